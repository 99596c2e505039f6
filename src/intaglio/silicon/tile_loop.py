"""Time of a loop over tiles of rows: load a tile, compute on it, store the result, on all cores at once.

The closed form of the kernels that work row by row. It follows one core instead of all: cores that run the same loop
are at the same place at the same time, so each gets an equal share of the L2 and of HBM. After a few tiles the loop
repeats itself, so the rest of a long loop is extrapolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf

from intaglio.chips import Target

SIMULATED = 3  # rounds that are followed at most, in depths of the ring; further ones take as long as those between
STEADY = 1, 2  # these two


@dataclass(frozen=True, kw_only=True)
class TileLoop:
    """Equal jobs, dealt to the cores in turn. Bytes and seconds are of one job."""

    jobs: int
    load: float  # bytes
    work_s: float  # seconds of the vector lanes
    store: float  # bytes
    depth: int = 2  # tiles of each ring
    once: float = 0.0  # bytes that each core loads before its first job
    in_place: bool = False  # a tile is stored as it was loaded, so it is free only after its store
    load_missed: float = 0.0  # bytes that HBM moves for each loaded byte
    store_missed: float = 0.0  # bytes that HBM moves for each stored byte
    store_s: float = 0.0  # seconds that a store takes at least

    def in_parts(self, target: Target, parts: Sequence[LoopPart]) -> float:
        """Seconds of the loop if its jobs are in these LoopParts, one after the other."""
        loops = [replace(self, load_missed=p.load, store_missed=p.store) for p in parts]
        first = loops[0].seconds(target)
        pairs = list(zip(loops, parts, strict=True))[1:]
        return first + sum(a.last_seconds(target, p.part) - loops[0].last_seconds(target, p.part) for a, p in pairs)

    def last_seconds(self, target: Target, fraction: float) -> float:
        """Seconds that the last `fraction` of the jobs adds to the loop; linear between whole numbers of jobs."""
        jobs = self.jobs * (1 - fraction)
        low = int(jobs)
        a, b = (replace(self, jobs=n).seconds(target) for n in (low, min(low + 1, self.jobs)))
        return self.seconds(target) - a - (b - a) * (jobs - low)

    def seconds(self, target: Target) -> float:
        """Seconds from the first load to the last store, without launch overhead."""
        if self.jobs <= 0:
            return 0.0
        full, rest = divmod(self.jobs, target.chip.cores)
        most = SIMULATED * max(6, self.depth)
        if full < most or (full == most and not rest):
            return _Core(self, target, full, rest).run()
        seconds, period = steady(replace(self, jobs=most * target.chip.cores), target)
        alone = min(period, self.work_s) if rest else 0.0  # the cores that have one more job share the memories' rates
        return seconds + (full - most) * period + max(alone, period * rest / target.chip.cores)


@lru_cache(maxsize=4096)
def steady(loop: TileLoop, target: Target) -> tuple[float, float]:
    """(seconds of the loop, seconds that each further round of jobs would add).

    loop: SIMULATED times the ring's depth in rounds of jobs, after which the rounds take equally long.
    """
    core = _Core(loop, target, loop.jobs // target.chip.cores, 0)
    start, end = (n * max(6, loop.depth) for n in STEADY)
    seconds = core.run()
    return seconds, (core.stored_at[end] - core.stored_at[start]) / (end - start)


class _Core:
    """Follows one of the cores that have the most jobs. `full` rounds use all cores; `rest` cores have one job more."""

    def __init__(self, loop: TileLoop, target: Target, full: int, rest: int) -> None:
        self.loop, self.target, self.full, self.rest = loop, target, full, rest
        self.count = full + (rest > 0)
        self.stored_at: list[float] = []  # seconds when each job's store has ended

    def active(self, job: int) -> int:
        """Number of cores that have a job of this number."""
        return self.target.chip.cores if job < self.full else self.rest

    def rates(self, load: int | None, store: int | None) -> tuple[float, float]:
        """(bytes/s of the load of job `load`, bytes/s of the store of job `store`); 0 for one that does not run."""
        chip, loop = self.target.chip, self.loop
        flows = [(job, missed) for job, missed in ((load, loop.load_missed), (store, loop.store_missed))]
        users = sum(self.active(job) for job, _ in flows if job is not None)
        missing = sum(self.active(job) for job, missed in flows if job is not None and missed > 0)
        out = []
        for job, missed in flows:
            if job is None:
                out.append(0.0)
                continue
            rate = min(chip.port_rate, chip.l2_rate / users)
            out.append(min(rate, chip.hbm_rate / missing / missed) if missed > 0 else rate)
        return out[0], min(out[1], loop.store / loop.store_s) if loop.store_s else out[1]

    def run(self) -> float:
        """Seconds until the core's last store has ended."""
        loop, count, now = self.loop, self.count, 0.0
        latency = self.target.chip.constants.hbm_latency_s * min(1.0, loop.load_missed)
        next_load = next_work = next_store = 0  # number of the next job of each engine
        visible: list[float] = []  # when the tile of each loaded job can be used
        load_left = store_left = 0.0  # bytes of the transfers that run; 0 if none does
        loading: int | None = None
        storing: int | None = None
        work_ends = inf
        worked = stored = 0
        known: dict[tuple[int, ...], tuple[float, float]] = {}  # rates() by which transfers run, of how many cores
        while stored < count:
            if loading is None and next_load < count:
                free = stored if loop.in_place else worked
                if next_load < loop.depth or free > next_load - loop.depth:
                    loading = next_load
                    load_left = loop.load + (0 if next_load else loop.once)
                    next_load += 1
            ready = next_work < len(visible) and visible[next_work] <= now
            room = loop.in_place or next_work < loop.depth or stored > next_work - loop.depth
            if work_ends == inf and ready and room:
                work_ends = now + loop.work_s
                next_work += 1
            if storing is None and next_store < worked:
                storing, store_left = next_store, loop.store
                next_store += 1
            state = tuple(0 if job is None else 1 + (job < self.full) for job in (loading, storing))
            if state not in known:
                known[state] = self.rates(loading, storing)
            load_rate, store_rate = known[state]
            load_ends = now + load_left / load_rate if loading is not None else inf
            store_ends = now + store_left / store_rate if storing is not None else inf
            waits = visible[next_work] if next_work < len(visible) and visible[next_work] > now else inf
            then = min(load_ends, store_ends, work_ends, waits)
            load_left -= (then - now) * load_rate
            store_left -= (then - now) * store_rate
            now = then
            if load_ends <= now and loading is not None:
                visible.append(now + latency)
                loading = None
            if work_ends <= now:
                worked, work_ends = worked + 1, inf
            if store_ends <= now:
                stored, storing = stored + 1, None
                self.stored_at.append(now)
        return now


