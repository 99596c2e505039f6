"""Guard: a wrapper of an engine that records which thread uses it and its stages."""

from __future__ import annotations

import threading
from typing import Any

from intaglio.runtime.accounting import Accounting
from intaglio.runtime.clock import MonotonicClock
from intaglio.runtime.kv import BlockPool
from intaglio.runtime.latency import LatencyEstimator
from intaglio.runtime.launcher import Launcher
from intaglio.runtime.live_requests import LiveRequests
from intaglio.runtime.recovery import Recovery
from intaglio.runtime.scheduler import Scheduler

STAGES = (Accounting, BlockPool, LatencyEstimator, Launcher, LiveRequests, MonotonicClock, Recovery, Scheduler)


class Guard:
    """Wraps an engine, or one of its stages, and appends (thread, attribute) to `accesses` at every use."""

    def __init__(self, inner: Any, accesses: list[tuple[str, str]], path: str = "engine") -> None:
        object.__setattr__(self, "guarded", (inner, accesses, path))

    def __getattr__(self, name: str) -> Any:
        inner, accesses, path = object.__getattribute__(self, "guarded")
        accesses.append((threading.current_thread().name, f"{path}.{name}"))
        value = getattr(inner, name)
        return Guard(value, accesses, f"{path}.{name}") if isinstance(value, STAGES) else value

    def __setattr__(self, name: str, value: Any) -> None:
        inner, accesses, path = object.__getattribute__(self, "guarded")
        accesses.append((threading.current_thread().name, f"{path}.{name}"))
        setattr(inner, name, value)
