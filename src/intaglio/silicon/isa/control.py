"""Instructions of the sequencer: Check traps on values that are not finite, Halt ends a stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intaglio.chips import Target
from intaglio.silicon.isa.instruction import Cost, Instruction, Shapes
from intaglio.silicon.memory import CoreMemory, MachineError, Region


@dataclass(frozen=True, kw_only=True)
class Check(Instruction, engine="SEQ", opcode=0x60):
    """Stop the run with an error (MachineError) if `src` holds NaN or infinity."""

    src: Region
    writes = ()

    def shapes(self) -> Shapes:
        return {}

    def run(self, mem: CoreMemory) -> None:
        values = mem.read32(self.src)
        if not np.isfinite(values).all():
            raise MachineError(f"{self.src} holds {np.count_nonzero(~np.isfinite(values))} values that are not finite")

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=self.src.nbytes / target.chip.sram_bytes_per_cycle)


@dataclass(frozen=True, kw_only=True)
class Halt(Instruction, engine="SEQ", opcode=0x61):
    """Mark the end of a core's stream. It has no effect and takes no time."""

    writes = ()

    def shapes(self) -> Shapes:
        return {}

    def run(self, mem: CoreMemory) -> None:
        """Do nothing: the instruction leaves memory unchanged."""

    def cost(self, target: Target) -> Cost:
        return Cost()
