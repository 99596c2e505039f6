"""Instructions for mixtures of experts: scores of a router, the best of a row, rows put together by expert and summed
again. All on the vector lanes; the products between are Matmul's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from intaglio.chips import ChipSpec
from intaglio.ops.elementwise import sigmoid
from intaglio.ops.experts import FLOOR, best, sparsemixer
from intaglio.silicon.instruction import Cost, Instruction
from intaglio.silicon.instructions import single, vector_cycles, wide
from intaglio.silicon.memory import MachineError, Region, Spaces


def rounds_cycles(spec: ChipSpec, n: Any, rounds: int, rows: int) -> Any:
    """Cycles for `rounds` searches over n values: a compare each, and for every row the tree that joins the lanes."""
    return rounds * (vector_cycles(spec, n) + rows / spec.vec_lanes * np.log2(spec.vec_lanes))


@dataclass(frozen=True, kw_only=True)
class Score(Instruction, engine="VEC", opcode=0x3C):
    """dst = softmax over each row, or sigmoid or sqrt(ln(1 + e^x)) of each value, of x f32 [m, n]; rounded once."""

    dst: Region
    x: Region
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        x = wide(at, self.x)
        if self.score == "softmax":
            p = np.exp(x - x.max(axis=1, keepdims=True))
            y = p / p.sum(axis=1, keepdims=True)
        else:
            y = sigmoid(x) if self.score == "sigmoid" else np.sqrt(np.logaddexp(0, x))
        at.write(self.dst, y)

    def cost(self, spec: ChipSpec) -> Cost:
        n = self.x.rows * self.x.cols
        return Cost(cycles=float(vector_cycles(spec, 4 * n, n)))


@dataclass(frozen=True, kw_only=True)
class TopK(Instruction, engine="VEC", opcode=0x3D):
    """ids i32 [m, k] = the k columns of highest key + bias in each row, best first, ties to the lowest; taken f32
    [m, k] = `of` there. key and `of` f32 [m, n], bias f32 [1, n]. With `groups`, columns stand in that many equal runs,
    and only the `kept` runs whose `group_best` highest add up to most are open."""

    ids: Region
    taken: Region
    key: Region
    of: Region
    bias: Region | None = None
    groups: int = 0
    kept: int = 0
    group_best: int = 1
    writes = ("ids", "taken")

    def run(self, at: Spaces) -> None:
        key = single(at, self.key)
        if self.bias is not None:
            key = key + single(at, self.bias)
        if self.groups:
            runs = key.reshape(len(key), self.groups, -1)
            worth = np.sort(runs, axis=-1)[..., ::-1][..., : self.group_best].sum(axis=-1, dtype=np.float64)
            kept = np.zeros(worth.shape, bool)
            np.put_along_axis(kept, best(worth.astype(np.float32), self.kept), True, axis=-1)
            key = np.where(kept[..., None], runs, -np.inf).reshape(key.shape)
        ids = best(key, self.ids.cols)
        at.write(self.ids, ids)
        at.write(self.taken, np.take_along_axis(single(at, self.of), ids, axis=-1))

    def cost(self, spec: ChipSpec) -> Cost:
        rows, n = self.key.rows, self.key.cols
        cycles = rounds_cycles(spec, rows * n, self.ids.cols + self.group_best * (self.groups > 0), rows)
        cycles += rounds_cycles(spec, rows * self.groups, self.kept, rows) if self.groups else 0
        return Cost(cycles=float(cycles + vector_cycles(spec, rows * n * (self.bias is not None))))


@dataclass(frozen=True, kw_only=True)
class SparseMix(Instruction, engine="VEC", opcode=0x3E):
    """ids i32 and weights f32 [m, k] of x f32 [m, n] by SparseMixer at inference, as the op route says."""

    ids: Region
    weights: Region
    x: Region
    jitter: float
    writes = ("ids", "weights")

    def run(self, at: Spaces) -> None:
        ids, weights = sparsemixer(single(at, self.x), self.ids.cols, self.jitter)
        at.write(self.ids, ids)
        at.write(self.weights, weights)

    def cost(self, spec: ChipSpec) -> Cost:
        n, k = self.x.rows * self.x.cols, self.ids.cols
        return Cost(cycles=float(rounds_cycles(spec, n, k, self.x.rows) + k * vector_cycles(spec, 5 * n, n)))


@dataclass(frozen=True, kw_only=True)
class Weigh(Instruction, engine="VEC", opcode=0x3F):
    """dst = x times scale, x f32 [m, k] divided first by its row's sum + 1e-20 if `normalise`. The sum is exact and
    rounded once to FP32."""

    dst: Region
    x: Region
    normalise: bool = False
    scale: float = 1.0
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        x = single(at, self.x)
        if self.normalise:
            x = x / (x.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32) + FLOOR)
        at.write(self.dst, x * np.float32(self.scale))

    def cost(self, spec: ChipSpec) -> Cost:
        return Cost(cycles=float(vector_cycles(spec, (1 + 2 * self.normalise) * self.x.rows * self.x.cols)))


@dataclass(frozen=True, kw_only=True)
class Group(Instruction, engine="VEC", opcode=0x49):
    """Routed rows put together by expert: order i32 [1, n] = the places of ids i32 [1, n] sorted by id, of one id in
    ascending order; tokens i32 [1, n] = order // top; counts i32 [1, experts] of ids first .. first + experts - 1.
    Other ids come last, and are counted nowhere; one outside 0 .. of - 1 is refused."""

    order: Region
    tokens: Region
    counts: Region
    ids: Region
    top: int
    first: int
    of: int
    writes = ("order", "tokens", "counts")

    def run(self, at: Spaces) -> None:
        ids, here = at.read(self.ids)[0], self.counts.cols
        bad = ids[(ids < 0) | (ids >= self.of)]
        if len(bad):
            raise MachineError(f"routes to expert {bad[0]} of {self.of}")
        ids = ids - self.first
        ids = np.where((ids >= 0) & (ids < here), ids, here)
        order = np.argsort(ids, kind="stable")
        at.write(self.order, order[None])
        at.write(self.tokens, order[None] // self.top)
        at.write(self.counts, np.bincount(ids, minlength=here + 1)[None, :here])

    def cost(self, spec: ChipSpec) -> Cost:
        """Counts, their running sum, then each place to where its expert's rows stand: a counting sort."""
        return Cost(cycles=float(vector_cycles(spec, 4 * self.ids.cols + 2 * self.counts.cols)))


@dataclass(frozen=True, kw_only=True)
class Combine(Instruction, engine="VEC", opcode=0x4A):
    """dst[i] = sum over j of parts[i * top + j] * weights[i, j], j ascending, + residual[i]. parts f32 [m * top, n],
    weights f32 [m, top] or none for ones, residual f32 [m, n]. Products are rounded to FP32, their sum once."""

    dst: Region
    parts: Region
    weights: Region | None = None
    residual: Region | None = None
    writes = ("dst",)

    def run(self, at: Spaces) -> None:
        parts = single(at, self.parts).reshape(self.dst.rows, -1, self.dst.cols)
        if self.weights is not None:
            parts = parts * single(at, self.weights)[:, :, None]
        y = parts.sum(axis=1, dtype=np.float64).astype(np.float32)
        at.write(self.dst, y if self.residual is None else y + at.read(self.residual))

    def cost(self, spec: ChipSpec) -> Cost:
        steps = 1 + (self.weights is not None)
        n = steps * self.parts.rows * self.parts.cols + self.dst.rows * self.dst.cols * (self.residual is not None)
        return Cost(cycles=float(vector_cycles(spec, n)))
