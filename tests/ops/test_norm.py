"""The op norm: definition compared with an independent computation, shape rules, and work counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.op_cases import BATCH, apply, close, quick, random, refuses, seeds, tensors, torched

from intaglio.ops import (
    Norm,
)  # fmt: skip
from intaglio.ops.op import Work


@quick
@given(seeds, st.integers(1, 5), st.integers(2, 40), st.sampled_from([1e-6, 1e-5]))
def test_norm(seed: int, rows: int, width: int, eps: float) -> None:
    x, r = random(seed, rows, width), random(seed + 3, rows, width)
    w, b = random(seed + 1, width), random(seed + 2, width)
    own = {"x": torched(x), "w": torched(w), "b": torched(b)}
    got = apply(Norm(site="s", x="x", weight="w", out="out", eps=eps), x=x, w=w)
    close(got, F.rms_norm(own["x"], (width,), own["w"], eps))
    got = apply(Norm(site="s", x="x", weight="w", bias="b", out="out", norm="layer", eps=eps), x=x, w=w, b=b)
    close(got, F.layer_norm(own["x"], (width,), own["w"], own["b"], eps))
    got = apply(Norm(site="s", x="x", out="out", norm="l2", eps=eps), x=x)
    close(got, own["x"] * torch.rsqrt(own["x"].pow(2).sum(-1, keepdim=True) + eps))
    got = apply(Norm(site="s", x="x", weight="w", residual="r", out="out", offset=1.0, eps=eps), x=x, w=w, r=r)
    close(got, F.rms_norm(own["x"], (width,), own["w"] + 1, eps) + torched(r))
    got = apply(Norm(site="s", x="x", weight="w", bias="b", out="out", norm="none"), x=x, w=w, b=b)
    close(got, own["x"] * own["w"] + own["b"])


def test_norm_by_group_is_the_norm_of_each_head() -> None:
    x, w = random(0, 5, 24), random(1, 8)
    for kind in ("rms", "layer", "l2", "none"):
        own = Norm(site="s", x="x", weight="w", out="out", norm=kind)
        got = apply(replace(own, group=8), x=x, w=w)
        heads = [apply(own, x=x[:, i : i + 8], w=w) for i in (0, 8, 16)]
        np.testing.assert_array_equal(got, np.concatenate(heads, axis=1))


def test_norm_refuses() -> None:
    op = Norm(site="s", x="x", weight="weight", out="out", norm="rms", group=0)
    refuses(op, r"weight is f32\[7\]; wanted \[8\]", x="f32[T, 8]", weight="f32[7]")
    refuses(op, "vectors stay in a plain format", x="f32[T, 8]", weight="int8g32[8]")
    refuses(
        Norm(site="s", x="x", out="out", norm="batch"), "norm='batch'; use one of rms, layer, l2, none", x="f32[T, 8]"
    )
    refuses(Norm(site="s", x="x", out="out", group=3), "group=3 does not divide the width 8", x="f32[T, 8]")
    residual = Norm(site="s", x="x", residual="r", out="out")
    refuses(residual, r"x is f32\[T, 8\] but r is f32\[T, 4\]", x="f32[T, 8]", r="f32[T, 4]")


def test_norm_work() -> None:
    op = Norm(site="s", x="x", weight="weight", residual="r", out="out")
    table = tensors(x="f32[T, 8]", weight="bf16[8]", r="f32[T, 8]", out="f32[T, 8]")
    assert op.work(table, BATCH) == Work(6 * 5 * 8, 8 * 2, 0, 3 * 5 * 8 * 4)
