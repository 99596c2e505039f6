"""How long regular tile loops take, in closed form: what the machine would find by running every instruction.

All functions take numbers or NumPy arrays, so that one call weighs every way to tile a product. Tests hold them equal
to the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """One kernel on one chip: seconds, the seconds each engine or memory was in use (of `seconds`, as a mean over the
    cores), what it moved and computed, and what it waited for most."""

    seconds: float
    busy: dict[str, float] = field(default_factory=dict)
    hbm_bytes: float = 0.0
    shared_bytes: float = 0.0
    link_bytes: float = 0.0
    flops: float = 0.0
    format: str = "bf16"  # of the products
    weight_bytes: float = 0.0  # of hbm_bytes, those that could have been fetched before
    why: str = ""  # the choice made, for people
    steps: int = 0  # steps of a collective

    @property
    def bound(self) -> str:
        """The engine or memory in use longest."""
        return max(self.busy, key=lambda e: self.busy[e]) if self.busy else "launch"

    def __add__(self, other: Timing) -> Timing:
        """One after the other."""
        keys = [*self.busy, *(k for k in other.busy if k not in self.busy)]
        return Timing(
            self.seconds + other.seconds,
            {k: self.busy.get(k, 0.0) + other.busy.get(k, 0.0) for k in keys},
            self.hbm_bytes + other.hbm_bytes,
            self.shared_bytes + other.shared_bytes,
            self.link_bytes + other.link_bytes,
            self.flops + other.flops,
            self.format if self.flops >= other.flops else other.format,
            self.weight_bytes + other.weight_bytes,
            "; ".join(filter(None, (self.why, other.why))),
            self.steps + other.steps,
        )


def pipeline(n: Any, load_s: Any, work_s: Any, latency_s: Any, depth: Any) -> Any:
    """Seconds from the first load's start to the last work's end, for n steps of load and work through a ring of
    `depth` tiles: a tile is there latency_s after its load, and is loaded anew once its work is done.

    Exact. The longest path through n steps goes r times round the ring (load, latency, work: depth steps on) and the
    rest along the busier engine; as that is linear in r, r is 0 or as large as it can be.
    """
    once = load_s + latency_s + work_s
    busier = np.maximum(load_s, work_s)
    rounds = np.floor((n - 1) / depth)
    return np.maximum(once + (n - 1) * busier, (rounds + 1) * once + (n - 1 - rounds * depth) * busier)


def spread(jobs: Any, cores: int) -> tuple[Any, Any]:
    """Jobs dealt to cores in waves: the number of full waves, and of jobs in the last."""
    full = np.floor(jobs / cores)
    return full, jobs - full * cores
