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

FOLLOWED = 4  # depths of the ring after which a loop repeats itself; of a longer one, these and the last are followed


@dataclass(frozen=True, kw_only=True)
class TileLoop:
    """A loop of equal jobs, dealt to the cores in turn; each loads a tile, computes on it and stores the result.

    Attributes:
        jobs: number of jobs, of all cores together.
        load: bytes that a job loads.
        work_s: seconds that a job computes on the vector lanes.
        store: bytes that a job stores.
        depth: number of a core's tiles for loads, and of its tiles for results. It is also the largest number of jobs
            that overlap on a core.
        once: bytes that each core loads before its first job, in addition to its jobs' bytes.
        in_place: True if a tile is stored from where it was loaded, so that it is free only after its store.
        load_missed: bytes that HBM moves for each loaded byte.
        store_missed: bytes that HBM moves for each stored byte.
        store_s: minimum seconds of a job's store; 0: no minimum.
    """

    jobs: int
    load: float
    work_s: float
    store: float
    depth: int = 2
    once: float = 0.0
    in_place: bool = False
    load_missed: float = 0.0
    store_missed: float = 0.0
    store_s: float = 0.0

    def in_parts(self, target: Target, parts: Sequence[LoopPart]) -> float:
        """Seconds of the loop if its jobs run as these LoopParts, one part after the other.

        The parts' values replace load_missed and store_missed; their fractions sum to 1.
        """
        loops = [replace(self, load_missed=p.load, store_missed=p.store) for p in parts]
        first = loops[0].seconds(target)
        pairs = list(zip(loops, parts, strict=True))[1:]
        return first + sum(a.last_seconds(target, p.part) - loops[0].last_seconds(target, p.part) for a, p in pairs)

    def last_seconds(self, target: Target, fraction: float) -> float:
        """Seconds by which the loop's last jobs make it longer: its seconds minus the seconds of a loop without them.

        fraction: number of these last jobs / number of all jobs, 0 to 1. If it does not give a whole number of jobs,
        the result is interpolated between the two nearest numbers.
        """
        jobs = self.jobs * (1 - fraction)
        low = int(jobs)
        a, b = (replace(self, jobs=n).seconds(target) for n in (low, min(low + 1, self.jobs)))
        return self.seconds(target) - a - (b - a) * (jobs - low)

    def seconds(self, target: Target) -> float:
        """Seconds from the first load to the last store, without launch overhead."""
        if self.jobs <= 0:
            return 0.0
        full, rest = divmod(self.jobs, target.chip.cores)
        one, period = replace(self, jobs=0), FOLLOWED * max(6, self.depth)
        skipped = max(0, full // period - 1)
        seconds = followed(one, target, full - skipped * period, rest)
        if skipped:
            seconds += skipped * (followed(one, target, 2 * period, 0) - followed(one, target, period, 0))
        return seconds


@lru_cache(maxsize=16384)
def followed(loop: TileLoop, target: Target, full: int, rest: int) -> float:
    """Seconds of a loop, found by following one core through all of its jobs.

    full: number of jobs that every core has. rest: number of cores that have one more job. loop.jobs is not used.
    """
    return _Core(loop, target, full, rest).run()


class _Core:
    """Simulation of the core of a TileLoop that has the largest number of jobs, so that its time is the loop's time.

    Jobs are counted from 0 on each core. full: number of jobs that every core has. rest: number of cores that have one
    more job.
    """

    def __init__(self, loop: TileLoop, target: Target, full: int, rest: int) -> None:
        self.loop, self.target, self.full, self.rest = loop, target, full, rest
        self.count = full + (rest > 0)

    def active(self, job: int) -> int:
        """Number of cores that have a job number `job`. Each core counts its own jobs from 0."""
        return self.target.chip.cores if job < self.full else self.rest

    def rates(self, load: int | None, store: int | None) -> tuple[float, float]:
        """(bytes/s of the core's current load, bytes/s of its current store). All cores share the memories' bandwidth.

        The model lets all cores with a job of the same number load or store at the same time. load, store: number of
        the job whose tile is loaded, or stored, now; None: the core has no load, or no store, and this rate is 0.
        """
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
        return now


@dataclass(frozen=True)
class LoopPart:
    """Consecutive jobs of a TileLoop for which HBM moves the same bytes.

    Attributes:
        part: number of these jobs / number of all jobs of the loop, 0 to 1.
        load: bytes that HBM moves for each loaded byte: 0 if loads hit the L2, 1 if they miss, above 1 if lines are
            also written back for them.
        store: bytes that HBM moves for each stored byte.
    """

    part: float
    load: float
    store: float


def l2_parts(reads: float, writes: float, capacity: float, ahead: float = 0.0) -> list[LoopPart]:
    """Divide a loop into LoopParts by what HBM moves: a list of one to three, in the order in which they run.

    The op before has just written the operands to the L2. The L2 evicts the least recently used lines.

    1. Loads hit the L2, unless the operands alone exceed the L2.
    2. Once the L2 is full, each result evicts operands that no job has read yet, so loads miss.
    3. Once no such operands are left in the L2, results are also written back to HBM.

    Without an L2, HBM moves all bytes.

    Args:
        reads: bytes of all operands.
        writes: bytes of all results.
        capacity: bytes of the L2; 0: none.
        ahead: bytes that are loaded before the first result is stored.
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
    """Divide a loop that reads rows by index into LoopParts by what HBM moves: a list of one or two.

    All loads count as misses of the L2. Results stay in the L2 until they fill it; later results are written to HBM.

    writes: bytes of all results. capacity: bytes of the L2; 0: none.
    """
    held = min(1.0, capacity / writes) if writes else 1.0
    return [p for p in (LoopPart(held, 1.0, 0.0), LoopPart(1 - held, 1.0, 1.0)) if p.part > 0]


def past_l2_parts(reads: float, writes: float, capacity: float) -> list[LoopPart]:
    """Divide a loop whose operands are in HBM, not in the L2, into LoopParts by what HBM moves: a list of one or two.

    All loads miss the L2. Operands and results fill it; each later byte evicts one, which is written back if it is of a
    result.

    reads, writes: bytes of all operands, and of all results; not both 0. capacity: bytes of the L2; 0: none.
    """
    held, back = min(1.0, capacity / (reads + writes)), writes / (reads + writes)
    return [p for p in (LoopPart(held, 1.0, 0.0), LoopPart(1 - held, 1 + back, back)) if p.part > 0]
