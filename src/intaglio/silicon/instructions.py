"""The instruction set: one class each, with what it does to memory (run) and what it holds for how long (cost).

Numbers are part of it. Matmul sums each tile over K exactly, rounds that sum once to FP32 and adds tiles in the order
they are issued: exact for E4M3 and INT8 at any K up to 65,536; for BF16 as wide as float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from intaglio import formats
from intaglio.batch import Edits, Sampling
from intaglio.chips import ChipSpec
from intaglio.ops.elementwise import FUNCTIONS
from intaglio.ops.sample import draw
from intaglio.silicon.instruction import Cost, Instruction, Steps
from intaglio.silicon.memory import FORMATS, MachineError, Region, Spaces

Activation = Literal["", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh"]
EXP_CALLS = ("silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "exp")
NEVER = np.float32(-np.inf)


def matmul_cycles(spec: ChipSpec, m: Any, n: Any, k: Any, format: str) -> Any:
    """Cycles of one core's array for [m, k] times [k, n], numbers or arrays: multiply-accumulates rounded up to the
    array, or operand bytes into and out of SRAM, whichever takes longer; over the share that streams reach."""
    am, an, ak = spec.array
    macs = np.ceil(m / am) * am * (np.ceil(n / an) * an) * (np.ceil(k / ak) * ak)
    operands = 2 * (m + n) * k * formats_bits(spec.runs_as(format)) / 8
    cycles = np.maximum(macs / spec.mac_rate(format), operands / spec.sram_bytes_per_cycle)
    return cycles / spec.constants.mxu_share


def formats_bits(format: str) -> int:
    """Bits of a value as the array takes it."""
    return 4 if format == "e2m1" else FORMATS[format][0]


def vector_cycles(spec: ChipSpec, ops: Any, exps: Any = 0) -> Any:
    """Cycles of one core's lanes for so many FP32 operations and exponentials."""
    return ops / spec.vec_lanes + exps / spec.exp_lanes


def wide(at: Spaces, r: Region) -> np.ndarray:
    return at.read(r).astype(np.float64)


def single(at: Spaces, r: Region) -> np.ndarray:
    return at.read(r).astype(np.float32)


def through_hbm(spec: ChipSpec, r: Region, out: bool) -> Cost:
    """A transfer between HBM and a core, or within a core. A store is done when it is on its way."""
    return Cost(bytes=r.nbytes, resource="hbm", latency_s=0.0 if out else spec.constants.latency_s)


# ---- DMA: into a core


@dataclass(frozen=True, kw_only=True)
class Load(Instruction, engine="DMA", opcode=0x10):
    """dst = src, of one shape and format, from HBM."""

    dst: Region
    src: Region
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        at.write(self.dst, at.read(self.src))

    def cost(self, spec: ChipSpec) -> Cost:
        return through_hbm(spec, self.src, out=False)


@dataclass(frozen=True, kw_only=True)
class Gather(Instruction, engine="DMA", opcode=0x11):
    """dst[i] = table[index[0, i]]: rows by number, such as embeddings and pages. A row outside the table is refused."""

    dst: Region
    table: Region
    index: Region
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        ids = at.read(self.index)[0]
        check_within("gathers row", ids, self.table.rows, self.table)
        for i, row in enumerate(ids.tolist()):
            at.write(self.dst.part(slice(i, i + 1)), at.read(self.table.part(slice(row, row + 1))))

    def cost(self, spec: ChipSpec) -> Cost:
        return through_hbm(spec, self.dst, out=False)


def check_within(what: str, ids: np.ndarray, count: int, of: Region) -> None:
    bad = ids[(ids < 0) | (ids >= count)]
    if len(bad):
        raise MachineError(f"{what} {bad[0]} of {of}, which has {count}")


@dataclass(frozen=True, kw_only=True)
class Fill(Instruction, engine="DMA", opcode=0x12):
    """dst = value everywhere."""

    dst: Region
    value: float = 0.0
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        at.write(self.dst, np.full((self.dst.rows, self.dst.cols), self.value, np.float32))

    def cost(self, spec: ChipSpec) -> Cost:
        return Cost(cycles=self.dst.nbytes / spec.sram_bytes_per_cycle)


# ---- OUT: out of a core


