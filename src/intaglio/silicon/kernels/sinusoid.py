"""Chip kernel of the op `sinusoid`: rows of sines and cosines of the positions."""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.batch import Batch
from intaglio.chips import ChipSpec
from intaglio.ops import Sinusoid
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_rows, load_once
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder


@chip_kernel(Sinusoid)
@dataclass(frozen=True)
class SinusoidKernel(RowsKernel):
    """Chip kernel of `sinusoid`: rotates rows of ones and zeros, which gives cosines and sines."""

    def cycles(self, chip: ChipSpec, n: int) -> float:
        return float(vector_cycles(chip, n, n))

    @classmethod
    def streams(cls, mem: ChipMemory, op: Sinusoid, t: Tensors, batch: Batch) -> list[Stream]:
        out, half = mem.region(op.out), mem.region(op.out).cols // 2
        held: dict[StreamBuilder, list[Region | None]] = {}

        def body(k: StreamBuilder, rings: list[Ring], rows: slice) -> None:
            (frequencies,) = load_once(k, mem, held, (op.frequencies,))
            assert frequencies is not None
            n = rows.stop - rows.start
            at = load(k, rings[2].next().shaped(1, n), mem.region(op.positions).part(cols=rows))
            steps = (("operand", "a"), ("number", float(op.first)), ("binary", "+"))
            k.emit(isa.Map(dst=at, a=at, steps=steps))
            x, y = (ring.next().shaped(n, 2 * half) for ring in rings[:2])
            k.emit(isa.Fill(dst=x.part(cols=slice(half)), value=1.0))
            k.emit(isa.Fill(dst=x.part(cols=slice(half, None)), value=0.0))
            k.emit(isa.Rope(dst=y, x=x, positions=at, frequencies=frequencies, head_dim=2 * half))
            k.emit(isa.Store(dst=out.part(rows, slice(half)), src=y.part(cols=slice(half, None))))
            k.emit(isa.Store(dst=out.part(rows, slice(half, None)), src=y.part(cols=slice(half))))

        return by_rows(mem, op.site, out.rows, [out.cols, out.cols, 1], body)
