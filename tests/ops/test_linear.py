"""The op linear: definition compared with an independent computation, shape rules, and work counted by hand."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.op_cases import BATCH, TORCH, apply, close, quick, random, refuses, seeds, sides, tensors, torched

from intaglio import formats
from intaglio.ops import (
    Linear,
)  # fmt: skip
from intaglio.ops.linear import ACTIVATIONS
from intaglio.ops.op import Work


@quick
@given(seeds, st.integers(1, 5), sides, sides, st.sampled_from(ACTIVATIONS))
def test_linear(seed: int, rows: int, n: int, k: int, activation: str) -> None:
    x, w, b, r = random(seed, rows, k), random(seed + 1, n, k), random(seed + 2, n), random(seed + 3, rows, n)
    plain = F.linear(torched(x), torched(w))
    close(apply(Linear(site="s", x="x", w="w", out="out"), x=x, w=w), plain)
    full = Linear(site="s", x="x", w="w", bias="b", residual="r", out="out", scale=0.5, activation=activation)
    want = TORCH[activation]((plain + torched(b)) * 0.5) + torched(r)
    close(apply(full, x=x, w=w, b=b, r=r), want, 2e-6)


@quick
@given(seeds, st.integers(1, 5), sides, sides, st.sampled_from(ACTIVATIONS))
def test_linear_glu(seed: int, rows: int, half: int, k: int, activation: str) -> None:
    x, r = random(seed, rows, k), random(seed + 3, rows, half)
    gate, up = random(seed + 1, half, k), random(seed + 2, half, k)
    op = Linear(site="s", x="x", w="w", residual="r", out="out", activation=activation, glu=True)
    want = TORCH[activation](F.linear(torched(x), torched(gate))) * F.linear(torched(x), torched(up)) + torched(r)
    close(apply(op, x=x, w=np.concatenate([gate, up]), r=r), want, 2e-6)


@quick
@given(seeds, st.integers(1, 5), sides, st.integers(1, 150), st.sampled_from([32, 64]))
def test_linear_in_other_formats(seed: int, rows: int, n: int, k: int, group: int) -> None:
    x, w = random(seed, rows, k), random(seed + 1, n, k)
    half = w.astype(formats.BF16)
    got = apply(Linear(site="s", x="x", w="w", out="out", x_format="bf16"), x=x, w=half)
    rounded = torch.from_numpy(x).bfloat16().double()
    close(got, F.linear(rounded, torched(half.astype(np.float32))))
    q = formats.quantise(w, f"int8g{group}")
    whole = torched(q.rows(slice(None)))
    got = apply(Linear(site="s", x="x", w="w", out="out", x_format="int8"), x=x, w=q)
    codes, scales = formats.quantise_rows(x, group)
    near = (codes.astype(np.float64) * scales[:, :, None]).reshape(rows, -1)[:, :k]  # x as the product sees it
    close(got, F.linear(torched(near), whole))


def test_linear_refuses() -> None:
    def op(**fields: object) -> Linear:
        return Linear(site="s", x="x", w="w", out="out", **fields)  # type: ignore[arg-type]

    x = "f32[T, 8]"
    refuses(op(), r"w is f32\[6, 9\] but x has 8 columns; w must be \[N, 8\]", x=x, w="f32[6, 9]")
    refuses(op(), "a weight has fixed rows", x=x, w="f32[R, 8]")
    refuses(op(x_format="int8"), "x_format=int8 with f32 weights; use f32 or bf16", x=x, w="f32[6, 8]")
    refuses(op(x_format="bf16"), "x_format=bf16 with int4g32 weights; use int8", x=x, w="int4g32[6, 8]")
    refuses(op(activation="exp"), "activation='exp'; use one of silu", x=x, w="f32[6, 8]")
    refuses(op(glu=True), "activation=''; use one of silu", x=x, w="f32[6, 8]")
    refuses(op(glu=True, activation="silu"), "glu needs an even number of rows, w has 7", x=x, w="f32[7, 8]")
    refuses(op(bias="bias"), r"bias is f32\[8\]; wanted \[6\]", x=x, w="f32[6, 8]", bias="f32[8]")
    refuses(op(residual="r"), r"residual r is f32\[T, 8\]; wanted", x=x, w="f32[6, 8]", r="f32[T, 8]")
    refuses(op(residual="r"), r"residual r is f32\[R, 6\]; wanted", x=x, w="f32[6, 8]", r="f32[R, 6]")


def test_linear_work() -> None:
    table = tensors(x="f32[T, 64]", w="int4g32[6, 64]", bias="f32[6]", r="f32[T, 6]", out="f32[T, 6]", half="f32[T, 3]")
    op = Linear(site="s", x="x", w="w", bias="bias", residual="r", out="out")
    weights = 6 * (32 + 2 * 2) + 6 * 4  # two scales a row
    assert op.work(table, BATCH) == Work(2 * 5 * 6 * 64, weights, 0, 4 * 5 * (64 + 6 + 6))
    glu = Linear(site="s", x="x", w="w", out="half", glu=True, activation="silu")
    assert glu.work(table, BATCH) == Work(2 * 5 * 6 * 64, 6 * 36, 0, 4 * 5 * (64 + 3))
