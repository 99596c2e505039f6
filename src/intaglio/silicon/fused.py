"""An instruction added for co-design: one step of flash attention's softmax in a single pass (see docs/codesign.md).

A chip has it if its spec lists it among `extra`; kernels use it where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.chips import ChipSpec
from intaglio.silicon.instruction import Cost, Instruction
from intaglio.silicon.instructions import masked, online, vector_cycles, wide
from intaglio.silicon.memory import Region, Spaces

NAME = "SoftmaxStep"
PASS_OPS = 2  # of the five a score takes apart: scale with mask as one operand of the exponential, sum on the way out


@dataclass(frozen=True, kw_only=True)
class SoftmaxStep(Instruction, engine="VEC", opcode=0x3B):
    """Softmax and Rescale in one pass over the scores: p, m, l carried on as by Softmax, and sums times the factor that
    Softmax would give as alpha, which never leaves the lanes."""

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
    writes = ("p", "m", "l", "sums")
    updates = ("m", "l", "sums")

    def run(self, at: Spaces) -> None:
        s = masked(self, wide(at, self.scores))
        p, m, length, alpha = online(s, wide(at, self.m), wide(at, self.l))
        at.write(self.sums, at.read(self.sums) * alpha.astype(np.float32))
        for region, value in ((self.p, p), (self.m, m), (self.l, length)):
            at.write(region, value)

    def cost(self, spec: ChipSpec) -> Cost:
        n = self.scores.rows * self.scores.cols
        return Cost(cycles=float(step_cycles(spec, n, self.softcap > 0)))


def step_cycles(spec: ChipSpec, n: Any, capped: bool = False) -> Any:
    """Cycles for n scores; the sums are scaled by the accumulators' own write port meanwhile."""
    return vector_cycles(spec, (PASS_OPS + 2 * capped) * n, n * (1 + capped))
