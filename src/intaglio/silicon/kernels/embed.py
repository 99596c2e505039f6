"""Chip kernel of the op `embed`: rows of a table by token id, times a scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intaglio.batch import Batch
from intaglio.ops import Embed
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, QuantisedRegion, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import ROWS, RowsKernel, by_rows
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder


@chip_kernel(Embed)
@dataclass(frozen=True)
class EmbedKernel(RowsKernel):
    """Chip kernel of `embed`: gathers rows in the table's format, converts them to f32 and scales them."""

    @classmethod
    def streams(cls, mem: ChipMemory, op: Embed, t: Tensors, batch: Batch) -> list[Stream]:
        ids, out, w = mem.region(op.tokens), mem.region(op.out), mem.regions[op.w]
        codes = w.codes if isinstance(w, QuantisedRegion) else w
        held: dict[StreamBuilder, list[Region]] = {}

        def body(k: StreamBuilder, rings: list[Ring], rows: slice) -> None:
            n = rows.stop - rows.start
            if k not in held:
                scales = w.scales.cols if isinstance(w, QuantisedRegion) else 1
                held[k] = [
                    k.tile(1, ROWS, "i32"),
                    k.tile(ROWS, codes.cols, codes.format),
                    k.tile(ROWS, scales, w.scales.format if isinstance(w, QuantisedRegion) else "f32"),
                ]
            index, raw, scale = held[k]
            index = load(k, index, ids.part(cols=rows))
            raw, y, z = (r.shaped(n, codes.cols) for r in (raw, rings[0].next(), rings[1].next()))
            k.emit(isa.Gather(dst=raw, table=codes, index=index))
            if isinstance(w, QuantisedRegion):
                scale = scale.shaped(n, w.scales.cols)
                k.emit(isa.Gather(dst=scale, table=w.scales, index=index))
                k.emit(isa.Dequantise(dst=y, codes=raw, scales=scale, group=w.group))
            else:
                k.emit(isa.Convert(dst=y, src=raw))
            k.emit(
                isa.Map(dst=z, a=y, steps=(("operand", "a"), ("number", float(np.float32(op.scale))), ("binary", "*")))
            )
            k.emit(isa.Store(dst=out.part(rows), src=z))

        return by_rows(mem, op.site, out.rows, [out.cols, out.cols], body)
