"""Chip kernel of the op `map`: an elementwise expression over tensors of one shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from intaglio.batch import Batch
from intaglio.chips import ChipSpec
from intaglio.ops import Map
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_rows
from intaglio.silicon.stream import Ring, Stream, StreamBuilder


@chip_kernel(Map)
@dataclass(frozen=True)
class MapKernel(RowsKernel):
    """Chip kernel of `map`: one Map instruction for each tile of rows.

    Its time counts one operation for each function call and binary operator and, if there is a call, one
    exponential per value.
    """

    expr: str = "a"

    @classmethod
    def of(cls, op: Map, t: Tensors) -> Self:  # type: ignore[override]
        return replace(super().of(op, t), expr=op.expr)

    @property
    def operations(self) -> int:
        """Number of vector operations per value: one per function call and binary operator, and one for the store."""
        return 1 + sum(step in ("call", "binary") for step, _ in postfix(self.expr))

    def cycles(self, chip: ChipSpec, n: int) -> float:
        called = any(step == "call" for step, _ in postfix(self.expr))
        return float(vector_cycles(chip, self.operations * n, n * called))

    @classmethod
    def streams(cls, mem: ChipMemory, op: Map, t: Tensors, batch: Batch) -> list[Stream]:
        out = mem.region(op.out)
        given = [name for name in ("a", "b", "c") if getattr(op, name) is not None]
        widths = [*(mem.region(getattr(op, name)).cols for name in given), out.cols]

        def body(k: StreamBuilder, rings: list[Ring], rows: slice) -> None:
            parts: dict[str, Any] = {
                n: load(k, ring.next(), mem.region(getattr(op, n)).part(rows))
                for n, ring in zip(given, rings, strict=False)
            }
            y = rings[-1].next().shaped(rows.stop - rows.start, out.cols)
            k.emit(isa.Map(dst=y, steps=postfix(op.expr), **parts))
            k.emit(isa.Store(dst=out.part(rows), src=y))

        return by_rows(mem, op.site, out.rows, widths, body)