@dataclass(frozen=True, kw_only=True)
class Store(Instruction, engine="OUT", opcode=0x18):
    """dst = src, of one shape, to HBM."""

    dst: Region
    src: Region
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        at.write(self.dst, at.read(self.src))

    def cost(self, spec: ChipSpec) -> Cost:
        return through_hbm(spec, self.dst, out=True)


@dataclass(frozen=True, kw_only=True)
class Scatter(Instruction, engine="OUT", opcode=0x19):
    """table[index[0, i]] = src[i]: rows by number, such as this step's keys into their pages."""

    table: Region
    src: Region
    index: Region
    writes = ("table",)

    def run(self, at: Spaces) -> None:
        ids = at.read(self.index)[0]
        check_within("scatters to row", ids, self.table.rows, self.table)
        values = at.read(self.src)
        for i, row in enumerate(ids.tolist()):
            at.write(self.table.part(slice(row, row + 1)), values[i : i + 1])

    def cost(self, spec: ChipSpec) -> Cost:
        return through_hbm(spec, self.src, out=True)


# ---- MXU: the matrix array


@dataclass(frozen=True, kw_only=True)
class Matmul(Instruction, engine="MXU", opcode=0x20):
    """acc (+)= (a @ b.T) * row_scale * col_scale. a [m, k], b [n, k], acc f32 [m, n], row_scale f32 [m, 1], col_scale
    f32 [1, n]. The sum over k is exact, is rounded once to FP32, and is added to acc in FP32. With
    `by_rows`, b is [k, n]. Operands of two formats run at the rate of the wider."""

    acc: Region
    a: Region
    b: Region
    row_scale: Region | None = None
    col_scale: Region | None = None
    accumulate: bool = False
    by_rows: bool = False
    writes = ("acc",)

    def run(self, at: Spaces) -> None:
        b = wide(at, self.b)
        y = wide(at, self.a) @ (b if self.by_rows else b.T)
        if self.row_scale is not None:
            y = y * wide(at, self.row_scale)
        if self.col_scale is not None:
            y = y * wide(at, self.col_scale)
        y = y.astype(np.float32)
        at.write(self.acc, y + at.read(self.acc) if self.accumulate else y)

    def cost(self, spec: ChipSpec) -> Cost:
        wider = max(self.a.format, self.b.format, key=lambda f: FORMATS[f][0])
        return Cost(cycles=float(matmul_cycles(spec, self.acc.rows, self.acc.cols, self.a.cols, wider)))

    def reads_old(self, name: str) -> bool:
        return self.accumulate and name == "acc"


# ---- VEC: the lanes


@dataclass(frozen=True, kw_only=True)
class Drain(Instruction, engine="VEC", opcode=0x30):
    """dst = f(alpha * y) / alpha [* (z + shift)] + residual, in FP32, rounded to dst's format, of
    y = (acc + bias) * scale and z = (up + up_bias) * scale.

    acc, up f32 [m, n] in accumulators, biases [1, n], residual f32 [m, n]. With `up`, a GLU pair, of which a limit
    above 0 caps y at limit and z at +-limit."""

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

    def _side(self, at: Spaces, acc: Region, bias: Region | None) -> np.ndarray:
        y = wide(at, acc)
        if bias is not None:
            y = y + wide(at, bias)
        return (y * self.scale).astype(np.float32)

    def run(self, at: Spaces) -> None:
        y = self._side(at, self.acc, self.bias)
        if self.limit:
            y = np.minimum(y, np.float32(self.limit))
        if self.activation:
            y = FUNCTIONS[self.activation](np.float32(self.alpha) * y) / np.float32(self.alpha)
        if self.up is not None:
            z = self._side(at, self.up, self.up_bias)
            y = y * ((np.clip(z, -self.limit, self.limit) if self.limit else z) + np.float32(self.shift))
        at.write(self.dst, y if self.residual is None else y + at.read(self.residual))

    def cost(self, spec: ChipSpec) -> Cost:
        n = self.dst.rows * self.dst.cols
        steps = 1 + sum(r is not None for r in (self.up, self.up, self.bias, self.up_bias, self.residual))
        steps += 2 * (self.limit > 0) + 2 * (self.alpha != 1) + (self.shift != 0)
        exps = n if self.activation in EXP_CALLS else 0
        return Cost(cycles=float(vector_cycles(spec, n * steps, exps)), latency_s=spec.depth / spec.clock_hz)


