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
    """Attention mask for a tile of scores: bool [rows, n], the shape of `scores`. True where a score counts.

    Row r is the query at position query + r // pack, since `pack` query heads share each position. Column j is the key
    at position key + j. A score counts if three conditions hold. The key is not after the query. The query is less than
    `window` positions after the key (window 0: any number). And j < keys: columns from `keys` on are padding.
    """
    distance = query + np.arange(len(scores))[:, None] // pack - (key + np.arange(scores.shape[1])[None, :])
    exists = np.arange(scores.shape[1])[None, :] < keys
    return (distance >= 0) & exists & ((distance < window) if window else True)


def capped(s: np.ndarray, softcap: float) -> np.ndarray:
    """Attention scores after softcapping, softcap * tanh(s / softcap); unchanged if `softcap` is 0."""
    return softcap * np.tanh(s / softcap) if softcap else s


def masked(i: Any, s: np.ndarray) -> np.ndarray:
    """Attention scores, f64 [rows, keys], from the products `s` [rows, keys] of queries and keys.

    The fields of instruction `i` (Softmax, SoftmaxStep or Attend) determine four steps:

    1. Multiply products by `scale`, and soft-cap them if `softcap` is above 0.
    2. If `temper` is not 0, multiply them by 1 + temper * ln(1 + floor(p / every)): a temperature that grows with the
       query's position (Llama 4). p is that position if `from_zero`, else the position + 1.
    3. Add slope * (key position - query position), the bias of ALiBi; 0 for slope 0.
    4. Set masked scores to -inf, see visible().
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
    """One step of the online softmax over scores `s` [rows, n], from the running maximum m and sum l [rows, 1].

    Returns p [rows, n] (unnormalised weights), the new m and l, and alpha [rows, 1], the factor that rescales sums made
    with the old m. Source: Milakov & Gimelshein 2018.
    """
    new_m = np.maximum(m, s.max(axis=1, keepdims=True))
    base = np.where(np.isfinite(new_m), new_m, 0)
    p = np.exp(s - base)
    alpha = np.exp(np.where(np.isfinite(m), m - base, MASKED))
    return p, new_m, l * alpha + p.sum(axis=1, keepdims=True), alpha


@dataclass(frozen=True, kw_only=True)
class Softmax(Instruction, engine="VEC", opcode=0x38):
    """One step of the online softmax, for one tile of queries and one tile of keys (Milakov & Gimelshein 2018).

    Attention takes the keys of a query tile by tile. Between tiles, m holds the largest score of each query (row) so
    far, and l the sum of exp(score - m). From the scores s of one tile, the instruction computes for each row:

    - the new m: the largest of m and of the row of s;
    - p = exp(s - new m), the weights of these keys before division by l;
    - alpha = exp(old m - new m), the factor for sums of weighted values that were made with the old m;
    - the new l: l * alpha + the sum of the row of p.

    scores f32 [q, n] in the accumulators, p [q, n], m, l, alpha f32 [q, 1]. Row r is a query at position query + r //
    pack, since `pack` query heads share a position. Column j is the key at position key + j. The scores s are computed
    so:

    1. s = scores * scale.
    2. If `softcap` is above 0: s = softcap * tanh(s / softcap).
    3. If `temper` is not 0 (Llama 4): s = s * (1 + temper * ln(1 + floor(x / every))), where x is the query's position
       if `from_zero`, otherwise the position + 1.
    4. s = s + slope * (key position - query position), the bias of ALiBi.
    5. s = -inf for a key that the query must not see: a key after the query; a column j >= keys (padding); and, if
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

    acc f32 [q, n], alpha f32 [q, 1], as `Softmax` writes it.
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
    """Merge the attention of q queries to several parts of the keys into their attention to all keys: dst [q, d].

    Part i is in rows i * q .. (i + 1) * q - 1 of sums [parts * q, d] (the sums of weighted values), and of m and l
    [parts * q, 1] (see Softmax). With M the largest m of a query, dst is the sum over i of sums_i * exp(m_i - M),
    divided by the sum over i of l_i * exp(m_i - M). Parts are added in ascending order, in FP64.
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
    """Attention of one tile of queries to one tile of keys: Matmul, Softmax, Rescale and Matmul in one.

    1. The scores are q @ k.T, rounded to FP32.
    2. p, alpha, and the new m and l follow from them as in Softmax. p is rounded to v's format.
    3. sums = sums * alpha + p @ v.

    q [rows, d], k [n, d], v [n, dv], sums f32 [rows, dv], m, l f32 [rows, 1]. The other fields are those of Softmax.
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
