"""Ops of hyper-connections: sinkhorn makes mixing matrices doubly stochastic, mix_streams mixes residual streams.

Hyper-connections (Zhu et al. 2024) keep several residual streams side by side in one tensor. In DeepSeek-V4 the matrix
that mixes them is doubly stochastic (Xie et al. 2026, "mHC: Manifold-Constrained Hyper-Connections").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

import numpy as np

from intaglio.batch import Batch
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result


def doubly_stochastic(x: np.ndarray, iterations: int, eps: float) -> np.ndarray:
    """Returns the matrices of `x`, changed so that all rows and columns of each sum to about 1.

    `x` and the result are float64 [rows, n * n]: each row is an n x n matrix, written row by row. The class Sinkhorn
    describes the computation and the meaning of `iterations` and `eps`.
    """
    n = isqrt(x.shape[1])
    m = x.reshape(-1, n, n)
    m = np.exp(m - m.max(axis=-1, keepdims=True))
    m = m / m.sum(axis=-1, keepdims=True) + eps
    for i in range(iterations):
        if i:
            m = m / (m.sum(axis=-1, keepdims=True) + eps)
        m = m / (m.sum(axis=-2, keepdims=True) + eps)
    return m.reshape(x.shape)


@dataclass(frozen=True, kw_only=True)
class Sinkhorn(Op, kind="sinkhorn"):
    """Op that changes n x n matrices so that all rows and columns of each sum to about 1.

    It computes `out` from `x` by the algorithm of Sinkhorn & Knopp (1967) as DeepSeek-V4 uses it:

    1. m = softmax of each matrix row, plus `eps`.
    2. Divide each matrix column of m by (its sum + `eps`).
    3. Repeat `iterations` - 1 times: divide each matrix row by (its sum + `eps`), then each column by (its sum +
       `eps`).

    `x` and `out` are f32 [rows, n * n]: each row is one matrix, written row by row.
    """

    x: str = operand()
    out: str = result()
    iterations: int = 20
    eps: float = 1e-6

    def shapes(self, t: Tensors) -> Results:
        _, width = self.rows_cols(t, self.x)
        self.check(isqrt(width) ** 2 == width, f"{self.x} is {t[self.x].type}; wanted n * n columns, of n x n matrices")
        self.check(self.iterations >= 1, f"iterations={self.iterations}; wanted 1 or more")
        self.check(self.eps >= 0, f"eps={self.eps}; wanted 0 or more")
        return {self.out: (t[self.x].shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        x = array(v, self.x).astype(np.float64)
        return {self.out: doubly_stochastic(x, self.iterations, self.eps).astype(np.float32)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        values = t[self.x].nbytes(batch.sizes) // 4
        return self.moved(t, batch, (6 + 4 * self.iterations) * values)  # softmax, then two sums and divisions


@dataclass(frozen=True, kw_only=True)
class MixStreams(Op, kind="mix_streams"):
    """Op that mixes n residual streams into m streams.

    Output stream k is the sum over the input streams j of weights[j, k] * x[j]. If `branch` and `gains` are given,
    gains[k] * branch is added. With m = 1, the op collapses the streams into one.

    `x` is f32 [rows, n * width], with the n streams side by side; `out` is f32 [rows, m * width]. `weights` is f32
    [rows, n * m]: for each input stream, its m weights. `branch` is f32 [rows, width] and `gains` is f32 [rows, m];
    give both of these or neither. The field `streams` is n.
    """

    x: str = operand()
    weights: str = operand()
    branch: str | None = operand(optional=True)
    gains: str | None = operand(optional=True)
    out: str = result()
    streams: int

    def shapes(self, t: Tensors) -> Results:
        rows, columns = self.rows_cols(t, self.x)
        held, weights = self.rows_cols(t, self.weights)
        n = self.streams
        fits = n >= 1 and columns % n == 0
        self.check(fits, f"streams={n}; wanted a divisor of the {columns} columns of {self.x}")
        fits = weights % n == 0 and held == rows
        self.check(fits, f"{self.weights} is {t[self.weights].type}; wanted rows as in {self.x}, {n} * m columns")
        width, m = columns // n, weights // n
        self.check((self.branch is None) == (self.gains is None), "give branch and gains, or neither")
        for name, wanted in ((self.branch, width), (self.gains, m)):
            if name is not None:
                fits = self.rows_cols(t, name) == (rows, wanted)
                self.check(fits, f"{name} is {t[name].type}; wanted [{rows}, {wanted}]")
        return {self.out: ((rows, m * width), "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        x, n = array(v, self.x), self.streams
        width, m = x.shape[1] // n, array(v, self.weights).shape[1] // n
        streams = x.reshape(-1, n, width).astype(np.float64)
        out = np.einsum("tjk,tjd->tkd", array(v, self.weights).reshape(-1, n, m), streams)
        if self.branch is not None and self.gains is not None:
            out = out + array(v, self.gains)[:, :, None] * array(v, self.branch).astype(np.float64)[:, None]
        return {self.out: out.reshape(-1, m * width).astype(np.float32)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        terms = self.streams + (self.branch is not None)
        return self.moved(t, batch, 2 * terms * (t[self.out].nbytes(batch.sizes) // 4))
