"""Tiling: how the instruction streams of a product cut it into tiles, steps over K and jobs of cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.chips import Target
from intaglio.silicon.kernels.chip_memory import shifted, slices
from intaglio.silicon.kernels.product import DRAIN_PART, Grouped, time_choices
from intaglio.silicon.memory import MachineError

INDEX_TILES = 4  # tiles of row numbers by which results are stored


def scale_columns(group: int, k: int) -> int:
    """Returns how many consecutive columns of x [m, k] share a scale, in a product with quantised weights.

    It is the smallest multiple of `group` that is at least formats.SPAN, but at most `k`.

    group: number of consecutive weights of a row that share a scale; 0: weights have no scales, and the result is `k`.
    """
    return min(k, group * -(-formats.SPAN // group)) if group else k


def groups_in(group: int, depth: int) -> int:
    """Returns an upper bound for the number of scale groups that `depth` consecutive columns of weights touch.

    It is 0 if the weights have no scales. group: number of consecutive weights of a row that share a scale; 0: none.
    """
    return -(-depth // group) + 1 if group else 0


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of a matrix product, and how a core divides its SRAM and accumulators among tiles.

    Attributes:
        rows, columns: size of a tile of the result; for a GLU pair, the columns of each side.
        parts: largest number of parts into which K is split. Each part is summed on its own, and a second pass adds the
            sums.
        depth: number of K values in one step, whose operands are loaded together.
        stages: number of steps whose operands SRAM holds at the same time.
        drain_rows: number of rows that move from accumulators to SRAM at a time.
        at_once: number of tiles between which a core alternates: it computes one step of each, then the next step of
            each.
        banks: 2 if a core begins its next tiles in other accumulators while it stores the current ones, else 1.
        block: rows and columns, in tiles, of a block of neighbouring tiles that the cores compute at the same time.
        scaled: number of tiles in each ring (circular SRAM buffer) of scales, for x and for w.
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
    scaled: int


def tiling(
    target: Target, size: tuple[int, int, int], x_format: str, w_format: str, w_bits: float,
    group: int = 0, sides: int = 1, residual: bool = False, heads: int = 1, grouped: Grouped | None = None,
) -> Tiling:  # fmt: skip
    """Returns the Tiling with which `heads` products x [m, k] @ w.T [k, n] take the least modelled time.

    The times come from time_choices(), which does not count the SRAM for the residual and for the scales. If SRAM has
    no room for these in addition to the tiles, the Tiling has fewer stages or a smaller depth than the fastest choice.
    The depth may also be smaller so that the columns with one scale are divided into equal steps.

    Args:
        target: chip and kernel library.
        size: (m, n, k): rows of x, columns of the result before activation (both sides of a GLU pair), columns of x.
        x_format: number format in which the product reads x, such as "int8".
        w_format: number format of a weight's code.
        w_bits: bits per weight, scales included.
        group: number of consecutive weights of a row that share a scale; 0: the weights have no scales.
        sides: 2 for a GLU pair, else 1.
        residual: True if a residual is added.
        heads: number of products, each with its own x and w.
        grouped: row counts of several products (experts), in place of m and heads, which are then ignored; None: m and
            heads count.

    Raises MachineError if SRAM has no room even for two stages of one K value each.
    """
    chip, (m, n, k) = target.chip, size
    how = time_choices(
        target, max(1, m), n, k, x_format, w_format, w_bits, 4.0, sides == 2, heads=heads, grouped=grouped
    )
    i = int(np.argmin(how["seconds"]))
    tm, tn, parts = (float(v[i]) for v in how["tile"])
    rows, columns = int(tm), -(-int(tn) // sides)
    buffers = 8 * columns * (1 + residual)  # bytes of a drained row, in two buffers
    drain_rows = max(1, min(rows, chip.sram_bytes // DRAIN_PART // buffers))
    bits = rows * formats.bits(x_format) + sides * columns * formats.bits(w_format)
    depth, left = max(1, int(how["depth"][i])), chip.sram_bytes - drain_rows * buffers - 8 * columns - 1024
    span, most = scale_columns(group, k), int(how["ring"][i])
    if depth < span < k:  # no step crosses a border of a span, so a span has equal steps, and as many bytes in flight
        array = chip.array_shape[2]
        equal = min(depth, -(-span // -(-span // depth) // array) * array)
        depth, most = equal, most * depth // equal
    if grouped and grouped.scattered:
        left -= INDEX_TILES * (4 * rows + 64)
    at_once, block = int(how["at_once"][i]), (int(how["block"][0][i]), int(how["block"][1][i]))
    whole = group >= k
    scales = 4 * rows + 4 * sides * columns + 64 * (1 + sides)
    while True:
        groups = groups_in(group, depth) * (not whole)
        stage = bits * depth // 8 + 64 * (1 + sides)
        if groups:
            stage += 4 * rows + 4 * sides * columns * groups + 64 * (1 + sides) * (1 + groups)
        for stages in range(max(2, most), 1, -1):
            # Loads of later tiles wait for a tile of scales if fewer are held than there are tiles in flight
            scaled = max(2 * at_once, 1 + -(-stages // max(1, int(k // depth / parts)))) if whole else stages
            if stages * stage + whole * scaled * scales <= left:
                banks = int(how["banks"][i]) if target.library.persistent else 1
                return Tiling(rows, columns, int(parts), depth, stages, drain_rows, at_once, banks, block, scaled)
        if depth == 1:
            raise MachineError(
                f"{chip.name}: {chip.sram_bytes:,} bytes of SRAM do not fit a product tile of {rows} rows"
            )
        depth = max(2, depth // 4 * 2) if depth > 2 else 1  # even, so that 4-bit values start at a byte


def in_blocks(rows: Sequence[Any], columns: Sequence[Any], block: tuple[int, int]) -> list[tuple[Any, Any]]:
    """Returns a list of all pairs (item of `rows`, item of `columns`), ordered block by block.

    A block has block[0] items of `rows` and block[1] items of `columns`; blocks at the edge are smaller. Blocks follow
    each other row by row, and so do the pairs in a block. Tiles that cores compute at the same time are then
    neighbours.
    """
    tall, wide = block
    return [
        (r, c)
        for top in slices(len(rows), tall) for left in slices(len(columns), wide)
        for r in rows[top] for c in columns[left]
    ]  # fmt: skip


def split_steps(k: int, span: int, cut: Tiling) -> list[list[slice]]:
    """Cut K, the columns 0 .. k - 1 of x, into at most cut.parts parts, and each part into steps.

    Returns a list with one item for each part: the list of its steps, which are slices of K in ascending order. A step
    has at most cut.depth columns, which are loaded and multiplied together. All columns of a step have the same scale:
    columns 0 .. span - 1 share one scale, the next `span` columns another, and so on.
    """
    every = [
        shifted(piece, outer.start)
        for outer in slices(k, span) for piece in slices(outer.stop - outer.start, cut.depth)
    ]  # fmt: skip
    return [every[part] for part in slices(len(every), -(-len(every) // cut.parts))]


@dataclass(frozen=True)
class Job:
    """One job of a core in a matrix product: a tile of the result, summed over all of K or over one part of K.

    Attributes:
        rows: slice of the rows of x and of the result.
        columns: slice of the columns of the result; for a GLU pair, of each side.
        steps: slices of K; the tile is computed in these steps.
        index: number of the part of K, of the expert or of the head. Jobs with different numbers share no operands.
    """

    rows: slice
    columns: slice
    steps: Sequence[slice]
    index: int = 0


def tile_jobs(rows: int, columns: int, parts: Sequence[Sequence[slice]], cut: Tiling) -> list[Job]:
    """Returns a list of the Jobs of a product, in the order in which they are dealt to the cores.

    rows, columns: size of the result; for a GLU pair, columns of one side. parts: for each part of K, the list of its
    steps. cut: tile sizes.
    """
    tiles = in_blocks(slices(rows, cut.rows), slices(columns, cut.columns), cut.block)
    return [Job(r, c, steps, part) for r, c in tiles for part, steps in enumerate(parts)]
