"""Instructions of the vector lanes: conversion, quantisation, column order, elementwise arithmetic, norms, rope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from intaglio import formats
from intaglio.chips import ChipSpec, Target
from intaglio.ops.elementwise import evaluate
from intaglio.silicon.isa.cycles import norm_cycles, vector_cycles
from intaglio.silicon.isa.instruction import Cost, Instruction, Shapes, Steps
from intaglio.silicon.isa.matrix import EXP_CALLS
from intaglio.silicon.isa.transfer import check_within
from intaglio.silicon.memory import CoreMemory, Region

SCALED: Steps = (("operand", "a"), ("operand", "b"), ("binary", "*"))  # a * b, as steps of Map


@dataclass(frozen=True, kw_only=True)
class Convert(Instruction, engine="VEC", opcode=0x31):
    """Convert a matrix to another format: dst = src, rounded to dst's format.

    dst, src [m, n]. If dst is e4m3, values are first clipped to -448 .. 448, and values that are not finite become NaN.
    """

    dst: Region
    src: Region
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {"dst": ("m", "n"), "src": ("m", "n")}

    def run(self, mem: CoreMemory) -> None:
        clips = self.dst.format == "e4m3"
        mem.write(self.dst, formats.to_e4m3(mem.read32(self.src)) if clips else mem.read(self.src))

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=float(vector_cycles(target.chip, self.src.rows * self.src.cols)))


@dataclass(frozen=True, kw_only=True)
class Quantise(Instruction, engine="VEC", opcode=0x32):
    """Quantise each row of x with a scale of its own, so that codes * scale is about x.

    x f32 [m, k], codes [m, k] in e4m3 or int8, scale f32 [m, 1]. The scale of a row is its largest |x|, divided by 448
    for e4m3 and by 127 for int8. If `for_cache` is set, int8 scales are rounded to bf16; the K/V cache format int8row
    requires this.
    """

    codes: Region
    scale: Region
    x: Region
    for_cache: bool = False
    writes = ("codes", "scale")

    def shapes(self) -> Shapes:
        return {"x": ("m", "k"), "codes": ("m", "k"), "scale": ("m", 1)}

    def run(self, mem: CoreMemory) -> None:
        x = mem.read32(self.x)
        if self.for_cache or self.codes.format == "e4m3":
            q = formats.quantise(x, "fp8row" if self.codes.format == "e4m3" else "int8row")
            codes, scales = q.codes, q.scales[:, :1]
        else:
            codes, scales = formats.quantise_rows(x, self.x.cols)
            codes = codes[:, 0]
        mem.write(self.codes, codes)
        mem.write(self.scale, scales)

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=float(vector_cycles(target.chip, 3 * self.x.rows * self.x.cols)))


@dataclass(frozen=True, kw_only=True)
class Dequantise(Instruction, engine="VEC", opcode=0x36):
    """Dequantise: multiply quantised values by their scales.

    dst[i, j] = codes[i, j] * scales[i, j // group]: `group` neighbouring columns of a row share a scale.

    dst f32 [m, k], codes [m, k], scales [m, ceil(k / group)].
    """

    dst: Region
    codes: Region
    scales: Region
    group: int
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {"dst": ("m", "k"), "codes": ("m", "k"), "scales": ("m", -(-self.codes.cols // max(1, self.group)))}

    def run(self, mem: CoreMemory) -> None:
        spread = np.repeat(mem.read32(self.scales), self.group, axis=1)[:, : self.codes.cols]
        mem.write(self.dst, mem.read32(self.codes) * spread)

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=float(vector_cycles(target.chip, 2 * self.codes.rows * self.codes.cols)))


@dataclass(frozen=True, kw_only=True)
class Permute(Instruction, engine="VEC", opcode=0x37):
    """Put the columns of a matrix in another order: column j of dst = column order[0, j] of src.

    dst [m, n], src [m, columns], order i32 [1, n]. Raises MachineError for an index outside 0 .. columns - 1.
    """

    dst: Region
    src: Region
    order: Region
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {"dst": ("m", "n"), "src": ("m", "columns"), "order": (1, "n")}

    def run(self, mem: CoreMemory) -> None:
        order = mem.read(self.order)[0]
        check_within("takes column", order, self.src.cols, self.src)
        mem.write(self.dst, mem.read32(self.src)[:, order])

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=float(vector_cycles(target.chip, self.dst.rows * self.dst.cols)))


def map_cycles(chip: ChipSpec, steps: Steps, n: float) -> float:
    """Returns the cycles of the vector lanes to evaluate an expression `steps` on n values.

    For each value, each function call and each binary operator is one operation; writing the result is one more. Some
    functions, such as silu, also take one exponential for each value.
    """
    ops = 1 + sum(step in ("call", "binary") for step, _ in steps)
    exps = sum(value in EXP_CALLS for step, value in steps if step == "call")
    return float(vector_cycles(chip, ops * n, exps * n))


@dataclass(frozen=True, kw_only=True)
class Map(Instruction, engine="VEC", opcode=0x33):
    """Evaluate an expression of a, b and c for each element: dst = the value of the stack program `steps`.

    A stack program is an expression in postfix order: the steps a, b, * stand for a * b. A step is an operand, a
    number, one of + - * /, or a function that the op `map` has, such as silu. dst, a, b, c f32 [m, n]. b and c may also
    be [m, 1], with one value for all columns of a row, or [1, n], with one value for all rows of a column.
    """

    dst: Region
    a: Region
    b: Region | None = None
    c: Region | None = None
    steps: Steps = ()
    writes = ("dst",)

    def shapes(self) -> Shapes:
        given = {name: r for name in ("b", "c") if (r := getattr(self, name)) is not None}
        other: Shapes = {
            name: (1 if r.rows == 1 else "m", 1 if r.cols == 1 else "n") for name, r in given.items()
        }  # fmt: skip
        return {"dst": ("m", "n"), "a": ("m", "n"), **other}

    def run(self, mem: CoreMemory) -> None:
        value = evaluate(self.steps, lambda name: mem.read32(getattr(self, name)))
        mem.write(self.dst, np.broadcast_to(value, (self.dst.rows, self.dst.cols)))

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=map_cycles(target.chip, self.steps, self.dst.rows * self.dst.cols))


@dataclass(frozen=True, kw_only=True)
class Norm(Instruction, engine="VEC", opcode=0x34):
    """Normalise each row of x, or each group of columns in each row.

    dst = normalised(x) * (weight + offset) + bias + residual.

    x, dst, residual f32 [m, n]; weight, bias [1, span]. Each row consists of n / span groups of `span` neighbouring
    columns. Each group is normalised by itself. The field `norm` selects how:

    - rms: x / sqrt(mean(x^2) + eps);
    - layer: (x - mean) / sqrt(var + eps), with the mean and variance of the group;
    - l2: x / sqrt(sum(x^2) + eps);
    - none: x itself.

    If no weight is given, normalised(x) is not multiplied, whatever `offset` is. Everything but the residual is
    computed in FP64 and rounded to FP32.
    """

    dst: Region
    x: Region
    weight: Region | None = None
    bias: Region | None = None
    residual: Region | None = None
    norm: Literal["rms", "layer", "l2", "none"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    span: int = 0
    writes = ("dst",)

    def shapes(self) -> Shapes:
        width = max(1, self.x.cols // max(1, self.span)) * self.span
        tile = dict.fromkeys(("x", "dst", "residual"), ("m", width))
        return {**tile, "weight": (1, self.span), "bias": (1, self.span)}

    def run(self, mem: CoreMemory) -> None:
        x = mem.read64(self.x).reshape(self.x.rows, self.x.cols // self.span, self.span)
        if self.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        squares = (x * x).sum(axis=-1, keepdims=True)
        y = x if self.norm == "none" else x / np.sqrt(squares / (1 if self.norm == "l2" else self.span) + self.eps)
        if self.weight is not None:
            y = y * (mem.read32(self.weight) + np.float32(self.offset))
        if self.bias is not None:
            y = y + mem.read32(self.bias)
        y = y.reshape(self.x.rows, self.x.cols).astype(np.float32)
        mem.write(self.dst, y if self.residual is None else y + mem.read(self.residual))

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=float(norm_cycles(target.chip, self.x.rows * self.x.cols)))


@dataclass(frozen=True, kw_only=True)
class Rope(Instruction, engine="VEC", opcode=0x35):
    """Apply rotary position embedding: rotate pairs of columns of each head of x.

    x, dst f32 [m, heads * head_dim], positions i32 [1, m], frequencies f32 [1, pairs]. The angle of a pair in row i is
    t = positions[0, i] * the frequency of the pair. A pair (u, v) becomes factor * (u * cos t - v * sin t, v * cos t +
    u * sin t).

    The first 2 * pairs columns of each head are rotated. If `trailing` is set, the last 2 * pairs columns are rotated
    instead. The other columns are copied. With style "half", column j of the rotated columns is paired with column j +
    pairs. With style "interleaved", column 2j is paired with column 2j + 1.
    """

    dst: Region
    x: Region
    positions: Region
    frequencies: Region
    head_dim: int
    style: Literal["half", "interleaved"] = "half"
    factor: float = 1.0
    trailing: bool = False
    writes = ("dst",)

    def shapes(self) -> Shapes:
        width = max(1, self.x.cols // max(1, self.head_dim)) * self.head_dim
        pairs = min(self.frequencies.cols, self.head_dim // 2)
        return {"x": ("m", width), "dst": ("m", width), "positions": (1, "m"), "frequencies": (1, pairs)}

    def run(self, mem: CoreMemory) -> None:
        x = mem.read32(self.x).reshape(self.x.rows, -1, self.head_dim)
        angle = mem.read32(self.positions).T * mem.read32(self.frequencies)
        cos = (np.cos(angle.astype(np.float64)) * self.factor).astype(np.float32)[:, None, :]
        sin = (np.sin(angle.astype(np.float64)) * self.factor).astype(np.float32)[:, None, :]
        n = cos.shape[2]
        low = self.head_dim - 2 * n if self.trailing else 0
        mid, high = low + n, low + 2 * n
        half = self.style == "half"
        first, second = (slice(low, mid), slice(mid, high)) if half else (slice(low, high, 2), slice(low + 1, high, 2))
        y = x.copy()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., second] * cos + x[..., first] * sin
        mem.write(self.dst, y.reshape(self.x.rows, -1))

    def cost(self, target: Target) -> Cost:
        sines = 2 * self.frequencies.cols * self.x.rows  # a sine or cosine takes as long as an exponential
        return Cost(cycles=float(vector_cycles(target.chip, 3 * self.x.rows * self.x.cols, sines)))
