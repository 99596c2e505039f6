"""Chip kernel of the op `rope`: rotary position embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intaglio.batch import Batch
from intaglio.chips import ChipSpec
from intaglio.ops import Rope
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_rows, load_once
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder


@chip_kernel(Rope)
@dataclass(frozen=True)
class RopeKernel(RowsKernel):
    """Chip kernel of `rope`, in tiles of rows; each core loads positions and frequencies once."""

    def cycles(self, chip: ChipSpec, n: int) -> float:
        return float(vector_cycles(chip, 3 * n, n))

    @classmethod
    def streams(cls, mem: ChipMemory, op: Rope, t: Tensors, batch: Batch) -> list[Stream]:
        x, out = mem.region(op.x), mem.region(op.out)
        held: dict[StreamBuilder, list[Region | None]] = {}

        def body(k: StreamBuilder, rings: list[Ring], rows: slice) -> None:
            positions, frequencies = load_once(k, mem, held, (op.positions, op.frequencies))
            assert positions is not None and frequencies is not None
            a = load(k, rings[0].next(), x.part(rows))
            y = rings[1].next().shaped(a.rows, a.cols)
            how: dict[str, Any] = {
                "head_dim": op.head_dim,
                "style": op.style,
                "factor": op.factor,
                "trailing": op.trailing,
            }
            k.emit(isa.Rope(dst=y, x=a, positions=positions.part(cols=rows), frequencies=frequencies, **how))
            k.emit(isa.Store(dst=out.part(rows), src=y))

        return by_rows(mem, op.site, x.rows, [x.cols, x.cols], body)
