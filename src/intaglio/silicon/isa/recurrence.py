"""Instruction Scan: advances a state row by row, each column by itself, on the vector lanes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intaglio.chips import Target
from intaglio.silicon.isa.cycles import scan_cycles
from intaglio.silicon.isa.instruction import Cost, Instruction, Shapes
from intaglio.silicon.memory import CoreMemory, Region


@dataclass(frozen=True, kw_only=True)
class Scan(Instruction, engine="VEC", opcode=0x4E):
    """Compute a linear recurrence over the rows of x: a state h decays, and each row of x is added to it.

    For each row i in order, h = exp(decay[i]) * h + x[i], and then dst[i] = h.

    dst, decay, x f32 [m, n]; h f32 [1, n], with one value for each column. If `normalised` is set, each x[i] is first
    multiplied by sqrt(1 - exp(2 * decay[i])); if `first` is set too, x[0] is not multiplied. Each row is computed in
    FP64, and then h is rounded to FP32.
    """

    dst: Region
    h: Region
    decay: Region
    x: Region
    normalised: bool = False
    first: bool = False
    writes = ("dst", "h")
    updates = ("h",)

    def shapes(self) -> Shapes:
        return {**dict.fromkeys(("dst", "decay", "x"), ("m", "n")), "h": (1, "n")}

    def run(self, mem: CoreMemory) -> None:
        log, x, h = mem.read64(self.decay), mem.read64(self.x), mem.read32(self.h)
        if self.normalised:
            factor = np.sqrt(-np.expm1(2 * log))
            factor[: int(self.first)] = 1
            x = x * factor
        out = np.zeros(x.shape, np.float32)
        for i in range(len(x)):
            out[i] = h = (np.exp(log[i]) * h + x[i]).astype(np.float32)
        mem.write(self.dst, out)
        mem.write(self.h, out[-1:])

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=float(scan_cycles(target.chip, self.x.rows, self.x.cols, self.normalised)))
