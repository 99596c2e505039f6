"""The ops embed, select, concat and permute: definition, shape rules, and work counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from support.op_cases import BATCH, apply, close, quick, random, refuses, seeds, sides, tensors, torched

from intaglio import formats
from intaglio.ops import (
    Concat,
    Embed,
    Permute,
    Select,
)  # fmt: skip
from intaglio.ops.op import Work


@quick
@given(seeds, sides, sides)
def test_embed(seed: int, rows: int, width: int) -> None:
    w = random(seed, rows, width)
    ids = np.random.default_rng(seed).integers(0, rows, 7).astype(np.int32)
    op = Embed(site="s", tokens="tokens", w="w", out="out", scale=1.5)
    close(apply(op, tokens=ids, w=w), F.embedding(torch.from_numpy(ids), torched(w)) * 1.5)
    half = w.astype(formats.BF16)
    close(apply(op, tokens=ids, w=half), half[ids].astype(np.float64) * 1.5)
    q = formats.quantise(w, "int8g32")
    np.testing.assert_array_equal(apply(op, tokens=ids, w=q), q.rows(slice(None))[ids] * np.float32(1.5))


def test_embed_refuses() -> None:
    op = Embed(site="s", tokens="tokens", w="w", out="out")
    refuses(op, r"tokens is f32\[T\]; wanted i32", tokens="f32[T]", w="f32[9, 8]")
    refuses(op, r"w is f32\[9\]; wanted a matrix", tokens="i32[T]", w="f32[9]")


def test_embed_work_touches_the_rows_it_reads() -> None:
    op = Embed(site="s", tokens="tokens", w="w", out="out")
    table = tensors(tokens="i32[T]", w="bf16[100, 8]", out="f32[T, 8]")
    assert op.work(table, BATCH) == Work(5 * 8, 5 * 8 * 2, 0, 5 * 8 * 4)


def test_select() -> None:
    x = random(0, 5, 3)
    rows = np.array([4, 0, 4], np.int32)
    np.testing.assert_array_equal(apply(Select(site="s", x="x", rows="rows", out="out"), x=x, rows=rows), x[[4, 0, 4]])


def test_select_refuses() -> None:
    op = Select(site="s", x="x", rows="rows", out="out")
    refuses(op, r"rows is f32\[R\]; wanted i32", x="f32[T, 8]", rows="f32[R]")
    refuses(op, r"x is f32\[T\]; wanted a matrix", x="f32[T]", rows="i32[R]")


def test_select_work() -> None:
    op = Select(site="s", x="x", rows="rows", out="out")
    table = tensors(x="f32[T, 8]", rows="i32[R]", out="f32[R, 8]")
    assert op.work(table, BATCH) == Work(0, 0, 0, 2 * 3 * 8 * 4)


def test_concat() -> None:
    a, b = random(0, 5, 4), random(1, 5, 3)
    got = apply(Concat(site="s", a="a", b="b", out="out"), a=a, b=b)
    assert [list(row) for row in got] == [[*x, *y] for x, y in zip(a, b, strict=True)]


def test_concat_refuses() -> None:
    op = Concat(site="s", a="a", b="b", out="out")
    refuses(op, r"a has T rows and b has R; wanted as many", a="f32[T, 4]", b="f32[R, 4]")
    refuses(op, r"b is f32\[T\]; wanted a matrix", a="f32[T, 4]", b="f32[T]")


def test_concat_work() -> None:
    op = Concat(site="s", a="a", b="b", out="out")
    table = tensors(a="f32[T, 8]", b="f32[T, 3]", out="f32[T, 11]")
    assert op.work(table, BATCH) == Work(0, 0, 0, 2 * 5 * 11 * 4)


def test_permute() -> None:
    x, order = random(0, 5, 4), np.array([2, 0, 3, 1], np.int32)
    op = Permute(site="s", x="x", order="order", out="out")
    np.testing.assert_array_equal(apply(op, x=x, order=order), np.stack([x[:, j] for j in order], axis=1))


def test_permute_refuses() -> None:
    op = Permute(site="s", x="x", order="order", out="out")
    refuses(op, r"order is i32\[3\]; wanted i32\[4\]", x="f32[T, 4]", order="i32[3]")
    refuses(op, r"order is f32\[4\]; wanted i32\[4\]", x="f32[T, 4]", order="f32[4]")


def test_permute_work() -> None:
    op = Permute(site="s", x="x", order="order", out="out")
    table = tensors(x="f32[T, 8]", order="i32[8]", out="f32[T, 8]")
    table["order"] = replace(table["order"], role="weight")
    assert op.work(table, BATCH) == Work(0, 8 * 4, 0, 2 * 5 * 8 * 4)
