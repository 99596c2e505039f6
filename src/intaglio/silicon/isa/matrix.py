"""Instructions of the matrix array: Matmul into accumulators, and Drain out of them.

Matmul sums a tile's products over K in float64, rounds the sum once to FP32 and adds it to the accumulator, tile by
tile in the order of issue. The float64 sum is exact for E4M3 and INT8 up to K = 65,536.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from intaglio import formats
from intaglio.chips import Target
from intaglio.ops.elementwise import FUNCTIONS
from intaglio.silicon.isa.cycles import matmul_cycles, vector_cycles
from intaglio.silicon.isa.instruction import Cost, Instruction, Shapes
from intaglio.silicon.memory import CoreMemory, Region

Activation = Literal["", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh"]
EXP_CALLS = ("silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "exp", "softplus")


@dataclass(frozen=True, kw_only=True)
class Matmul(Instruction, engine="MXU", opcode=0x20):
    """Multiply two tiles in the matrix array: acc = (a @ b.T) * row_scale * col_scale.

    a [m, k], b [n, k], acc f32 [m, n], row_scale f32 [m, 1], col_scale f32 [1, n]. If `by_rows` is set, b is [k, n] and
    the product is a @ b. A scale that is not given counts as 1.

    The sum over k is computed in FP64, multiplied by the scales and rounded once to FP32. If `accumulate` is set, this
    result is added to the old acc, in FP32. If a and b have different formats, the time is that of the wider format.
    """

    acc: Region
    a: Region
    b: Region
    row_scale: Region | None = None
    col_scale: Region | None = None
    accumulate: bool = False
    by_rows: bool = False
    writes = ("acc",)

    def shapes(self) -> Shapes:
        b = ("k", "n") if self.by_rows else ("n", "k")
        return {"acc": ("m", "n"), "a": ("m", "k"), "b": b, "row_scale": ("m", 1), "col_scale": (1, "n")}

    def run(self, mem: CoreMemory) -> None:
        b = mem.read64(self.b)
        y = mem.read64(self.a) @ (b if self.by_rows else b.T)
        if self.row_scale is not None:
            y = y * mem.read64(self.row_scale)
        if self.col_scale is not None:
            y = y * mem.read64(self.col_scale)
        y = y.astype(np.float32)
        mem.write(self.acc, y + mem.read(self.acc) if self.accumulate else y)

    def cost(self, target: Target) -> Cost:
        wider = max(self.a.format, self.b.format, key=formats.bits)
        return Cost(cycles=float(matmul_cycles(target, self.acc.rows, self.acc.cols, self.a.cols, wider)))

    def reads_old(self, name: str) -> bool:
        return self.accumulate and name == "acc"


@dataclass(frozen=True, kw_only=True)
class Drain(Instruction, engine="VEC", opcode=0x30):
    """Move a tile from the accumulators to SRAM, with bias, scale, activation function f, gate and residual.

    1. y = (acc + bias) * scale. If `limit` is above 0, values above `limit` become `limit`.
    2. If there is an activation f: y = f(alpha * y) / alpha.
    3. If `up`, the second product of a gated MLP, is given: z = (up + up_bias) * scale, clamped to -limit .. limit if
       `limit` is above 0. Then y = y * (z + shift).
    4. dst = y + residual, rounded to dst's format.

    acc, up f32 [m, n] in the accumulators; bias, up_bias [1, n]; residual f32 [m, n]; dst [m, n]. A bias or residual
    that is not given counts as 0. (acc + bias) * scale and z are computed in FP64 and rounded to FP32. Everything else
    is computed in FP32.
    """

    dst: Region
    acc: Region
    up: Region | None = None
    bias: Region | None = None
    up_bias: Region | None = None
    residual: Region | None = None
    scale: float = 1.0
    activation: Activation = ""
    alpha: float = 1.0
    limit: float = 0.0
    shift: float = 0.0
    writes = ("dst",)

    def shapes(self) -> Shapes:
        tile = dict.fromkeys(("dst", "acc", "up", "residual"), ("m", "n"))
        return {**tile, "bias": (1, "n"), "up_bias": (1, "n")}

    def _side(self, mem: CoreMemory, acc: Region, bias: Region | None) -> np.ndarray:
        y = mem.read64(acc)
        if bias is not None:
            y = y + mem.read64(bias)
        return (y * self.scale).astype(np.float32)

    def run(self, mem: CoreMemory) -> None:
        y = self._side(mem, self.acc, self.bias)
        if self.limit:
            y = np.minimum(y, np.float32(self.limit))
        if self.activation:
            y = FUNCTIONS[self.activation](np.float32(self.alpha) * y) / np.float32(self.alpha)
        if self.up is not None:
            z = self._side(mem, self.up, self.up_bias)
            y = y * ((np.clip(z, -self.limit, self.limit) if self.limit else z) + np.float32(self.shift))
        mem.write(self.dst, y if self.residual is None else y + mem.read(self.residual))

    def cost(self, target: Target) -> Cost:
        n = self.dst.rows * self.dst.cols
        steps = 1 + sum(r is not None for r in (self.up, self.up, self.bias, self.up_bias, self.residual))
        steps += 2 * (self.limit > 0) + 2 * (self.alpha != 1) + (self.shift != 0)
        exps = n if self.activation in EXP_CALLS else 0
        return Cost(
            cycles=float(vector_cycles(target.chip, n * steps, exps)),
            latency_s=target.chip.array_depth / target.chip.clock_hz,
        )
