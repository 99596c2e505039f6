"""Chip kernel of the op `rope`: rotary position embedding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from intaglio.batch import Batch
from intaglio.chips import ChipSpec, KernelLibrary
from intaglio.ops import Rope
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_jobs, load_once
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder

FREQUENCY_BYTES = POSITION_BYTES = 4


@chip_kernel(Rope)
@dataclass(frozen=True)
class RopeKernel(RowsKernel):
    """Chip kernel of `rope`. It rotates one row of x after the other; each core loads the frequencies once."""

    def cycles(self, chip: ChipSpec, n: int) -> float:
        return float(vector_cycles(chip, 3 * n, 2 * self.vector_bytes / FREQUENCY_BYTES))

    def load_bytes(self, library: KernelLibrary) -> float:
        return super().load_bytes(library) + POSITION_BYTES

    def columns(self) -> tuple[int, ...]:
        return self.width, self.width, 1

    @classmethod
    def streams(cls, mem: ChipMemory, op: Rope, t: Tensors, batch: Batch) -> list[Stream]:
        x, out = mem.region(op.x), mem.region(op.out)
        kernel = cls.of(op, t)
        held: dict[StreamBuilder, list[Region | None]] = {}

        def body(k: StreamBuilder, rings: list[Ring], rows: slice, columns: slice) -> None:
            (frequencies,) = load_once(k, mem, held, (op.frequencies,))
            assert frequencies is not None
            at = replace(rings[2].next().shaped(1, 1), format="i32")
            load(k, at, mem.region(op.positions).part(cols=rows))
            a = load(k, rings[0].next(), x.part(rows))
            y = rings[1].next().shaped(a.rows, a.cols)
            how: dict[str, Any] = {
                "head_dim": op.head_dim,
                "style": op.style,
                "factor": op.factor,
                "trailing": op.trailing,
            }
            k.emit(isa.Rope(dst=y, x=a, positions=at, frequencies=frequencies, **how))
            k.emit(isa.Store(dst=out.part(rows), src=y))

        return by_jobs(mem, op, kernel, x.rows, kernel.columns(), body)
