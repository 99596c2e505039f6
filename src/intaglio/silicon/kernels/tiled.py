"""Streams of a matrix product in the tiles that its closed form chooses (product.py): rounding of x, then the product.

x is rounded to the op's x_format by a launch of its own, as the closed form assumes: it times the product of codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from intaglio import formats
from intaglio.chips import Target
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, QuantisedRegion, codes_of, deal_jobs, load, slices
from intaglio.silicon.kernels.product import time_choices
from intaglio.silicon.kernels.rows import ROWS
from intaglio.silicon.memory import MachineError, Region
from intaglio.silicon.stream import StreamBuilder

DRAIN_PART = 8  # a tile is drained in pieces whose buffers take at most this part of SRAM


def scale_columns(w: Region | QuantisedRegion, k: int) -> int:
    """Number of columns of x [m, k] that share a scale: w.scale_columns, at most `k`; `k` if w has no groups."""
    return min(k, w.scale_columns) if isinstance(w, QuantisedRegion) else k


def groups_in(w: Region | QuantisedRegion, depth: int) -> int:
    """Largest number of groups of w that a run of `depth` columns touches; 0 if w has no groups."""
    return -(-depth // w.group) + 1 if isinstance(w, QuantisedRegion) else 0


def rounded(mem: ChipMemory, site: str, x: Region, x_format: str, span: int) -> tuple[Region, Region | None]:
    """Round x f32 [m, k] to `x_format` in a launch of its own. Returns (codes [m, k], scales f32 [m, G] or None).

    int8 has a scale for each `span` columns, fp8row one for each row; bf16 and f32 have none, and f32 is not
    rounded.
    """
    if x_format == "f32":
        return x, None
    span = span if x_format == "int8" else x.cols
    codes = mem.heap.allocate(x.rows, x.cols, formats.element(x_format))
    scales = mem.heap.allocate(x.rows, -(-x.cols // span), "f32") if x_format in ("int8", "fp8row") else None
    step = max(1, min(ROWS, mem.chip.sram_bytes // (3 * 8 * span)))
    jobs = [(rows, g, part) for rows in slices(x.rows, step) for g, part in enumerate(slices(x.cols, span))]
    streams = []
    for k, mine in deal_jobs(mem.chip, jobs, site):
        raw, results, factors = k.ring(2, step, span), k.ring(2, step, span, codes.format), k.ring(2, step, 1)
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


@dataclass(frozen=True)
class Tiling:
    """How a core computes a product.

    Attributes:
        rows, columns: size of a tile of the result; with a GLU pair, columns of each side.
        depth: K values of a step.
        stages: steps in flight.
        drain_rows: rows that are drained at a time.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    drain_rows: int


