"""Chip kernel of the op `moment`: one number for each row, its mean, root mean square or standard deviation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from intaglio.batch import Batch
from intaglio.chips import ChipSpec, KernelLibrary
from intaglio.ops import Moment
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import moment_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_jobs
from intaglio.silicon.stream import Ring, Stream, StreamBuilder


@chip_kernel(Moment)
@dataclass(frozen=True)
class MomentKernel(RowsKernel):
    """Chip kernel of `moment`, with one Moment instruction for each row.

    moment: the statistic that is computed, such as "mean"; the field `of` of the op.
    """

    moment: str = "mean"

    @classmethod
    def of(cls, op: Moment, t: Tensors) -> Self:  # type: ignore[override]
        rows, width = t[op.x].shape
        return cls(rows, int(width), 2, moment=op.of)

    def columns(self) -> tuple[int, ...]:
        return self.width, 1

    def cycles(self, chip: ChipSpec, n: int) -> float:
        return float(moment_cycles(chip, n, self.moment))

    def store_bytes(self, library: KernelLibrary) -> float:
        return float(library.activation_bytes)

    @classmethod
    def streams(cls, mem: ChipMemory, op: Moment, t: Tensors, batch: Batch) -> list[Stream]:
        x, out = mem.region(op.x), mem.region(op.out)

        def body(k: StreamBuilder, rings: list[Ring], rows: slice, columns: slice) -> None:
            a = load(k, rings[0].next(), x.part(rows))
            y = rings[1].next()
            k.emit(isa.Moment(dst=y, x=a, of=op.of))  # type: ignore[arg-type]
            k.emit(isa.Store(dst=out.part(rows), src=y))

        return by_jobs(mem, op, cls.of(op, t), x.rows, [x.cols, 1], body)
