"""Time of attention's instruction streams: the loop of all cores over their jobs and over tiles of keys.

The closed form of the streams of attend.py. It follows the loads, the computation and the stores of each core through
the jobs that deal() gives to it. Transfers in flight share the rates of the L2 and of HBM equally. The L2 holds the
tiles that were used last: keys, values, queries and results.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp

import numpy as np

from intaglio.chips import KernelLibrary, Target
from intaglio.silicon.cache import LINE
from intaglio.silicon.kernels.attend_tiles import LISTED, AttendPlan, deal, decode_keys, tile_seconds
from intaglio.silicon.kernels.kernel import WIDE
from intaglio.silicon.kernels.kv_write import Heads
from intaglio.silicon.sizes import ChunkCounts


@dataclass(frozen=True)
class StreamJob:
    """One job of the streams: some queries of one sequence for plan.pack heads, and the keys that they attend to.

    Attributes:
        sequence: number of the sequence.
        kv_head: number of the K/V head.
        queries: number of queries of each head.
        low, high: the keys are those at positions low .. high - 1.
        parts: number of parts into which the sequence's context is split; the job has one of them.
    """

    sequence: int
    kv_head: int
    queries: int
    low: int
    high: int
    parts: int = 1


def prefill_jobs_of_streams(h: Heads, plan: AttendPlan, part: ChunkCounts) -> list[StreamJob]:
    """A list of the StreamJobs of the chunks with several queries, in the order of attend.prefill_work().

    part: (queries, keys, number of sequences) of each distinct chunk.
    """
    step, out = max(1, plan.rows // plan.pack), list[StreamJob]()
    heads = [head // h.group for head in sorted(range(0, h.heads, plan.pack), key=lambda i: (i % h.group, i))]
    sequences = [(q, keys) for q, keys, n in part for _ in range(n)]
    for s, (q, keys) in enumerate(sequences):
        before = keys - q
        for first in reversed(range(0, q, step)):
            low = max(0, before + first - h.window + 1) if h.window else 0
            end = min(first + step, q)
            out += [StreamJob(s, head, end - first, low - low % plan.keys, before + end) for head in heads]
    return out


def decode_jobs_of_streams(library: KernelLibrary, h: Heads, plan: AttendPlan, part: ChunkCounts) -> list[StreamJob]:
    """A list of the StreamJobs of the chunks with one query, in the order of attend.decode_work().

    part: (queries, keys, number of sequences) of each distinct chunk.
    """
    out, sequences = [], [keys for _, keys, n in part for _ in range(n)]
    for s, keys in enumerate(sequences):
        low = keys - decode_keys(library, h.window, keys)
        tiles = -(-(keys - low) // plan.keys)
        cuts = [*range(low, keys, -(-tiles // plan.parts) * plan.keys), keys]
        for head in range(0, h.heads, plan.pack):
            out += [StreamJob(s, head // h.group, 1, a, b, len(cuts) - 1) for a, b in pairwise(cuts)]
    return out


@dataclass
class _Transfer:
    """A load or store of one core. Times are in seconds since the start of the launch.

    Attributes:
        start: the earliest time at which it starts.
        bytes: bytes that it moves.
        place: key of its tile in the L2; None: it passes the L2, since its rows are addressed by index.
        writes: True for a store.
        latency_s: seconds from the end of the transfer until its result can be used.
        ready: for a load, when the L2 has all of the tile; 0.0 for a store.
        end: when it ends.
    """

    start: float
    bytes: float
    place: Hashable | None = None
    writes: bool = False
    latency_s: float = 0.0
    ready: float = 0.0
    end: float = 0.0

    @property
    def visible(self) -> float:
        """When the result of the transfer can be used."""
        return max(self.end + self.latency_s, self.ready)


class _L2:
    """Content of an L2 that evicts lines at random (cache.py), as expected values. Stored bytes go to HBM then."""

    def __init__(self, capacity: float, latency_s: float) -> None:
        self.capacity, self.latency_s = capacity, latency_s
        self.held = self.evicted = self.stored = 0.0  # bytes in it; evicted so far; in it and not in HBM
        self.tiles: dict[Hashable, tuple[float, float, float]] = {}  # (bytes, evicted before, when there)

    def access(self, x: _Transfer, now: float) -> float:
        """Record that the transfer `x` starts at time `now`. Returns the bytes that HBM moves because of it.

        Sets x.latency_s and x.ready.
        """
        if x.place is None or not self.capacity:
            x.latency_s = 0.0 if x.writes else self.latency_s
            return x.bytes
        size, before, ready = self.tiles.get(x.place, (0.0, 0.0, 0.0))
        size *= exp((before - self.evicted) / self.capacity) if size else 0.0
        missed = max(0.0, x.bytes - size)
        missed = missed if missed > LINE / 2 else 0.0
        if missed and not x.writes:
            x.latency_s, ready = self.latency_s * missed / x.bytes, max(ready, now + self.latency_s)
        x.ready = 0.0 if x.writes else ready
        out = max(0.0, self.held + missed - self.capacity)
        written = out * self.stored / self.capacity
        self.held, self.evicted = self.held + missed - out, self.evicted + out
        self.stored = min(self.held, self.stored - written + x.bytes * x.writes)
        self.tiles[x.place] = max(size, x.bytes), self.evicted, ready
        return written + (0.0 if x.writes else missed)


@dataclass
class _Core:
    """Progress of one core. Times are in seconds since the start of the launch.

    The lists grow while the loop is followed: they have an item for each job, or tile, that has come so far.

    Attributes:
        jobs: its jobs, in order, each with its number in the launch.
        begun: for each job, when its queries and sums can be used.
        loaded: for each tile of keys and values, when it can be used.
        tiles: for each tile of keys and values, when it was used for the last time.
        queries, sums, results: for each job, when its queries, its sums and its results were used for the last time.
        programs: its loads, its computation and its stores, as iterators.
    """

    jobs: list[tuple[int, StreamJob]]
    begun: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    tiles: list[float] = field(default_factory=list)
    queries: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    results: list[float] = field(default_factory=list)
    programs: tuple[Iterator[_Transfer | None], ...] = ()


class _Loop:
    """Follows the loop of all cores, transfer by transfer. The arguments are those of stream_seconds()."""

    def __init__(self, target: Target, h: Heads, plan: AttendPlan, jobs: Sequence[StreamJob], single: bool) -> None:
        self.chip, self.h, self.plan, self.single = target.chip, h, plan, single
        self.t = t = tile_seconds(target, h, plan.rows, plan.keys)
        self.split = any(job.parts > 1 for job in jobs)
        seconds = [-(-(job.high - job.low) // plan.keys) * t.work + t.fill + t.merge for job in jobs]
        self.cores = [_Core([(i, jobs[i]) for i in mine]) for mine in deal(seconds, self.chip.cores)]
        self.l2 = _L2(self.chip.l2_bytes * target.library.l2_usable, self.chip.constants.hbm_latency_s)
        for i in sorted(range(len(jobs)), key=lambda i: (jobs[i].sequence, jobs[i].high)):  # the op before wrote them
            self.l2.access(_Transfer(0.0, self.query_bytes(jobs[i]), ("queries", i)), 0.0)
        self.l2.tiles = {place: (size, before, 0.0) for place, (size, before, _) in self.l2.tiles.items()}
        latent = h.head_dim - h.v_dim
        # Widths of the loads of a tile of keys and values, and True for columns of keys that are not values
        self.columns = [(h.v_dim, False), (latent, True), (h.v_dim, False)] if h.values_in_keys else [
            (h.head_dim, True), (h.v_dim, False)]  # fmt: skip

    def query_bytes(self, job: StreamJob) -> float:
        """Bytes of the queries of a job."""
        return float(job.queries * self.plan.pack * self.h.head_dim * WIDE)

    def seconds(self) -> float:
        """Follow the loop to its end. Returns the seconds until the last result is stored."""
        n, now = len(self.cores), 0.0
        left, slowed = np.full(2 * n, np.inf), np.full(2 * n, np.inf)  # of each core's load, then of its store
        self.waiting: list[tuple[float, int, _Transfer]] = []  # (start, place in `left`, transfer)
        self.flights: list[_Transfer | None] = [None] * (2 * n)
        flying = missing = 0
        for c, core in enumerate(self.cores):
            core.programs = self.loads(core), self.compute(core), self.stores(core)
            self.advance(c)
        while flying or self.waiting:
            rate = min(self.chip.port_rate, self.chip.l2_rate / max(1, flying))
            rates = np.minimum(rate, self.chip.hbm_rate / max(1, missing) * slowed)
            after = left / rates
            then = now + float(after.min())
            if self.waiting and self.waiting[0][0] < then:
                then = max(now, self.waiting[0][0])
            ended = np.flatnonzero(now + after <= then * (1 + 1e-12))
            left -= (then - now) * rates
            now = then
            for i in ended.tolist():
                flying, missing = flying - 1, missing - bool(np.isfinite(slowed[i]))
                left[i] = slowed[i] = np.inf
                if (done := self.flights[i]) is not None:
                    done.end, self.flights[i] = now, None
            for i in ended.tolist():
                self.advance(i % n)
            while self.waiting and self.waiting[0][0] <= now:
                _, i, x = heapq.heappop(self.waiting)
                moved = self.l2.access(x, now)
                flying, missing = flying + 1, missing + (moved > 0)
                left[i], slowed[i] = x.bytes, x.bytes / moved if moved else np.inf
        assert all(len(core.results) == len(core.jobs) for core in self.cores)
        return now

    def advance(self, c: int) -> None:
        """Continue each program of core number `c` up to its next transfer, or until it waits for another program."""
        loads, compute, stores = self.cores[c].programs
        later = c + len(self.cores)  # place of the core's stores
        for place, program in ((later, stores), (c, loads), (-1, compute), (c, loads), (later, stores)):
            if place < 0:
                next(program, None)
            elif self.flights[place] is None and (x := next(program, None)) is not None:
                self.flights[place] = x
                heapq.heappush(self.waiting, (x.start, place, x))

    def loads(self, c: _Core) -> Iterator[_Transfer | None]:
        """Program of a core's loads. Yields each transfer, or None to wait for the core's computation or stores."""
        plan, h, t, chip = self.plan, self.h, self.t, self.chip
        listed = (len(c.jobs) if plan.ahead else LISTED) if self.single else 1
        now = visible = index = 0.0  # when the engine is free; when its latest load can be used: they arrive in order
        freed, value_bytes, tile = c.results if self.split else c.sums, h.bits / 8, 0
        for number, (name, job) in enumerate(c.jobs):
            reused = number - plan.held  # the job whose tiles of queries and results this job takes
            if plan.ahead or not number % plan.lanes:  # sums of one job, or of all that start together
                last = reused if plan.ahead else number - 1
                while len(freed) <= last:
                    yield None
                now = max(now, freed[last] if last >= 0 else 0.0) + t.fill * (1 if plan.ahead else plan.lanes)
            if number < plan.held:
                now += t.blank
            visible = max(visible, now)
            if (self.single or not plan.ahead) and not number % listed:  # row numbers, over those of earlier jobs
                while not self.single and len(c.results) <= reused:
                    yield None
                free = c.begun[-1:] if self.single else c.results[max(0, reused) : max(0, reused + 1)]
                count = min(listed, len(c.jobs) - number) if self.single else job.queries
                x = _Transfer(max(now, *free, 0.0), 4 * count)
                yield x
                now, index = x.end, max(visible, x.visible)
                visible = index
            while len(c.queries) <= reused:
                yield None
            start = max(now, c.queries[reused] if reused >= 0 else 0.0, index if self.single else 0.0)
            x = _Transfer(start, self.query_bytes(job), None if self.single else ("queries", name))
            yield x
            now, visible = x.end, max(visible, x.visible)
            c.begun.append(visible)
            for low in range(job.low, job.high, plan.keys):
                while len(c.tiles) <= tile - plan.depth:
                    yield None
                keys = min(plan.keys, job.high - low)
                blank = (plan.keys - keys) * (h.head_dim + h.v_dim) * value_bytes  # after the last key, set to 0
                now = max(now, c.tiles[tile - plan.depth] if tile >= plan.depth else 0.0)
                now += blank / chip.sram_bytes_per_cycle / chip.clock_hz
                for width, only_key in self.columns:
                    x = _Transfer(now, keys * width * value_bytes, (job.sequence, job.kv_head, low, only_key))
                    yield x
                    now, visible = x.end, max(visible, x.visible)
                c.loaded.append(visible)
                tile += 1

    def compute(self, c: _Core) -> Iterator[None]:
        """Record when a core's computations end. Yields None while the next waits for the core's loads or stores."""
        plan, t, array, lanes, tile = self.plan, self.t, 0.0, 0.0, 0
        for number, (_, job) in enumerate(c.jobs):
            for _ in range(job.low, job.high, plan.keys):
                while len(c.loaded) <= tile:
                    yield
                start = max(array, c.loaded[tile])
                if self.chip.att_lanes:
                    array = scored = start + t.work
                else:
                    scored = start + t.scores
                    lanes = max(lanes, scored) + t.softmax
                    array = lanes + t.sums
                c.tiles.append(array)
                tile += 1
            c.queries.append(scored)
            if not self.split:
                reused = number - plan.held
                while len(c.results) <= reused:
                    yield
                free = c.results[reused] if reused >= 0 else 0.0
                lanes = max(lanes, array, free) + t.merge * job.queries * plan.pack / plan.rows
            c.sums.append(array if self.split else lanes)

    def stores(self, c: _Core) -> Iterator[_Transfer | None]:
        """Yield a core's stores, each as a _Transfer; None while the next one waits for the core's computation."""
        scattered, now = not self.single and not self.plan.ahead, 0.0
        columns = self.h.v_dim + 2 * self.split  # with maxima and denominators
        for number, (name, job) in enumerate(c.jobs):
            while len(c.sums) <= number:
                yield None
            size = job.queries * self.plan.pack * columns * WIDE
            place = None if scattered else ("results", name)
            x = _Transfer(max(now, c.sums[number]), size, place, writes=True)
            yield x
            now = x.end
            c.results.append(now)


def stream_seconds(target: Target, h: Heads, plan: AttendPlan, jobs: Sequence[StreamJob], single: bool) -> float:
    """Seconds of the streams of some jobs, until the last result is stored, without launch overhead.

    At the start the L2 holds the queries, as far as they fit, and no keys and values.

    Args:
        target: chip and kernel library.
        h: heads and their sizes.
        plan: tiles and buffers of the kernel.
        jobs: all jobs of the launch.
        single: True for chunks with one query, whose queries are gathered by index.
    """
    return _Loop(target, h, plan, jobs, single).seconds()
