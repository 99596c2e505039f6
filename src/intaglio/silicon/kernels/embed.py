"""Chip kernel of the op `embed`: rows of a table by token id, times a scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import ChipSpec, KernelLibrary
from intaglio.ops import Embed
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.isa.vector import map_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, QuantisedRegion
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.product import bits_per_value
from intaglio.silicon.kernels.rows import MOST_TILES, RowsKernel, by_jobs, load_indices
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder

SCALE = (("operand", "a"), ("number", 1.0), ("binary", "*"))


@chip_kernel(Embed)
@dataclass(frozen=True)
class EmbedKernel(RowsKernel):
    """Chip kernel of `embed`. It loads each token's row of the table by index, converts it to f32 and scales it.

    row_bytes: bytes of a row of the table, scales included. quantised: True if the table is quantised.
    """

    row_bytes: float = 0.0  # of a row of the table with its scales
    quantised: bool = False
    source = "gathered"

    @classmethod
    def of(cls, op: Embed, t: Tensors) -> Self:  # type: ignore[override]
        row_bytes = bits_per_value(t[op.w]) * int(t[op.w].shape[-1]) / 8
        return replace(
            super().of(op, t), row_bytes=row_bytes, quantised=formats.get(t[op.w].format).grouped, vector_bytes=0.0
        )

    def columns(self) -> tuple[int, ...]:
        return self.width, self.width, self.width

    def held_bytes(self) -> float:
        scales = MOST_TILES * 4 * self.width / 32  # of groups of at least 32
        return super().held_bytes() + scales * self.quantised

    def cycles(self, chip: ChipSpec, n: int) -> float:
        return self.read_cycles(chip, n) + map_cycles(chip, SCALE, n)

    def read_cycles(self, chip: ChipSpec, n: int) -> float:
        return float(vector_cycles(chip, (1 + self.quantised) * n))  # of the conversion

    def load_bytes(self, library: KernelLibrary) -> float:
        return self.row_bytes

    @classmethod
    def streams(cls, mem: ChipMemory, op: Embed, t: Tensors, batch: Batch) -> list[Stream]:
        ids, out, w = mem.region(op.tokens), mem.region(op.out), mem.regions[op.w]
        codes = w.codes if isinstance(w, QuantisedRegion) else w
        kernel = cls.of(op, t)
        scales = w.scales.cols if isinstance(w, QuantisedRegion) else 1
        held: dict[StreamBuilder, Ring] = {}
        indices: dict[StreamBuilder, tuple[Region, int]] = {}

        def body(k: StreamBuilder, rings: list[Ring], rows: slice, columns: slice) -> None:
            if k not in held:
                held[k] = k.ring(len(rings[0].tiles), 1, scales)
            index = load_indices(k, mem, indices, ids, rows.start)
            raw = replace(rings[0].next(), format=codes.format).shaped(1, codes.cols)
            y, z = (r.next().shaped(1, codes.cols) for r in rings[1:])
            k.emit(isa.Gather(dst=raw, table=codes, index=index))
            if isinstance(w, QuantisedRegion):
                scale = replace(held[k].next(), format=w.scales.format).shaped(1, scales)
                k.emit(isa.Gather(dst=scale, table=w.scales, index=index))
                k.emit(isa.Dequantise(dst=y, codes=raw, scales=scale, group=w.group))
            else:
                k.emit(isa.Convert(dst=y, src=raw))
            k.emit(
                isa.Map(dst=z, a=y, steps=(("operand", "a"), ("number", float(np.float32(op.scale))), ("binary", "*")))
            )
            k.emit(isa.Store(dst=out.part(rows), src=z))

        return by_jobs(mem, op, kernel, out.rows, kernel.columns(), body)
