"""Attention that gathers keys by index: streams and time shared by `attend` to chosen positions and `attend_pooled`.

A job is one token and some of its query heads. The indices of a job's keys are loaded while the job before it is
computed, so that the keys can be gathered without waiting.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from intaglio.chips import Target
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.core_loop import CoreLoop, Program, TilesInL2, Transfer, until
from intaglio.silicon.isa.cycles import exposed, matmul_cycles, softmax_cycles, vector_cycles
from intaglio.silicon.isa.vector import map_cycles
from intaglio.silicon.kernels.chip_memory import slices
from intaglio.silicon.kernels.kernel import WIDE
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import StreamBuilder

ROWS = 64  # query heads of a job, at most
AHEAD = 3  # jobs whose indices and queries SRAM holds at a time
SPARE = 16384  # bytes of SRAM for block tables and alignment
ADDED = postfix("a + b")


@dataclass(frozen=True)
class GatherPlan:
    """Tile sizes of an attention kernel that gathers keys and values from the cache by index.

    Attributes:
        rows: number of query heads that are computed together; they share a K/V head.
        keys: number of keys in a tile.
        d, dv: widths of a key and of a value.
        gathered: columns that each gather instruction loads for a key. Their sum is d if values are part of the keys,
            and more if values are gathered too.
        bits: bits of a value in the cache.
    """

    rows: int
    keys: int
    d: int
    dv: int
    gathered: tuple[int, ...]
    bits: int

    @classmethod
    def of(
        cls, target: Target, group: int, d: int, dv: int, gathered: tuple[int, ...], bits: int, places: int
    ) -> GatherPlan:
        """Returns a GatherPlan whose tiles fit SRAM and accumulators, with as many query heads and keys as possible.

        As long as the tiles do not fit, the number of keys is halved, down to 32. Then the number of query heads is
        reduced, and after that the number of keys again. If not even one key and one query head fit, the result has one
        of each.

        Args:
            target: the chip and its kernel library.
            group: number of query heads that share a K/V head.
            d: width of a key.
            dv: width of a value.
            gathered: columns that each gather instruction loads for a key.
            bits: bits of a value in the cache.
            places: largest number of cache rows (keys) that one job attends to.
        """
        rows = max(n for n in range(1, min(ROWS, group) + 1) if group % n == 0)
        keys = target.library.key_tile
        while True:
            sram = 2 * keys * sum(gathered) * bits / 8 + AHEAD * rows * (d + dv) * WIDE + rows * (keys + 8) * WIDE
            sram += AHEAD * 12 * places + SPARE
            fits = sram <= target.chip.sram_bytes and rows * (2 * dv + keys) * WIDE + 256 <= target.chip.acc_bytes
            if fits or rows * keys == 1:
                return cls(rows, keys, d, dv, gathered, bits)
            smaller = [n for n in range(1, rows) if rows % n == 0]
            rows, keys = (rows, keys // 2) if keys > 32 or not smaller else (smaller[-1], keys)


@dataclass(frozen=True)
class GatherJob:
    """One attention job, described for the time model: one token and some of its query heads.

    Attributes:
        place: name under which the L2 model knows the job's queries and results.
        lists: (bytes, name in the L2 model or None) of each load before the queries: indices, which say where the job's
            keys are, and attention sinks. None: the L2 does not hold these bytes.
        prepare: cycles of the vector lanes to compute the cache rows of the keys from the indices.
        tiles: (number of keys, True if a mask is added to their scores) of each tile of keys.
        indexed: True if gather instructions use the first of `lists` directly as row numbers. The lists of a later job
            that reuse its SRAM are then loaded only after these gathers.
    """

    place: tuple[int, ...]
    lists: tuple[tuple[float, Hashable | None], ...]
    prepare: float
    tiles: tuple[tuple[int, bool], ...]
    indexed: bool = False


def gathered_seconds(
    target: Target, plan: GatherPlan, cores: Sequence[Sequence[GatherJob]], held: Sequence[tuple[Hashable, float]]
) -> float:
    """Returns the seconds of an attention kernel that gathers keys by index, without launch overhead.

    The time is from the start of the streams until the last result is stored.

    Args:
        target: the chip and its kernel library.
        plan: the tile sizes.
        cores: the jobs of each core, in order.
        held: (name, bytes) of each tile that the L2 holds at the start, in addition to the queries of all jobs.
    """
    l2 = TilesInL2.of(target)
    for place, size in held:
        l2.hold(place, size)
    for job in sorted((job for mine in cores for job in mine), key=lambda job: job.place):
        l2.hold(("queries", *job.place), plan.rows * plan.d * 4.0)
    made = [_Core(target, plan, mine) for mine in cores]
    return CoreLoop(target.chip, l2, [(c.loads(), c.compute(), c.stores()) for c in made]).seconds()


@dataclass
class _Core:
    """Time model of one core. Each list has the times, in seconds, at which the core reached a point of its work.

    Attributes:
        target: the chip and its kernel library.
        plan: the tile sizes.
        jobs: the core's jobs, in order.
        listed: for each job, when its indices have been loaded.
        located: for each job, when the cache rows of its keys are known.
        gathered: for each tile of keys, when it is in SRAM.
        multiplied: for each tile of keys, when it has been used, so that its SRAM is free.
        queries, sums, results: for each job, when its queries, sums and results have been used for the last time.
    """

    target: Target
    plan: GatherPlan
    jobs: Sequence[GatherJob]
    listed: list[float] = field(default_factory=list)
    located: list[float] = field(default_factory=list)
    gathered: list[float] = field(default_factory=list)
    multiplied: list[float] = field(default_factory=list)
    queries: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    results: list[float] = field(default_factory=list)

    def loads(self) -> Program:
        """Yields a Transfer for each load of the core, in order, and None while it waits for the core's computation.

        A job's indices and queries are loaded before the previous job's keys.
        """
        plan, chip, tiles = self.plan, self.target.chip, 0
        now = visible = 0.0
        ends = list(accumulate(len(job.tiles) for job in self.jobs))  # number of tiles up to each job
        for number in range(-1, len(self.jobs)):
            if number + 1 < len(self.jobs):
                job, reused = self.jobs[number + 1], number + 1 - AHEAD
                if job.indexed and reused >= 0:
                    now = max(now, self.gathered[ends[reused] - 1])
                for size, place in job.lists:
                    x = Transfer(now, size, place)
                    yield x
                    now, visible = x.end, max(visible, x.visible)
                self.listed.append(visible)
                now = max(now, (yield from until(self.queries, reused)))
                x = Transfer(now, 4.0 * plan.rows * plan.d, ("queries", *job.place))
                yield x
                now, visible = x.end, max(visible, x.visible)
            if number < 0:
                continue
            now = max(now, (yield from until(self.sums, number - 2)))
            located = yield from until(self.located, number)
            now += 4.0 * plan.rows * (plan.dv + 2) / chip.sram_bytes_per_cycle / chip.clock_hz
            for n, _ in self.jobs[number].tiles:
                now = max(now, located, (yield from until(self.multiplied, tiles - 2)))
                for width in plan.gathered:
                    x = Transfer(now, n * width * plan.bits / 8)
                    yield x
                    now, visible = x.end, max(visible, x.visible)
                self.gathered.append(visible)
                tiles += 1

    def compute(self) -> Program:
        """Model the core's computation; yields None while it waits for loads or stores.

        Before the first tile of a job is computed, the cache rows of the next job's keys are computed.
        """
        plan, chip, on, rows = self.plan, self.target.chip, self.target, self.plan.rows
        array = lanes = 0.0
        tiles, hz = 0, chip.clock_hz
        for number in range(-1, len(self.jobs)):
            if number + 1 < len(self.jobs):
                listed, prepare = (yield from until(self.listed, number + 1)), self.jobs[number + 1].prepare
                if prepare:
                    lanes = max(lanes, listed) + prepare / hz
                self.located.append(max(listed, lanes * bool(prepare)))
            if number < 0:
                continue
            for n, masked in self.jobs[number].tiles:
                gathered = yield from until(self.gathered, tiles)
                softmax = softmax_cycles(chip, rows * n) + vector_cycles(chip, rows * plan.dv)
                cycles = map_cycles(chip, ADDED, rows * n) * masked + exposed(on, float(softmax))
                scored = max(array, gathered) + float(matmul_cycles(on, rows, n, plan.d, "f32")) / hz
                lanes = max(lanes, scored) + cycles / hz
                array = lanes + float(matmul_cycles(on, rows, plan.dv, n, "f32")) / hz
                self.multiplied.append(array)
                tiles += 1
            self.queries.append(scored)
            free = yield from until(self.results, number - 2)
            lanes = max(lanes, array, free) + float(vector_cycles(chip, 2 * rows * plan.dv, rows)) / hz
            self.sums.append(lanes)

    def stores(self) -> Program:
        """Yields a Transfer for each store of a result, in order, and None while it waits for a result."""
        now, size = 0.0, 4.0 * self.plan.rows * self.plan.dv
        for number, job in enumerate(self.jobs):
            x = Transfer(max(now, (yield from until(self.sums, number))), size, ("results", *job.place), writes=True)
            yield x
            now = x.end
            self.results.append(now)


class GatherTiles:
    """SRAM and accumulator tiles of one core: queries of AHEAD jobs, two tiles of keys, two of sums, two of results."""

    def __init__(self, k: StreamBuilder, plan: GatherPlan, format: str) -> None:
        self.k, self.plan, rows = k, plan, plan.rows
        self.queries, self.results = k.ring(AHEAD, rows, plan.d), k.ring(2, rows, plan.dv)
        self.pairs, self.p = k.ring(2, plan.keys, sum(plan.gathered), format), k.tile(rows, plan.keys)
        self.totals, self.scores = k.ring(2, rows, plan.dv, "f32", "acc"), k.tile(rows, plan.keys, "f32", "acc")
        self.maxima, self.lengths, self.alpha = k.ring(2, rows, 1), k.ring(2, rows, 1), k.tile(rows, 1)

    def attend(
        self, queries: Region, parts: Sequence[tuple[Sequence[Region], Region, Region | None]], sinks: Region | None,
        how: dict[str, Any],
    ) -> Region:  # fmt: skip
        """Emit the instructions that compute the attention of one job. Returns the SRAM tile with its result.

        Args:
            queries: SRAM tile with the job's queries.
            parts: the keys, in parts; the job attends to all of them. Each part is (tables from which the columns of a
                key are gathered, row numbers in these tables, mask that is added to the scores or None). The last
                columns that are gathered for a key are its value.
            sinks: scores of an extra key without value, [1, rows] in SRAM, or None.
            how: fields of the Softmax instruction, such as scale and temperature; `query` is the token's position.
        """
        k, plan, rows = self.k, self.plan, self.plan.rows
        sums, m, length = self.totals.next(), self.maxima.next(), self.lengths.next()
        k.emit(isa.Fill(dst=sums, value=0.0))
        k.emit(isa.Fill(dst=length, value=0.0 if sinks is None else 1.0))
        if sinks is None:
            k.emit(isa.Fill(dst=m, value=float("-inf")))
        else:
            k.emit(isa.Convert(dst=m.shaped(1, rows), src=sinks))
        for tables, index, mask in parts:
            for tile in slices(index.cols, plan.keys):
                n, pair, done = tile.stop - tile.start, self.pairs.next(), 0
                for table in tables:
                    to = pair.part(slice(0, n), slice(done, done + table.cols))
                    k.emit(isa.Gather(dst=to, table=table, index=index.part(cols=tile)))
                    done += table.cols
                pair, s, weights = pair.part(slice(0, n)), self.scores.shaped(rows, n), self.p.shaped(rows, n)
                k.emit(isa.Matmul(acc=s, a=queries, b=pair.part(cols=slice(0, plan.d))))
                if mask is not None:
                    k.emit(isa.Map(dst=s, a=s, b=mask.part(cols=tile), steps=ADDED))
                seen = {"pack": rows, "keys": n, "key": how["query"] - n + 1}
                k.emit(isa.Softmax(p=weights, m=m, l=length, alpha=self.alpha, scores=s, **seen, **how))
                k.emit(isa.Rescale(acc=sums, alpha=self.alpha))
                values = pair.part(cols=slice(done - plan.dv, done))
                k.emit(isa.Matmul(acc=sums, a=weights, b=values, by_rows=True, accumulate=True))
        y = self.results.next()
        k.emit(isa.Merge(dst=y, sums=sums, m=m, l=length))
        return y
