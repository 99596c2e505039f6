"""Ops that move data: embedding lookup, selection of rows, permutation of columns, and concatenation of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from intaglio.batch import Batch
from intaglio.formats import Quantised
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result


@dataclass(frozen=True, kw_only=True)
class Embed(Op, kind="embed"):
    """Op that looks up the tokens' rows of an embedding table: out[t] = w[tokens[t]] * scale.

    t counts the tokens of the step. tokens is int32 [T] for T tokens, w is [vocabulary, width] in any format, out is
    f32 [T, width].
    """

    tokens: str = operand("index")
    w: str = operand("table")
    out: str = result()
    scale: float = 1.0

    def shapes(self, t: Tensors) -> Results:
        self.check(t[self.tokens].format == "i32", f"{self.tokens} is {t[self.tokens].type}; wanted i32 token ids")
        _, width = self.rows_cols(t, self.w)
        return {self.out: ((t[self.tokens].shape[0], width), "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        w, ids = v[self.w], v[self.tokens]
        assert isinstance(ids, np.ndarray)
        rows = w.rows(ids) if isinstance(w, Quantised) else w[ids].astype(np.float32)
        return {self.out: rows * np.float32(self.scale)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        touched = replace(t[self.w], shape=("T", t[self.w].shape[1])).nbytes(batch.sizes)
        out = t[self.out].nbytes(batch.sizes)
        return Work(len(batch.tokens) * int(t[self.w].shape[1]), touched, 0, out)


@dataclass(frozen=True, kw_only=True)
class Select(Op, kind="select"):
    """Op that selects rows of x: out[r] = x[rows[r]]. x is f32 [T, width], rows int32 [R], out f32 [R, width]."""

    x: str = operand()
    rows: str = operand("index")
    out: str = result()

    def shapes(self, t: Tensors) -> Results:
        self.check(t[self.rows].format == "i32", f"{self.rows} is {t[self.rows].type}; wanted i32 row numbers")
        return {self.out: ((t[self.rows].shape[0], self.rows_cols(t, self.x)[1]), "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        rows = v[self.rows]
        assert isinstance(rows, np.ndarray)
        return {self.out: array(v, self.x)[rows]}

    def work(self, t: Tensors, batch: Batch) -> Work:
        return Work(0, 0, 0, 2 * t[self.out].nbytes(batch.sizes))


@dataclass(frozen=True, kw_only=True)
class Permute(Op, kind="permute"):
    """Op that puts the columns of x in another order: out[t, j] = x[t, order[j]].

    x and out are f32 [rows, width], order is i32 [width]. Weights quantised with act-order (GPTQ) have their columns
    sorted by quantisation group; Permute sorts the columns of x to match.
    """

    x: str = operand()
    order: str = operand("index")
    out: str = result()

    def shapes(self, t: Tensors) -> Results:
        _, width = self.rows_cols(t, self.x)
        order = t[self.order]
        self.check(
            (order.shape, order.format) == ((width,), "i32"), f"{self.order} is {order.type}; wanted i32[{width}]"
        )
        return {self.out: (t[self.x].shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        order = v[self.order]
        assert isinstance(order, np.ndarray)
        return {self.out: array(v, self.x)[:, order]}

    def work(self, t: Tensors, batch: Batch) -> Work:
        return self.moved(t, batch, 0)


@dataclass(frozen=True, kw_only=True)
class Concat(Op, kind="concat"):
    """Op that puts the columns of two tensors side by side: row t of out has row t of a, then row t of b.

    a is f32 [rows, m], b is f32 [rows, n], out is f32 [rows, m + n].
    """

    a: str = operand()
    b: str = operand()
    out: str = result()

    def shapes(self, t: Tensors) -> Results:
        (rows, m), (others, n) = self.rows_cols(t, self.a), self.rows_cols(t, self.b)
        self.check(rows == others, f"{self.a} has {rows} rows and {self.b} has {others}; wanted as many")
        return {self.out: ((rows, m + n), "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        return {self.out: np.concatenate([array(v, self.a), array(v, self.b)], axis=1)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        return self.moved(t, batch, 0)
