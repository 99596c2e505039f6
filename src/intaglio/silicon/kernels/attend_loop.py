"""Time of attention's instruction streams: the loop of all cores over their jobs and over tiles of keys.

The closed form of the streams of attend.py. It follows each core through the jobs that deal() gives to it: when each
transfer, product and store starts and ends, and from when on the L2 has each tile. Cores with work left share the rates
of the L2 and of HBM equally.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from intaglio.chips import KernelLibrary, Target
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
    """

    sequence: int
    kv_head: int
    queries: int
    low: int
    high: int


def prefill_jobs_of_streams(h: Heads, plan: AttendPlan, part: ChunkCounts) -> list[StreamJob]:
    """A list of the jobs of chunks with several queries, in the order of attend.prefill_work().

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
    """A list of the jobs of chunks with one query, in the order of attend.decode_work(); part: as there."""
    out, sequences = [], [keys for _, keys, n in part for _ in range(n)]
    for s, keys in enumerate(sequences):
        low = keys - decode_keys(library, h.window, keys)
        tiles = -(-(keys - low) // plan.keys)
        cuts = [*range(low, keys, -(-tiles // plan.parts) * plan.keys), keys]
        for head in range(0, h.heads, plan.pack):
            out += [StreamJob(s, head // h.group, 1, a, b) for a, b in pairwise(cuts)]
    return out


@dataclass
class _Core:
    """Times of one core, in seconds since the start of the launch.

    Attributes:
        jobs: its jobs, in order.
        loads, array, lanes, stores: until when the engine of loads, the matrix array (or the attention engine), the
            vector lanes and the engine of stores are busy.
        visible: when the latest load is visible. Loads become visible in order.
        bytes: bytes that the core has moved.
        tiles: when each tile of keys was read for the last time.
        queries, states, results: when the queries, the sums and the results of each job were read for the last time.
    """

    jobs: list[StreamJob]
    loads: float = 0.0
    array: float = 0.0
    lanes: float = 0.0
    stores: float = 0.0
    visible: float = 0.0
    bytes: float = 0.0
    tiles: list[float] = field(default_factory=list)
    queries: list[float] = field(default_factory=list)
    states: list[float] = field(default_factory=list)
    results: list[float] = field(default_factory=list)


class _Loop:
    """The loop of all cores; see stream_seconds() for the arguments."""

    def __init__(
        self, target: Target, h: Heads, plan: AttendPlan, jobs: Sequence[StreamJob], missed: float, single: bool
    ) -> None:
        self.chip, self.h, self.plan, self.missed, self.single = target.chip, h, plan, missed, single
        self.t = t = tile_seconds(target, h, plan.rows, plan.keys)
        self.latency_s = self.chip.constants.hbm_latency_s
        seconds = [-(-(job.high - job.low) // plan.keys) * t.work + t.fill + t.merge for job in jobs]
        self.cores = [_Core([jobs[i] for i in mine]) for mine in deal(seconds, self.chip.cores)]
        self.live = self.active = len(self.cores)  # cores with loads left; cores with jobs
        self.there: dict[tuple[int, int, int, bool], tuple[float, int]] = {}  # tile in the L2: (since when, its keys)
        latent = h.head_dim - h.v_dim
        # Widths of the loads of a tile of keys and values, and True for columns of keys that are not values
        self.columns = [(h.v_dim, False), (latent, True), (h.v_dim, False)] if h.values_in_keys else [
            (h.head_dim, True), (h.v_dim, False)]  # fmt: skip

    def rates(self) -> tuple[float, float]:
        """The bandwidth of a core's load, in bytes/s, from the L2 and from HBM."""
        if not self.chip.l2_bytes:
            return (min(self.chip.port_rate, self.chip.hbm_rate / self.live),) * 2
        rate = min(self.chip.port_rate, self.chip.l2_rate / self.live)
        return rate, min(rate, self.chip.hbm_rate / max(1.0, self.missed * self.live))

    def seconds(self) -> float:
        """Seconds until the last result is stored. Loads of all cores are followed in the order of their starts."""
        runs = [self.run(core) for core in self.cores]
        turns = [(next(run), i) for i, run in enumerate(runs)]
        heapq.heapify(turns)
        while turns:
            _, i = heapq.heappop(turns)
            start = next(runs[i], None)
            if start is None:
                self.live = max(1, self.live - 1)
            else:
                heapq.heappush(turns, (start, i))
        share = (self.chip.l2_rate if self.chip.l2_bytes else self.chip.hbm_rate) / self.active
        t, held = self.t, self.plan.held
        shared = (c.bytes / share + t.fill * len(c.jobs) + t.blank * min(held, len(c.jobs)) for c in self.cores)
        return max(*shared, *(core.stores for core in self.cores))

    def run(self, c: _Core) -> Iterator[float]:
        """Follow one core. Yields the start of each of its next loads, and then computes what the load changes."""
        plan, h, t, chip = self.plan, self.h, self.t, self.chip
        listed = (len(c.jobs) if plan.ahead else LISTED) if self.single else 1
        for number, job in enumerate(c.jobs):
            rows, (l2_rate, hbm_rate) = job.queries * plan.pack, self.rates()
            reused = number - plan.held  # the job whose tiles of queries and results this job takes
            if plan.ahead or not number % plan.lanes:  # sums of one job, or of all that start together
                merged = (
                    c.states[reused : reused + 1] if plan.ahead and reused >= 0 else c.states if not plan.ahead else []
                )
                c.loads = max([c.loads, *merged[-1:]]) + t.fill * (1 if plan.ahead else plan.lanes)
                c.visible = state = max(c.visible, c.loads)
            if number < plan.held:
                c.loads += t.blank
                c.visible = max(c.visible, c.loads)
            if (self.single or not plan.ahead) and not number % listed:  # row numbers
                free = c.queries[-1] if self.single and c.queries else 0.0
                free = c.results[reused] if not self.single and reused >= 0 else free
                start = max(c.loads, free)
                yield start
                count = min(listed, len(c.jobs) - number) if self.single else job.queries
                c.loads = start + 4 * count / hbm_rate
                c.visible = index = max(c.visible, c.loads + self.latency_s)
            start = max(c.loads, c.queries[reused] if reused >= 0 else 0.0, index if self.single else 0.0)
            yield start
            rate = min(l2_rate, chip.hbm_rate / self.active) if self.single else l2_rate
            c.loads = start + rows * h.head_dim * WIDE / rate
            late = self.latency_s if self.single or not chip.l2_bytes else 0.0  # queries by index come from HBM
            c.visible = queries = max(c.visible, c.loads + late)
            for low in range(job.low, job.high, plan.keys):
                keys = min(plan.keys, job.high - low)
                yield from self.load_tile(c, job, low, keys)
                start = max(c.array, queries, state, c.visible)
                if chip.att_lanes:
                    c.array = scored = start + t.work
                else:
                    scored = start + t.scores
                    c.lanes = max(c.lanes, scored) + t.softmax
                    c.array = c.lanes + t.sums
                c.tiles.append(c.array)
            c.queries.append(scored)
            free = c.results[reused] if reused >= 0 else 0.0
            c.lanes = max(c.lanes, c.array, free) + t.merge * rows / plan.rows
            c.states.append(c.lanes)
            scattered = plan.parts == 1 and (self.single or not plan.ahead)  # by index: to HBM
            l2_rate, _ = self.rates()
            rate = min(l2_rate, chip.hbm_rate / self.active) if scattered else l2_rate
            c.stores = max(c.stores, c.lanes) + rows * h.v_dim * WIDE / rate
            c.results.append(c.stores)
            c.bytes += rows * (h.head_dim + h.v_dim) * WIDE

    def load_tile(self, c: _Core, job: StreamJob, low: int, keys: int) -> Iterator[float]:
        """Load one tile of keys and values to a core. low: position of its first key. keys: number of its keys."""
        h, value_bytes = self.h, self.h.bits / 8
        start = max(c.loads, c.tiles[-self.plan.depth] if len(c.tiles) >= self.plan.depth else 0.0)
        blank = (self.plan.keys - keys) * (h.head_dim + h.v_dim) * value_bytes
        start += blank / self.chip.sram_bytes_per_cycle / self.chip.clock_hz  # rows after the last key are set to 0
        for width, only_key in self.columns:
            yield start
            l2_rate, hbm_rate = self.rates()
            place, size = (job.sequence, job.kv_head, low, only_key), keys * width * value_bytes
            since, have = self.there.get(place, (0.0, 0)) if self.chip.l2_bytes else (0.0, 0)
            missed = max(0, keys - have) / keys  # part of the tile
            end = start + size / (l2_rate if have else hbm_rate)
            c.visible = max(c.visible, end + self.latency_s * missed, since)
            if missed:
                self.there[place] = max(since, start + self.latency_s), keys
            c.loads = start = end
            c.bytes += size


def stream_seconds(
    target: Target, h: Heads, plan: AttendPlan, jobs: Sequence[StreamJob], missed: float, single: bool
) -> float:
    """Seconds of the streams of some jobs, until the last result is stored, without launch overhead.

    missed: fraction of the loads of keys and values that HBM delivers. single: True for chunks with one query, whose
    queries and results are gathered and scattered by index.
    """
    return _Loop(target, h, plan, jobs, missed, single).seconds()