def tiling(
    target: Target, m: int, n: int, x: Region, w_bits: float, w: Region | QuantisedRegion, sides: int, residual: bool
) -> Tiling:
    """The Tiling for a product of codes x [m, k] with w, of n columns in all.

    It is the one without a K split that the product's timing (time_choices()) finds fastest. Stages and depth shrink if
    SRAM must also hold what the timing leaves out: result, residual and scales. w_bits: bits per weight with its
    scales. sides: 2 for a GLU pair, else 1. residual: True if a residual is added. Raises MachineError if SRAM does not
    fit two stages of one K value.
    """
    chip, k = target.chip, x.cols
    how = time_choices(target, max(1, m), n, k, x.format, codes_of(w).format, w_bits, 4.0, sides == 2)
    tm, tn, split = how["tile"]
    i = int(np.argmin(np.where(split == 1, how["seconds"], np.inf)))
    rows, columns = min(int(tm[i]), max(1, m)), min(-(-int(tn[i]) // sides), n // sides)
    buffers = 8 * columns * (1 + residual)  # bytes of a drained row, in two buffers
    drain_rows = max(1, min(rows, chip.sram_bytes // DRAIN_PART // buffers))
    bits = rows * formats.bits(x.format) + sides * columns * formats.bits(codes_of(w).format)
    depth, left = min(int(how["depth"]), k), chip.sram_bytes - drain_rows * buffers - 8 * columns - 1024
    while True:
        groups = groups_in(w, depth)
        stage = bits * depth // 8 + 4 * rows + 4 * sides * columns * groups + 64 * (1 + sides) * (2 + groups)
        if 2 * stage <= left:
            return Tiling(rows, columns, depth, max(2, min(int(how["ring"][i]), left // stage)), drain_rows)
        if depth == 1:
            raise MachineError(
                f"{chip.name}: {chip.sram_bytes:,} bytes of SRAM do not fit a product tile of {rows} rows"
            )
        depth = max(2, depth // 4 * 2) if depth > 2 else 1  # even, so that 4-bit values start at a byte


class TiledProduct:
    """The operands of a product on one core: rings of tiles of x and w, and the instructions that multiply them."""

    def __init__(
        self, k: StreamBuilder, x: Region, scales: Region | None, w: Region | QuantisedRegion, span: int, cut: Tiling,
        sides: int,
    ) -> None:  # fmt: skip
        self.k, self.x, self.scales, self.w, self.span, self.cut = k, x, scales, w, span, cut
        depth, groups = cut.depth, groups_in(w, cut.depth)
        self.x_tiles = k.ring(cut.stages, cut.rows, depth, x.format)
        self.w_tiles = [k.ring(cut.stages, cut.columns, depth, codes_of(w).format) for _ in range(sides)]
        self.row_scales = k.ring(cut.stages, cut.rows, 1) if scales is not None else None
        self.column_scales = [k.ring(cut.stages, groups, cut.columns) if groups else None for _ in range(sides)]

    def steps(self) -> list[slice]:
        """A list of the steps over K, as slices. None of them crosses a border of columns of x that share a scale."""
        return [
            slice(outer.start + piece.start, outer.start + piece.stop)
            for outer in slices(self.x.cols, self.span) for piece in slices(outer.stop - outer.start, self.cut.depth)
        ]  # fmt: skip

    def multiply(self, rows: slice, accs: Sequence[Region], columns: Sequence[slice]) -> None:
        """Emit the instructions for acc = x[rows] @ w[columns].T over all of K.

        accs, columns: an accumulator and a run of columns of w; two of each for a GLU pair (gate, up).
        """
        factor, held = None, dict[int, tuple[slice, Region]]()
        for step in self.steps():
            a = load(self.k, self.x_tiles.next(), self.x.part(rows, step))
            if self.scales is not None and self.row_scales is not None:
                g = step.start // self.span if self.scales.cols > 1 else 0
                if factor is None or (self.scales.cols > 1 and step.start % self.span == 0):
                    factor = load(self.k, self.row_scales.next(), self.scales.part(rows, slice(g, g + 1)))
            for side, (acc, part) in enumerate(zip(accs, columns, strict=True)):
                b = load(self.k, self.w_tiles[side].next(), codes_of(self.w).part(part, step))
                for cols, scale in self.groups(side, part, step, held):
                    x, y = a.part(cols=cols), b.part(cols=cols)
                    start = step.start + cols.start > 0
                    self.k.emit(isa.Matmul(acc=acc, a=x, b=y, row_scale=factor, col_scale=scale, accumulate=start))

    def groups(
        self, side: int, part: slice, step: slice, held: dict[int, tuple[slice, Region]]
    ) -> list[tuple[slice, Region | None]]:
        """A list of (columns, scales of w or None) for each run of a step's columns that shares scales.

        Loads the scales that are not in `held` yet.
        """
        ring = self.column_scales[side]
        if not isinstance(self.w, QuantisedRegion) or ring is None:
            return [(slice(0, step.stop - step.start), None)]
        size = self.w.group
        numbers = slice(step.start // size, -(-step.stop // size))
        if side not in held or held[side][0] != numbers:
            held[side] = numbers, load(self.k, ring.next(), self.w.scales_t.part(numbers, part))
        scales = held[side][1]
        cuts = [max(step.start, g * size) - step.start for g in range(numbers.start, numbers.stop)]
        ends = [*cuts[1:], step.stop - step.start]
        return [(slice(a, z), scales.part(slice(i, i + 1))) for i, (a, z) in enumerate(zip(cuts, ends, strict=True))]
