"""Chip kernel of the op `linear`: x @ w.T with bias, scale, activation and residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import Target
from intaglio.ops import Linear
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, deal_jobs, load, slices
from intaglio.silicon.kernels.kernel import ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.product import bits_per_value, linear_timing
from intaglio.silicon.kernels.tiled import TiledProduct, rounded, scale_columns, tiling
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Ring, Stream, StreamBuilder
from intaglio.silicon.timing import Timing


@chip_kernel(Linear)
@dataclass(frozen=True)
class LinearKernel(ChipKernel):
    """Chip kernel of `linear`: x [rows, k] @ w.T [k, n].

    Attributes:
        rows: rows of x, a number or a symbol.
        n, k: rows and columns of w; for a GLU pair (gate, up), n counts the rows of both.
        x_format, w_format: formats of a value of x and of a weight.
        w_bits: bits of a weight, scales included.
        glu: True for a GLU pair.
    """

    by_sequence: ClassVar[bool] = False
    rows: int | str
    n: int
    k: int
    x_format: str
    w_format: str
    w_bits: float
    glu: bool

    @classmethod
    def of(cls, op: Linear, t: Tensors) -> LinearKernel:
        w, x_format = t[op.w], formats.element(op.x_format)
        n, k = int(w.shape[0]), int(w.shape[1])
        return cls(t[op.x].shape[0], n, k, x_format, formats.element(w.format), bits_per_value(w), op.glu)

    def time(self, target: Target, sizes: BatchSizes, resident: bool) -> Timing:
        rows, out_bytes = sizes.rows_of(self.rows), target.library.activation_bytes
        if not rows:
            return Timing(0.0)
        how = self.x_format, self.w_format, self.w_bits, out_bytes, self.glu, resident
        return linear_timing(target, rows, self.n, self.k, *how)

    @classmethod
    def streams(cls, mem: ChipMemory, op: Linear, t: Tensors, batch: Batch) -> list[Stream]:
        """The product's Streams, as a list, with the tiles that the timing finds fastest.

        A first launch, run here, rounds x. Tiles of the result are dealt to the cores. A tile's product runs over K
        with rings of both operands; Drain then applies bias, activation and residual. A GLU pair uses two accumulators
        of half the columns each.
        """
        x, out, w = mem.region(op.x), mem.region(op.out), mem.regions[op.w]
        sides = 2 if op.glu else 1
        span = scale_columns(w, x.cols)
        codes, scales = rounded(mem, op.site, x, op.x_format, span)
        cut = tiling(mem.target, x.rows, sides * out.cols, codes, bits_per_value(t[op.w]), w, sides, bool(op.residual))
        jobs = [(r, c) for r in slices(x.rows, cut.rows) for c in slices(out.cols, cut.columns)]
        streams = []
        for k, mine in deal_jobs(mem.chip, jobs, op.site):
            product = TiledProduct(k, codes, scales, w, span, cut, sides)
            accs = [k.tile(cut.rows, cut.columns, "f32", "acc") for _ in range(sides)]
            extra = [k.tile(1, cut.columns, mem.region(op.bias).format) if op.bias else None for _ in range(2)]
            shape = cut.drain_rows, cut.columns
            rings = k.ring(2, *shape), k.ring(2, *shape) if op.residual else None
            for rows, columns in mine:
                parts = [slice(columns.start + j * out.cols, columns.stop + j * out.cols) for j in range(sides)]
                tiles = [acc.shaped(rows.stop - rows.start, columns.stop - columns.start) for acc in accs]
                product.multiply(rows, tiles, parts)
                drain(k, mem, op, rows, columns, tiles, extra, parts, rings)
            streams.append(k.stream())
        return streams


def drain(
    k: StreamBuilder, mem: ChipMemory, op: Linear, rows: slice, columns: slice, accs: Sequence[Region],
    extra: Sequence[Region | None], parts: Sequence[slice], rings: tuple[Ring, Ring | None],
) -> None:  # fmt: skip
    """Emit what follows the product of one tile: loads of bias and residual, Drain, and the Store of the result.

    accs: one accumulator, or two of a GLU pair. extra: a tile for the bias of each accumulator. parts: the columns of
    each bias. rings: tiles of a few rows of the result and of the residual, since a tile is drained piece by piece.
    """
    biases: list[Region | None] = [None, None]
    for j, (tile, part) in enumerate(zip(extra, parts, strict=False)):
        if tile is not None and op.bias is not None:
            biases[j] = load(k, tile, mem.region(op.bias).part(slice(0, 1), part))
    results, residuals = rings
    for piece in slices(accs[0].rows, results.tiles[0].rows):
        at = slice(rows.start + piece.start, rows.start + piece.stop)
        added = None
        if residuals is not None and op.residual is not None:
            added = load(k, residuals.next(), mem.region(op.residual).part(at, columns))
        result = results.next().shaped(piece.stop - piece.start, accs[0].cols)
        k.emit(
            isa.Drain(
                dst=result, acc=accs[0].part(piece), up=accs[1].part(piece) if len(accs) > 1 else None, bias=biases[0],
                up_bias=biases[1], residual=added, scale=op.scale,
                activation=op.activation,  # type: ignore[arg-type]
            )
        )  # fmt: skip
        k.emit(isa.Store(dst=mem.region(op.out).part(at, columns), src=result))