@dataclass(frozen=True, kw_only=True)
class Convert(Instruction, engine="VEC", opcode=0x31):
    """dst = src rounded to dst's format."""

    dst: Region
    src: Region
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        at.write(self.dst, at.read(self.src))

    def cost(self, spec: ChipSpec) -> Cost:
        return Cost(cycles=float(vector_cycles(spec, self.src.rows * self.src.cols)))


@dataclass(frozen=True, kw_only=True)
class Quantise(Instruction, engine="VEC", opcode=0x32):
    """codes [m, k], scale f32 [m, 1] of x f32 [m, k]: int8 by formats.quantise_rows with the row as one group, e4m3 by
    formats.quantise to fp8row. `kept` int8, for a cache: by formats.quantise to int8row, whose scales are bf16."""

    codes: Region
    scale: Region
    x: Region
    kept: bool = False
    writes = ("codes", "scale")

    def run(self, at: Spaces) -> None:
        x = single(at, self.x)
        if self.codes.format == "e4m3":
            q = formats.quantise(x, "fp8row")
            at.write(self.codes, q.codes)
            at.write(self.scale, q.scales[:, :1])
            return
        if self.kept:
            q = formats.quantise(x, "int8row")
            at.write(self.codes, q.codes)
            at.write(self.scale, q.scales[:, :1])
            return
        codes, scales = formats.quantise_rows(x, self.x.cols)
        at.write(self.codes, codes[:, 0])
        at.write(self.scale, scales)

    def cost(self, spec: ChipSpec) -> Cost:
        return Cost(cycles=float(vector_cycles(spec, 3 * self.x.rows * self.x.cols)))


@dataclass(frozen=True, kw_only=True)
class Dequantise(Instruction, engine="VEC", opcode=0x36):
    """dst f32 [m, k] = codes [m, k] times the scale of their group, scales [m, ceil(k / group)]."""

    dst: Region
    codes: Region
    scales: Region
    group: int
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        spread = np.repeat(single(at, self.scales), self.group, axis=1)[:, : self.codes.cols]
        at.write(self.dst, single(at, self.codes) * spread)

    def cost(self, spec: ChipSpec) -> Cost:
        return Cost(cycles=float(vector_cycles(spec, 2 * self.codes.rows * self.codes.cols)))


@dataclass(frozen=True, kw_only=True)
class Permute(Instruction, engine="VEC", opcode=0x37):
    """dst[:, j] = src[:, order[0, j]], f32. A column outside of src is refused."""

    dst: Region
    src: Region
    order: Region
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        order = at.read(self.order)[0]
        check_within("takes column", order, self.src.cols, self.src)
        at.write(self.dst, single(at, self.src)[:, order])

    def cost(self, spec: ChipSpec) -> Cost:
        return Cost(cycles=float(vector_cycles(spec, self.dst.rows * self.dst.cols)))


@dataclass(frozen=True, kw_only=True)
class Map(Instruction, engine="VEC", opcode=0x33):
    """dst = a small stack program over a, b, c (f32, one shape; b and c may have one column, which then stands for
    all), element by element."""

    dst: Region
    a: Region
    b: Region | None = None
    c: Region | None = None
    steps: Steps = ()
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        stack: list[Any] = []
        for step, value in self.steps:
            if step == "operand":
                stack.append(single(at, getattr(self, str(value))))
            elif step == "number":
                stack.append(np.float32(value))
            elif step == "call":
                stack.append(FUNCTIONS[str(value)](stack.pop()))
            else:
                right, left = stack.pop(), stack.pop()
                binary = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide}
                stack.append(binary[str(value)](left, right))
        at.write(self.dst, np.broadcast_to(stack.pop(), (self.dst.rows, self.dst.cols)))

    def cost(self, spec: ChipSpec) -> Cost:
        n = self.dst.rows * self.dst.cols
        work = sum(step in ("call", "binary") for step, _ in self.steps) or 1
        exps = sum(value in EXP_CALLS for step, value in self.steps if step == "call")
        return Cost(cycles=float(vector_cycles(spec, work * n, exps * n)))


