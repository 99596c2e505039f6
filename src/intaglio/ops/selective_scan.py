"""Recurrences with a state per channel: selective_scan (Mamba) and rg_lru (RecurrentGemma)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from intaglio.batch import Batch
from intaglio.ops.elementwise import sigmoid
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result
from intaglio.ops.recurrence import check_state, sequences, softplus, state_bytes


@dataclass(frozen=True, kw_only=True)
class SelectiveScan(Op, kind="selective_scan"):
    """Op for the selective state space of Mamba (Gu & Dao 2023).

    It keeps a state h of n numbers for each channel. For each token it updates h and computes one output per channel i:

        dt = softplus(step[i])
        h[i, j] = exp(-exp(rate[i, j]) * dt) * h[i, j] + dt * x[i] * b[j]    for each j below n
        out[i] = skip[i] * x[i] + the sum over j of h[i, j] * c[j]

    Shapes, for T tokens: x, step and out are f32 [T, channels]; b and c are f32 [T, n]; rate (A_log in Mamba) is
    [channels, n]; skip (D in Mamba) is [channels]. `state` is f32 [N, channels, n]: it has N slots, and each sequence
    keeps its h in one slot.
    """

    x: str = operand()
    step: str = operand()
    b: str = operand()
    c: str = operand()
    rate: str = operand("vector")
    skip: str = operand("vector")
    state: str = operand("slots", access="update")
    out: str = result()

    def shapes(self, t: Tensors) -> Results:
        width, n = self.token_columns(t, self.x), self.token_columns(t, self.b)
        self.same_shape(t, self.x, self.step)
        self.same_shape(t, self.b, self.c)
        fits = t[self.rate].shape == (width, n)
        self.check(fits, f"{self.rate} is {t[self.rate].type}; wanted [{width}, {n}]")
        self.vector(t, self.skip, width)
        check_state(self, t, self.state, width, n)
        return {self.out: (t[self.x].shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        x, b, c = (array(v, name).astype(np.float64) for name in (self.x, self.b, self.c))
        dt, rate = softplus(array(v, self.step)), -np.exp(array(v, self.rate).astype(np.float64))
        out = array(v, self.skip).astype(np.float64) * x
        for own, state in sequences(v, self.state, batch):
            for t in range(own.start, own.stop):
                state[:] = np.exp(rate * dt[t][:, None]) * state + (dt[t] * x[t])[:, None] * b[t]
                out[t] += state.astype(np.float64) @ c[t]
        return {self.out: out.astype(np.float32)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        flops = 7 * len(batch.tokens) * int(t[self.rate].shape[0]) * int(t[self.rate].shape[1])
        return self.moved(t, batch, flops) + Work(state_bytes=state_bytes(t, self.state, batch))


@dataclass(frozen=True, kw_only=True)
class RgLru(Op, kind="rg_lru"):
    """Op for the real-gated linear recurrent unit of Griffin (De et al. 2024, section 2.4).

    It keeps a state h of one number for each channel. For each token and channel it computes:

        a = exp(-8 * softplus(rate) * sigmoid(decay_gate + decay_bias))
        h = a * h + sqrt(1 - a^2) * x * sigmoid(input_gate + input_bias)
        out = h

    At position 0, the factor sqrt(1 - a^2) is replaced by 1. Shapes, for T tokens: x, input_gate, decay_gate and out
    are f32 [T, channels]; rate, input_bias and decay_bias are [channels]. `state` is f32 [N, channels]: it has N slots,
    and each sequence keeps its h in one slot.
    """

    x: str = operand()
    input_gate: str = operand()
    decay_gate: str = operand()
    rate: str = operand("vector")
    input_bias: str = operand("vector")
    decay_bias: str = operand("vector")
    state: str = operand("slots", access="update")
    out: str = result()

    def shapes(self, t: Tensors) -> Results:
        width = self.token_columns(t, self.x)
        for name in (self.input_gate, self.decay_gate):
            self.same_shape(t, self.x, name)
        for name in (self.rate, self.input_bias, self.decay_bias):
            self.vector(t, name, width)
        check_state(self, t, self.state, width)
        return {self.out: (t[self.x].shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        x = array(v, self.x).astype(np.float64)
        gated = x * sigmoid(array(v, self.input_gate) + array(v, self.input_bias))
        gate = sigmoid(array(v, self.decay_gate) + array(v, self.decay_bias)).astype(np.float64)
        log = -8 * softplus(array(v, self.rate)) * gate
        first = (batch.positions == 0)[:, None]
        gated *= np.where(first, 1, np.sqrt(-np.expm1(2 * log)))
        out = np.zeros(x.shape, np.float32)
        for own, state in sequences(v, self.state, batch):
            for t in range(own.start, own.stop):
                state[:] = np.exp(log[t]) * state + gated[t]
                out[t] = state
        return {self.out: out}

    def work(self, t: Tensors, batch: Batch) -> Work:
        flops = 14 * (t[self.x].nbytes(batch.sizes) // 4)
        return self.moved(t, batch, flops) + Work(state_bytes=state_bytes(t, self.state, batch))
