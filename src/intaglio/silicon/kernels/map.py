"""Chip kernel of the op `map`: an elementwise expression over tensors of one shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from intaglio.batch import Batch
from intaglio.chips import ChipSpec
from intaglio.ops import Map
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.isa.vector import map_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_jobs
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder

COLUMNS = 4096  # of a job, at most


@chip_kernel(Map)
@dataclass(frozen=True)
class MapKernel(RowsKernel):
    """Chip kernel of the op `map`, with one Map instruction for each row.

    A row with more than COLUMNS columns takes several Map instructions. expr: the elementwise expression over the
    operands a, b and c.
    """

    expr: str = "a"

    @classmethod
    def of(cls, op: Map, t: Tensors) -> Self:  # type: ignore[override]
        return replace(super().of(op, t), expr=op.expr)

    @property
    def operations(self) -> int:
        """The number of vector operations per value.

        Each function call, each operator and the store count as one.
        """
        return 1 + sum(step in ("call", "binary") for step, _ in postfix(self.expr))

    def parts(self) -> int:
        return -(-self.width // COLUMNS)

    def cycles(self, chip: ChipSpec, n: int) -> float:
        return map_cycles(chip, postfix(self.expr), n)

    @classmethod
    def unsupported(cls, op: Map, t: Tensors) -> str | None:
        width = t[op.a].shape[1]
        odd = [name for name in op.inputs if t[name].shape[1] not in (1, width)]
        return f"chip kernels do not broadcast the {t[odd[0]].shape[1]} columns of {odd[0]} to {width}" if odd else None

    @classmethod
    def streams(cls, mem: ChipMemory, op: Map, t: Tensors, batch: Batch) -> list[Stream]:
        out = mem.region(op.out)
        given = [name for name in ("a", "b", "c") if getattr(op, name) is not None]
        widths = [*(mem.region(getattr(op, name)).cols for name in given), out.cols]

        def body(k: StreamBuilder, rings: list[Ring], rows: slice, columns: slice) -> None:
            parts: dict[str, Any] = {
                n: load(k, ring.next(), part_of(mem.region(getattr(op, n)), rows, columns))
                for n, ring in zip(given, rings, strict=False)
            }
            y = rings[-1].next().shaped(1, columns.stop - columns.start)
            k.emit(isa.Map(dst=y, steps=postfix(op.expr), **parts))
            k.emit(isa.Store(dst=out.part(rows, columns), src=y))

        return by_jobs(mem, op, cls.of(op, t), out.rows, widths, body)


def part_of(x: Region, rows: slice, columns: slice) -> Region:
    """Returns the part of the operand `x` with the given rows and columns.

    If `x` has only one column, its values are used for all columns; the part is then this column of the given rows.
    """
    return x.part(rows, columns if x.cols > 1 else slice(None))
