"""Collective ops: results across ranks, errors, and work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.op_cases import BATCH, quick, random, refuses, seeds, sides, tensors

from intaglio import formats
from intaglio.batch import shared_rows
from intaglio.ops import AllGather, AllReduce, AllToAll, OpError, Recv, ReduceScatter, Send, Work


def parts(seed: int, ranks: int, rows: int, width: int) -> list[np.ndarray]:
    return [random(seed + i, rows, width) for i in range(ranks)]


@quick
@given(seeds, st.integers(1, 6), sides, sides)
def test_all_reduce(seed: int, ranks: int, rows: int, width: int) -> None:
    x = parts(seed, ranks, rows, width)
    op = AllReduce(site="s", x="x", out="out", group=tuple(range(ranks)))
    total = x[0]
    for part in x[1:]:
        total = total + part  # in order of rank, in float32
    for got in op.exchange(x):
        np.testing.assert_array_equal(got, total)
    short = replace(op, wire="bf16").exchange(x)[-1]
    np.testing.assert_array_equal(short, formats.round_to(short, "bf16"))
    room = (ranks + 1) * 2.0**-8 * np.sum([np.abs(part) for part in x], axis=0)
    assert (np.abs(short - total) <= room).all()


@pytest.mark.parametrize("ranks", [1, 3])
def test_all_gather(ranks: int) -> None:
    x = [random(i, 5, 2 + i) for i in range(ranks)]
    width = sum(part.shape[1] for part in x)
    op = AllGather(site="s", x="x", out="out", group=tuple(range(ranks)), width=width)
    for got in op.exchange(x):
        np.testing.assert_array_equal(got, np.concatenate(x, axis=1))
    half = replace(op, wire="f16").exchange(x)[0]
    np.testing.assert_array_equal(half, np.concatenate(x, axis=1).astype(np.float16).astype(np.float32))


@quick
@given(seeds, st.integers(1, 6), sides, sides)
def test_reduce_scatter_and_all_gather_are_all_reduce(seed: int, ranks: int, rows: int, width: int) -> None:
    """Near-equal runs of token rows of the sum; one after the other they are the whole again."""
    x, group = parts(seed, ranks, rows, width), tuple(range(ranks))
    total = AllReduce(site="s", x="x", out="out", group=group).exchange(x)[0]
    got = ReduceScatter(site="s", x="x", out="out", group=group, share=0).exchange(x)
    assert [len(part) for part in got] == [len(shared_rows(rows, i, ranks)) for i in range(ranks)]
    assert len(got[0]) == max(map(len, got)) <= min(map(len, got)) + 1
    whole = AllGather(site="s", x="x", out="out", group=group, width=width, tokens=True).exchange(got)
    for again in whole:
        np.testing.assert_array_equal(again, total)


@quick
@given(seeds, st.integers(1, 6), sides)
def test_all_to_all(seed: int, ranks: int, rows: int) -> None:
    x = [random(seed + i, rows, 1 + (seed + i) % 3) for i in range(ranks)]
    whole, group = np.concatenate(x, axis=1), tuple(range(ranks))
    op = AllToAll(site="s", x="x", out="out", group=group, share=0, width=whole.shape[1])
    for i, got in enumerate(op.exchange(x)):
        np.testing.assert_array_equal(got, whole[list(shared_rows(rows, i, ranks))])
    np.testing.assert_array_equal(replace(op, wire="bf16").exchange(x)[0], formats.round_to(op.exchange(x)[0], "bf16"))


def test_send_and_recv() -> None:
    (x,) = parts(0, 1, 4, 3)
    (arrived,) = Send(site="s", x="x", peer=1, wire="bf16").exchange([x])
    np.testing.assert_array_equal(arrived, formats.round_to(x, "bf16"))
    assert Recv(site="s", out="out", peer=0, width=3, wire="bf16").exchange([arrived])[0] is arrived


def test_recv_has_the_shape_it_names() -> None:
    op = Recv(site="s", out="out", peer=0, width=3, rows="R")
    assert op.shapes({}) == {"out": (("R", 3), "f32")}


def test_a_collective_of_one_rank_is_refused() -> None:
    op = AllReduce(site="s", x="x", out="out", group=(0, 1))
    with pytest.raises(OpError, match="a single rank cannot compute it; run all ranks"):
        op.reference({"x": random(0, 2, 2)}, BATCH)


@quick
@given(seeds, st.integers(1, 5), sides, sides, st.integers(1, 4))
def test_all_reduce_of_slots(seed: int, ranks: int, rows: int, width: int, slots: int) -> None:
    """The sum of the slots, in their order, does not depend on which rank has the values of a slot."""
    rng, values = np.random.default_rng(seed), random(seed, rows, slots * width)
    op = AllReduce(site="s", x="x", out="out", group=tuple(range(ranks)), slots=slots)
    assert op.shapes(tensors(x=f"f32[T, {slots * width}]")) == {"out": (("T", width), "f32")}
    results = []
    for _ in range(2):
        owner = rng.integers(ranks, size=(rows, slots)).repeat(width, axis=1)
        results += op.exchange([np.where(owner == r, values, np.float32(0)) for r in range(ranks)])
    total = values[:, :width].copy()
    for j in range(1, slots):
        total += values[:, j * width : (j + 1) * width]
    for got in results:
        np.testing.assert_array_equal(got, total)
    short = replace(op, wire="bf16").exchange([values, *[np.zeros_like(values)] * (ranks - 1)])[-1]
    np.testing.assert_array_equal(short, formats.round_to(short, "bf16"))


def test_all_reduce_refuses() -> None:
    op = AllReduce(site="s", x="x", out="out", group=(0, 2))
    refuses(replace(op, group=(2, 0)), r"group=\(2, 0\); wanted ranks in ascending order", x="f32[T, 8]")
    refuses(replace(op, group=()), r"group=\(\); wanted ranks", x="f32[T, 8]")
    refuses(replace(op, wire="int8"), "wire='int8'; use one of f32, bf16, f16", x="f32[T, 8]")
    refuses(op, r"x is f32\[T\]; wanted a matrix", x="f32[T]")
    refuses(replace(op, slots=3), "slots=3, but x has 8 columns; wanted 1 or more that divides", x="f32[T, 8]")


def test_all_gather_refuses() -> None:
    op = AllGather(site="s", x="x", out="out", group=(0, 1), width=7)
    refuses(op, r"x is f32\[T, 8\], which is more than width=7", x="f32[T, 8]")


def test_reduce_scatter_refuses() -> None:
    scatter = ReduceScatter(site="s", x="x", out="out", group=(0, 1), share=2)
    refuses(scatter, r"share=2 is outside 0\.\.1, the places in group=\(0, 1\)", x="f32[T, 8]")
    refuses(replace(scatter, share=1), r"x is f32\[R, 8\]; wanted a row for every token", x="f32[R, 8]")


def test_all_to_all_refuses() -> None:
    swap = AllToAll(site="s", x="x", out="out", group=(0, 1), share=0, width=7)
    refuses(swap, r"x is f32\[T, 8\], which is more than width=7", x="f32[T, 8]")


def test_all_gather_refuses_shares_of_other_groups() -> None:
    gather = AllGather(site="s", x="x", out="out", group=(0, 1), width=8, tokens=True)
    refuses(gather, r"x is f32\[T:0/3, 8\]; wanted \[T:i/2, 8\]", x="f32[T:0/3, 8]")
    refuses(gather, r"x is f32\[T, 8\]; wanted", x="f32[T, 8]")


def test_send_refuses() -> None:
    refuses(Send(site="s", x="x", peer=1, wire="f64"), "wire='f64'", x="f32[T, 8]")


def test_recv_refuses() -> None:
    refuses(Recv(site="s", out="out", peer=1, width=8, rows="S"), "rows='S'; use T, R or a share")
    refuses(Recv(site="s", out="out", peer=1, width=8, rows="T:2/2"), "rows='T:2/2'; use T, R or a share")


def test_all_reduce_work() -> None:
    op = AllReduce(site="s", x="x", out="out", group=(0, 1, 2, 3), wire="bf16")
    n = 5 * 8 * 4
    assert op.work(tensors(x="f32[T, 8]", out="f32[T, 8]"), BATCH) == Work(3 * 5 * 8 // 4, 0, 0, 2 * n, 2 * 3 * n // 8)
    slots = replace(op, slots=4).work(tensors(x="f32[T, 8]", out="f32[T, 2]"), BATCH)
    assert slots == Work(3 * 5 * 8 // 4 + 3 * 5 * 2, 0, 0, n + n // 4, 2 * 3 * n // 8)


def test_all_gather_work() -> None:
    op = AllGather(site="s", x="x", out="out", group=(0, 1, 2, 3), width=8)
    assert op.work(tensors(x="f32[T, 2]", out="f32[T, 8]"), BATCH) == Work(0, 0, 0, 2 * 5 * 8 * 4, 5 * 6 * 4)


SPLIT = tensors(x="f32[T, 8]", part="f32[T, 2]", out="f32[T:0/4, 8]", whole="f32[T, 8]")
OWN = 2 * 8 * 4  # bytes of the first of four ranks' rows, of five tokens


def test_reduce_scatter_work() -> None:
    scatter = ReduceScatter(site="s", x="x", out="out", group=(0, 1, 2, 3), share=0, wire="bf16")
    assert scatter.work(SPLIT, BATCH) == Work(3 * 2 * 8, 0, 0, 5 * 8 * 4 + OWN, 3 * OWN // 2)


def test_all_to_all_work() -> None:
    swap = AllToAll(site="s", x="part", out="out", group=(0, 1, 2, 3), share=0, width=8)
    assert swap.work(SPLIT, BATCH) == Work(0, 0, 0, 5 * 2 * 4 + OWN, OWN * 3 // 4)


def test_all_gather_work_along_tokens() -> None:
    gather = AllGather(site="s", x="out", out="whole", group=(0, 1, 2, 3), width=8, tokens=True)
    assert gather.work(SPLIT, BATCH) == Work(0, 0, 0, 2 * 5 * 8 * 4, 3 * 8 * 4)


def test_send_work() -> None:
    op = Send(site="s", x="x", peer=1, wire="f16")
    assert op.work(tensors(x="f32[T, 8]"), BATCH) == Work(0, 0, 0, 5 * 8 * 4, 5 * 8 * 2)


def test_recv_work() -> None:
    op = Recv(site="s", out="out", peer=1, width=8)
    assert op.work(tensors(out="f32[T, 8]"), BATCH) == Work(0, 0, 0, 5 * 8 * 4, 5 * 8 * 4)
