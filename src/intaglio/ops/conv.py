"""The op short_conv: a causal convolution over the last few tokens of a sequence, one filter per channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from intaglio.batch import Batch
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result
from intaglio.ops.recurrence import check_state, sequences, state_bytes


@dataclass(frozen=True, kw_only=True)
class ShortConv(Op, kind="short_conv"):
    """Op for a causal convolution over the last k tokens of a sequence, with one filter for each channel.

    out[t, c] = bias[c] + the sum over j < k of w[c, j] * x[t - k + 1 + j, c], where x is 0 before the sequence's start.
    x and out are f32 [T, channels] for T tokens; w is [channels, k] with k >= 2; bias is [channels]. `state` is f32 [N,
    k - 1, channels]: for each of N sequences, the last k - 1 rows of x, oldest first. Used in Mamba (Gu & Dao 2023),
    LFM2 and gated delta nets.
    """

    x: str = operand()
    w: str = operand("vector")
    state: str = operand("slots", access="update")
    bias: str | None = operand("vector", optional=True)
    out: str = result()

    def shapes(self, t: Tensors) -> Results:
        width = self.token_columns(t, self.x)
        w = t[self.w]
        fits = len(w.shape) == 2 and w.shape[0] == width and int(w.shape[1]) >= 2
        self.check(fits, f"{self.w} is {w.type}; wanted [{width}, k], k of 2 or more")
        self.vector(t, self.bias, width)
        check_state(self, t, self.state, int(w.shape[1]) - 1, width)
        return {self.out: (t[self.x].shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        x, w = array(v, self.x), array(v, self.w).astype(np.float64)
        out, taps = np.zeros(x.shape), w.shape[1]
        for rows, state in sequences(v, self.state, batch):
            seen = np.concatenate([state, x[rows]])
            n = len(seen) - taps + 1
            out[rows] = sum(w[:, j] * seen[j : j + n] for j in range(taps))
            state[:] = seen[n:]
        if self.bias is not None:
            out += array(v, self.bias)
        return {self.out: out.astype(np.float32)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        flops = 2 * int(t[self.w].shape[1]) * (t[self.x].nbytes(batch.sizes) // 4)
        return self.moved(t, batch, flops) + Work(state_bytes=state_bytes(t, self.state, batch))
