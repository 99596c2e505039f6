"""Chip kernel of the op `select`: the rows whose logits are wanted."""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.batch import Batch
from intaglio.ops import Select
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import CopyKernel, by_jobs, load_indices
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder


@chip_kernel(Select)
@dataclass(frozen=True)
class SelectKernel(CopyKernel):
    """Chip kernel of `select`, which copies the rows of the tokens whose logits are needed. Rows are read by index."""

    source = "selected"

    @classmethod
    def streams(cls, mem: ChipMemory, op: Select, t: Tensors, batch: Batch) -> list[Stream]:
        x, ids, out = mem.region(op.x), mem.region(op.rows), mem.region(op.out)

        held: dict[StreamBuilder, tuple[Region, int]] = {}

        def body(k: StreamBuilder, rings: list[Ring], rows: slice, columns: slice) -> None:
            index = load_indices(k, mem, held, ids, rows.start)
            y = rings[0].next().shaped(1, x.cols)
            k.emit(isa.Gather(dst=y, table=x, index=index))
            k.emit(isa.Store(dst=out.part(rows), src=y))

        return by_jobs(mem, op, cls.of(op, t), out.rows, [out.cols], body)
