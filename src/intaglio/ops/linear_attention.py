"""Linear attention with a matrix of state per head: decay computes its gates, linear_attention its recurrence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from intaglio.batch import Batch
from intaglio.ops.elementwise import sigmoid
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result
from intaglio.ops.recurrence import check_state, sequences, softplus, state_bytes


@dataclass(frozen=True, kw_only=True)
class Decay(Op, kind="decay"):
    """Op that computes the step sizes of a recurrence, and the logarithms of its decays, for T tokens.

    step = clamp(softplus(x + bias)) and decay = -exp(rate[head]) * step. x is f32 [T, width], bias is [width], rate is
    [heads]; step and decay are f32 [T, width]. width is a multiple of heads: the columns of a head lie side by side.
    Used in Mamba-2 (Dao & Gu 2024), where x is dt and rate is A_log, and in gated delta nets (Yang et al. 2024).

    Attributes:
        low: smaller steps become `low`.
        high: larger steps become `high`; 0: no limit.
        floor: if below 0, decay is floor * sigmoid(exp(rate[head]) * (x + bias)) instead, so decay is never below
            `floor` (the bounded gate of Ling 3).
    """

    x: str = operand()
    rate: str = operand("vector")
    bias: str | None = operand("vector", optional=True)
    step: str = result()
    decay: str = result()
    low: float = 0.0
    high: float = 0.0
    floor: float = 0.0

    def shapes(self, t: Tensors) -> Results:
        width = self.token_columns(t, self.x)
        heads = t[self.rate].shape[0]
        self.check(isinstance(heads, int) and width % heads == 0, f"{width} columns are no multiple of {heads} rates")
        self.vector(t, self.rate, int(heads))
        self.vector(t, self.bias, width)
        self.check(
            self.low >= 0 and not 0 < self.high < self.low, f"low={self.low}, high={self.high}; wanted 0 <= low <= high"
        )
        self.check(self.floor <= 0, f"floor={self.floor}; wanted 0, for none, or a log decay below 0")
        return {self.step: (t[self.x].shape, "f32"), self.decay: (t[self.x].shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        x = array(v, self.x) if self.bias is None else array(v, self.x) + array(v, self.bias)
        step = softplus(x)
        step = np.clip(step, self.low, self.high or None).astype(np.float32)
        rate = -np.exp(array(v, self.rate).astype(np.float64))
        rate = np.repeat(rate, x.shape[1] // len(rate))
        if self.floor:
            decay = np.float32(self.floor) * sigmoid((-rate * x).astype(np.float32))
        else:
            decay = (rate * step).astype(np.float32)
        return {self.step: step, self.decay: decay}

    def work(self, t: Tensors, batch: Batch) -> Work:
        return self.moved(t, batch, 6 * (t[self.x].nbytes(batch.sizes) // 4))


@dataclass(frozen=True, kw_only=True)
class LinearAttention(Op, kind="linear_attention"):
    """Op for linear attention, a recurrence: each token in turn updates a state matrix S [K, V] of each head.

    For each token and head, with the token's q, k [K] and v [V]:

    1. S = exp(decay) * S, with a decay per row of S if `decay` has heads * K columns;
    2. u = beta * (v - S^T k) if `delta` is set, else u = beta * v; beta is 1 if the op has no beta;
    3. S = S + k u^T;
    4. out = scale * S^T q + skip * v.

    For T tokens: q, k f32 [T, groups * K]; v, out f32 [T, heads * V]; beta f32 [T, heads]; skip [heads]. decay is f32
    [T, heads] or [T, heads * K], natural logarithms; `rates` [heads] may replace it with the same decays for all
    tokens. state is f32 [N, heads, K, V] for N sequences. Head h reads group h // (heads / groups) of q and k.

    Four kinds of models use the op:

    - Mamba-2 (Dao & Gu 2024): q is its C, k its B, v its x, beta its step, skip its D.
    - Gated delta nets (Yang et al. 2024): with `delta`.
    - Kimi delta attention: with `delta` and a decay per key column.
    - Lightning attention (Qin et al. 2024): with `rates`.
    """

    q: str = operand()
    k: str = operand()
    v: str = operand()
    state: str = operand("slots", access="update")
    decay: str | None = operand(optional=True)
    rates: str | None = operand("vector", optional=True)
    beta: str | None = operand(optional=True)
    skip: str | None = operand("vector", optional=True)
    out: str = result()
    heads: int
    delta: bool = False
    scale: float = 1.0

    def shapes(self, t: Tensors) -> Results:
        held = t[self.state].shape
        fits = len(held) == 4 and held[1] == self.heads and all(isinstance(d, int) for d in held[1:])
        self.check(fits, f"{self.state} is {t[self.state].type}; wanted f32[N, {self.heads}, K, V]")
        keys, values = int(held[2]), int(held[3])
        check_state(self, t, self.state, self.heads, keys, values)
        width = self.token_columns(t, self.k)
        whole = width % keys == 0 and self.heads % (width // keys) == 0
        self.check(
            whole, f"{self.k} is {t[self.k].type}; wanted groups of {keys} columns that divide {self.heads} heads"
        )
        self.same_shape(t, self.q, self.k)
        wide = self.token_columns(t, self.v)
        self.check(wide == self.heads * values, f"{self.v} is {t[self.v].type}; wanted {self.heads} heads of {values}")
        one = (self.decay is None) != (self.rates is None)
        self.check(one, f"decay={self.decay}, rates={self.rates}; give one of them")
        if self.decay is not None:
            columns = self.token_columns(t, self.decay)
            known = columns in (self.heads, self.heads * keys)
            self.check(
                known, f"{self.decay} is {t[self.decay].type}; wanted {self.heads} or {self.heads * keys} columns"
            )
        if self.beta is not None:
            columns = self.token_columns(t, self.beta)
            self.check(columns == self.heads, f"{self.beta} is {t[self.beta].type}; wanted {self.heads} columns")
        self.vector(t, self.rates, self.heads)
        self.vector(t, self.skip, self.heads)
        return {self.out: (t[self.v].shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        held, heads = v[self.state], self.heads
        rows, keys = len(array(v, self.v)), held.shape[2]
        repeat = heads // (array(v, self.k).shape[1] // keys)
        q, k = (
            np.repeat(array(v, name).astype(np.float64).reshape(rows, heads // repeat, keys), repeat, axis=1)
            for name in (self.q, self.k)
        )
        values = array(v, self.v).astype(np.float64).reshape(rows, heads, held.shape[3])
        beta = np.ones((rows, heads)) if self.beta is None else array(v, self.beta).astype(np.float64)
        if self.decay is not None:
            kept = np.exp(array(v, self.decay).astype(np.float64)).reshape(rows, heads, -1)
        else:
            assert self.rates is not None
            kept = np.exp(np.broadcast_to(array(v, self.rates).astype(np.float64)[:, None], (rows, heads, 1)))
        out = np.zeros(values.shape)
        for own, state in sequences(v, self.state, batch):
            for t in range(own.start, own.stop):
                s = state * kept[t][..., None]
                u = values[t] - np.einsum("hkv,hk->hv", s, k[t]) if self.delta else values[t]
                state[:] = s + k[t][..., None] * (beta[t][:, None] * u)[:, None]
                out[t] = self.scale * np.einsum("hkv,hk->hv", state.astype(np.float64), q[t])
        if self.skip is not None:
            out += array(v, self.skip).astype(np.float64)[:, None] * values
        return {self.out: out.reshape(rows, -1).astype(np.float32)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        _, heads, keys, values = (int(d) if isinstance(d, int) else 0 for d in t[self.state].shape)
        flops = len(batch.tokens) * heads * keys * values * (7 if self.delta else 5)
        return self.moved(t, batch, flops) + Work(state_bytes=state_bytes(t, self.state, batch))
