"""Chip kernel of the op `sinusoid`: rows of sines and cosines of the positions."""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.batch import Batch
from intaglio.chips import ChipSpec, KernelLibrary
from intaglio.ops import Sinusoid
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.isa.vector import map_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_jobs, load_once
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder

FIRST = (("operand", "a"), ("number", 0.0), ("binary", "+"))


@chip_kernel(Sinusoid)
@dataclass(frozen=True)
class SinusoidKernel(RowsKernel):
    """Chip kernel of `sinusoid`: sines and cosines of angles. A Rope instruction rotates (1, 0) by each angle."""

    def cycles(self, chip: ChipSpec, n: int) -> float:
        shift = map_cycles(chip, FIRST, 1)  # of the position
        return shift + float(vector_cycles(chip, 3 * n, n))

    def held_bytes(self) -> float:
        return self.vector_bytes + 4 * self.width  # a row of ones and zeros

    def columns(self) -> tuple[int, ...]:
        return 1, self.width

    def load_bytes(self, library: KernelLibrary) -> float:
        return 4.0  # a position

    @classmethod
    def streams(cls, mem: ChipMemory, op: Sinusoid, t: Tensors, batch: Batch) -> list[Stream]:
        out, half = mem.region(op.out), mem.region(op.out).cols // 2
        kernel = cls.of(op, t)
        units: dict[StreamBuilder, Region] = {}  # ones, then zeros
        held: dict[StreamBuilder, list[Region | None]] = {}

        def body(k: StreamBuilder, rings: list[Ring], rows: slice, columns: slice) -> None:
            if k not in units:
                units[k] = k.tile(1, 2 * half)
                k.emit(isa.Fill(dst=units[k].part(cols=slice(half)), value=1.0))
                k.emit(isa.Fill(dst=units[k].part(cols=slice(half, None)), value=0.0))
            (frequencies,) = load_once(k, mem, held, (op.frequencies,))
            assert frequencies is not None
            at = load(k, rings[0].next(), mem.region(op.positions).part(cols=rows))
            steps = (("operand", "a"), ("number", float(op.first)), ("binary", "+"))
            k.emit(isa.Map(dst=at, a=at, steps=steps))
            x, y = units[k], rings[1].next()
            k.emit(isa.Rope(dst=y, x=x, positions=at, frequencies=frequencies, head_dim=2 * half))
            k.emit(isa.Store(dst=out.part(rows, slice(half)), src=y.part(cols=slice(half, None))))
            k.emit(isa.Store(dst=out.part(rows, slice(half, None)), src=y.part(cols=slice(half))))

        return by_jobs(mem, op, kernel, out.rows, kernel.columns(), body)
