"""The op short_conv: definition compared with PyTorch, its state over chunks, shape rules, and work counted by hand."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.op_cases import BATCH, close, quick, random, refuses, seeds, tensors, torched

from intaglio.batch import Chunk, bind
from intaglio.ops import ShortConv
from intaglio.ops.op import Work

OP = ShortConv(site="s", x="x", w="w", state="state", bias="bias", out="out")


@quick
@given(seeds, st.integers(2, 5), st.integers(1, 9), st.integers(1, 12))
def test_short_conv(seed: int, taps: int, width: int, tokens: int) -> None:
    x, w, bias = random(seed, tokens, width), random(seed + 1, width, taps), random(seed + 2, width)
    v = {"x": x, "w": w, "bias": bias, "state": np.full((2, taps - 1, width), np.nan, np.float32)}
    got = OP.reference(v, bind([Chunk(range(tokens), 0, [0, 1, 2], state=(-1, 1))], 4))["out"]
    padded = F.pad(torched(x).T, (taps - 1, 0))
    close(got, F.conv1d(padded, torched(w)[:, None], torched(bias), groups=width).T)
    last = torch.cat([torch.zeros(taps - 1, width, dtype=torch.float64), torched(x)])[-(taps - 1) :]
    np.testing.assert_array_equal(v["state"][1], last.float().numpy())
    assert np.isnan(v["state"][0]).all()


@quick
@given(seeds, st.integers(2, 5), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_short_conv_in_chunks_beside_another_sequence(seed: int, taps: int, sizes: list[int]) -> None:
    tokens, width = sum(sizes), 3
    x, y, w = random(seed, tokens, width), random(seed + 1, tokens, width), random(seed + 2, width, taps)
    op = ShortConv(site="s", x="x", w="w", state="state", out="out")
    v = {"x": x, "w": w, "state": np.zeros((4, taps - 1, width), np.float32)}
    whole = op.reference(v, bind([Chunk(range(tokens), 0, range(20), state=(-1, 0))], 1))["out"]
    at, got = 0, []
    for i, n in enumerate(sizes):
        pairs = [(-1 if i == 0 else 2 * s + (i + 1) % 2, 2 * s + i % 2) for s in (0, 1)]
        blocks = (range(20), range(20, 40))
        chunks = [Chunk(range(n), at, blocks[s], state=pairs[s]) for s in (1, 0)]
        rows = {**v, "x": np.concatenate([y[at : at + n], x[at : at + n]])}
        got.append(op.reference(rows, bind(chunks, 1))["out"][n:])
        at += n
    np.testing.assert_array_equal(np.concatenate(got), whole)


def test_short_conv_refuses() -> None:
    good = {"x": "f32[T, 8]", "w": "f32[8, 3]", "bias": "f32[8]", "state": "f32[N, 2, 8]"}
    refuses(OP, r"w is f32\[8, 1\]; wanted \[8, k\], k of 2 or more", **{**good, "w": "f32[8, 1]"})
    refuses(OP, r"w is f32\[7, 3\]", **{**good, "w": "f32[7, 3]"})
    refuses(OP, r"bias is f32\[7\]; wanted \[8\]", **{**good, "bias": "f32[7]"})
    refuses(OP, r"state is f32\[N, 3, 8\]; wanted f32\[N, 2, 8\]", **{**good, "state": "f32[N, 3, 8]"})
    refuses(OP, r"state is bf16\[N, 2, 8\]; wanted f32", **{**good, "state": "bf16[N, 2, 8]"})
    refuses(OP, r"x is f32\[R, 8\]; wanted a row for every token", **{**good, "x": "f32[R, 8]"})


def test_short_conv_work() -> None:
    table = tensors(x="f32[T, 8]", w="f32[8, 3]", bias="bf16[8]", state="f32[N, 2, 8]", out="f32[T, 8]")
    # 5 tokens of 2 sequences; state: read and written
    assert OP.work(table, BATCH) == Work(2 * 3 * 5 * 8, 8 * 3 * 4 + 8 * 2, 2 * 2 * 2 * 8 * 4, 2 * 5 * 8 * 4)
