"""Instructions of flash attention: online softmax, rescale and merge on vector lanes, and fused attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.chips import Target
from intaglio.silicon.isa.cycles import attend_cycles, exposed, softmax_cycles, vector_cycles
from intaglio.silicon.isa.instruction import Cost, Instruction, Shapes
from intaglio.silicon.memory import CoreMemory, Region

MASKED = np.float32(-np.inf)


def visible(scores: np.ndarray, query: int, pack: int, key: int, keys: int, window: int) -> np.ndarray:
    """Returns the attention mask of a tile of scores, a bool array with the shape [rows, n] of `scores`.

    It is True where a score counts. Row r is the query at position query + r // pack, since `pack` query heads share
    each position. Column j is the key at position key + j. A score counts if all three conditions hold:

    - The key is not after the query.
    - The query is less than `window` positions after the key; with window 0 this condition always holds.
    - j < keys, since the columns from number `keys` on are padding.
    """
    distance = query + np.arange(len(scores))[:, None] // pack - (key + np.arange(scores.shape[1])[None, :])
    exists = np.arange(scores.shape[1])[None, :] < keys
    return (distance >= 0) & exists & ((distance < window) if window else True)


def capped(s: np.ndarray, softcap: float) -> np.ndarray:
    """Returns attention scores after softcapping: softcap * tanh(s / softcap), or `s` unchanged if `softcap` is 0."""
    return softcap * np.tanh(s / softcap) if softcap else s


def masked(i: Any, s: np.ndarray) -> np.ndarray:
    """Returns attention scores, f64 [rows, keys], computed from `s`, the products [rows, keys] of queries and keys.

    The fields of instruction `i` (Softmax, SoftmaxStep or Attend) determine four steps:

    1. Multiply `s` by `scale`. If `softcap` is above 0, soft-cap the result.
    2. If `temper` is not 0, multiply each score by 1 + temper * ln(1 + floor(p / every)). This temperature grows with
       the position of the query (Llama 4): p is the position if `from_zero` is set, else the position + 1.
    3. Add slope * (key position - query position), the bias of ALiBi. It is 0 if `slope` is 0.
    4. Set the scores that the mask excludes to -inf; see visible().
    """
    s = capped(s * i.scale, i.softcap)
    position = i.query + np.arange(len(s))[:, None] // i.pack
    if i.temper:
        s = s * (1 + i.temper * np.log1p((position + (not i.from_zero)) // i.every))
    s = s + i.slope * (i.key + np.arange(s.shape[1])[None, :] - position)
    return np.where(visible(s, i.query, i.pack, i.key, i.keys, i.window), s, MASKED)


def online_softmax(
    s: np.ndarray,
    m: np.ndarray,
    l: np.ndarray,  # noqa: E741
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the weights and the new state of the softmax after new scores `s` [rows, n]: (p, new m, new l, alpha).

    The function is one step of the online softmax. m, l [rows, 1] are its state: the largest score, and the sum of
    exp(score - m), over the scores of earlier steps.

    p [rows, n]: exp(s - new m), the softmax weights before the division by l. alpha [rows, 1]: exp(m - new m), by which
    sums that were made with the old m must be multiplied. Source: Milakov & Gimelshein 2018.
    """
    new_m = np.maximum(m, s.max(axis=1, keepdims=True))
    base = np.where(np.isfinite(new_m), new_m, 0)
    p = np.exp(s - base)
    alpha = np.exp(np.where(np.isfinite(m), m - base, MASKED))
    return p, new_m, l * alpha + p.sum(axis=1, keepdims=True), alpha


@dataclass(frozen=True, kw_only=True)
class Softmax(Instruction, engine="VEC", opcode=0x38):
    """Do one step of the online softmax (Milakov & Gimelshein 2018).

    The step is for one tile of queries and one tile of keys. Attention processes the keys of a query tile by tile.
    Between tiles, m holds the largest score so far of each query (row), and l the sum of exp(score - m). From the
    scores s of the new tile, the instruction computes for each row:

    - the new m: the largest of the old m and the scores of the row;
    - p = exp(s - new m), the weights of these keys before the division by l;
    - alpha = exp(old m - new m), by which sums of weighted values that were made with the old m must be multiplied;
    - the new l = old l * alpha + the sum of p over the row.

    scores f32 [q, n] in the accumulators, p [q, n], m, l, alpha f32 [q, 1]. Row r is a query at position query + r //
    pack, since `pack` query heads share a position. Column j is the key at position key + j. The scores s are computed
    in five steps:

    1. s = scores * scale.
    2. If `softcap` is above 0: s = softcap * tanh(s / softcap).
    3. If `temper` is not 0 (Llama 4): s = s * (1 + temper * ln(1 + floor(x / every))). Here x is the position of the
       query if `from_zero` is set, else the position + 1.
    4. s = s + slope * (key position - query position), the bias of ALiBi.
    5. s = -inf for each key that the query must not see: a key after the query; a column j >= keys (padding); and, if
       `window` is above 0, a key `window` or more positions before the query.
    """

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
    from_zero: bool = False
    slope: float = 0.0
    writes = ("p", "m", "l", "alpha")
    updates = ("m", "l")

    def shapes(self) -> Shapes:
        state = dict.fromkeys(("m", "l", "alpha"), ("q", 1))
        return {"scores": ("q", "n"), "p": ("q", "n"), **state}

    def run(self, mem: CoreMemory) -> None:
        s = masked(self, mem.read64(self.scores))
        results = online_softmax(s, *self._state(mem))
        for region, value in zip((self.p, self.m, self.l, self.alpha), results, strict=True):
            mem.write(region, value)

    def _state(self, mem: CoreMemory) -> tuple[np.ndarray, np.ndarray]:
        return mem.read64(self.m), mem.read64(self.l)

    def cost(self, target: Target) -> Cost:
        n = self.scores.rows * self.scores.cols
        return Cost(cycles=exposed(target, float(softmax_cycles(target.chip, n, self.softcap > 0))))


