"""Matrix products: linear, with the operations fused into it (bias, scale, activation, residual), and head_linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.formats import Quantised
from intaglio.ops.elementwise import FUNCTIONS
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh")


def x_format(weight: str, exact: bool = False) -> str:
    """Returns the name of the number format to which x is rounded before a product with weights of format `weight`.

    It is int8 for integer codes, bf16 for bf16 and other quantised weights, and f32 for all others. exact: True to use
    f32 in place of bf16.
    """
    fmt = formats.get(weight)
    if fmt.integer:
        return "int8"
    return "bf16" if not exact and (weight == "bf16" or fmt.grouped) else "f32"


def check_x_format(op: Op, t: Tensors, w: str, x_format: str) -> None:
    """Raise OpError unless activations in the number format `x_format` can be multiplied with the weight `w`.

    Weights of integer codes allow only int8. All other weights allow f32 and bf16; fp8 weights (e4m3) also allow
    fp8row. Returns nothing.

    op: the op that has the weight. t: the Program's tensors by name. w: name of the weight.
    """
    fmt = formats.get(t[w].format)
    allowed = ("int8",) if fmt.integer else ("f32", "bf16", "fp8row") if fmt.element == "e4m3" else ("f32", "bf16")
    op.check(x_format in allowed, f"x_format={x_format} with {t[w].format} weights; use {' or '.join(allowed)}")


def product(x: np.ndarray, w: Value, x_format: str) -> np.ndarray:
    """Returns the matrix product x @ w.T, float64 [rows, N], where x is first rounded to the number format `x_format`.

    For weights of integer codes x is always rounded to int8.

    x: [rows, K]. w: [N, K].
    """
    if isinstance(w, Quantised) and (w.levels or w.codes.dtype == formats.E4M3):
        w = w.rows(slice(None))
    if isinstance(w, Quantised):
        xq, xs = formats.quantise_rows(x, w.group)
        wq = formats.in_groups(w.codes, w.group)
        y = np.zeros((len(x), len(wq)))
        for g in range(xs.shape[1]):  # the products of a group are integers: exact
            exact, total = (xq[:, g].astype(np.float64) @ v for v in (wq[:, g].astype(np.float64).T, np.ones(w.group)))
            scale = xs[:, g, None].astype(np.float64)
            if w.zeros is not None:
                exact -= total[:, None] * w.zeros[:, g]
            y += exact * scale * w.scales[:, g].astype(np.float64)
            if w.minima is not None:
                y -= total[:, None] * scale * w.minima[:, g].astype(np.float64)
        return y
    if formats.get(x_format).grouped:
        x = formats.quantise(x, x_format).rows(slice(None)) if len(x) else x
    else:
        x = formats.round_to(x, x_format)
    return x.astype(np.float64) @ w.astype(np.float64).T


@dataclass(frozen=True, kw_only=True)
class Linear(Op, kind="linear"):
    """Op for a matrix product with bias and activation: out = activation((x @ w.T + bias) * scale) + residual.

    x is f32 [rows, K], w is [N, K] in any weight format, out is f32 [rows, N]. Products are summed in float32 or wider;
    integer products are exact within a quantisation group.

    Attributes:
        x_format: number format to which x is rounded before the product. With weights of integer codes: int8 (see
            formats.quantise_rows()). With E4M3 weights: f32, bf16 or fp8row (E4M3 with one scale per row). With all
            other weights: f32 or bf16.
        glu: True if w has the rows of a gate matrix, then the rows of an up matrix. Then out = activation(gate) * up,
            [rows, N / 2], where gate and up are the products with these two matrices.
    """

    x: str = operand()
    w: str = operand("matrix")
    bias: str | None = operand("vector", optional=True)
    residual: str | None = operand(optional=True)
    out: str = result()
    x_format: str = "f32"
    scale: float = 1.0
    activation: str = ""
    glu: bool = False

    @property
    def interleaved(self) -> tuple[str, ...]:
        """The tuple (w,) if `glu` is set, else (). In a device's memory, gate rows of w alternate with up rows."""
        return (self.w,) if self.glu else ()

    def shapes(self, t: Tensors) -> Results:
        rows, k = self.rows_cols(t, self.x)
        n, wk = self.rows_cols(t, self.w)
        self.check(wk == k, f"{self.w} is {t[self.w].type} but {self.x} has {k} columns; w must be [N, {k}]")
        self.check(isinstance(n, int), f"{self.w} is {t[self.w].type}; a weight has fixed rows")
        check_x_format(self, t, self.w, self.x_format)
        known = self.activation in ACTIVATIONS or (self.activation == "" and not self.glu)
        self.check(known, f"activation={self.activation!r}; use one of {', '.join(ACTIVATIONS)}")
        self.vector(t, self.bias, int(n))
        self.check(not self.glu or int(n) % 2 == 0, f"glu needs an even number of rows, {self.w} has {n}")
        shape = (rows, int(n) // 2 if self.glu else int(n))
        if self.residual is not None:
            r = t[self.residual]
            self.check(r.shape == shape, f"residual {self.residual} is {r.type}; wanted {list(shape)}")
        return {self.out: (shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        y = product(array(v, self.x), v[self.w], self.x_format)
        if self.bias is not None:
            y = y + array(v, self.bias)
        y = (y * self.scale).astype(np.float32)
        if self.glu:
            gate, up = np.split(y, 2, axis=1)
            y = FUNCTIONS[self.activation](gate) * up
        elif self.activation:
            y = FUNCTIONS[self.activation](y)
        return {self.out: y if self.residual is None else y + array(v, self.residual)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        rows = t[self.x].nbytes(batch.sizes) // (4 * int(t[self.x].shape[1]))
        n, k = t[self.w].shape
        return self.moved(t, batch, 2 * rows * int(n) * int(k))


@dataclass(frozen=True, kw_only=True)
class HeadLinear(Op, kind="head_linear"):
    """Op that multiplies each head of x by the head's own matrix: out[t, h] = w[h] @ x[t, h, :K].

    t is a token and h a head. A head of x has K + rest columns; the last `rest` columns are copied behind the product.
    x is f32 [T, heads * (K + rest)], w is [heads, N, K] in a plain format, out is f32 [T, heads * (N + rest)]. Latent
    attention (DeepSeek-V2, 2.1.2) uses the op to bring queries into the latent space, and attention results out of it.
    Sums are in float32 or wider.
    """

    x: str = operand()
    w: str = operand("heads")
    out: str = result()

    def shapes(self, t: Tensors) -> Results:
        width, s = self.token_columns(t, self.x), t[self.w].shape
        ok = len(s) == 3 and all(isinstance(d, int) for d in s) and t[self.w].format in formats.PLAIN
        self.check(ok, f"{self.w} is {t[self.w].type}; wanted a matrix a head, [heads, N, K] in a plain format")
        heads, n, k = map(int, s)
        fits = width % heads == 0 and width // heads >= k
        self.check(fits, f"{self.x} is {t[self.x].type}; {self.w} wants {heads} heads of {k} columns or more")
        return {self.out: (("T", heads * (n + width // heads - k)), "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        w = array(v, self.w).astype(np.float64)
        heads, _, k = w.shape
        x = array(v, self.x)
        x = x.reshape(len(x), heads, x.shape[1] // heads)
        y = np.einsum("thk,hnk->thn", x[..., :k].astype(np.float64), w).astype(np.float32)
        return {self.out: np.concatenate([y, x[..., k:]], axis=-1).reshape(len(x), -1)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        heads, n, k = map(int, t[self.w].shape)
        return self.moved(t, batch, 2 * len(batch.tokens) * heads * n * k)
