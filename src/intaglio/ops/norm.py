"""The op norm: RMS, layer or L2 norm of a row or of equal groups of it (per-head QK norm), plus a residual.

Norm "none" leaves the rows as they are: its weight and bias scale and shift each column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from intaglio.batch import Batch
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result

KINDS = ("rms", "layer", "l2", "none")


@dataclass(frozen=True, kw_only=True)
class Norm(Op, kind="norm"):
    """Op that normalises rows: out = normalised(x) * (weight + offset) + bias + residual, float32 [rows, width].

    The field `norm` names the formula of normalised(x):

    - rms: x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019);
    - layer: (x - mean) / sqrt(var + eps) (Ba et al. 2016);
    - l2: x / sqrt(sum(x^2) + eps);
    - none: x itself.

    x is [rows, width]; weight and bias are [width]. If `group` is above 0, the columns are divided into runs of `group`
    columns, each run is normalised by itself, and weight and bias are [group] or [width]. `offset` is 1 where the
    checkpoint stores weight - 1 (Gemma).
    """

    x: str = operand()
    weight: str | None = operand("vector", optional=True)
    bias: str | None = operand("vector", optional=True)
    residual: str | None = operand(optional=True)
    out: str = result()
    norm: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    group: int = 0

    def shapes(self, t: Tensors) -> Results:
        self.check(self.norm in KINDS, f"norm={self.norm!r}; use one of {', '.join(KINDS)}")
        _, width = self.rows_cols(t, self.x)
        span = self.group or width
        self.check(width % span == 0, f"group={self.group} does not divide the width {width}")
        long = self.weight is not None and t[self.weight].shape == (width,)
        self.vector(t, self.weight, width if long else span)
        self.vector(t, self.bias, width if long else span)
        if self.residual is not None:
            self.same_shape(t, self.x, self.residual)
        return {self.out: (t[self.x].shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        full = array(v, self.x)
        span = self.group or full.shape[1]
        x = full.astype(np.float64).reshape(len(full), full.shape[1] // span, span)  # -1 will not do: rows may be 0
        if self.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        squares = (x * x).sum(axis=-1, keepdims=True)
        y = x if self.norm == "none" else x / np.sqrt(squares / (1 if self.norm == "l2" else x.shape[-1]) + self.eps)
        if self.weight is not None:
            w = array(v, self.weight)
            y = y.reshape(len(full), -1, len(w)) if len(full) else y.reshape(0, 1, len(w))
            y = y * (w + np.float32(self.offset))
        if self.bias is not None:
            y = y + array(v, self.bias)
        y = y.reshape(full.shape).astype(np.float32)
        return {self.out: y if self.residual is None else y + array(v, self.residual)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        return self.moved(t, batch, 6 * (t[self.x].nbytes(batch.sizes) // 4))
