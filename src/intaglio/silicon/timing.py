"""Timing of a kernel, and closed forms for the time of regular tile loops.

The closed forms give what the machine would find by executing every instruction; tests compare the two. They take
numbers or NumPy arrays, so that one call evaluates every tiling of a product.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Modelled time of one kernel on one chip, with the bytes it moves and the FLOPs it computes.

    Attributes:
        seconds: time of the kernel, launch included.
        busy: {engine or memory: seconds in which it is in use}, as a mean over the cores.
        hbm_bytes: bytes moved from and to HBM.
        l2_bytes: bytes moved between the L2 and the cores.
        link_bytes: bytes that the chip sends over its links.
        flops: FLOPs of the matrix array.
        format: number format in which the matrix array multiplies.
        weight_bytes: the part of hbm_bytes that are weights, which can be prefetched.
        choice: tile, split or algorithm chosen, in words.
        steps: number of steps of a collective's schedule; 0 for other kernels.
        jobs: number of tiles or other equal units of work that were dealt to the cores; 0: not counted.
    """

    seconds: float
    busy: dict[str, float] = field(default_factory=dict)
    hbm_bytes: float = 0.0
    l2_bytes: float = 0.0
    link_bytes: float = 0.0
    flops: float = 0.0
    format: str = "bf16"
    weight_bytes: float = 0.0
    choice: str = ""
    steps: int = 0
    jobs: float = 0.0

    @property
    def bound(self) -> str:
        """The name of the engine or memory that is busy for the longest time; "launch" if none is busy."""
        return max(self.busy, key=lambda e: self.busy[e]) if self.busy else "launch"

    def __add__(self, other: Timing) -> Timing:
        """Returns the Timing of two kernels that run one after the other.

        Seconds, busy times, bytes, FLOPs and steps are added. `format` is taken from the kernel with more FLOPs, `jobs`
        from the kernel that takes longer.
        """
        keys = [*self.busy, *(k for k in other.busy if k not in self.busy)]
        return Timing(
            self.seconds + other.seconds,
            {k: self.busy.get(k, 0.0) + other.busy.get(k, 0.0) for k in keys},
            self.hbm_bytes + other.hbm_bytes,
            self.l2_bytes + other.l2_bytes,
            self.link_bytes + other.link_bytes,
            self.flops + other.flops,
            self.format if self.flops >= other.flops else other.format,
            self.weight_bytes + other.weight_bytes,
            "; ".join(filter(None, (self.choice, other.choice))),
            self.steps + other.steps,
            self.jobs if self.seconds >= other.seconds else other.jobs,
        )


def pipeline(n: Any, load_s: Any, work_s: Any, latency_s: Any, depth: Any) -> Any:
    """Returns the seconds of a software pipeline of n iterations. Each loads a tile and then computes on it.

    The time runs from the start of the first load to the end of the last computation. A load takes load_s. Its tile can
    be used latency_s later; the computation takes work_s, and then the tile is free for another load. There are `depth`
    tiles, used in turn. Arguments are numbers or arrays that broadcast, and so is the result.

    The result is exact: it is the length of the longest chain of dependencies. With r waits for a free tile, a chain
    takes (r + 1) * (load_s + latency_s + work_s) + (n - 1 - r * depth) * max(load_s, work_s) seconds. The formula is
    linear in r, so the maximum is at r = 0 or at the largest r, floor((n - 1) / depth).
    """
    once = load_s + latency_s + work_s
    busier = np.maximum(load_s, work_s)
    rounds = np.floor((n - 1) / depth)
    return np.maximum(once + (n - 1) * busier, (rounds + 1) * once + (n - 1 - rounds * depth) * busier)


def fraction_held(need: float, capacity: float) -> float:
    """Returns the fraction (0 to 1) of `need` bytes that are still in a cache of `capacity` bytes at the next read.

    It is 1 if `need` is at most `capacity`, 0 if it is at least twice `capacity`, and linear between. So modelled time
    grows without a jump where a tensor exceeds the L2. The width of this transition is an assumption. Returns 0 if
    `capacity` is 0.
    """
    return min(1.0, max(0.0, 2 - need / capacity)) if capacity else 0.0


def waves(jobs: Any, cores: int) -> tuple[Any, Any]:
    """Divide `jobs` equal jobs among `cores` cores. Returns (number of full rounds, jobs in the last partial round).

    In a full round every core has one job. jobs: a number or an array.
    """
    full = np.floor(jobs / cores)
    return full, jobs - full * cores
