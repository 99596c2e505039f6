"""Chip kernel of the op `concat`: the columns of two tensors side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from intaglio.batch import Batch
from intaglio.ops import Concat
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import CopyKernel, by_jobs
from intaglio.silicon.stream import Ring, Stream, StreamBuilder


@chip_kernel(Concat)
@dataclass(frozen=True)
class ConcatKernel(CopyKernel):
    """Chip kernel of `concat`. It loads a row of each operand and stores them side by side as a row of the result.

    left: number of columns of the first operand.
    """

    left: int = 0

    @classmethod
    def of(cls, op: Concat, t: Tensors) -> Self:  # type: ignore[override]
        return replace(super().of(op, t), left=int(t[op.a].shape[-1]))

    def pieces(self) -> tuple[float, ...]:
        return self.left / self.width, 1 - self.left / self.width

    @classmethod
    def streams(cls, mem: ChipMemory, op: Concat, t: Tensors, batch: Batch) -> list[Stream]:
        out, first = mem.region(op.out), mem.region(op.a).cols
        places = (op.a, slice(0, first)), (op.b, slice(first, out.cols))

        def body(k: StreamBuilder, rings: list[Ring], rows: slice, columns: slice) -> None:
            for ring, (name, place) in zip(rings, places, strict=True):
                y = load(k, ring.next(), mem.region(name).part(rows))
                k.emit(isa.Store(dst=out.part(rows, place), src=y))

        return by_jobs(mem, op, cls.of(op, t), out.rows, [first, out.cols - first], body)