@dataclass(frozen=True, kw_only=True)
class Norm(Instruction, engine="VEC", opcode=0x34):
    """dst = normalised(x) * (weight + offset) + bias + residual, as the op norm says; x f32 [m, groups * span], weight
    and bias [1, span]."""

    dst: Region
    x: Region
    weight: Region | None = None
    bias: Region | None = None
    residual: Region | None = None
    norm: Literal["rms", "layer", "l2"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    span: int = 0
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        x = wide(at, self.x).reshape(self.x.rows, self.x.cols // self.span, self.span)
        if self.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        squares = (x * x).sum(axis=-1, keepdims=True)
        y = x / np.sqrt(squares / (1 if self.norm == "l2" else self.span) + self.eps)
        if self.weight is not None:
            y = y * (single(at, self.weight) + np.float32(self.offset))
        if self.bias is not None:
            y = y + single(at, self.bias)
        y = y.reshape(self.x.rows, self.x.cols).astype(np.float32)
        at.write(self.dst, y if self.residual is None else y + at.read(self.residual))

    def cost(self, spec: ChipSpec) -> Cost:
        return Cost(cycles=float(norm_cycles(spec, self.x.rows * self.x.cols)))


def norm_cycles(spec: ChipSpec, n: Any) -> Any:
    """Two passes of two operations over n values, and the tree that joins a row's lanes."""
    return vector_cycles(spec, 4 * n) + 2 * np.log2(spec.vec_lanes)


@dataclass(frozen=True, kw_only=True)
class Rope(Instruction, engine="VEC", opcode=0x35):
    """dst = x with pairs of each head turned by position * frequency, times factor, as the op rope says. x f32
    [m, heads * head_dim], positions i32 [1, m], frequencies f32 [1, pairs]."""

    dst: Region
    x: Region
    positions: Region
    frequencies: Region
    head_dim: int
    style: Literal["half", "interleaved"] = "half"
    factor: float = 1.0
    trailing: bool = False
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        x = single(at, self.x).reshape(self.x.rows, -1, self.head_dim)
        angle = single(at, self.positions).T * single(at, self.frequencies)
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
        at.write(self.dst, y.reshape(self.x.rows, -1))

    def cost(self, spec: ChipSpec) -> Cost:
        turned = 2 * self.frequencies.cols * self.x.rows
        return Cost(cycles=float(vector_cycles(spec, 3 * self.x.rows * self.x.cols, turned)))


# ---- VEC: attention in pieces


def visible(scores: np.ndarray, query: int, pack: int, key: int, keys: int, window: int) -> np.ndarray:
    """Which scores count: row r stands for the query at position query + r // pack, column j for the key at key + j,
    of which `keys` exist."""
    back = query + np.arange(len(scores))[:, None] // pack - (key + np.arange(scores.shape[1])[None, :])
    inside = np.arange(scores.shape[1])[None, :] < keys
    return (back >= 0) & inside & ((back < window) if window else True)


def masked(i: Any, s: np.ndarray) -> np.ndarray:
    """Products of queries and keys [rows, n], float64, as instruction `i` scales, caps, tempers and masks them: times
    1 + temper * ln(1 + floor((position + 1) / every)), by the query's position."""
    s = capped(s * i.scale, i.softcap)
    if i.temper:
        position = i.query + np.arange(len(s))[:, None] // i.pack
        s = s * (1 + i.temper * np.log1p((position + 1) // i.every))
    return np.where(visible(s, i.query, i.pack, i.key, i.keys, i.window), s, NEVER)


def online(s: np.ndarray, m: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One step of the running softmax: weights, new maximum, new sum and the factor for what was summed before."""
    top = np.maximum(m, s.max(axis=1, keepdims=True))
    base = np.where(np.isfinite(top), top, 0)
    p = np.exp(s - base)
    alpha = np.exp(np.where(np.isfinite(m), m - base, NEVER))
    return p, top, length * alpha + p.sum(axis=1, keepdims=True), alpha


@dataclass(frozen=True, kw_only=True)
class Softmax(Instruction, engine="VEC", opcode=0x38):
    """One step of the running softmax (Milakov & Gimelshein 2018): p = exp(softcap(scores * scale) + mask - m'), and m,
    l carried on, alpha the factor for sums made with the old m. scores f32 [q, n] in accumulators; m, l, alpha f32
    [q, 1]. Row r is the query at position query + r // pack, column j the key at key + j, of which `keys` exist."""

    p: Region
    m: Region
    l: Region  # noqa: E741
    alpha: Region
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
    writes = ("p", "m", "l", "alpha")
    updates = ("m", "l")

    def run(self, at: Spaces) -> None:
        s = masked(self, wide(at, self.scores))
        for region, value in zip((self.p, self.m, self.l, self.alpha), online(s, *self._state(at)), strict=True):
            at.write(region, value)

    def _state(self, at: Spaces) -> tuple[np.ndarray, np.ndarray]:
        return wide(at, self.m), wide(at, self.l)

    def cost(self, spec: ChipSpec) -> Cost:
        n = self.scores.rows * self.scores.cols
        return Cost(cycles=float(softmax_cycles(spec, n, self.softcap > 0)))


SOFTMAX_OPS = 5  # scale and mask, maximum, subtract, sum, convert


def softmax_cycles(spec: ChipSpec, n: Any, capped: bool = False) -> Any:
    """Cycles for n scores; a softcap is one more exponential and two operations."""
    return vector_cycles(spec, (SOFTMAX_OPS + 2 * capped) * n, n * (1 + capped))


def capped(s: np.ndarray, softcap: float) -> np.ndarray:
    return softcap * np.tanh(s / softcap) if softcap else s


@dataclass(frozen=True, kw_only=True)
class Rescale(Instruction, engine="VEC", opcode=0x39):
    """acc = acc * alpha, alpha f32 [q, 1]."""

    acc: Region
    alpha: Region
    writes = ("acc",)
    updates = ("acc",)

    def run(self, at: Spaces) -> None:
        at.write(self.acc, at.read(self.acc) * single(at, self.alpha))

    def cost(self, spec: ChipSpec) -> Cost:
        return Cost(cycles=float(vector_cycles(spec, self.acc.rows * self.acc.cols)))


@dataclass(frozen=True, kw_only=True)
class Merge(Instruction, engine="VEC", opcode=0x3A):
    """dst = sums / l over `parts` partial attentions of the same queries, in ascending order: each part's sums
    [parts * q, d], m and l [parts * q, 1], part by part."""

    dst: Region
    sums: Region
    m: Region
    l: Region  # noqa: E741
    parts: int = 1
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        o, m, length = (wide(at, r).reshape(self.parts, self.dst.rows, -1) for r in (self.sums, self.m, self.l))
        top = m.max(axis=0)
        weight = np.exp(m - np.where(np.isfinite(top), top, 0))
        total = np.zeros((self.dst.rows, self.dst.cols))
        below = np.zeros((self.dst.rows, 1))
        for i in range(self.parts):
            total, below = total + o[i] * weight[i], below + length[i] * weight[i]
        at.write(self.dst, total / below)

    def cost(self, spec: ChipSpec) -> Cost:
        n = self.parts * self.dst.rows
        return Cost(cycles=float(vector_cycles(spec, 2 * n * self.dst.cols, n)))


# ---- ATT: attention in one


@dataclass(frozen=True, kw_only=True)
class Attend(Instruction, engine="ATT", opcode=0x40):
    """One tile of keys for one tile of queries, fused: sums, m, l carried on as by Matmul, Softmax, Rescale, Matmul.

    q [rows, d], k [n, d], v [n, dv]; sums f32 [rows, dv]; m, l f32 [rows, 1]. Weights are rounded to v's format."""

    sums: Region
    m: Region
    l: Region  # noqa: E741
    q: Region
    k: Region
    v: Region
    scale: float
    softcap: float = 0.0
    query: int = 0
    pack: int = 1
    key: int = 0
    keys: int = 0
    window: int = 0
    temper: float = 0.0
    every: int = 1
    writes = ("sums", "m", "l")
    updates = ("sums", "m", "l")

    def run(self, at: Spaces) -> None:
        s = masked(self, (wide(at, self.q) @ wide(at, self.k).T).astype(np.float32).astype(np.float64))
        p, m, length, alpha = online(s, wide(at, self.m), wide(at, self.l))
        p = p.astype(FORMATS[self.v.format][1]).astype(np.float64)
        at.write(self.sums, wide(at, self.sums) * alpha + p @ wide(at, self.v))
        at.write(self.m, m)
        at.write(self.l, length)

    def cost(self, spec: ChipSpec) -> Cost:
        rows, n = self.q.rows, self.k.rows
        return Cost(cycles=float(attend_cycles(spec, rows, n, self.q.cols, self.v.cols, self.k.format)))


def attend_cycles(spec: ChipSpec, rows: Any, n: Any, d: Any, dv: Any, format: str) -> Any:
    """The fused engine borrows the matrix array: queries and sums stay in it while keys and values pass, and its own
    lanes turn scores into weights meanwhile."""
    macs = rows * n * (d + dv) / spec.mac_rate(format) / spec.constants.mxu_share
    passing = n * (d + dv) * formats_bits(spec.runs_as(format)) / 8 / spec.sram_bytes_per_cycle
    return np.maximum(np.maximum(macs, passing), rows * n / max(1, spec.att_lanes))


# ---- sampling, links and sequencing


@dataclass(frozen=True, kw_only=True)
class Sample(Instruction, engine="VEC", opcode=0x48):
    """token i32 [1, 1] drawn from logits f32 [1, vocabulary], and its log-probability f32 [1, 1], as the op sample
    says. The draw depends on (seed, position) alone. Edits are ids i32, factors and terms f32, [1, k] each; mask i32
    [1, words] has a bit for each id, the lowest first."""

    token: Region
    logprob: Region
    logits: Region
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    ids: Region | None = None
    factors: Region | None = None
    terms: Region | None = None
    mask: Region | None = None
    writes = ("token", "logprob")

    def run(self, at: Spaces) -> None:
        x = at.read(self.logits)[0]
        how = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.seed, *self._changes(at))
        token, logprob = draw(x, how, self.position), np.nan
        if token >= 0:
            up = x.astype(np.float64)
            logprob = up[token] - up.max() - np.log(np.exp(up - up.max()).sum())
        at.write(self.token, np.array([[token]]))
        at.write(self.logprob, np.array([[logprob]]))

    def _changes(self, at: Spaces) -> tuple[Edits | None, np.ndarray | None]:
        """What becomes of the logits before the draw."""
        edits = None
        if self.ids is not None and self.factors is not None and self.terms is not None:
            edits = Edits(*(at.read(r)[0] for r in (self.ids, self.factors, self.terms)))
        return edits, None if self.mask is None else at.read(self.mask)[0].view(np.uint32)

    def cost(self, spec: ChipSpec) -> Cost:
        filtered = self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)
        cycles = float(sample_cycles(spec, self.logits.cols, filtered))
        changed = EDIT_OPS * (self.ids.cols if self.ids else 0) + (self.logits.cols if self.mask else 0)
        return Cost(cycles=cycles + float(vector_cycles(spec, changed)))


EDIT_OPS = 5  # a logit read, compared, scaled, added to and written


def sample_cycles(spec: ChipSpec, n: Any, filtered: Any) -> Any:
    """Maximum, exponentials and sums over n logits; a filter bisects the threshold in 32 more passes."""
    return vector_cycles(spec, (4 + 32 * filtered) * n, n)


@dataclass(frozen=True, kw_only=True)
class Send(Instruction, engine="NET", opcode=0x50):
    """Send src to the chip `peer` under `tag`. Done when the last byte has left."""

    src: Region
    peer: int
    tag: int = 0
    writes = ()

    def run(self, at: Spaces) -> None:
        at.read(self.src)  # the machine carries the bytes

    def cost(self, spec: ChipSpec) -> Cost:
        return Cost(bytes=self.src.nbytes, resource="link")


@dataclass(frozen=True, kw_only=True)
class Receive(Instruction, engine="NET", opcode=0x51):
    """dst = what the chip `peer` sent under `tag`; waits for it."""

    dst: Region
    peer: int
    tag: int = 0
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        """The machine writes dst when the message is there."""

    def cost(self, spec: ChipSpec) -> Cost:
        return Cost(latency_s=spec.constants.hop_s)


@dataclass(frozen=True, kw_only=True)
class Check(Instruction, engine="SEQ", opcode=0x60):
    """Trap if `what` holds NaN or infinity."""

    what: Region
    writes = ()

    def run(self, at: Spaces) -> None:
        values = single(at, self.what)
        if not np.isfinite(values).all():
            raise MachineError(f"{self.what} holds {np.count_nonzero(~np.isfinite(values))} values that are not finite")

    def cost(self, spec: ChipSpec) -> Cost:
        return Cost(cycles=self.what.nbytes / spec.sram_bytes_per_cycle)


@dataclass(frozen=True, kw_only=True)
class Halt(Instruction, engine="SEQ", opcode=0x61):
    """The end of a core's stream; its waits are what must have finished."""

    writes = ()

    def run(self, at: Spaces) -> None:
        """Nothing to do."""

    def cost(self, spec: ChipSpec) -> Cost:
        return Cost()
