"""The runtime: requests, the pool of KV blocks, the scheduler and the engine that steps them through a device."""

from intaglio.runtime.engine import Engine, Event
from intaglio.runtime.invariants import check_invariants
from intaglio.runtime.kv import BlockPool, KvError
from intaglio.runtime.request import ParamsError, Request, RequestError, SamplingParams
from intaglio.runtime.scheduler import Piece, Scheduler

__all__ = [
    "BlockPool", "Engine", "Event", "KvError", "ParamsError", "Piece", "Request", "RequestError", "SamplingParams",
    "Scheduler", "check_invariants",
]  # fmt: skip
