"""The ops of mixtures of experts: route chooses the experts of each token, experts computes and sums their outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.formats import Quantised
from intaglio.ops.elementwise import FUNCTIONS, sigmoid
from intaglio.ops.linear import ACTIVATIONS, check_x_format, product
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result

SCORES = ("softmax", "sigmoid", "sqrt_softplus", "chosen", "sparsemixer")
FLOOR = np.float32(1e-20)  # added to the sum that weights are divided by, as DeepSeek-V3 does: all may be zero


def softmax(x: np.ndarray) -> np.ndarray:
    """Returns the softmax of x over its last axis, as float32. It is computed in float64."""
    p = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True)).astype(np.float32)


def best(key: np.ndarray, count: int) -> np.ndarray:
    """Returns the column indices of the `count` largest values of each row, largest first: an int array [rows, count].

    Of equal values, the value with the lowest index comes first.
    """
    return np.argsort(-key, axis=-1, kind="stable")[..., :count]


def sparsemixer(logits: np.ndarray, count: int, jitter: float) -> tuple[np.ndarray, np.ndarray]:
    """Choose experts by SparseMixer at inference (Liu et al. 2024). Returns (expert ids, float32 weights).

    Both are [rows, count]. Experts are chosen one after the other, each time the expert with the largest remaining
    logit m. Its weight is its softmax over the remaining experts whose logit l is near m: (m - l) / max(|l|, m) <= 2 *
    jitter.
    """
    left = logits.astype(np.float64)
    ids, weights = [], []
    for _ in range(count):
        ids.append(best(left, 1))
        top = np.take_along_axis(left, ids[-1], axis=-1)
        far = (top - logits) / np.maximum(np.abs(logits), top) > 2 * jitter
        weights.append(1 / np.exp(np.where(far, -np.inf, left) - top).sum(axis=-1, keepdims=True))
        np.put_along_axis(left, ids[-1], -np.inf, axis=-1)
    return np.concatenate(ids, axis=-1), np.concatenate(weights, axis=-1).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Route(Op, kind="route"):
    """Op that chooses the `top` experts of each token, best first, and computes their weights.

    For T tokens and E experts: logits f32 [T, E], bias and factors [E], table i32 [vocabulary, top]. Results: weights
    f32 [T, top], ids i32 [T, top]. The op has three steps.

    1. It scores all experts, by the field `score`. "softmax", "sigmoid" and "sqrt_softplus" (sqrt(ln(1 + e^l))) are
       functions of the logits; "chosen" is a softmax over the logits of the chosen experts only; "sparsemixer" is the
       function of that name, with `jitter`.
    2. It chooses the experts with the largest score + bias; the bias affects only the choice (DeepSeek-V3). Without a
       bias, experts are ordered by their logits, or by their scores if `group_best` is above 1. Ties go to the lowest
       index. With `groups`, the experts form that many equal groups, and only experts of the `kept_groups` best groups
       can be chosen; a group is rated by the sum of its `group_best` highest values. With a `table`, the experts are
       the table's row for the token's id, in order (hash routing, DeepSeek-V4); a row may list an expert twice.
    3. It computes the weights: the scores of the chosen experts, divided by their sum (plus FLOOR, 1e-20) if
       `normalise`, times `scale`, and times the experts' factors, if there are any (Gemma 4).
    """

    logits: str = operand(exact=True)
    bias: str | None = operand("vector", optional=True)
    factors: str | None = operand("vector", optional=True)
    table: str | None = operand("index", optional=True)
    weights: str = result()
    ids: str = result()
    top: int
    score: str = "softmax"
    groups: int = 0
    kept_groups: int = 0
    group_best: int = 1
    normalise: bool = False
    scale: float = 1.0
    jitter: float = 0.0

    def shapes(self, t: Tensors) -> Results:
        experts = self.token_columns(t, self.logits)
        self.check(self.score in SCORES, f"score={self.score!r}; use one of {', '.join(SCORES)}")
        self.check(1 <= self.top <= experts, f"top={self.top} is outside 1..{experts}, the experts there are")
        self.vector(t, self.bias, experts)
        self.vector(t, self.factors, experts)
        if self.groups:
            each = experts // self.groups
            self.check(experts % self.groups == 0, f"groups={self.groups} does not divide the {experts} experts")
            kept = 1 <= self.kept_groups <= self.groups and self.kept_groups * each >= self.top
            self.check(kept, f"kept_groups={self.kept_groups} of {self.groups} groups of {each} for top={self.top}")
            self.check(1 <= self.group_best <= each, f"group_best={self.group_best} is outside 1..{each}")
        plain = self.score not in ("sparsemixer", "chosen") or not (self.groups or self.bias)
        self.check(plain, f"score={self.score} takes neither groups nor a bias")
        if self.table is not None:
            table, scored = t[self.table], self.score not in ("sparsemixer", "chosen")
            fits = table.format == "i32" and len(table.shape) == 2 and table.shape[1] == self.top
            self.check(fits, f"{self.table} is {table.type}; wanted i32[vocabulary, {self.top}]")
            free = scored and not self.groups and self.bias is None
            self.check(free, f"{self.table} lists the experts; score={self.score}, groups or a bias would choose them")
        return {self.weights: (("T", self.top), "f32"), self.ids: (("T", self.top), "i32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        logits = array(v, self.logits)
        if self.score == "sparsemixer":
            ids, weights = sparsemixer(logits, self.top, self.jitter)
        else:
            scores = self._scores(logits)
            if self.table is None:
                ids = best(self._open(self._key(logits, scores, v)), self.top)
            else:
                ids = np.asarray(v[self.table])[batch.tokens]
            weights = np.take_along_axis(logits if self.score == "chosen" else scores, ids, axis=-1)
            if self.score == "chosen":
                weights = softmax(weights)
        if self.normalise:
            weights = weights / (weights.sum(axis=-1, keepdims=True, dtype=np.float32) + FLOOR)
        weights = (weights * np.float32(self.scale)).astype(np.float32)
        if self.factors is not None:
            weights = weights * array(v, self.factors)[ids]
        return {self.weights: weights.astype(np.float32), self.ids: ids.astype(np.int32)}

    def _scores(self, logits: np.ndarray) -> np.ndarray:
        """Returns the score of each expert for each token, f32 [T, E], by the op's scoring function.

        logits: f32 [T, E], for T tokens and E experts.
        """
        if self.score == "sigmoid":
            return sigmoid(logits)
        if self.score == "sqrt_softplus":
            return np.sqrt(np.logaddexp(0, logits.astype(np.float64))).astype(np.float32)
        return softmax(logits)

    def _key(self, logits: np.ndarray, scores: np.ndarray, v: Mapping[str, Value]) -> np.ndarray:
        """Returns the values by which a token's experts are chosen, f32 [T, E].

        The experts with the largest values win. With a bias the values are scores + bias. Without a bias they are the
        logits, which have the same order as the scores. There is one exception: if a group of experts is rated by a sum
        of several values, the values are the scores, because sums of logits have another order than sums of scores.

        Args:
            logits: f32 [T, E], for T tokens and E experts.
            scores: f32 [T, E].
            v: values of the op's operands by name.
        """
        if self.bias is not None:
            return scores + array(v, self.bias)
        return scores if self.group_best > 1 else logits

    def _open(self, key: np.ndarray) -> np.ndarray:
        """Returns a copy of `key` with minus infinity for the experts that a token cannot choose.

        These are the experts outside the token's `kept_groups` best groups. Without groups it returns `key` itself.

        key: [T, E], the values by which the experts of each token are chosen (see _key()).
        """
        if not self.groups:
            return key
        runs = key.reshape(len(key), self.groups, key.shape[1] // self.groups)
        worth = -np.sort(-runs, axis=-1)[..., : self.group_best].sum(axis=-1, dtype=np.float32)
        closed = np.ones(worth.shape, bool)
        np.put_along_axis(closed, best(worth, self.kept_groups), False, axis=-1)
        return np.where(closed[..., None], -np.inf, runs).reshape(key.shape)

    def work(self, t: Tensors, batch: Batch) -> Work:
        leave = (self.table,) if self.table else ()  # a row of it is read for each token, not all of it
        listed = Work(weight_bytes=len(leave) * 4 * self.top * len(batch.tokens))
        return self.moved(t, batch, 8 * (t[self.logits].nbytes(batch.sizes) // 4), leave=leave) + listed


@dataclass(frozen=True, kw_only=True)
class Experts(Op, kind="experts"):
    """Op that applies the chosen experts (MLPs) to each token and adds up their weighted results.

    out[t] = the sum over j of weights[t, j] * expert_e(x[t]) + residual[t], where e is ids[t, j]. expert_e(x) is down @
    (activation(gate @ x) * (up @ x)) or, without a gate, down @ activation(up @ x). The argument of `down` is called
    the inner row, [I]. Sums of products are in float32 or wider.

    For T tokens and E experts: x f32 [T, K], weights f32 [T, top], ids i32 [T, top]; gate and up [E, I, K] in one
    weight format, down [E, N, I]; gate_bias and up_bias [E, I], with a gate both or neither; down_bias [E, N]; residual
    and out f32 [T, N]. "Stacks" below are the tensors gate, up and down.

    Attributes:
        order: i32 [E, K], the column order of gate and up of each expert (GPTQ's act-order): expert e is multiplied
            with x[t, order[e]].
        down_order: i32 [E, I], the column order of down of each expert.
        x_format: format to which x and the inner row are rounded before each product, as in linear.
        limit: above 0, caps gate at `limit` and up at +-limit (gpt-oss: 7). The inner row is activation(alpha * gate) /
            alpha * (up + shift).
        alpha: factor in the formula of `limit` (gpt-oss: 1.702).
        shift: summand in the formula of `limit` (gpt-oss: 1).
        scale_input: True to multiply x by the expert's weight instead of the expert's result (Llama 4).
        of: number of experts in the model if the stacks hold only some of them (expert parallelism): experts first ..
            first + E - 1. The others add nothing on this rank. 0: the stacks hold all experts.
        first: number of the first expert in the stacks.
        held: with an expert placement, the expert number of each matrix in the stacks, ascending. Experts that are not
            in `held` add nothing on this rank, and `first` is 0. (): no placement; then copies, copy, rank and ranks
            are not used.
        copies: for each matrix, the number of ranks that hold the same expert. These ranks take turns at the expert's
            tokens.
        copy: for each matrix, this rank's number among those ranks. The rank computes the expert for token t of the
            step if t % copies == copy.
        rank: this rank's number among the expert-parallel ranks. Results do not depend on `rank` and `ranks`: they say
            which rank's matrices to exchange when experts move.
        ranks: number of expert-parallel ranks.
        slots: above 0, results are not summed: out f32 [T, slots * N] has weights[t, j] * expert_e(x[t]) in the columns
            j * N .. j * N + N - 1, or zeros if this rank does not compute e. slots is `top`, or top + 1 if any rank has
            a residual, which is in the last N columns. An all_reduce with the same `slots` adds the blocks of N
            columns.
    """

    x: str = operand()
    weights: str = operand()
    ids: str = operand("index")
    gate: str | None = operand("stack", optional=True, up="up")
    up: str = operand("stack")
    down: str = operand("stack")
    gate_bias: str | None = operand("vector", optional=True, up="up_bias")
    up_bias: str | None = operand("vector", optional=True)
    down_bias: str | None = operand("vector", optional=True)
    order: str | None = operand("index", optional=True)
    down_order: str | None = operand("index", optional=True)
    residual: str | None = operand(optional=True)
    out: str = result()
    x_format: str = "f32"
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    shift: float = 0.0
    scale_input: bool = False
    first: int = 0
    of: int = 0
    held: tuple[int, ...] = ()
    copy: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()
    rank: int = 0
    ranks: int = 0
    slots: int = 0

    def shapes(self, t: Tensors) -> Results:
        k, top = self.token_columns(t, self.x), self.token_columns(t, self.weights)
        self.same_shape(t, self.weights, self.ids)
        self.check(t[self.ids].format == "i32", f"{self.ids} is {t[self.ids].type}; wanted i32 expert ids")
        first = self.gate or self.up
        experts, inner, wide = self._sizes(t, first)
        self.check(wide == k, f"{first} is {t[first].type} but {self.x} has {k} columns")
        self.same_shape(t, first, self.up)
        count, n, narrow = self._sizes(t, self.down)
        fits = (count, narrow) == (experts, inner)
        self.check(fits, f"{self.down} is {t[self.down].type}; wanted [{experts}, N, {inner}] as {first}")
        total = self.of or experts
        self.check(top <= total, f"{self.ids} chooses {top} of {total} experts")
        inside = 0 <= self.first <= total - experts
        self.check(inside, f"first={self.first}, of={self.of}, but {first} has {experts} experts")
        self._placement(experts, total)
        slotted = self.slots in (0, top + 1) or (self.slots == top and self.residual is None)
        allowed = f"0, {top + 1} or, without a residual, {top}"
        self.check(slotted, f"slots={self.slots}, but {self.ids} has {top} columns; allowed: {allowed}")
        one = t[first].format == t[self.up].format
        self.check(one, f"gate is {t[first].format} but up is {t[self.up].format}; wanted one format")
        plain = self.limit == self.shift == 0 and self.alpha == 1
        clamp = f"limit={self.limit}, alpha={self.alpha}, shift={self.shift}"
        self.check(self.gate is not None or plain, f"{clamp}; without a gate, wanted 0, 1 and 0")
        for w in (self.up, self.down):
            check_x_format(self, t, w, self.x_format)
        self.check(
            self.activation in ACTIVATIONS, f"activation={self.activation!r}; use one of {', '.join(ACTIVATIONS)}"
        )
        self.check(self.alpha > 0 and self.limit >= 0, f"alpha={self.alpha}, limit={self.limit}; above 0, not below 0")
        self._biases(t, experts, inner, n)
        for name, wanted in ((self.order, (experts, k)), (self.down_order, (experts, inner))):
            if name:
                ok = (t[name].shape, t[name].format) == (wanted, "i32")
                self.check(ok, f"{name} is {t[name].type}; wanted i32{list(wanted)}")
        if self.residual is not None:
            r = t[self.residual]
            self.check(r.shape == ("T", n), f"residual {self.residual} is {r.type}; wanted ['T', {n}]")
        return {self.out: (("T", n * max(1, self.slots)), "f32")}

    def _placement(self, experts: int, total: int) -> None:
        """Raise OpError unless the fields held, copy, copies, rank and ranks (an expert placement) are valid.

        There is no placement if `held`, `copy` and `copies` are empty. Otherwise each of the three must have one item
        for each matrix in the stacks: `held` different expert numbers, ascending; `copy` and `copies` numbers with 0 <=
        copy < copies. `rank` and `ranks` must satisfy 0 <= rank < ranks. Returns nothing.

        experts: number of matrices in the stacks. total: number of experts in the model.
        """
        given = {len(self.held), len(self.copy), len(self.copies)}
        if given == {0}:
            return
        fits = given == {experts} and tuple(sorted(set(self.held))) == self.held and self.first == 0
        self.check(
            fits and 0 <= self.held[0] <= self.held[-1] < total,
            f"held={self.held}; wanted {experts} different experts of {total}, ascending, with as many of `copy` and "
            "`copies`, and first=0",
        )
        self.check(0 <= self.rank < self.ranks, f"rank={self.rank}, ranks={self.ranks}; wanted 0 <= rank < ranks")
        turns = all(0 <= i < n for i, n in zip(self.copy, self.copies, strict=True))
        self.check(turns, f"copy={self.copy}, copies={self.copies}; wanted 0 <= copy < copies for each matrix")

    def matrix_of(self, t: int, expert: int, experts: int) -> int:
        """Returns the index of an expert's matrices in this rank's weights; -1 if another rank computes the expert.

        If several ranks have copies of the expert, the ranks take turns at the tokens, so the result depends on `t`.

        Args:
            t: row of the token in the step.
            expert: number of the expert in the model.
            experts: number of experts in this rank's weights.
        """
        if not self.held:
            return expert - self.first if 0 <= expert - self.first < experts else -1
        i = int(np.searchsorted(self.held, expert))
        here = i < experts and self.held[i] == expert and t % self.copies[i] == self.copy[i]
        return i if here else -1

    def _sizes(self, t: Tensors, name: str) -> tuple[int, int, int]:
        """Returns (number of experts, rows, columns) of a stack of matrices [experts, rows, columns], three ints.

        Raises OpError for another shape. t: the Program's tensors by name. name: name of the stack.
        """
        s = t[name].shape
        ok = len(s) == 3 and all(isinstance(d, int) for d in s)
        self.check(ok, f"{name} is {t[name].type}; wanted a stack of matrices [experts, rows, columns]")
        return int(s[0]), int(s[1]), int(s[2])

    def _biases(self, t: Tensors, experts: int, inner: int, n: int) -> None:
        """Raise OpError unless the biases of gate, up and down have the right shapes and plain formats.

        Returns nothing. Gate and up must both have a bias, or neither. Without a gate matrix, there must be no gate
        bias.

        Args:
            t: the Program's tensors by name.
            experts: number of experts in the stacks of matrices.
            inner: inner width of an expert: biases of gate and up are [experts, inner].
            n: columns of the result: the bias of down is [experts, n].
        """
        named = {self.gate_bias: inner, self.up_bias: inner, self.down_bias: n}
        both = (self.gate_bias is None) == (self.up_bias is None)
        if self.gate is None:
            self.check(self.gate_bias is None, f"gate_bias {self.gate_bias} without a gate")
        else:
            self.check(both, "gate and up have biases both, or none")
        for name in (name for name in named if name is not None):
            b, wanted = t[name], (experts, named[name])
            self.check(b.shape == wanted, f"{name} is {b.type}; wanted {list(wanted)}")
            self.check(b.format in formats.PLAIN, f"{name} is {b.format}; biases stay in a plain format")

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        x, weights, ids = array(v, self.x), array(v, self.weights), np.asarray(v[self.ids])
        parts = np.zeros((*ids.shape, _values(v[self.down]).shape[1]), np.float32)
        here = len(_values(v[self.up]))
        matrices = np.array([[self.matrix_of(t, e, here) for e in row] for t, row in enumerate(ids.tolist())])
        matrices = matrices.reshape(ids.shape)
        for e in (e for e in np.unique(matrices) if e >= 0):
            t, j = np.nonzero(matrices == e)
            row = x[t] * weights[t, j, None] if self.scale_input else x[t]
            row = _in_order(row, v, self.order, e)
            inner = self._part(v, row, self.up, self.up_bias, e)
            if self.gate is None:
                inner = FUNCTIONS[self.activation](inner).astype(np.float32)
            else:
                inner = self._glu(self._part(v, row, self.gate, self.gate_bias, e), inner)
            parts[t, j] = self._part(v, _in_order(inner, v, self.down_order, e), self.down, self.down_bias, e)
        if not self.scale_input:
            parts *= weights[:, :, None]
        if self.slots:
            last = np.zeros_like(parts[:, :0]) if self.slots == ids.shape[1] else np.zeros_like(parts[:, :1])
            if self.residual is not None:
                last[:, 0] = array(v, self.residual)
            return {self.out: np.concatenate([parts, last], axis=1).reshape(len(ids), self.slots * parts.shape[2])}
        out = parts.sum(axis=1, dtype=np.float64).astype(np.float32)
        return {self.out: out if self.residual is None else out + array(v, self.residual)}

    def _part(self, v: Mapping[str, Value], x: np.ndarray, name: str, bias: str | None, e: int) -> np.ndarray:
        """Multiply rows `x` by one expert's matrix of the stack `name`, and add the expert's bias if there is one.

        Returns float32 [rows of x, rows of the matrix].

        Args:
            v: values of the op's operands by name.
            x: float32 [rows, columns].
            name: name of the stack of matrices.
            bias: name of the stack of biases; None: no bias.
            e: number of the expert's matrix in the stack.
        """
        y = product(x, expert(v[name], int(e)), self.x_format)
        return (y if bias is None else y + array(v, bias)[e]).astype(np.float32)

    def _glu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """Returns an expert's gate and up products combined: activation(alpha * gate) / alpha * (up + shift).

        The result is f32 [rows, I]. If the op's `limit` is above 0, gate is first capped at `limit` and up at +-limit.

        gate, up: products of the rows with an expert's two matrices, f32 [rows, I].
        """
        if self.limit:
            gate, up = np.minimum(gate, np.float32(self.limit)), np.clip(up, -self.limit, self.limit)
        act = FUNCTIONS[self.activation](np.float32(self.alpha) * gate) / np.float32(self.alpha)
        return (act * (up + np.float32(self.shift))).astype(np.float32)

    def work(self, t: Tensors, batch: Batch) -> Work:
        """Returns the Work (FLOPs and bytes) of one step.

        A step does not read the weights of experts that no token chose. weight_bytes counts as many experts as random
        routing of T tokens is expected to reach: E * (1 - (1 - top / E)^T) of E experts.
        """
        tokens, top = len(batch.tokens), int(t[self.ids].shape[1])
        experts = int(t[self.up].shape[0])
        total = self.of or experts
        touched = experts * (1 - (1 - top / total) ** tokens)
        named = (self.gate_bias, self.up_bias, self.down_bias, self.order, self.down_order)
        stacks = [n for n in (self.gate, self.up, self.down, *named) if n]
        weight = sum(t[n].nbytes({}) for n in stacks) * touched / experts
        each = 2 * sum(prod(map(int, t[n].shape[1:])) for n in (self.gate, self.up, self.down) if n)
        computed = sum(1 / n for n in self.copies) if self.held else experts  # copies take turns
        flops = int(tokens * top * each * computed // total)
        rows = [n for n in (self.x, self.weights, self.ids, self.residual, self.out) if n]
        return Work(flops, round(weight), 0, sum(t[n].nbytes(batch.sizes) for n in rows))


def expert(w: Value, e: int) -> Value:
    """Returns matrix number `e` of a stack of matrices, [N, K].

    It is a Quantised if the stack is quantised, else an array. w: the stack, [E, N, K].
    """
    return w.matrix(e) if isinstance(w, Quantised) else w[e]


def _in_order(x: np.ndarray, v: Mapping[str, Value], order: str | None, e: int) -> np.ndarray:
    """Returns x with its columns in the order that the weights of expert `e` need (GPTQ's act-order).

    Args:
        x: [rows, columns].
        v: values of the tensors by name.
        order: name of the tensor with the column order of each expert, i32 [E, columns]; None: x itself is returned.
        e: number of the expert's matrix in the stack.
    """
    return x if order is None else x[:, np.asarray(v[order])[e]]


def _values(w: Value) -> np.ndarray:
    return w.codes if isinstance(w, Quantised) else w
