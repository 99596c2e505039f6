"""SoftmaxStep, an optional instruction: one online-softmax step in a single pass (see docs/codesign.md).

A chip has it if ChipSpec.extra_instructions lists it; the attention kernel then uses it instead of Softmax and Rescale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.chips import ChipSpec, Target
from intaglio.silicon.isa.attention import masked, online_softmax
from intaglio.silicon.isa.cycles import exposed, vector_cycles
from intaglio.silicon.isa.instruction import Cost, Instruction, Shapes
from intaglio.silicon.memory import CoreMemory, Region

NAME = "SoftmaxStep"
PASS_OPS = 2  # operations a score, of Softmax's 5: scale and mask in one on the way into the exponential, sum after it


@dataclass(frozen=True, kw_only=True)
class SoftmaxStep(Instruction, engine="VEC", opcode=0x3B):
    """Do the work of the instructions Softmax and Rescale in one, for the scores of one tile of keys.

    It makes one pass over the scores. p, m and l are the results that Softmax computes. The accumulators `sums`
    f32 [q, dv] hold the sums of weighted values so far. Each row of `sums` is multiplied by exp(old m - new m), the
    factor that Softmax calls alpha. The other fields have the same meaning as in Softmax.
    """

    p: Region
    m: Region
    l: Region  # noqa: E741
    sums: Region
    scores: Region
    scale: float
    softcap: float = 0.0
    query: int = 0
    pack: int = 1
    key: int = 0
    keys: int = 0
    window: int = 0
    temper: float = 0.0
    every: int = 1
    from_zero: bool = False
    slope: float = 0.0
    optional = True
    writes = ("p", "m", "l", "sums")
    updates = ("m", "l", "sums")

    def shapes(self) -> Shapes:
        state: Shapes = {"sums": ("q", "dv"), "m": ("q", 1), "l": ("q", 1)}
        return {"scores": ("q", "n"), "p": ("q", "n"), **state}

    def run(self, mem: CoreMemory) -> None:
        s = masked(self, mem.read64(self.scores))
        p, m, length, alpha = online_softmax(s, mem.read64(self.m), mem.read64(self.l))
        mem.write(self.sums, mem.read(self.sums) * alpha.astype(np.float32))
        for region, value in ((self.p, p), (self.m, m), (self.l, length)):
            mem.write(region, value)

    def cost(self, target: Target) -> Cost:
        n = self.scores.rows * self.scores.cols
        return Cost(cycles=exposed(target, float(step_cycles(target.chip, n, self.softcap > 0))))


def step_cycles(chip: ChipSpec, n: Any, capped: bool = False) -> Any:
    """Returns the cycles of SoftmaxStep for n scores. capped: True if scores are soft-capped.

    Rescaling the sums adds no cycles: the write port of the accumulators does it at the same time.
    """
    return vector_cycles(chip, (PASS_OPS + 2 * capped) * n, n * (1 + capped))