@dataclass(frozen=True, kw_only=True)
class Rescale(Instruction, engine="VEC", opcode=0x39):
    """Multiply each row of accumulators by a factor: acc = acc * alpha, in FP32.

    acc f32 [q, n]; alpha f32 [q, 1], the factor of each row. Kernels use the alpha that `Softmax` computes.
    """

    acc: Region
    alpha: Region
    writes = ("acc",)
    updates = ("acc",)

    def shapes(self) -> Shapes:
        return {"acc": ("q", "n"), "alpha": ("q", 1)}

    def run(self, mem: CoreMemory) -> None:
        mem.write(self.acc, mem.read(self.acc) * mem.read32(self.alpha))

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=exposed(target, float(vector_cycles(target.chip, self.acc.rows * self.acc.cols))))


@dataclass(frozen=True, kw_only=True)
class Merge(Instruction, engine="VEC", opcode=0x3A):
    """Combine attention that was computed over several parts of the keys into attention over all keys.

    dst [q, d] is the result for q queries. Part i is in rows i * q .. (i + 1) * q - 1 of three inputs: sums [parts * q,
    d], the sums of weighted values, and m and l [parts * q, 1], the largest score and the softmax denominator (see
    Softmax).

    For each query, let M be the largest m of all parts. Then dst = (sum over i of sums_i * exp(m_i - M)) / (sum over i
    of l_i * exp(m_i - M)). The parts are added in ascending order, in FP64.
    """

    dst: Region
    sums: Region
    m: Region
    l: Region  # noqa: E741
    parts: int = 1
    writes = ("dst",)

    def shapes(self) -> Shapes:
        rows = self.parts * self.dst.rows
        return {"dst": ("q", "d"), "sums": (rows, "d"), "m": (rows, 1), "l": (rows, 1)}

    def run(self, mem: CoreMemory) -> None:
        o, m, length = (mem.read64(r).reshape(self.parts, self.dst.rows, -1) for r in (self.sums, self.m, self.l))
        largest = m.max(axis=0)
        weight = np.exp(m - np.where(np.isfinite(largest), largest, 0))
        numerator = np.zeros((self.dst.rows, self.dst.cols))
        denominator = np.zeros((self.dst.rows, 1))
        for i in range(self.parts):
            numerator, denominator = numerator + o[i] * weight[i], denominator + length[i] * weight[i]
        mem.write(self.dst, numerator / denominator)

    def cost(self, target: Target) -> Cost:
        n = self.parts * self.dst.rows
        return Cost(cycles=float(vector_cycles(target.chip, 2 * n * self.dst.cols, n)))


@dataclass(frozen=True, kw_only=True)
class Attend(Instruction, engine="ATT", opcode=0x40):
    """Compute attention of one tile of queries to one tile of keys.

    The instruction does the work of Matmul, Softmax, Rescale and another Matmul:

    1. The scores are q @ k.T, rounded to FP32.
    2. p, alpha, the new m and the new l are computed from the scores as described at Softmax. p is rounded to v's
       format.
    3. sums = sums * alpha + p @ v.

    q [rows, d], k [n, d], v [n, dv], sums f32 [rows, dv], m, l f32 [rows, 1]. The other fields have the same meaning as
    in Softmax.
    """

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
    from_zero: bool = False
    slope: float = 0.0
    writes = ("sums", "m", "l")
    updates = ("sums", "m", "l")

    def shapes(self) -> Shapes:
        state: Shapes = {"sums": ("rows", "dv"), "m": ("rows", 1), "l": ("rows", 1)}
        return {"q": ("rows", "d"), "k": ("n", "d"), "v": ("n", "dv"), **state}

    def run(self, mem: CoreMemory) -> None:
        s = masked(self, (mem.read64(self.q) @ mem.read64(self.k).T).astype(np.float32).astype(np.float64))
        p, m, length, alpha = online_softmax(s, mem.read64(self.m), mem.read64(self.l))
        p = p.astype(formats.ELEMENTS[self.v.format][1]).astype(np.float64)
        mem.write(self.sums, mem.read64(self.sums) * alpha + p @ mem.read64(self.v))
        mem.write(self.m, m)
        mem.write(self.l, length)

    def cost(self, target: Target) -> Cost:
        rows, n = self.q.rows, self.k.rows
        return Cost(cycles=float(attend_cycles(target, rows, n, self.q.cols, self.v.cols, self.k.format)))
