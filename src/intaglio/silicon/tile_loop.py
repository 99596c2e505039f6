"""Time of a loop over tiles of rows: load a tile, compute on it, store the result, on all cores at once.

The closed form of the kernels that work row by row. It follows one core instead of all: cores that run the same loop
are at the same place at the same time, so each gets an equal share of the L2 and of HBM. After a few tiles the loop
repeats itself, so the rest of a long loop is extrapolated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf, sqrt
from statistics import NormalDist

from intaglio.chips import Target
from intaglio.silicon.cache import LINE
from intaglio.silicon.l2 import L2, Source

FOLLOWED = 4  # depths of the ring after which a loop repeats itself; of a longer one, these and the last are followed
# Of loops that outgrow the L2:
SETTLED = 6  # times the rounds that the L2 holds; from there on nearly all loads miss, and a round takes equally long
GRID = 6  # loops are followed for numbers of rounds that grow by a part 1 / GRID
FINER = 8  # parts between two of these numbers, for loops for which the last tiles matter
PARTLY = 24  # rounds; of a shorter loop, parts of the last round are followed too
MOST_ROUNDS = 600  # that the L2 holds; of a longer loop, a part is followed
AHEAD = 0.5  # part of the time in which a core waits, and others have its bandwidth, see _Core.saved_s()
SPREAD = 2.0  # standard deviations of the cores' times that lie between those that wait and those that transfer


@dataclass(frozen=True, kw_only=True)
class TileLoop:
    """A loop of equal jobs, dealt to the cores in turn. Each job loads a tile, computes on it and stores the result.

    Attributes:
        jobs: number of jobs of all cores together.
        load: bytes that a job loads.
        work_s: seconds that a job computes on the vector lanes; without `worked`, each piece takes as long.
        read_s: seconds from the start of the computation until the job's tile may be overwritten; 0: all of work_s.
        store: bytes that a job stores.
        depth: number of tile buffers that a core has for loads; it has as many for results. This is also the largest
            number of jobs that overlap on a core.
        once: bytes that each core loads before its first job, in addition to its jobs' bytes.
        pieces: fractions of a job, which sum to 1. A job's bytes are loaded, computed and stored in these pieces one
            after the other; each piece has buffers of its own.
        in_place: True if a tile is stored from where it was loaded, so that it is free only after its store.
        load_missed: bytes that HBM moves per loaded byte; 0: the L2 has all operands.
        store_missed: bytes that HBM moves per stored byte; 0: the L2 keeps all results.
        store_s: minimum seconds of a job's store; 0: no minimum.
        one_ring: True if all pieces use the same `depth` buffers in turn.
        wait_s: minimum seconds from the end of a job's load until its tile can be used.
        loads: number of load instructions of a piece.
        loaded: fraction of the job's bytes that each piece loads; (): the fractions in `pieces`. A piece that loads
            nothing computes on what earlier pieces have loaded.
        worked: fraction of work_s and read_s that each piece takes; (): each piece takes all of work_s.
    """

    jobs: int
    load: float
    work_s: float
    store: float
    depth: int = 2
    once: float = 0.0
    pieces: tuple[float, ...] = (1.0,)
    in_place: bool = False
    read_s: float = 0.0
    load_missed: float = 0.0
    store_missed: float = 0.0
    store_s: float = 0.0
    one_ring: bool = False
    wait_s: float = 0.0
    loads: int = 1
    loaded: tuple[float, ...] = ()
    worked: tuple[float, ...] = ()

    def seconds(self, target: Target) -> float:
        """Returns the modelled seconds from the first load to the last store, without launch overhead."""
        if self.jobs <= 0:
            return 0.0
        full, rest = divmod(self.jobs, target.chip.cores)
        one, period = replace(self, jobs=0), FOLLOWED * max(6, self.depth)
        skipped = max(0, full // period - 1)
        seconds = followed(one, target, full - skipped * period, rest)
        if skipped:
            seconds += skipped * (followed(one, target, 2 * period, 0) - followed(one, target, period, 0))
        return seconds

    def through_l2(self, target: Target, source: Source) -> tuple[float, float]:
        """Returns (seconds of the loop, bytes that HBM moves) on a chip with an L2.

        The seconds are from the first load to the last store, without launch overhead. A model of the L2 decides which
        accesses miss; load_missed and store_missed are not used.

        If the loop exceeds the L2, not every number of jobs is simulated. Simulated are the numbers that
        followed_jobs() yields, up to the first that is at least self.jobs. The result is interpolated between the last
        two of them. If the loop is short or just exceeds the L2, the interval between these two is first divided into
        FINER smaller intervals. More jobs never take less time.

        source: where the operands are before the loop; see the class L2.
        """
        capacity, cores = target.chip.l2_bytes * target.library.l2_usable, target.chip.cores
        read = self.load * (source != "l2")  # bytes of a job that HBM reads in any case
        kept = int(capacity / (self.store + self.load * (source != "gathered")))  # jobs without evictions

        def usual(jobs: int) -> float:
            """Returns the seconds that this loop would take with `jobs` jobs and an L2 that evicts nothing."""
            return replace(self, jobs=jobs, load_missed=float(source != "l2")).seconds(target)

        if self.jobs <= kept:
            return usual(self.jobs), self.jobs * read
        one, points = replace(self, jobs=0), [(kept, usual(kept), kept * read)]  # (jobs, seconds, bytes)
        k = max(1, kept // cores // MOST_ROUNDS)  # a long loop is followed with an L2 and jobs of a k-th
        for jobs in followed_jobs(kept, cores):
            seconds, moved = evicting(one, target, source, jobs // k, k)
            seconds = usual(jobs) + k * (seconds - usual(jobs // k)) if k > 1 else seconds
            points.append((jobs, max(seconds, points[-1][1]), k * moved))
            if jobs >= self.jobs:
                break
        (low, low_s, low_bytes), (high, high_s, high_bytes) = points[-2:]
        if k == 1 and high >= self.jobs and low < max(PARTLY * cores, kept * (1 + 1 / GRID)):
            for jobs in sorted({low + (high - low) * n // FINER for n in range(1, FINER)} - {low}):
                seconds, moved = evicting(one, target, source, jobs, 1)
                point = jobs, min(max(seconds, low_s), high_s), min(max(moved, low_bytes), high_bytes)
                if jobs >= self.jobs:
                    high, high_s, high_bytes = point
                    break
                low, low_s, low_bytes = point
        now, before, after = (usual(jobs) for jobs in (self.jobs, low, high))
        share = (self.jobs - low) / (high - low)
        part = (now - before) / (after - before) if after > before else share
        return low_s + part * (high_s - low_s), low_bytes + share * (high_bytes - low_bytes)


def followed_jobs(kept: int, cores: int) -> Iterator[int]:
    """Yields the numbers of jobs for which TileLoop.through_l2() simulates a loop, in ascending order.

    For other numbers of jobs, through_l2() interpolates. All yielded numbers are above `kept`, so the loops exceed the
    L2.

    kept: largest number of jobs whose data fit the L2. cores: number of cores.
    """
    rounds, latest = kept // cores, kept
    last = SETTLED * max(1, rounds)
    while rounds <= last:
        parts = (1, cores // 4, cores // 2, 3 * cores // 4) if rounds < PARTLY else ()
        after = rounds + max(1, rounds // GRID)
        for jobs in (*(rounds * cores + part for part in parts), after * cores):
            if jobs > latest:
                yield jobs
                latest = jobs
        rounds = after


@lru_cache(maxsize=16384)
def followed(loop: TileLoop, target: Target, full: int, rest: int) -> float:
    """Returns the seconds that a loop takes, from a simulation of one core.

    The core is simulated through all of its jobs. full: number of jobs that every core has. rest: number of cores that
    have one more job. loop.jobs is not used.
    """
    return _Core(loop, target, full, rest).run()


@lru_cache(maxsize=16384)
def evicting(loop: TileLoop, target: Target, source: Source, jobs: int, k: int) -> tuple[float, float]:
    """Returns (seconds, bytes that HBM moves) of a loop whose data exceed the L2.

    They come from a simulation of one core with the largest number of jobs. If fewer than a quarter of the cores have
    that many, one of the other cores is simulated too, and the longer time is returned.

    jobs: number of jobs; loop.jobs is not used. k: the simulated L2 has 1 / k of the size that the library can use.
    """
    capacity = target.chip.l2_bytes * target.library.l2_usable / k
    core = _Core(loop, target, *divmod(jobs, target.chip.cores), L2(jobs * loop.load, capacity, source))
    seconds = core.run()
    full, rest = divmod(jobs, target.chip.cores)
    if full and 0 < rest < target.chip.cores // 4:
        seconds = max(seconds, _Core(loop, target, full, 0, L2(jobs * loop.load, capacity, source)).run())
    return seconds, core.hbm_bytes


class _Core:
    """Simulation of one core of a TileLoop, one with the largest number of jobs. Its time is the time of the loop.

    A TileLoop may divide its jobs into pieces (TileLoop.pieces). In this class each piece is a job; jobs are numbered
    from 0 on each core. Only `full` and `rest` count whole jobs of the TileLoop.

    Args:
        loop: the loop; loop.jobs is not used.
        target: chip and kernel library.
        full: number of whole jobs that every core has.
        rest: number of cores that have one more whole job.
        l2: model of the L2, which decides which accesses miss; None: loop.load_missed and loop.store_missed are used.
    """

    def __init__(self, loop: TileLoop, target: Target, full: int, rest: int, l2: L2 | None = None) -> None:
        self.loop, self.target, self.full, self.rest, self.l2 = loop, target, full, rest, l2
        self.count = (full + (rest > 0)) * len(loop.pieces)
        self.loads = loop.loads if l2 else 1  # of a job; without misses they take as long as one
        self.hbm_bytes = 0.0  # of all cores, counted if there is an L2
        # The numbers of lines that miss are random, and the slowest core counts: that of these which has most
        slowest = rest or target.chip.cores
        # Tiles with a missed line, as a sum of probabilities, less those that were late: one core of the slowest ones
        # has a first missed line sooner than others
        self.late_tiles = 1 - 1 / slowest
        self.variance = 0.0  # of the lines that HBM has moved for a core
        self.deviations = NormalDist().inv_cdf((slowest - 0.375) / (slowest + 0.25)) if slowest > 1 else 0.0
        self.waited = 0.0  # seconds in which the core loaded nothing before its latest job

    def excess(self, users: int, size: float, missed: float, written: float) -> float:
        """Returns the extra bytes that HBM moves for the slowest core's transfer, compared with an average core.

        Also adds the transfer to self.variance. Which lines miss the L2 is random, and so is which evicted lines are
        dirty. For the slowest core, the number of lines that HBM moves is therefore some standard deviations above the
        mean. Returns 0 if each core has a single tile buffer: a late core then gets the bandwidth of the cores that
        wait.

        Args:
            users: number of cores that make the transfer.
            size: bytes of the transfer of one core.
            missed: fraction of the bytes that miss; 1 for a store, 0 if the L2 holds its lines.
            written: bytes that HBM writes for all of these cores.
        """
        lines, before = size / LINE, self.variance
        dirty = min(1.0, written / (users * size * missed)) if missed else 0.0
        self.variance += lines * missed * (1 - missed + dirty * (1 - dirty))
        return LINE * self.deviations * (sqrt(self.variance) - sqrt(before)) if self.loop.depth > 1 else 0.0

    def saved_s(self, share: float) -> float:
        """Returns the seconds that a load saves because the cores do not all load at the same time.

        Misses are random, so cores drift apart: while one core waits, others use its share of the bandwidth. The
        further they are apart, the more time is saved. Cores with a single tile buffer wait after every load, so they
        are apart from the first round on. Returns 0 if there is no model of the L2, or if its source is not "l2".

        share: bytes/s of HBM for one core if all cores load at the same time.
        """
        if self.l2 is None or self.l2.source != "l2":
            return 0.0
        apart_s = SPREAD * sqrt(self.variance) * LINE / share
        least = AHEAD if self.loop.depth == 1 else 0.0
        return max(least * self.waited, min(self.waited, apart_s)) / self.loads

    def active(self, job: int) -> int:
        """Returns the number of cores that execute a job with the number `job`.

        These are all cores that have more than `job` jobs.
        """
        return self.target.chip.cores if job < self.full * len(self.loop.pieces) else self.rest

    def piece(self, job: int) -> float:
        """Returns the size of job number `job` as a fraction of a whole job of the TileLoop."""
        return self.loop.pieces[job % len(self.loop.pieces)]

    def loaded(self, job: int) -> float:
        """Returns the part of a whole job's bytes that job number `job` loads."""
        return (self.loop.loaded or self.loop.pieces)[job % len(self.loop.pieces)]

    def begin_load(self, job: int, number: int) -> _Flow:
        """Returns a new transfer: a load of job number `job`. It is recorded in self.l2, if there is one.

        number: which of the job's self.loads load instructions it is, from 0.
        """
        loop, users = self.loop, self.active(job)
        own = loop.load * self.loaded(job) / self.loads
        size = own + (0 if job or number else loop.once)
        if self.l2 is None:
            return _Flow(size, users, loop.load_missed, loop.load_missed)
        missed, moved = self.l2.load(users * own)  # what cores load once is always there
        self.hbm_bytes += moved
        self.late_tiles += 1 - (1 - missed) ** (own / LINE)
        late = self.late_tiles >= 1
        self.late_tiles -= late
        moved += users * self.excess(users, own, missed, moved - missed * users * own)
        return _Flow(size, users, moved / (users * size), missed, late)

    def begin_store(self, job: int) -> _Flow:
        """Returns a new transfer: the store of job number `job`. It is recorded in self.l2, if there is one."""
        users, size = self.active(job), self.loop.store * self.piece(job)
        if self.l2 is None:
            return _Flow(size, users, self.loop.store_missed)
        written = self.l2.store(users * size)
        self.hbm_bytes += written
        written += users * self.excess(users, size, float(written > 0), written)
        return _Flow(size, users, written / (users * size))

    def rates(self, load: _Flow | None, store: _Flow | None) -> tuple[float, float]:
        """Returns the current rates of this core's transfers: (bytes/s of its load, bytes/s of its store).

        Other cores make the same transfers at the same time. All of them share the bandwidth of the L2 and of HBM
        equally; _Flow.users is their number. load, store: the core's transfers; None: there is none, and its rate is 0.
        """
        chip, loop = self.target.chip, self.loop
        flows = [flow for flow in (load, store) if flow is not None]
        users, missing = sum(flow.users for flow in flows), sum(flow.users for flow in flows if flow.missed)
        rate = min(chip.port_rate, chip.l2_rate / users) if users else 0.0
        share = chip.hbm_rate / missing if missing else inf

        def of(flow: _Flow | None) -> float:
            if flow is None:
                return 0.0
            seconds = max(flow.size / rate, flow.size * flow.missed / share)
            if flow is load and self.waited:
                seconds = max(flow.size / chip.port_rate, seconds - self.saved_s(share))
            return flow.size / seconds

        return of(load), min(of(store), loop.store / loop.store_s) if loop.store_s else of(store)

    def run(self) -> float:
        """Run the simulation. Returns the seconds until the core's last store has ended."""
        loop, count, now = self.loop, self.count, 0.0
        depth = loop.depth * (1 if loop.one_ring else len(loop.pieces))
        latency_s = self.target.chip.constants.hbm_latency_s
        next_load = next_work = next_store = 0  # number of the next job of each engine
        visible: list[float] = []  # when the tile of each loaded job can be used
        part, arrives, idle = 0, 0.0, 0.0  # loads of the next job so far, when they come, and when the last ended
        load_left = store_left = 0.0  # bytes of the transfers that run; 0 if none does
        load: _Flow | None = None
        store: _Flow | None = None
        load_rate = store_rate = began = 0.0
        work_ends = read_ends = inf
        read = worked = stored = 0
        changed = True  # True if a transfer has begun or ended
        while stored < count:
            if store is None and next_store < worked:
                store = self.begin_store(next_store)
                store_left, next_store, changed = store.size, next_store + 1, True
            if load is None and next_load < count:
                free = stored if loop.in_place else read
                if part or next_load < depth or free > next_load - depth:
                    if not part and loop.depth > 1:
                        self.waited = now - idle
                    load = self.begin_load(next_load, part)
                    load_left, part, changed, began = load.size, part + 1, True, now
            ready = next_work < len(visible) and visible[next_work] <= now
            room = loop.in_place or next_work < depth or stored > next_work - depth
            if work_ends == inf and ready and room:
                share = loop.worked[next_work % len(loop.pieces)] if loop.worked else 1.0
                work_ends, read_ends = now + share * loop.work_s, now + share * (loop.read_s or loop.work_s)
                next_work += 1
            if changed:
                load_rate, store_rate = self.rates(load, store)
                changed = False
            load_ends = now + load_left / load_rate if load is not None else inf
            store_ends = now + store_left / store_rate if store is not None else inf
            waits = visible[next_work] if next_work < len(visible) and visible[next_work] > now else inf
            then = min(load_ends, store_ends, work_ends, read_ends, waits)
            load_left -= (then - now) * load_rate
            store_left -= (then - now) * store_rate
            now = then
            if load_ends <= now and load is not None:
                arrives = max(arrives, now + max(loop.wait_s, latency_s * min(1.0, load.part)))  # in order
                arrives = max(arrives, began + latency_s) if load.late else arrives
                load, changed = None, True
                if part == self.loads:
                    idle, self.waited = now, arrives - now
                    visible.append(arrives)
                    next_load, part = next_load + 1, 0
                    if next_load < count and not self.loaded(next_load):
                        visible.append(arrives)
                        next_load += 1
            if read_ends <= now:
                read, read_ends = read + 1, inf
            if work_ends <= now:
                worked, work_ends = worked + 1, inf
            if store_ends <= now:
                stored, store, changed = stored + 1, None, True
        return now


@dataclass(frozen=True)
class _Flow:
    """A load or store of one core. Other cores make an equal transfer at the same time.

    Attributes:
        size: bytes that one core moves.
        users: number of cores that make the transfer, this core included.
        missed: bytes that HBM moves per byte of `size`.
        part: for a load, the fraction of its bytes that miss the L2.
        late: True if at least one line of the tile misses the L2.
    """

    size: float
    users: int
    missed: float
    part: float = 0.0
    late: bool = False
