"""Chip kernel of the op `head_linear`: one matrix product for each head, as in latent attention (MLA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import Target
from intaglio.ops import HeadLinear
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, deal_jobs, load, slices
from intaglio.silicon.kernels.kernel import ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.product import best_tile, bits_per_value, linear_timing
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Stream
from intaglio.silicon.timing import Timing


@chip_kernel(HeadLinear)
@dataclass(frozen=True)
class HeadLinearKernel(ChipKernel):
    """Chip kernel of `head_linear` (each head of x times a matrix of its own): timing and instruction streams.

    It is timed as one product with heads * n columns.

    Attributes:
        rows: rows of x, a number or a symbol.
        heads: heads, each with a matrix [n, k].
        n, k: rows and columns of a head's matrix.
        w_format: format of a weight.
        w_bits: bits of a weight, scales included; may be a fraction.
    """

    by_sequence: ClassVar[bool] = False
    rows: int | str
    heads: int
    n: int
    k: int
    w_format: str
    w_bits: float

    @classmethod
    def of(cls, op: HeadLinear, t: Tensors) -> HeadLinearKernel:
        w = t[op.w]
        heads, n, k = (int(d) for d in w.shape)
        return cls(t[op.x].shape[0], heads, n, k, formats.element(w.format), bits_per_value(w))

    def time(self, target: Target, sizes: BatchSizes, resident: bool) -> Timing:
        how = "bf16", self.w_format, self.w_bits, target.library.activation_bytes, False, resident
        return linear_timing(target, sizes.rows_of(self.rows), self.heads * self.n, self.k, *how)

    @classmethod
    def streams(cls, mem: ChipMemory, op: HeadLinear, t: Tensors, batch: Batch) -> list[Stream]:
        """A list of Streams, one for each core with work, that compute each head's product in tiles.

        A head's matrix multiplies the first k columns of the head in x. If the head has more columns in x, they are
        copied to the result unchanged, after the product's n columns.
        """
        x, out, w = mem.region(op.x), mem.region(op.out), mem.region(op.w)
        heads, n, depth = (int(d) for d in t[op.w].shape)
        wide, narrow = x.cols // heads, out.cols // heads
        tm, tn, tk = best_tile(mem.target, max(1, x.rows), n, depth, "f32", w.format, False)
        jobs = [(h, r, c) for h in range(heads) for r in slices(x.rows, tm) for c in [*slices(n, tn), None]]
        streams = []
        for k, mine in deal_jobs(mem.chip, jobs if wide > depth else [j for j in jobs if j[2]], op.site):
            a, v = k.ring(2, tm, tk), k.ring(4, tn, tk, w.format)
            acc, result, rest = k.tile(tm, tn, "f32", "acc"), k.ring(2, tm, tn), k.ring(2, tm, max(1, wide - depth))
            for h, rows, columns in mine:
                if columns is None:
                    passed = load(k, rest.next(), x.part(rows, slice(h * wide + depth, (h + 1) * wide)))
                    k.emit(isa.Store(dst=out.part(rows, slice(h * narrow + n, (h + 1) * narrow)), src=passed))
                    continue
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                for d in slices(depth, tk):
                    left = load(k, a.next(), x.part(rows, slice(h * wide + d.start, h * wide + d.stop)))
                    right = load(k, v.next(), w.part(slice(h * n + columns.start, h * n + columns.stop), d))
                    k.emit(isa.Matmul(acc=acc.shaped(*shape), a=left, b=right, accumulate=d.start > 0))
                y = result.next().shaped(*shape)
                k.emit(isa.Drain(dst=y, acc=acc.shaped(*shape)))
                k.emit(
                    isa.Store(dst=out.part(rows, slice(h * narrow + columns.start, h * narrow + columns.stop)), src=y)
                )
            streams.append(k.stream())
        return streams
