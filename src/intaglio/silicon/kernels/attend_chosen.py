"""Streams of `attend` over chosen positions (sparse attention), and their closed form. A part of attend.py's kernel.

A job is one token and some of its query heads. Its list of positions comes from HBM, so keys and values are gathered by
index, tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from intaglio.batch import Batch
from intaglio.chips import Target
from intaglio.ops import Attend
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.core_loop import CoreLoop, Program, TilesInL2, Transfer
from intaglio.silicon.isa.cycles import exposed, matmul_cycles, softmax_cycles, vector_cycles
from intaglio.silicon.isa.vector import map_cycles
from intaglio.silicon.kernels.attend_tiles import deal
from intaglio.silicon.kernels.chip_memory import ChipMemory, load, slices
from intaglio.silicon.kernels.kernel import WIDE
from intaglio.silicon.kernels.kv_write import Heads
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BLOCK, ChunkCounts
from intaglio.silicon.stream import Stream, StreamBuilder

ROWS = 64  # query heads of a job, at most
AHEAD = 3  # jobs whose lists and queries SRAM holds at a time
SPARE = 16384  # bytes of SRAM for block tables and alignment
ADDED = postfix("a + b")
HIDDEN = postfix("(relu(0.0 - a) + relu(a - 1.0)) * -1e30")  # the second number is the query's position


@dataclass(frozen=True)
class ChosenJob:
    """One token and some of its query heads, which one core computes.

    Attributes:
        sequence: number of the token's sequence.
        row: the token's row, counted from the sequence's first row of the step.
        head: the first query head.
        position: the token's position.
        listed: slice of the token's list that can hold positions. The places before it hold -1.
    """

    sequence: int
    row: int
    head: int
    position: int
    listed: slice

    @property
    def place(self) -> tuple[int, int, int]:
        """Key of its queries and of its results in the L2."""
        return self.sequence, self.row, self.head


@dataclass(frozen=True)
class ChosenPlan:
    """Sizes of the tiles. rows: query heads of a tile, which share a K/V head. keys: keys of a tile."""

    rows: int
    keys: int


def chosen_plan(target: Target, h: Heads, chosen: int) -> ChosenPlan:
    """The ChosenPlan whose tiles fit SRAM and accumulators. If needed, keys are halved (down to 32), then rows reduced.

    chosen: places of a token's list.
    """
    rows = max(n for n in range(1, min(ROWS, h.group) + 1) if h.group % n == 0)
    keys, width = target.library.key_tile, h.head_dim + h.v_dim
    while True:
        sram = 2 * keys * width * h.bits / 8 + AHEAD * rows * width * WIDE + rows * (keys + 8) * WIDE
        sram += AHEAD * 12 * chosen + SPARE
        fits = sram <= target.chip.sram_bytes and rows * (2 * h.v_dim + keys) * WIDE + 256 <= target.chip.acc_bytes
        if fits or rows * keys == 1:
            return ChosenPlan(rows, keys)
        smaller = [n for n in range(1, rows) if rows % n == 0]
        rows, keys = (rows, keys // 2) if keys > 32 or not smaller else (smaller[-1], keys)


def chosen_jobs(
    target: Target, h: Heads, plan: ChosenPlan, chosen: int, sequences: Sequence[tuple[int, int]]
) -> list[list[ChosenJob]]:
    """Deal the jobs to the cores. Returns for each core with work a list of its ChosenJobs.

    chosen: places of a token's list. sequences: for each sequence (new tokens, keys up to the last of them).
    """
    jobs = [
        ChosenJob(s, row, head, keys - q + row, slice(max(0, chosen - (keys - q + row + 1)), chosen))
        for s, (q, keys) in enumerate(sequences) for row in range(q) for head in range(0, h.heads, plan.rows)
    ]  # fmt: skip
    places = [job.listed.stop - job.listed.start + 1.0 for job in jobs]
    return [[jobs[i] for i in mine] for mine in deal(places, target.chip.cores)]


def chosen_seconds(target: Target, h: Heads, chosen: int, batch: ChunkCounts) -> float:
    """Seconds of the streams until the last result is stored, without launch overhead. batch: as in attend_timing()."""
    plan = chosen_plan(target, h, chosen)
    dealt = chosen_jobs(target, h, plan, chosen, [(q, keys) for q, keys, n in batch for _ in range(n)])
    l2 = TilesInL2.of(target)
    for job in sorted((job for mine in dealt for job in mine), key=lambda job: (job.sequence, job.row, job.head)):
        l2.hold(("queries", *job.place), plan.rows * h.head_dim * 4.0)
        l2.hold(("list", job.sequence, job.row), chosen * 4.0)
    cores = [_Core(target, h, plan, mine) for mine in dealt]
    return CoreLoop(target.chip, l2, [(c.loads(), c.compute(), c.stores()) for c in cores]).seconds()


@dataclass
class _Core:
    """Programs of one core in the closed form, in the order of chosen_streams().

    The lists of times grow while the loop is followed: they have an item for each job, or tile, so far.

    Attributes:
        target, h, plan: chip and library, sizes of the layer, tiles.
        jobs: the core's jobs.
        listed, located: for each job, when its list has been loaded, and when its rows of the cache are known.
        gathered, multiplied: for each tile of keys, when it can be used, and when it has been.
        queries, sums, results: for each job, when its queries, its sums and its results were used for the last time.
    """

    target: Target
    h: Heads
    plan: ChosenPlan
    jobs: list[ChosenJob]
    listed: list[float] = field(default_factory=list)
    located: list[float] = field(default_factory=list)
    gathered: list[float] = field(default_factory=list)
    multiplied: list[float] = field(default_factory=list)
    queries: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    results: list[float] = field(default_factory=list)

    def loads(self) -> Program:
        """Yield each Transfer of the core's loads; None while the next waits for the computation or the stores.

        A job's list and queries are loaded before the keys of the job before it.
        """
        h, rows, chip, tiles = self.h, self.plan.rows, self.target.chip, 0
        now = visible = 0.0
        widths = [h.v_dim, h.head_dim - h.v_dim, h.v_dim] if h.values_in_keys else [h.head_dim, h.v_dim]
        for number in range(-1, len(self.jobs)):
            if number + 1 < len(self.jobs):
                job, reused = self.jobs[number + 1], number + 1 - AHEAD
                places, blocks = job.listed.stop - job.listed.start, job.position // BLOCK + 1
                for size, place in ((4.0 * places, ("list", job.sequence, job.row)), (4.0 * blocks, None)):
                    x = Transfer(now, size, place)
                    yield x
                    now, visible = x.end, max(visible, x.visible)
                self.listed.append(visible)
                while len(self.queries) <= reused:
                    yield None
                now = max(now, self.queries[reused] if reused >= 0 else 0.0)
                x = Transfer(now, 4.0 * rows * h.head_dim, ("queries", *job.place))
                yield x
                now, visible = x.end, max(visible, x.visible)
            if number < 0:
                continue
            while len(self.sums) <= number - 2 or len(self.located) <= number:
                yield None
            now = max(now, self.sums[number - 2] if number >= 2 else 0.0)
            now += 4.0 * rows * (h.v_dim + 2) / chip.sram_bytes_per_cycle / chip.clock_hz
            for tile in slices(self.jobs[number].listed.stop - self.jobs[number].listed.start, self.plan.keys):
                while len(self.multiplied) <= tiles - 2:
                    yield None
                now = max(now, self.located[number], self.multiplied[tiles - 2] if tiles >= 2 else 0.0)
                for width in widths:
                    x = Transfer(now, (tile.stop - tile.start) * width * h.bits / 8)
                    yield x
                    now, visible = x.end, max(visible, x.visible)
                self.gathered.append(visible)
                tiles += 1

    def compute(self) -> Program:
        """Record when the core's computations end. Yields None while the next waits for loads or stores.

        The next job's rows of the cache are found before a job's first tile is computed.
        """
        h, rows, chip, on = self.h, self.plan.rows, self.target.chip, self.target
        array = lanes = 0.0
        tiles, hz = 0, chip.clock_hz
        for number in range(-1, len(self.jobs)):
            if number + 1 < len(self.jobs):
                while len(self.listed) <= number + 1:
                    yield None
                places = self.jobs[number + 1].listed.stop - self.jobs[number + 1].listed.start
                cycles = float(vector_cycles(chip, 4 * places)) + map_cycles(chip, HIDDEN, places)
                lanes = max(lanes, self.listed[number + 1]) + cycles / hz
                self.located.append(lanes)
            if number < 0:
                continue
            for tile in slices(self.jobs[number].listed.stop - self.jobs[number].listed.start, self.plan.keys):
                while len(self.gathered) <= tiles:
                    yield None
                n = tile.stop - tile.start
                softmax = softmax_cycles(chip, rows * n) + vector_cycles(chip, rows * h.v_dim)
                cycles = map_cycles(chip, ADDED, rows * n) + exposed(on, float(softmax))
                scored = max(array, self.gathered[tiles]) + float(matmul_cycles(on, rows, n, h.head_dim, "f32")) / hz
                lanes = max(lanes, scored) + cycles / hz
                array = lanes + float(matmul_cycles(on, rows, h.v_dim, n, "f32")) / hz
                self.multiplied.append(array)
                tiles += 1
            self.queries.append(scored)
            while len(self.results) <= number - 2:
                yield None
            free = self.results[number - 2] if number >= 2 else 0.0
            lanes = max(lanes, array, free) + float(vector_cycles(chip, 2 * rows * h.v_dim, rows)) / hz
            self.sums.append(lanes)

    def stores(self) -> Program:
        """Yield each Transfer of the core's stores; None while the next waits for the computation."""
        now = 0.0
        for number, job in enumerate(self.jobs):
            while len(self.sums) <= number:
                yield None
            x = Transfer(
                max(now, self.sums[number]), 4.0 * self.plan.rows * self.h.v_dim, ("results", *job.place), writes=True
            )
            yield x
            now = x.end
            self.results.append(now)


