"""Instructions for mixture-of-experts layers: router scores, top-k, grouping rows by expert, combining results.

All run on the vector lanes; the experts' products are Matmul's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from intaglio.chips import ChipSpec, Target
from intaglio.ops.elementwise import sigmoid
from intaglio.ops.experts import FLOOR, best, sparsemixer
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.isa.instruction import Cost, Instruction, Shapes
from intaglio.silicon.memory import CoreMemory, MachineError, Region


def rounds_cycles(chip: ChipSpec, n: Any, rounds: int, rows: int) -> Any:
    """Returns the cycles of the vector lanes to search the maximum of each row `rounds` times.

    n: number of values in all rows together. Each search takes one comparison for each value and one tree reduction for
    each row.
    """
    return rounds * (vector_cycles(chip, n) + rows / chip.vec_lanes * np.log2(chip.vec_lanes))


@dataclass(frozen=True, kw_only=True)
class Score(Instruction, engine="VEC", opcode=0x3C):
    """Compute router scores: dst [m, n] = the softmax, sigmoid or sqrt(softplus) of the logits x f32 [m, n].

    The field `score` selects the function. "softmax" is computed over each row. The other functions apply to each
    value: "sigmoid" is 1 / (1 + e^-x), and "sqrt_softplus" is sqrt(ln(1 + e^x)). The result is computed in FP64, then
    rounded.
    """

    dst: Region
    x: Region
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {"dst": ("m", "n"), "x": ("m", "n")}

    def run(self, mem: CoreMemory) -> None:
        x = mem.read64(self.x)
        if self.score == "softmax":
            p = np.exp(x - x.max(axis=1, keepdims=True))
            y = p / p.sum(axis=1, keepdims=True)
        else:
            y = sigmoid(x) if self.score == "sigmoid" else np.sqrt(np.logaddexp(0, x))
        mem.write(self.dst, y)

    def cost(self, target: Target) -> Cost:
        n = self.x.rows * self.x.cols
        return Cost(cycles=float(vector_cycles(target.chip, 4 * n, n)))


@dataclass(frozen=True, kw_only=True)
class TopK(Instruction, engine="VEC", opcode=0x3D):
    """Choose the k columns with the highest key + bias in each row.

    ids i32 [m, k] are the numbers of the chosen columns, the column with the highest key + bias first. Of columns with
    equal key + bias, the one with the lowest number comes first. selected f32 [m, k] are the elements of `values` in
    the chosen columns. key, values f32 [m, n], bias f32 [1, n].

    If `groups` is above 0 (group-limited routing), the columns form `groups` groups of equal size. The rating of a
    group is the sum of its `group_best` highest values of key + bias. Only columns of the `kept_groups` groups with the
    highest ratings can be chosen.
    """

    ids: Region
    selected: Region
    key: Region
    values: Region
    bias: Region | None = None
    groups: int = 0
    kept_groups: int = 0
    group_best: int = 1
    writes = ("ids", "selected")

    def shapes(self) -> Shapes:
        results, columns = dict.fromkeys(("ids", "selected"), ("m", "k")), dict.fromkeys(("key", "values"), ("m", "n"))
        return {**columns, **results, "bias": (1, "n")}

    def run(self, mem: CoreMemory) -> None:
        key = mem.read32(self.key)
        if self.bias is not None:
            key = key + mem.read32(self.bias)
        if self.groups:
            grouped = key.reshape(len(key), self.groups, -1)
            total = np.sort(grouped, axis=-1)[..., ::-1][..., : self.group_best].sum(axis=-1, dtype=np.float64)
            kept = np.zeros(total.shape, bool)
            np.put_along_axis(kept, best(total.astype(np.float32), self.kept_groups), True, axis=-1)
            key = np.where(kept[..., None], grouped, -np.inf).reshape(key.shape)
        ids = best(key, self.ids.cols)
        mem.write(self.ids, ids)
        mem.write(self.selected, np.take_along_axis(mem.read32(self.values), ids, axis=-1))

    def cost(self, target: Target) -> Cost:
        rows, n = self.key.rows, self.key.cols
        cycles = rounds_cycles(target.chip, rows * n, self.ids.cols + self.group_best * (self.groups > 0), rows)
        cycles += rounds_cycles(target.chip, rows * self.groups, self.kept_groups, rows) if self.groups else 0
        return Cost(cycles=float(cycles + vector_cycles(target.chip, rows * n * (self.bias is not None))))


@dataclass(frozen=True, kw_only=True)
class SparseMix(Instruction, engine="VEC", opcode=0x3E):
    """Choose k experts and their weights for each row of logits, by the routing method SparseMixer.

    x f32 [m, n] are the logits of n experts. ids i32 [m, k] are the chosen experts, and weights f32 [m, k] their
    weights. The experts of a row are chosen one after the other: each time, the remaining expert with the largest logit
    (call it M) is chosen. Its weight is its softmax over those remaining experts whose logit l is close to M: (M - l) /
    max(|l|, M) <= 2 * jitter.
    """

    ids: Region
    weights: Region
    x: Region
    jitter: float
    writes = ("ids", "weights")

    def shapes(self) -> Shapes:
        return {"x": ("m", "n"), "ids": ("m", "k"), "weights": ("m", "k")}

    def run(self, mem: CoreMemory) -> None:
        ids, weights = sparsemixer(mem.read32(self.x), self.ids.cols, self.jitter)
        mem.write(self.ids, ids)
        mem.write(self.weights, weights)

    def cost(self, target: Target) -> Cost:
        n, k = self.x.rows * self.x.cols, self.ids.cols
        return Cost(
            cycles=float(rounds_cycles(target.chip, n, k, self.x.rows) + k * vector_cycles(target.chip, 5 * n, n))
        )


@dataclass(frozen=True, kw_only=True)
class Weigh(Instruction, engine="VEC", opcode=0x3F):
    """Compute routing weights from the scores x of chosen experts: dst = x * scale * factors[0, ids].

    dst, x f32 [m, k], factors f32 [1, n], ids i32 [m, k]. If `factors` or `ids` is not given, dst = x * scale. If
    `normalise` is set, x is first divided by the sum of its row plus 1e-20; this sum is computed in FP64 and rounded to
    FP32.
    """

    dst: Region
    x: Region
    factors: Region | None = None
    ids: Region | None = None
    normalise: bool = False
    scale: float = 1.0
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {**dict.fromkeys(("dst", "x", "ids"), ("m", "k")), "factors": (1, "n")}

    def run(self, mem: CoreMemory) -> None:
        x = mem.read32(self.x)
        if self.normalise:
            x = x / (x.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32) + FLOOR)
        y = x * np.float32(self.scale)
        if self.factors is not None and self.ids is not None:
            y = y * mem.read32(self.factors)[0][mem.read(self.ids)]
        mem.write(self.dst, y)

    def cost(self, target: Target) -> Cost:
        steps = 1 + 2 * self.normalise + (self.factors is not None)
        return Cost(cycles=float(vector_cycles(target.chip, steps * self.x.rows * self.x.cols)))


@dataclass(frozen=True, kw_only=True)
class Group(Instruction, engine="VEC", opcode=0x49):
    """Sort (token, expert) pairs by expert, for a rank that holds the `held` experts from number `first` on.

    Each token has chosen `top` experts. Pair i consists of token i // top and expert ids[0, i]. Pairs with the same
    expert keep their order. ids i32 [1, n]; the results are:

    - order i32 [1, n]: the numbers of the pairs, ordered by expert. Pairs with experts of other ranks come last.
    - tokens i32 [1, n]: the tokens of these pairs, order // top.
    - counts i32 [1, held]: the number of pairs for each held expert.

    Raises MachineError for an id outside 0 .. experts - 1.
    """

    order: Region
    tokens: Region
    counts: Region
    ids: Region
    top: int
    first: int
    experts: int
    writes = ("order", "tokens", "counts")

    def shapes(self) -> Shapes:
        return {**dict.fromkeys(("ids", "order", "tokens"), (1, "n")), "counts": (1, "held")}

    def run(self, mem: CoreMemory) -> None:
        ids, held = mem.read(self.ids)[0], self.counts.cols
        bad = ids[(ids < 0) | (ids >= self.experts)]
        if len(bad):
            raise MachineError(f"a row is routed to expert {bad[0]}; experts are 0 to {self.experts - 1}")
        ids = ids - self.first
        ids = np.where((ids >= 0) & (ids < held), ids, held)
        order = np.argsort(ids, kind="stable")
        mem.write(self.order, order[None])
        mem.write(self.tokens, order[None] // self.top)
        mem.write(self.counts, np.bincount(ids, minlength=held + 1)[None, :held])

    def cost(self, target: Target) -> Cost:
        """Returns the Cost of a counting sort: count the pairs of each expert, sum the counts, write indices."""
        return Cost(cycles=float(vector_cycles(target.chip, 4 * self.ids.cols + 2 * self.counts.cols)))


@dataclass(frozen=True, kw_only=True)
class Combine(Instruction, engine="VEC", opcode=0x4A):
    """Compute the weighted sum of the experts' results of each token.

    dst[i] = residual[i] + sum over j of parts[i * top + j] * weights[i, j]. `parts` are the experts' results.

    parts f32 [m * top, n], weights f32 [m, top], residual f32 [m, n], dst [m, n]. Weights that are not given count as
    1, a residual that is not given counts as 0. Products are rounded to FP32. They are summed in FP64, j ascending, and
    the sum is rounded to FP32. Then the residual is added in FP32.
    """

    dst: Region
    parts: Region
    weights: Region | None = None
    residual: Region | None = None
    writes = ("dst",)

    def shapes(self) -> Shapes:
        top = self.parts.rows // max(1, self.dst.rows) if self.weights is None else self.weights.cols
        rows = top * self.dst.rows
        return {"dst": ("m", "n"), "residual": ("m", "n"), "weights": ("m", top), "parts": (rows, "n")}

    def run(self, mem: CoreMemory) -> None:
        parts = mem.read32(self.parts).reshape(self.dst.rows, -1, self.dst.cols)
        if self.weights is not None:
            parts = parts * mem.read32(self.weights)[:, :, None]
        y = parts.sum(axis=1, dtype=np.float64).astype(np.float32)
        mem.write(self.dst, y if self.residual is None else y + mem.read(self.residual))

    def cost(self, target: Target) -> Cost:
        steps = 1 + (self.weights is not None)
        n = steps * self.parts.rows * self.parts.cols + self.dst.rows * self.dst.cols * (self.residual is not None)
        return Cost(cycles=float(vector_cycles(target.chip, n)))