@dataclass(frozen=True)
class LoopPart:
    """A part of a loop's jobs, and the bytes that HBM moves for each byte that they load and store."""

    part: float  # of all jobs
    load: float
    store: float


def l2_parts(reads: float, writes: float, capacity: float, ahead: float = 0.0) -> list[LoopPart]:
    """A list of the LoopParts of a loop over `reads` bytes of operands, which the op before has just written to the L2.

    The L2 of `capacity` bytes evicts the least recently used lines. Results replace operands that are not read yet, so
    once it is full the other operands miss; when none of those is left, also results are written back. ahead: bytes
    that are loaded before the first result is stored.
    """
    each = reads + writes
    if not capacity:
        return [LoopPart(1.0, 1.0, 1.0)]
    if each <= capacity:
        return [LoopPart(1.0, 0.0, 0.0)]
    hits = 0.0
    if reads < capacity:
        hits = min(1.0, (capacity - reads) / writes + ahead / max(reads, 1.0))
    stale = (1 - hits) * reads if reads < capacity else capacity  # bytes of operands that will be evicted unread
    clean = min(1 - hits, stale / each)
    back = writes / each
    parts = [LoopPart(hits, 0.0, 0.0), LoopPart(clean, 1.0, 0.0), LoopPart(1 - hits - clean, 1.0 + back, back)]
    return [p for p in parts if p.part > 0]


def gather_parts(writes: float, capacity: float) -> list[LoopPart]:
    """A list of the LoopParts of a loop that reads operands by index, past the L2. Results stay in L2 if they fit."""
    held = min(1.0, capacity / writes) if writes else 1.0
    return [p for p in (LoopPart(held, 1.0, 0.0), LoopPart(1 - held, 1.0, 1.0)) if p.part > 0]
