"""Instruction streams of an MoE layer: rows sorted by expert, grouped products with activation, the sum by token.

The products run in the loop of `linear` (tiled.py), with the tiles that the closed form finds fastest for these numbers
of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from intaglio.chips import Target
from intaglio.ops import Experts
from intaglio.silicon import isa
from intaglio.silicon.isa.vector import SCALED
from intaglio.silicon.kernels.chip_memory import (
    ChipMemory,
    QuantisedRegion,
    codes_of,
    deal_jobs,
    group_of,
    load,
    shifted,
    slices,
)
from intaglio.silicon.kernels.product import Grouped
from intaglio.silicon.kernels.product_loop import product_seconds
from intaglio.silicon.kernels.product_steps import ProductLoop
from intaglio.silicon.kernels.rows import ROWS
from intaglio.silicon.kernels.tiled import (
    Codes,
    RowReader,
    TileJob,
    pieces,
    product_streams,
)
from intaglio.silicon.kernels.tiling import INDEX_TILES, Job, Tiling, scale_columns, split_steps, tile_jobs, tiling
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Stream, StreamBuilder


def sort_by_expert(mem: ChipMemory, op: Experts, ids: Region, out: tuple[Region, Region, Region]) -> list[Stream]:
    """Returns a list with one Stream, which sorts the routed rows by expert on one core.

    A routed row is a pair of a token and one of the experts that it chose.

    Args:
        mem: the chip's memory.
        op: the op.
        ids: i32 [1, n], the expert of each routed row.
        out: three i32 regions for the results. First, [1, n]: the numbers of the routed rows, sorted by expert; rows of
            other ranks' experts come last. Second, [1, n]: the tokens of these rows, in the same order. Third, [1,
            held]: the number of rows of each expert of this rank.
    """
    k = StreamBuilder(op.site)
    tiles = [k.tile(r.rows, r.cols, "i32") for r in out]
    ids_tile = load(k, k.tile(1, ids.cols, "i32"), ids)
    order, tokens, counts = tiles
    experts = op.of or counts.cols
    top, first = mem.region(op.ids).cols, op.first
    k.emit(isa.Group(order=order, tokens=tokens, counts=counts, ids=ids_tile, top=top, first=first, experts=experts))
    for dst, src in zip(out, tiles, strict=True):
        k.emit(isa.Store(dst=dst, src=src))
    return [k.stream()]


def by_expert(mem: ChipMemory, op: Experts, order: Region, tokens: Region) -> Callable[[StreamBuilder, int], RowReader]:
    """Returns a function that makes readers. A reader loads rows of x in an order sorted by expert.

    The returned function is called as make(builder, step), with the StreamBuilder of a core and the largest number of
    rows of a tile. It returns a reader: a function read(tile, rows, columns), which emits the load of a part of x into
    `tile` and returns the filled region of `tile`. `rows` is a slice of the sorted rows, `columns` a slice of the
    columns of x. If op.scale_input is set, read() also multiplies each row by its routing weight.

    The function that makes readers is the argument `reader` of tiled.rounded(). order, tokens: the first two regions
    that sort_by_expert() writes.
    """
    x, weights = mem.region(op.x), mem.region(op.weights).shaped(order.cols, 1)

    def reader(k: StreamBuilder, step: int) -> RowReader:
        token_ring, place_ring, factors = k.ring(2, 1, step, "i32"), k.ring(2, 1, step, "i32"), k.ring(2, step, 1)

        def read(tile: Region, rows: slice, columns: slice) -> Region:
            raw = tile.shaped(rows.stop - rows.start, columns.stop - columns.start)
            token = load(k, token_ring.next(), tokens.part(cols=rows))
            k.emit(isa.Gather(dst=raw, table=x.part(cols=columns), index=token))
            if op.scale_input:
                place, factor = load(k, place_ring.next(), order.part(cols=rows)), factors.next().shaped(raw.rows, 1)
                k.emit(isa.Gather(dst=factor, table=weights, index=place))
                k.emit(isa.Map(dst=raw, a=raw, b=factor, steps=SCALED))
            return raw

        return read

    return reader


@dataclass(frozen=True)
class GroupedProduct:
    """A grouped matrix product, cut into tiles: each expert's rows of x times the expert's weights.

    Attributes:
        codes: the rows of x, sorted by expert and rounded to the format in which they are multiplied.
        cut: the tile sizes, the same for all experts.
        jobs: one TileJob for each tile of the result, one expert after the other. The `index` of a job is the number of
            its expert. Experts without rows have no jobs.
    """

    codes: Codes
    cut: Tiling
    jobs: list[TileJob]


def grouped_product(
    on: Target, codes: Codes, sides: Sequence[Region | QuantisedRegion], bits: float, n: int, counts: np.ndarray,
    scattered: bool,
) -> GroupedProduct:  # fmt: skip
    """Returns the GroupedProduct: the products of all experts that have rows, cut into tiles.

    Args:
        on: a target whose library offers the tile sizes of grouped products, see grouped_target().
        codes: rows of x, sorted by expert and rounded.
        sides: weights of all experts, each item [experts * n, K]. There are two items (gate and up) for a GLU pair,
            else one.
        bits: bits of a weight with its scales.
        n: number of result columns of one item of `sides`.
        counts: number of rows of each expert, int [experts]; at least one is above 0.
        scattered: True if rows of the result are stored by index.
    """
    k, groups = codes.x.cols, Grouped(tuple(counts[counts > 0].tolist()), scattered)
    size = codes.x.rows, len(sides) * n, k
    w = codes_of(sides[0]).format, bits, group_of(sides[0])
    cut = tiling(on, size, codes.x.format, *w, len(sides), grouped=groups)
    (steps,) = split_steps(k, codes.span, cut)
    jobs = [
        TileJob(job.rows, sides, [shifted(job.columns, job.index * n)] * len(sides), steps, job.columns, 0, job.index)
        for job in expert_jobs(counts.tolist(), n, steps, cut)
    ]
    return GroupedProduct(codes, cut, jobs)


def expert_jobs(counts: Sequence[int], n: int, steps: Sequence[slice], cut: Tiling) -> list[Job]:
    """Returns a list with one Job for each tile of each expert's product, sorted by expert.

    The `index` of a Job is the number of its expert. Experts without rows have no Jobs.

    Args:
        counts: number of rows of each expert. The rows of all experts are one matrix, sorted by expert.
        n: columns of the result.
        steps: slices of K; a tile is computed in these steps.
        cut: tile sizes.
    """
    jobs, first = list[Job](), 0
    for e, count in enumerate(counts):
        jobs += [replace(job, rows=shifted(job.rows, first), index=e) for job in tile_jobs(count, n, [steps], cut)]
        first += count
    return jobs


@lru_cache(maxsize=65536)
def grouped_seconds(
    on: Target, counts: tuple[int, ...], n: int, k: int, x_format: str, w_format: str, w_bits: float, group: int,
    sides: int, scattered: bool, out_bytes: float, before: float,
) -> float:  # fmt: skip
    """Returns the seconds that the streams of a grouped product take, without launch.

    Args:
        on: a target whose library offers the tile sizes of grouped products, see experts.grouped_target().
        counts: number of rows of each expert; at least one is above 0.
        n: result columns of one side.
        k: columns of x.
        x_format: number format of x.
        w_format: number format of the weights.
        w_bits: bits of a weight with its scales.
        group: number of weights of a row that share a scale; 0: weights have no scales.
        sides: 2 for a GLU pair (gate and up), else 1.
        scattered: True if rows of the result are stored by index.
        out_bytes: bytes of a value of the result.
        before: the kernel that runs before this one writes x. `before` is the number of bytes that it reads through
            the L2, divided by the number of bytes of x that it writes. 0: no kernel has just written x.
    """
    rows, groups = sum(counts), Grouped(tuple(c for c in counts if c), scattered)
    cut = tiling(on, (rows, sides * n, k), x_format, w_format, w_bits, group, sides, grouped=groups)
    span = scale_columns(group, k)
    (steps,) = split_steps(k, span, cut)
    loop = ProductLoop(
        cut=cut, x_format=x_format, w_format=w_format, group=group, span=span if x_format in ("int8", "e4m3") else 0,
        sides=sides, out_bytes=out_bytes, scattered=scattered, before=before,
    )  # fmt: skip
    return product_seconds(on, loop, expert_jobs(counts, n, steps, cut))[0]


Bias = tuple[Region, Region] | None  # [experts, n] in HBM, and a tile for part of one row


def biases(mem: ChipMemory, k: StreamBuilder, names: Sequence[str | None], columns: int) -> list[Bias]:
    """Returns a list with one pair for each name: (the bias's HBM region, a new SRAM tile [1, columns]).

    If a name is None, there is no bias, and the item is None instead of a pair.
    """
    return [(r, k.tile(1, columns, r.format)) if r else None for r in map(mem.optional_region, names)]


def bias_of(k: StreamBuilder, bias: Bias, e: int, columns: slice) -> Region | None:
    """Emit the load of expert `e`'s bias for the columns `columns`. Returns the filled part of the SRAM tile.

    Returns None if `bias` is None, which means that the experts have no bias. bias: an item of biases().
    """
    return load(k, bias[1], bias[0].part(slice(e, e + 1), columns)) if bias else None


def gate_up(mem: ChipMemory, op: Experts, product: GroupedProduct, out: Region) -> list[Stream]:
    """Returns a list of Streams that compute act(gate(x)) * up(x) into `out`: one for each core with work.

    Without a gate (op.gate is None) they compute act(up(x)). Each row of x is multiplied by the weights of its expert.

    product: the GroupedProduct of x with the gate and up weights. out: region [rows, inner] for the results, sorted by
    expert.
    """
    cut, how = product.cut, {n: getattr(op, n) for n in ("activation", "alpha", "limit", "shift")}

    def finisher(k: StreamBuilder) -> Callable[[TileJob], None]:
        extra = biases(mem, k, (op.gate_bias, op.up_bias) if op.gate else (op.up_bias,), cut.columns)
        ring = k.ring(2, cut.drain_rows, cut.columns, out.format)

        def finish(job: TileJob) -> None:
            bias, *up_bias = (bias_of(k, bias, job.index, job.out) for bias in extra)
            for piece, at in pieces(job, ring):
                y = ring.next().shaped(piece.stop - piece.start, job.out.stop - job.out.start)
                acc, *up = (acc.part(piece, slice(0, y.cols)) for acc in job.accs)
                second, its_bias = (up[0], up_bias[0]) if up else (None, None)
                k.emit(isa.Drain(dst=y, acc=acc, up=second, bias=bias, up_bias=its_bias, **how))
                k.emit(isa.Store(dst=out.part(at, job.out), src=y))

        return finish

    return product_streams(mem, op.site, product.codes, cut, product.jobs, finisher)


def down(mem: ChipMemory, op: Experts, product: GroupedProduct, order: Region, out: Region) -> list[Stream]:
    """Returns a list of Streams that multiply each row by its expert's down weights: one for each core with work.

    Args:
        mem: the chip's memory.
        op: the op.
        product: the GroupedProduct of the inner rows, sorted by expert, with the down weights.
        order: i32 [1, n]; for each sorted row, the row of `out` in which its result is stored.
        out: region for the results in routing order: row t * top + i belongs to token t and its choice i.
    """
    cut = product.cut

    def finisher(k: StreamBuilder) -> Callable[[TileJob], None]:
        (extra,) = biases(mem, k, (op.down_bias,), cut.columns)
        ring, index = k.ring(2, cut.drain_rows, cut.columns), k.ring(INDEX_TILES, 1, cut.rows, "i32")

        def finish(job: TileJob) -> None:
            bias, places = bias_of(k, extra, job.index, job.out), load(k, index.next(), order.part(cols=job.rows))
            for piece, _ in pieces(job, ring):
                y = ring.next().shaped(piece.stop - piece.start, job.out.stop - job.out.start)
                k.emit(isa.Drain(dst=y, acc=job.accs[0].part(piece, slice(0, y.cols)), bias=bias))
                k.emit(isa.Scatter(table=out.part(cols=job.out), src=y, index=places.part(cols=piece)))

        return finish

    return product_streams(mem, op.site, product.codes, cut, product.jobs, finisher)


def zero_rows(mem: ChipMemory, op: Experts, rows: Region, out: Region) -> list[Stream]:
    """Returns a list of Streams that set those rows of `out` to zero whose experts are on other chips.

    rows: region [1, n] with the numbers of these rows. The list is empty if n is 0.
    """
    step = max(1, min(ROWS, mem.chip.sram_bytes // (8 * out.cols)))
    streams = []
    for k, mine in deal_jobs(mem.chip, slices(rows.cols, step), op.site):
        zeros, index_ring = k.tile(step, out.cols), k.ring(2, 1, step, "i32")
        k.emit(isa.Fill(dst=zeros))
        for piece in mine:
            index = load(k, index_ring.next(), rows.part(cols=piece))
            k.emit(isa.Scatter(table=out, src=zeros.part(slice(0, index.cols)), index=index))
        streams.append(k.stream())
    return streams


def combine(mem: ChipMemory, op: Experts, parts: Region, width: int, depth: int) -> list[Stream]:
    """Returns a list of Streams that compute the weighted sum of the experts' results of each token.

    It is the op's result for the token. The weights are the routing weights. If op.scale_input is set, the sum has no
    weights, since the experts' inputs were multiplied by them. If op.residual is set, the residual is added.

    Args:
        mem: the chip's memory.
        op: the op.
        parts: [tokens * top, hidden], the experts' results: row t * top + i belongs to token t and its choice i.
        width: number of columns of a token that are summed at a time.
        depth: number of tiles of each SRAM buffer.
    """
    out, top, residual = mem.region(op.out), mem.region(op.ids).cols, mem.optional_region(op.residual)
    streams = []
    for k, mine in deal_jobs(mem.chip, [(r, c) for r in range(out.rows) for c in slices(out.cols, width)], op.site):
        rings = [k.ring(depth, *shape) for shape in ((top, width), (1, top), (1, width), (1, width))]
        for r, columns in mine:
            row, (rows_in, weight, added, result) = slice(r, r + 1), (ring.next() for ring in rings)
            x = load(k, rows_in, parts.part(slice(r * top, (r + 1) * top), columns))
            w = None if op.scale_input else load(k, weight, mem.region(op.weights).part(row))
            residuals = load(k, added, residual.part(row, columns)) if residual else None
            y = result.shaped(1, x.cols)
            k.emit(isa.Combine(dst=y, parts=x, weights=w, residual=residuals))
            k.emit(isa.Store(dst=out.part(row, columns), src=y))
        streams.append(k.stream())
    return streams
