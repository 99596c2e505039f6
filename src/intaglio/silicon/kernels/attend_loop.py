"""Time of attention's instruction streams: the loop of all cores over their jobs and over tiles of keys.

The closed form of the streams of attend.py. It follows the loads, the computation and the stores of each core through
the jobs that deal() gives to it. Transfers in flight share the rates of the L2 and of HBM equally. The L2 holds the
tiles that were used last: keys, values, queries and results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from intaglio.chips import KernelLibrary, Target
from intaglio.silicon.core_loop import CoreLoop, Program, TilesInL2, Transfer, until
from intaglio.silicon.kernels.attend_tiles import LISTED, AttendPlan, deal, decode_keys, tile_seconds
from intaglio.silicon.kernels.kernel import WIDE
from intaglio.silicon.kernels.kv_write import Heads
from intaglio.silicon.sizes import ChunkCounts


@dataclass(frozen=True)
class StreamJob:
    """One job of a core, for the timing: queries of one sequence, for plan.pack heads, and the keys they attend to.

    Attributes:
        sequence: number of the sequence.
        kv_head: number of the K/V head.
        queries: number of queries of each head.
        low, high: the job's keys are those at the positions low .. high - 1.
        parts: number of parts into which the sequence's context is split. The job computes one of these parts.
    """

    sequence: int
    kv_head: int
    queries: int
    low: int
    high: int
    parts: int = 1


def prefill_jobs_of_streams(h: Heads, plan: AttendPlan, part: ChunkCounts) -> list[StreamJob]:
    """Returns a list of the StreamJobs of all sequences with several new tokens.

    Within a sequence, jobs with later queries come before jobs with earlier queries. attend.prefill_work() makes the
    jobs of the simulated kernel in the same order.

    part: triples (new tokens, context length, number of sequences with these two numbers), one for each distinct pair.
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
    """Returns a list of the StreamJobs of all sequences with one new token.

    The jobs are ordered by sequence, then head, then part of the context.

    part: triples (1, context length, number of sequences with this context length), one for each distinct length.
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
class _Core:
    """Progress of one core in the simulated loop. All times are in seconds since the start of the launch.

    The lists grow while the loop is simulated.

    Attributes:
        jobs: the core's jobs in order, each with its number in the launch.
        begun: for each job so far, the time when its queries and its initialised sums can be used.
        loaded: for each tile of keys and values so far, the time when it can be used.
        tiles: for each tile of keys and values so far, the time when it was last used.
        queries: for each job so far, the time when its queries were last used.
        sums: for each job so far, the time when its sums were last used.
        results: for each job so far, the time when its results were stored.
    """

    jobs: list[tuple[int, StreamJob]]
    begun: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    tiles: list[float] = field(default_factory=list)
    queries: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    results: list[float] = field(default_factory=list)


class _Loop:
    """Simulation that finds the duration of the loop in which all cores work through their jobs.

    It proceeds transfer by transfer.

    target: chip and kernel library. h: heads and their sizes. plan: tiles and buffers of the kernel. jobs: all jobs of
    the launch. single: True if each sequence has one new token.
    """

    def __init__(self, target: Target, h: Heads, plan: AttendPlan, jobs: Sequence[StreamJob], single: bool) -> None:
        self.chip, self.h, self.plan, self.single = target.chip, h, plan, single
        self.t = t = tile_seconds(target, h, plan.rows, plan.keys)
        self.split = any(job.parts > 1 for job in jobs)
        seconds = [-(-(job.high - job.low) // plan.keys) * t.work + t.fill + t.merge for job in jobs]
        self.cores = [_Core([(i, jobs[i]) for i in mine]) for mine in deal(seconds, self.chip.cores)]
        self.l2 = TilesInL2.of(target)
        for i in sorted(range(len(jobs)), key=lambda i: (jobs[i].sequence, jobs[i].high)):  # the op before wrote them
            self.l2.hold(("queries", i), self.query_bytes(jobs[i]))
        latent = h.head_dim - h.v_dim
        # Widths of the loads of a tile of keys and values, and True for columns of keys that are not values
        self.columns = [(h.v_dim, False), (latent, True), (h.v_dim, False)] if h.values_in_keys else [
            (h.head_dim, True), (h.v_dim, False)]  # fmt: skip

    def query_bytes(self, job: StreamJob) -> float:
        """Returns the number of bytes of a job's queries."""
        return float(job.queries * self.plan.pack * self.h.head_dim * WIDE)

    def seconds(self) -> float:
        """Returns the modelled seconds from the start of the loop until the last result is stored."""
        programs = [(self.loads(c), self.compute(c), self.stores(c)) for c in self.cores]
        return CoreLoop(self.chip, self.l2, programs).seconds()

    def loads(self, c: _Core) -> Program:
        """Yield each load of a core as a Transfer. Yields None while the next load waits for computation or stores."""
        plan, h, t, chip = self.plan, self.h, self.t, self.chip
        listed = (len(c.jobs) if plan.ahead else LISTED) if self.single else 1
        now = visible = index = 0.0  # when the engine is free; when its latest load can be used: they arrive in order
        freed, value_bytes, tile = c.results if self.split else c.sums, h.bits / 8, 0
        for number, (name, job) in enumerate(c.jobs):
            reused = number - plan.held  # the job whose tiles of queries and results this job takes
            if plan.ahead or not number % plan.lanes:  # sums of one job, or of all that start together
                last = reused if plan.ahead else number - 1
                now = max(now, (yield from until(freed, last))) + t.fill * (1 if plan.ahead else plan.lanes)
            if number < plan.held:
                now += t.blank
            visible = max(visible, now)
            if (self.single or not plan.ahead) and not number % listed:  # row numbers, over those of earlier jobs
                while not self.single and len(c.results) <= reused:
                    yield None
                free = c.begun[-1:] if self.single else c.results[max(0, reused) : max(0, reused + 1)]
                count = min(listed, len(c.jobs) - number) if self.single else job.queries
                x = Transfer(max(now, *free, 0.0), 4 * count)
                yield x
                now, index = x.end, max(visible, x.visible)
                visible = index
            start = max(now, (yield from until(c.queries, reused)), index if self.single else 0.0)
            x = Transfer(start, self.query_bytes(job), None if self.single else ("queries", name))
            yield x
            now, visible = x.end, max(visible, x.visible)
            c.begun.append(visible)
            for low in range(job.low, job.high, plan.keys):
                overwritable = yield from until(c.tiles, tile - plan.depth)
                keys = min(plan.keys, job.high - low)
                blank = (plan.keys - keys) * (h.head_dim + h.v_dim) * value_bytes  # after the last key, set to 0
                now = max(now, overwritable)
                now += blank / chip.sram_bytes_per_cycle / chip.clock_hz
                for width, only_key in self.columns:
                    x = Transfer(now, keys * width * value_bytes, (job.sequence, job.kv_head, low, only_key))
                    yield x
                    now, visible = x.end, max(visible, x.visible)
                c.loaded.append(visible)
                tile += 1

    def compute(self, c: _Core) -> Program:
        """Record when each computation of a core ends. Yields None while the next one waits for loads or stores."""
        plan, t, array, lanes, tile = self.plan, self.t, 0.0, 0.0, 0
        for number, (_, job) in enumerate(c.jobs):
            for _ in range(job.low, job.high, plan.keys):
                start = max(array, (yield from until(c.loaded, tile)))
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
                free = yield from until(c.results, number - plan.held)
                lanes = max(lanes, array, free) + t.merge * job.queries * plan.pack / plan.rows
            c.sums.append(array if self.split else lanes)

    def stores(self, c: _Core) -> Program:
        """Yield each store of a core as a Transfer. Yields None while the next store waits for the computation."""
        scattered, now = not self.single and not self.plan.ahead, 0.0
        columns = self.h.v_dim + 2 * self.split  # with maxima and denominators
        for number, (name, job) in enumerate(c.jobs):
            ready = yield from until(c.sums, number)
            size = job.queries * self.plan.pack * columns * WIDE
            place = None if scattered else ("results", name)
            x = Transfer(max(now, ready), size, place, writes=True)
            yield x
            now = x.end
            c.results.append(now)


def stream_seconds(target: Target, h: Heads, plan: AttendPlan, jobs: Sequence[StreamJob], single: bool) -> float:
    """Returns the modelled seconds of attention's instruction streams, until the last result is stored.

    The launch overhead is not included. At the start the L2 holds the queries, as far as they fit, but no keys and
    values.

    Args:
        target: chip and kernel library.
        h: heads and their sizes.
        plan: tiles and buffers of the kernel.
        jobs: all jobs of the launch.
        single: True if each sequence has one new token. Queries are then loaded by row number.
    """
    return _Loop(target, h, plan, jobs, single).seconds()
