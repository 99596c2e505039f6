"""Chip kernel of the op `select`: the rows whose logits are wanted."""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.batch import Batch
from intaglio.ops import Select
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import ROWS, RowsKernel, by_rows
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder


@chip_kernel(Select)
@dataclass(frozen=True)
class SelectKernel(RowsKernel):
    """Chip kernel of `select`: gathers the rows whose logits are wanted."""

    @classmethod
    def streams(cls, mem: ChipMemory, op: Select, t: Tensors, batch: Batch) -> list[Stream]:
        x, ids, out = mem.region(op.x), mem.region(op.rows), mem.region(op.out)
        held: dict[StreamBuilder, Region] = {}

        def body(k: StreamBuilder, rings: list[Ring], rows: slice) -> None:
            if k not in held:
                held[k] = k.tile(1, ROWS, "i32")
            index = load(k, held[k], ids.part(cols=rows))
            y = rings[0].next().shaped(rows.stop - rows.start, x.cols)
            k.emit(isa.Gather(dst=y, table=x, index=index))
            k.emit(isa.Store(dst=out.part(rows), src=y))

        return by_rows(mem, op.site, out.rows, [out.cols], body)
