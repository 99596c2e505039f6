"""Ops of positions: rotary embedding of queries and keys, and sinusoids that are added to the embeddings.

Every scaling scheme (llama3, longrope, ...) is a table of frequencies, a const of the Program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from intaglio.batch import Batch
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result

STYLES = ("half", "interleaved")


@dataclass(frozen=True, kw_only=True)
class Rope(Op, kind="rope"):
    """Op for rotary position embedding: rotates pairs of columns of each head (Su et al. 2021).

    The angle of a rotation is position * frequency, a float32 product. For T tokens: x and out f32 [T, heads *
    head_dim], positions int32 [T], frequencies f32 [rotary_dim / 2] (a const).

    Attributes:
        style: "half" pairs column i with i + rotary_dim / 2 (as transformers' rotate_half); "interleaved" pairs 2i with
            2i + 1.
        factor: scales cos and sin (the attention factor of longrope and yarn).
        trailing: True to rotate the last rotary_dim columns of a head, False to rotate the first. The others are
            copied.
    """

    x: str = operand()
    positions: str = operand("index")
    frequencies: str = operand("vector")
    out: str = result()
    head_dim: int
    style: str = "half"
    factor: float = 1.0
    trailing: bool = False

    def shapes(self, t: Tensors) -> Results:
        width = self.token_columns(t, self.x)
        self.check(self.style in STYLES, f"style={self.style!r}; use one of {', '.join(STYLES)}")
        self.check(width % self.head_dim == 0, f"head_dim={self.head_dim} does not divide the width {width}")
        pairs = t[self.frequencies].shape[0]
        most = self.head_dim // 2
        fits = isinstance(pairs, int) and pairs <= most
        self.check(fits, f"{self.frequencies} has {pairs} frequencies; head_dim={self.head_dim} has room for {most}")
        return {self.out: (t[self.x].shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        full = array(v, self.x)
        x = full.reshape(len(full), full.shape[1] // self.head_dim, self.head_dim)
        angle = array(v, self.positions)[:, None] * array(v, self.frequencies)[None, :]
        cos = (np.cos(angle.astype(np.float64)) * self.factor).astype(np.float32)[:, None, :]
        sin = (np.sin(angle.astype(np.float64)) * self.factor).astype(np.float32)[:, None, :]
        n = cos.shape[2]
        start = self.head_dim - 2 * n if self.trailing else 0
        if self.style == "half":
            first, second = slice(start, start + n), slice(start + n, start + 2 * n)
        else:
            first, second = slice(start, start + 2 * n, 2), slice(start + 1, start + 2 * n, 2)
        y = x.copy()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., second] * cos + x[..., first] * sin
        return {self.out: y.reshape(full.shape)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        return self.moved(t, batch, 3 * (t[self.x].nbytes(batch.sizes) // 4))


@dataclass(frozen=True, kw_only=True)
class Sinusoid(Op, kind="sinusoid"):
    """Op for sinusoidal position embeddings: out[t] = [sin(p * frequencies), cos(p * frequencies)].

    t is a token, and p is positions[t] + first. For T tokens: positions int32 [T], frequencies f32 [width / 2] (a
    const), out f32 [T, width]. The angle is a float32 product (Vaswani et al. 2017, 3.5).
    """

    positions: str = operand("index")
    frequencies: str = operand("vector")
    out: str = result()
    first: int = 0

    def shapes(self, t: Tensors) -> Results:
        pairs = t[self.frequencies].shape[0]
        self.check(t[self.positions].format == "i32", f"{self.positions} is {t[self.positions].type}; wanted i32")
        self.check(self.first >= 0, f"first={self.first}; wanted 0 or more")
        return {self.out: ((t[self.positions].shape[0], 2 * int(pairs)), "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        at = (array(v, self.positions) + self.first).astype(np.float32)
        angle = (at[:, None] * array(v, self.frequencies)[None, :]).astype(np.float64)
        return {self.out: np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        return self.moved(t, batch, t[self.out].nbytes(batch.sizes) // 4)
