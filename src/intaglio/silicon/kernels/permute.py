"""Chip kernel of the op `permute`: puts the columns of x in another order."""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.batch import Batch
from intaglio.ops import Permute
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_jobs, load_once
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder


@chip_kernel(Permute)
@dataclass(frozen=True)
class PermuteKernel(RowsKernel):
    """Chip kernel of `permute`, which reorders the columns of each row. It processes one row after the other.

    Each core loads the order of the columns once.
    """

    @classmethod
    def streams(cls, mem: ChipMemory, op: Permute, t: Tensors, batch: Batch) -> list[Stream]:
        x, out = mem.region(op.x), mem.region(op.out)
        held: dict[StreamBuilder, list[Region | None]] = {}

        def body(k: StreamBuilder, rings: list[Ring], rows: slice, columns: slice) -> None:
            (order,) = load_once(k, mem, held, (op.order,))
            assert order
            a = load(k, rings[0].next(), x.part(rows))
            y = rings[1].next().shaped(a.rows, a.cols)
            k.emit(isa.Permute(dst=y, src=a, order=order))
            k.emit(isa.Store(dst=out.part(rows), src=y))

        return by_jobs(mem, op, cls.of(op, t), out.rows, [x.cols, x.cols], body)
