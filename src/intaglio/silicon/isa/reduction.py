"""Instructions of the vector lanes that reduce values: moments, matrices made doubly stochastic, pooled rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from intaglio.chips import Target
from intaglio.ops.moment import moment
from intaglio.ops.pooled import pool
from intaglio.ops.streams import doubly_stochastic
from intaglio.silicon.isa.cycles import moment_cycles, pool_cycles, sinkhorn_cycles
from intaglio.silicon.isa.instruction import Cost, Instruction, Shapes
from intaglio.silicon.memory import CoreMemory, Region


@dataclass(frozen=True, kw_only=True)
class Moment(Instruction, engine="VEC", opcode=0x4B):
    """Reduce each row of x f32 [m, n] to its mean, root mean square or standard deviation: dst f32 [m, 1].

    The field `of` selects the statistic: mean is sum(x) / n, rms is sqrt(sum(x^2) / n), std is sqrt(sum((x - mean)^2) /
    n). The result is computed in FP64 and rounded once.
    """

    dst: Region
    x: Region
    of: Literal["mean", "rms", "std"] = "mean"
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {"dst": ("m", 1), "x": ("m", "n")}

    def run(self, mem: CoreMemory) -> None:
        mem.write(self.dst, moment(mem.read64(self.x), self.of))

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=float(self.x.rows * moment_cycles(target.chip, self.x.cols, self.of)))


@dataclass(frozen=True, kw_only=True)
class Sinkhorn(Instruction, engine="VEC", opcode=0x4C):
    """Make the rows and the columns of square matrices each sum to about 1 (Sinkhorn & Knopp 1967).

    Such matrices are called doubly stochastic.

    x, dst f32 [m, n * n]: each row of x is an n x n matrix, and the same row of dst is its result. First, softmax is
    applied to each row of the matrix and eps is added; then each column is divided by its sum + eps. After this,
    `iterations` - 1 times, each row and then each column is divided by its sum + eps. The result is computed in FP64
    and rounded once.
    """

    dst: Region
    x: Region
    iterations: int = 20
    eps: float = 1e-6
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {"dst": ("m", "columns"), "x": ("m", "columns")}

    def run(self, mem: CoreMemory) -> None:
        mem.write(self.dst, doubly_stochastic(mem.read64(self.x), self.iterations, self.eps))

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=float(self.x.rows * sinkhorn_cycles(target.chip, self.x.cols, self.iterations)))


@dataclass(frozen=True, kw_only=True)
class Pool(Instruction, engine="VEC", opcode=0x4D):
    """Replace m rows of x by their weighted sum: dst[0, j] = the sum over i of w[i, j] * x[i, j].

    The weights w are the softmax of gates + bias over the m rows, separately for each column j. dst f32 [1, n], x and
    gates [m, n] in any float format, bias f32 [m, n]. The result is computed in FP64 and rounded once.
    """

    dst: Region
    x: Region
    gates: Region
    bias: Region
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {"dst": (1, "n"), **dict.fromkeys(("x", "gates", "bias"), ("m", "n"))}

    def run(self, mem: CoreMemory) -> None:
        gates = mem.read64(self.gates) + mem.read64(self.bias)
        mem.write(self.dst, pool(mem.read64(self.x), gates)[None, :])

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=float(pool_cycles(target.chip, self.x.rows * self.x.cols)))
