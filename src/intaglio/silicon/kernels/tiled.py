"""Streams of a matrix product in the loop that its closed form times (product.py): rounding of x, then the product.

x is rounded to the op's x_format by a launch of its own, as the closed form assumes: it times the product of codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.chips import Target
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, QuantisedRegion, codes_of, deal_jobs, load, slices
from intaglio.silicon.kernels.product import DRAIN_PART, block_shape, time_choices
from intaglio.silicon.kernels.rows import ROWS
from intaglio.silicon.memory import MachineError, Region
from intaglio.silicon.stream import StreamBuilder


def scale_columns(w: Region | QuantisedRegion, k: int) -> int:
    """Number of columns of x [m, k] that share a scale: w.scale_columns, at most `k`; `k` if w has no groups."""
    return min(k, w.scale_columns) if isinstance(w, QuantisedRegion) else k


def groups_in(w: Region | QuantisedRegion, depth: int) -> int:
    """Largest number of groups of w that a run of `depth` columns touches; 0 if w has no groups."""
    return -(-depth // w.group) + 1 if isinstance(w, QuantisedRegion) else 0


def rounded(mem: ChipMemory, site: str, x: Region, x_format: str, span: int) -> tuple[Region, Region | None]:
    """Round x f32 [m, k] to `x_format`, executing that on the chip now. Returns (codes [m, k], scales f32 [m, G]).

    int8 has one scale for every `span` columns of a row, fp8row one for each row. For bf16 the scales are None. For f32
    the result is (x, None), and nothing is executed.
    """
    if x_format == "f32":
        return x, None
    span = span if x_format == "int8" else x.cols
    codes = mem.heap.allocate(x.rows, x.cols, formats.element(x_format))
    scales = mem.heap.allocate(x.rows, -(-x.cols // span), "f32") if x_format in ("int8", "fp8row") else None
    sram = mem.chip.sram_bytes
    if scales is None:
        span = min(span, sram // (3 * 8))
    step = max(1, min(ROWS, sram // (3 * 8 * span)))
    tiles = 2 if step * span * (4 + formats.bits(codes.format) / 8) * 2 < sram - 1024 else 1
    jobs = [(rows, g, part) for rows in slices(x.rows, step) for g, part in enumerate(slices(x.cols, span))]
    streams = []
    for k, mine in deal_jobs(mem.chip, jobs, site):
        raw, results = k.ring(tiles, step, span), k.ring(tiles, step, span, codes.format)
        factors = k.ring(2, step, 1)
        for rows, g, part in mine:
            a = load(k, raw.next(), x.part(rows, part))
            y = results.next().shaped(a.rows, a.cols)
            if scales is None:
                k.emit(isa.Convert(dst=y, src=a))
            else:
                factor = factors.next().shaped(a.rows, 1)
                k.emit(isa.Quantise(codes=y, scale=factor, x=a))
                k.emit(isa.Store(dst=scales.part(rows, slice(g, g + 1)), src=factor))
            k.emit(isa.Store(dst=codes.part(rows, part), src=y))
        streams.append(k.stream())
    mem.run(streams)
    return codes, scales


def one_scale(w: Region | QuantisedRegion) -> bool:
    """True if w is quantised with a single scale for each row; False if it is not quantised."""
    return isinstance(w, QuantisedRegion) and w.scales_t.rows == 1


@dataclass(frozen=True)
class Tiling:
    """How the cores compute a product.

    Attributes:
        rows, columns: size of a tile of the result; for a GLU pair, the columns of each side.
        parts: parts into which K is split. Each is summed on its own, and a second pass adds the sums.
        depth: K values of a step, whose operands are loaded together.
        stages: steps whose operands SRAM holds at the same time.
        drain_rows: rows that move from accumulators to SRAM at a time.
        at_once: tiles between which a core alternates: it computes one step of each, then the next step of each.
        banks: 2 if a core begins its next tiles in other accumulators while it stores these, else 1.
        block: rows and columns, in tiles, of a block of neighbouring tiles that cores compute at the same time.
    """

    rows: int
    columns: int
    parts: int
    depth: int
    stages: int
    drain_rows: int
    at_once: int
    banks: int
    block: tuple[int, int]


def tiling(
    target: Target, m: int, n: int, x: Region, w_bits: float, w: Region | QuantisedRegion, sides: int, residual: bool
) -> Tiling:
    """The Tiling of a product x [m, k] @ w.T [k, n]: the fastest that time_choices() finds, made to fit SRAM.

    time_choices() does not count the SRAM of the residual and of the scales. Where these do not fit as well, the Tiling
    has fewer stages, or a smaller depth, than time_choices() gives.

    Args:
        target: chip and kernel library.
        m: rows of x.
        n: columns of the result before activation, both sides of a GLU pair.
        x: codes of x, already rounded.
        w_bits: bits per weight, scales included.
        w: the weights.
        sides: 2 for a GLU pair, else 1.
        residual: True if a residual is added.

    Raises MachineError if SRAM does not fit two stages with one K value each.
    """
    chip, k = target.chip, x.cols
    how = time_choices(target, max(1, m), n, k, x.format, codes_of(w).format, w_bits, 4.0, sides == 2)
    i = int(np.argmin(how["seconds"]))
    tm, tn, parts = (float(v[i]) for v in how["tile"])
    rows, columns = int(tm), -(-int(tn) // sides)
    buffers = 8 * columns * (1 + residual)  # bytes of a drained row, in two buffers
    drain_rows = max(1, min(rows, m, chip.sram_bytes // DRAIN_PART // buffers))
    bits = rows * formats.bits(x.format) + sides * columns * formats.bits(codes_of(w).format)
    depth, left = max(1, int(how["depth"][i])), chip.sram_bytes - drain_rows * buffers - 8 * columns - 1024
    at_once, block = int(how["at_once"][i]), block_shape(target, np.ceil(m / tm), np.ceil(n / tn), tm, tn, parts)
    whole = one_scale(w)
    if whole:
        left -= 2 * at_once * (4 * rows + 4 * sides * columns + 64 * (1 + sides))
    while True:
        groups = groups_in(w, depth) * (not whole)
        stage = bits * depth // 8 + 64 * (1 + sides)
        if groups:
            stage += 4 * rows + 4 * sides * columns * groups + 64 * (1 + sides) * (1 + groups)
        if 2 * stage <= left:
            stages = max(2, min(int(how["ring"][i]), left // stage))
            shape = int(block[0]), int(block[1])
            banks = int(how["banks"][i]) if target.library.persistent else 1
            return Tiling(rows, columns, int(parts), depth, stages, drain_rows, at_once, banks, shape)
        if depth == 1:
            raise MachineError(
                f"{chip.name}: {chip.sram_bytes:,} bytes of SRAM do not fit a product tile of {rows} rows"
            )
        depth = max(2, depth // 4 * 2) if depth > 2 else 1  # even, so that 4-bit values start at a byte


def in_blocks(rows: Sequence[Any], columns: Sequence[Any], block: tuple[int, int]) -> list[tuple[Any, Any]]:
    """A list of all pairs (item of `rows`, item of `columns`), ordered block by block.

    block: items of `rows` and of `columns` in a block; blocks at the edge are smaller. Blocks follow each other row by
    row, and so do the pairs of a block. Tiles that cores compute at the same time are then neighbours.
    """
    tall, wide = block
    return [
        (r, c)
        for top in slices(len(rows), tall) for left in slices(len(columns), wide)
        for r in rows[top] for c in columns[left]
    ]  # fmt: skip


@dataclass
class TileJob:
    """A tile of the result that a core computes, for one part of K if K is split.

    Attributes:
        rows: rows of x and of the result.
        columns: the rows of w, which are columns of x @ w.T: one slice, or two for a GLU pair (gate, up).
        accs: the accumulators, one for each item of `columns`.
        steps: the steps over K, as slices.
        factor: the tile with the row scales of x that were loaded last; None before the first load.
        held: the scales of w that were loaded last, by index into `columns`: (slice of group numbers, their tile).
    """

    rows: slice
    columns: Sequence[slice]
    accs: Sequence[Region]
    steps: Sequence[slice]
    factor: Region | None = None
    held: dict[int, tuple[slice, Region]] = field(default_factory=dict)


def split_steps(k: int, span: int, cut: Tiling) -> list[list[slice]]:
    """The slices of 0 .. k - 1 that are multiplied step by step: an inner list for each part of K, in order.

    There are at most cut.parts inner lists. A slice has at most cut.depth values, and lies within one run of `span`
    columns of x, which share a scale.
    """
    every = [
        slice(outer.start + piece.start, outer.start + piece.stop)
        for outer in slices(k, span) for piece in slices(outer.stop - outer.start, cut.depth)
    ]  # fmt: skip
    return [every[part] for part in slices(len(every), -(-len(every) // cut.parts))]


class TiledProduct:
    """Emits the loads and matmuls of a product on one core, and holds its SRAM tiles of x, of w and of their scales.

    Tiles at the edge of the result are padded with zeros.

    scales: row scales of x, or None. span: columns of x that share a scale. cut: the Tiling. sides: 2 for a GLU pair,
    else 1. w_first: True to load tiles of w before those of x. If half of the cores do so, not all load x from the L2
    at the same time, and HBM is never idle.
    """

    def __init__(
        self, k: StreamBuilder, x: Region, scales: Region | None, w: Region | QuantisedRegion, span: int, cut: Tiling,
        sides: int, w_first: bool,
    ) -> None:  # fmt: skip
        self.k, self.x, self.scales, self.w, self.span, self.cut = k, x, scales, w, span, cut
        self.w_first = w_first
        depth, groups, scaled = cut.depth, groups_in(w, cut.depth), cut.stages
        if one_scale(w):  # its scales and those of x stay while a tile is computed
            groups, scaled = 1, 2 * cut.at_once
        self.x_tiles = k.ring(cut.stages, cut.rows, depth, x.format)
        self.w_tiles = [k.ring(cut.stages, cut.columns, depth, codes_of(w).format) for _ in range(sides)]
        self.row_scales = k.ring(scaled, cut.rows, 1) if scales is not None else None
        self.column_scales = [k.ring(scaled, groups, cut.columns) if groups else None for _ in range(sides)]

    def multiply(self, jobs: Sequence[TileJob]) -> None:
        """Emit instructions that compute acc = x[rows] @ w[columns].T over the steps of each job, with loads.

        The jobs are interleaved: the first step of each job, then the second step of each, and so on.
        """
        for i in range(max(len(job.steps) for job in jobs)):
            for job in jobs:
                if i < len(job.steps):
                    self.step(job, job.steps[i], accumulate=i > 0)

    def step(self, job: TileJob, step: slice, accumulate: bool) -> None:
        """Emit the loads of one step of a job, and the matmuls of what was loaded.

        step: slice of K. accumulate: True to add to the job's accumulators, False to overwrite them (first step).
        """
        a = None if self.w_first else self.load_x(job, step)
        sides = [
            load(self.k, self.w_tiles[side].next(), codes_of(self.w).part(part, step), self.cut.columns)
            for side, part in enumerate(job.columns)
        ]
        a = a or self.load_x(job, step)
        for side, (acc, part, b) in enumerate(zip(job.accs, job.columns, sides, strict=True)):
            for i, (cols, scale) in enumerate(self.groups(side, part, step, job.held)):
                x, y = a.part(cols=cols), b.part(cols=cols)
                more = accumulate or i > 0
                self.k.emit(isa.Matmul(acc=acc, a=x, b=y, row_scale=job.factor, col_scale=scale, accumulate=more))

    def load_x(self, job: TileJob, step: slice) -> Region:
        """Emit the load of columns `step` of a job's rows of x; returns the tile.

        If x has scales, also loads the row scales of these columns into job.factor, unless job.factor has them from the
        job's step before.
        """
        a = load(self.k, self.x_tiles.next(), self.x.part(job.rows, step), self.cut.rows)
        if self.scales is not None and self.row_scales is not None:
            g = step.start // self.span if self.scales.cols > 1 else 0
            if job.factor is None or (self.scales.cols > 1 and step.start % self.span == 0):
                scales = self.scales.part(job.rows, slice(g, g + 1))
                job.factor = load(self.k, self.row_scales.next(), scales, self.cut.rows)
        return a

    def groups(
        self, side: int, part: slice, step: slice, held: dict[int, tuple[slice, Region]]
    ) -> list[tuple[slice, Region | None]]:
        """Divide a step's columns into the groups that share scales of w; a list of (columns, region of the scales).

        The columns are a slice relative to the step's first. If w has no scales, the list has one item, with None as
        region.

        side: index into job.columns. part: the rows of w. step: slice of K. held: TileJob.held; if it has no scales for
        these groups, they are loaded and stored in it.
        """
        ring = self.column_scales[side]
        if not isinstance(self.w, QuantisedRegion) or ring is None:
            return [(slice(0, step.stop - step.start), None)]
        size = self.w.group
        numbers = slice(step.start // size, -(-step.stop // size))
        if side not in held or held[side][0] != numbers:
            scales = self.w.scales_t.part(numbers, part)
            held[side] = numbers, load(self.k, ring.next(), scales, columns=self.cut.columns)
        scales = held[side][1]
        cuts = [max(step.start, g * size) - step.start for g in range(numbers.start, numbers.stop)]
        ends = [*cuts[1:], step.stop - step.start]
        return [(slice(a, z), scales.part(slice(i, i + 1))) for i, (a, z) in enumerate(zip(cuts, ends, strict=True))]