class ListTiles:
    """Tile buffers of one core for what a job needs before its keys: positions, rows of the cache, mask and queries.

    There are AHEAD of each, so that a job is prepared while the one before it is computed.
    """

    def __init__(self, mem: ChipMemory, k: StreamBuilder, op: Attend, h: Heads, batch: Batch, rows: int) -> None:
        assert op.chosen is not None
        self.mem, self.k, self.h, self.batch, self.rows = mem, k, h, batch, rows
        self.chosen, self.q = mem.region(op.chosen), mem.region(op.q)
        self.lists, self.places = (k.ring(AHEAD, 1, self.chosen.cols, "i32") for _ in range(2))
        self.hidden, self.queries = k.ring(AHEAD, 1, self.chosen.cols), k.ring(AHEAD, rows, h.head_dim)
        self.tables = k.ring(AHEAD, 1, batch.block_table.shape[1], "i32")

    def prepare(self, job: ChosenJob) -> tuple[Region, Region, Region]:
        """Emit the loads of a job's list and queries. Returns (its queries, its rows of the cache, its mask).

        The mask is added to scores. It is 0, except at places of the list that have no position, or a position after
        the query's: there it is so low that the weight of the key is 0.
        """
        k, h, rows, size = self.k, self.h, self.rows, self.batch.block_size
        row = int(self.batch.first_row[job.sequence]) + job.row
        one, columns = slice(row, row + 1), slice(job.head * h.head_dim, (job.head + rows) * h.head_dim)
        ids = load(k, self.lists.next(), self.chosen.part(one, job.listed))
        held = self.batch.block_table[job.sequence, : job.position // size + 1]
        table, queries = load(k, self.tables.next(), self.mem.put_indices(held)), self.queries.next()
        load(k, queries.shaped(1, rows * h.head_dim), self.q.part(one, columns))
        index, mask = self.places.next().shaped(1, ids.cols), self.hidden.next().shaped(1, ids.cols)
        where: dict[str, Any] = {"size": size, "heads": h.kv_heads, "head": job.head // h.group}
        k.emit(isa.Locate(dst=index, positions=ids, table=table, **where))
        steps = postfix(f"(relu(0.0 - a) + relu(a - {job.position}.0)) * -1e30")
        k.emit(isa.Map(dst=mask, a=ids, steps=steps))
        return queries, index, mask


def chosen_streams(mem: ChipMemory, on: Target, op: Attend, h: Heads, batch: Batch) -> list[Stream]:
    """A list of Streams, one for each core with work, that attend to the positions which op.chosen lists."""
    assert op.chosen is not None
    names = [op.k_cache, *([op.rope_cache] if op.rope_cache else []), op.v_cache]
    out, caches, places = mem.region(op.out), [mem.region(n) for n in names], mem.region(op.chosen).cols
    sequences = list(zip(batch.q_len.tolist(), batch.context_len.tolist(), strict=True))
    plan, streams, d, dv = chosen_plan(on, h, places), list[Stream](), h.head_dim, h.v_dim
    rows = plan.rows
    for mine in chosen_jobs(on, h, plan, places, sequences):
        k = StreamBuilder(op.site)
        tiles, results = ListTiles(mem, k, op, h, batch, rows), k.ring(2, rows, dv)
        pairs, p = k.ring(2, plan.keys, d + dv, caches[0].format), k.tile(rows, plan.keys)
        totals, scores = k.ring(2, rows, dv, "f32", "acc"), k.tile(rows, plan.keys, "f32", "acc")
        maxima, lengths, alpha = k.ring(2, rows, 1), k.ring(2, rows, 1), k.tile(rows, 1)
        following = tiles.prepare(mine[0])
        for number, job in enumerate(mine):
            a, index, mask = following
            if number + 1 < len(mine):
                following = tiles.prepare(mine[number + 1])
            sums, m, length = totals.next(), maxima.next(), lengths.next()
            for region, value in ((sums, 0.0), (length, 0.0), (m, float("-inf"))):
                k.emit(isa.Fill(dst=region, value=value))
            for tile in slices(index.cols, plan.keys):
                n, pair, done = tile.stop - tile.start, pairs.next(), 0
                for cache in caches:
                    to = pair.part(slice(0, n), slice(done, done + cache.cols))
                    k.emit(isa.Gather(dst=to, table=cache, index=index.part(cols=tile)))
                    done += cache.cols
                pair, s, weights = pair.part(slice(0, n)), scores.shaped(rows, n), p.shaped(rows, n)
                k.emit(isa.Matmul(acc=s, a=a, b=pair.part(cols=slice(0, d))))
                k.emit(isa.Map(dst=s, a=s, b=mask.part(cols=tile), steps=ADDED))
                how: dict[str, Any] = {"scale": op.scale, "query": job.position, "pack": rows, "keys": n}
                how |= {"key": job.position - n + 1, "temper": op.temper, "every": op.temper_every}
                how |= {"from_zero": not op.temper_from}
                k.emit(isa.Softmax(p=weights, m=m, l=length, alpha=alpha, scores=s, **how))
                k.emit(isa.Rescale(acc=sums, alpha=alpha))
                values = pair.part(cols=slice(d, d + dv))
                k.emit(isa.Matmul(acc=sums, a=weights, b=values, by_rows=True, accumulate=True))
            y, row = results.next(), int(batch.first_row[job.sequence]) + job.row
            k.emit(isa.Merge(dst=y, sums=sums, m=m, l=length))
            to = out.part(slice(row, row + 1), slice(job.head * dv, (job.head + rows) * dv))
            k.emit(isa.Store(dst=to, src=y.shaped(1, rows * dv)))
        streams.append(k.stream())
    return streams
