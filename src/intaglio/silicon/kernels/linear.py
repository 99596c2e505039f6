"""Chip kernel of the op `linear`: x @ w.T with bias, scale, activation and residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import Target
from intaglio.ops import Linear
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, codes_of, deal_jobs, group_of, load, shifted, slices
from intaglio.silicon.kernels.kernel import WIDE, ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.partial_sums import missed_sums, part_columns, partial_seconds
from intaglio.silicon.kernels.product import bits_per_value, linear_timing, scale_group
from intaglio.silicon.kernels.product_loop import product_seconds
from intaglio.silicon.kernels.product_steps import ProductLoop
from intaglio.silicon.kernels.tiled import (
    Finish,
    TileJob,
    pieces,
    product_streams,
    rounded,
    store_product,
)
from intaglio.silicon.kernels.tiling import scale_columns, split_steps, tile_jobs, tiling
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Ring, Stream, StreamBuilder
from intaglio.silicon.timing import Timing


@chip_kernel(Linear)
@dataclass(frozen=True)
class LinearKernel(ChipKernel):
    """Chip kernel of `linear`: x [rows, k] @ w.T [k, n].

    Attributes:
        rows: number of rows of x, or the symbol that stands for it.
        n, k: rows and columns of w; for a GLU pair (gate, up), n counts the rows of both.
        x_format, w_format: number formats of x and of w.
        w_bits: bits of a weight, scales included.
        glu: True for a GLU pair.
        group: number of weights of a row of w that share a scale; 0: w has no scales.
    """

    by_sequence: ClassVar[bool] = False
    rows: int | str
    n: int
    k: int
    x_format: str
    w_format: str
    w_bits: float
    glu: bool
    group: int = 0

    @classmethod
    def of(cls, op: Linear, t: Tensors) -> LinearKernel:
        w, x_format = t[op.w], formats.element(op.x_format)
        n, k = int(w.shape[0]), int(w.shape[1])
        how = x_format, formats.element(w.format), bits_per_value(w), op.glu, scale_group(w)
        return cls(t[op.x].shape[0], n, k, *how)

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        rows, out_bytes = sizes.rows_of(self.rows), target.library.activation_bytes
        if not rows:
            return Timing(0.0)
        how = self.x_format, self.w_format, self.w_bits, out_bytes, self.glu
        found = linear_timing(target, rows, self.n, self.k, *how, prefetched=prefetched)
        if target.library.activation_bytes < WIDE or prefetched:
            return found
        return replace(found, seconds=target.library.launch_s + stream_seconds(target, self, rows))

    @classmethod
    def streams(cls, mem: ChipMemory, op: Linear, t: Tensors, batch: Batch) -> list[Stream]:
        """Returns a list of Streams that run the last kernel of the op: one for each core with work.

        This kernel computes the op's result. If K is not split, the last kernel computes the product. If K is split, an
        earlier kernel computes one product for each part of K, and the last kernel adds them. The last kernel also
        applies bias, scale, activation and residual. Another earlier kernel rounds x, unless x is f32. This method
        itself executes the earlier kernels in `mem`. A GLU pair (gate, up) uses two accumulators of half the columns
        each. Tile sizes are the fastest that the time model finds.
        """
        x, out, w = mem.region(op.x), mem.region(op.out), mem.regions[op.w]
        sides = 2 if op.glu else 1
        span = scale_columns(group_of(w), x.cols)
        codes = rounded(mem, op.site, x, op.x_format, span)
        size, how = (x.rows, sides * out.cols, x.cols), (codes_of(w).format, bits_per_value(t[op.w]), group_of(w))
        cut = tiling(mem.target, size, codes.x.format, *how, sides, bool(op.residual))
        steps = split_steps(x.cols, span, cut)
        sums = mem.heap.allocate(x.rows * len(steps), sides * out.cols, "f32") if len(steps) > 1 else None
        jobs = [
            TileJob(job.rows, [w] * sides, parts, job.steps, job.columns, index=job.index)
            for job in tile_jobs(x.rows, out.cols, steps, cut)
            for parts in [[shifted(job.columns, j * out.cols) for j in range(sides)]]
        ]

        def finisher(k: StreamBuilder) -> Finish:
            extra = [k.tile(1, cut.columns, mem.region(op.bias).format) if op.bias else None for _ in range(2)]
            shape = cut.drain_rows, cut.columns
            rings = k.ring(2, *shape), k.ring(2, *shape) if op.residual and sums is None else None

            def finish(job: TileJob) -> None:
                if sums is None:
                    drain(k, mem, op, job, extra, rings)
                    return
                columns = [shifted(c, job.index * sums.cols) for c in job.columns]
                store_product(k, job, sums.shaped(x.rows, len(steps) * sums.cols), columns, rings[0])

            return finish

        streams = product_streams(mem, op.site, codes, cut, jobs, finisher)
        if sums is None:
            return streams
        mem.run(streams)
        return add_parts(mem, op, sums, len(steps))


@lru_cache(maxsize=65536)
def stream_seconds(target: Target, kernel: LinearKernel, rows: int) -> float:
    """Returns the modelled seconds that the instruction streams of `kernel` take to multiply `rows` rows of x by w.

    If K is split, the time to add the partial sums is included. Bias, residual and launch overhead are not included.
    """
    sides, k = 1 + kernel.glu, kernel.k
    how = kernel.x_format, kernel.w_format, kernel.w_bits, kernel.group
    cut = tiling(target, (rows, kernel.n, k), *how, sides)
    span = scale_columns(kernel.group, k)
    steps = split_steps(k, span, cut)
    loop = ProductLoop(
        cut=cut, x_format=kernel.x_format, w_format=kernel.w_format, group=kernel.group,
        span=span if kernel.x_format in ("int8", "e4m3") else 0, sides=sides,
        drains=sides if len(steps) > 1 else 1,
        before=0.0 if kernel.x_format == "f32" else WIDE * 8 / formats.bits(kernel.x_format),
    )  # fmt: skip
    seconds, written = product_seconds(target, loop, tile_jobs(rows, kernel.n // sides, steps, cut))
    if len(steps) > 1:
        missed = missed_sums(target, 4 * len(steps) * rows * kernel.n, written)
        seconds += float(partial_seconds(target, rows, kernel.n, len(steps), 4.0, kernel.glu, missed))
    return seconds


def drain(
    k: StreamBuilder, mem: ChipMemory, op: Linear, job: TileJob, extra: Sequence[Region | None],
    rings: tuple[Ring, Ring | None],
) -> None:  # fmt: skip
    """Emit the instructions that finish one tile of the product and store it. Returns nothing.

    They load bias and residual, move the sums from accumulators to SRAM (Drain), and store the tile.

    Args:
        k: the core's stream builder.
        mem: the chip's memory, with the op's operands and its result.
        op: the op.
        job: the tile, with its accumulators.
        extra: SRAM tiles for the biases, at least one for each accumulator; items are None if the op has no bias.
        rings: SRAM buffers for some rows of the result, and of the residual (None if there is none to add).
    """
    biases: list[Region | None] = [None, None]
    for j, (tile, part) in enumerate(zip(extra, job.columns, strict=False)):
        if tile is not None and op.bias is not None:
            biases[j] = load(k, tile, mem.region(op.bias).part(slice(0, 1), part))
    results, residuals = rings
    width = slice(0, job.out.stop - job.out.start)
    for piece, at in pieces(job, results):
        added = None
        if residuals is not None and op.residual is not None:
            added = load(k, residuals.next(), mem.region(op.residual).part(at, job.out))
        result = results.next().shaped(piece.stop - piece.start, width.stop)
        accs = [acc.part(piece, width) for acc in job.accs]
        k.emit(drained(op, result, accs, biases, added))
        k.emit(isa.Store(dst=mem.region(op.out).part(at, job.out), src=result))


def drained(
    op: Linear, dst: Region, accs: Sequence[Region], biases: Sequence[Region | None], residual: Region | None
) -> isa.Drain:
    """Returns the Drain instruction that moves sums from accumulators to SRAM and applies bias, scale and activation.

    Args:
        op: the op.
        dst: the SRAM tile for the results.
        accs: one accumulator, or two for a GLU pair (gate, up).
        biases: bias tile of the first accumulator, and of the second; None if there is none. Further items are ignored.
        residual: SRAM tile that is added; None if nothing is added.
    """
    return isa.Drain(
        dst=dst, acc=accs[0], up=accs[1] if len(accs) > 1 else None, bias=biases[0],
        up_bias=biases[1], residual=residual, scale=op.scale, activation=op.activation,  # type: ignore[arg-type]
    )  # fmt: skip


def add_parts(mem: ChipMemory, op: Linear, sums: Region, parts: int) -> list[Stream]:
    """Returns a list of Streams that add the partial sums of a product whose K was split.

    They also apply bias, scale, activation and residual.

    sums: f32 [rows * parts, n]. The `parts` partial sums of one result row are consecutive rows. For a GLU pair, n
    counts the columns of gate and up together.
    """
    out, residual = mem.region(op.out), mem.optional_region(op.residual)
    sides = sums.cols // out.cols
    width = int(part_columns(mem.target, out.cols, parts, sides))
    streams = []
    jobs = [(r, c) for r in range(out.rows) for c in slices(out.cols, width)]
    for k, mine in deal_jobs(mem.chip, jobs, op.site):
        loaded = [k.ring(2, parts, width) for _ in range(sides)]
        accs = [k.ring(2, 1, width, space="acc") for _ in range(sides)]
        results, residuals = k.ring(2, 1, width), k.ring(2, 1, width)
        extra = [k.ring(2, 1, width, mem.region(op.bias).format) if op.bias else None for _ in range(sides)]
        for r, columns in mine:
            filled, biases = [], list[Region | None]()
            row = slice(r, r + 1)
            for j in range(sides):
                side = shifted(columns, j * out.cols)
                part = load(k, loaded[j].next(), sums.part(slice(r * parts, (r + 1) * parts), side))
                filled.append(accs[j].next().shaped(1, part.cols))
                k.emit(isa.Combine(dst=filled[j], parts=part))
                ring = extra[j]
                biases.append(load(k, ring.next(), mem.region(op.bias or "").part(slice(0, 1), side)) if ring else None)
            added = load(k, residuals.next(), residual.part(row, columns)) if residual else None
            result = results.next().shaped(1, columns.stop - columns.start)
            k.emit(drained(op, result, filled, [*biases, None], added))
            k.emit(isa.Store(dst=out.part(row, columns), src=result))
        streams.append(k.stream())
    return streams
