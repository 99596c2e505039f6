"""The op moment: definition compared with PyTorch, shape rules, and work counted by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.op_cases import BATCH, apply, close, quick, random, refuses, seeds, tensors, torched

from intaglio.ops import Moment
from intaglio.ops.op import Work


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 40))
def test_moment(seed: int, rows: int, width: int) -> None:
    x = random(seed, rows, width)
    own = torched(x)
    for of, wanted in (
        ("mean", own.mean(-1, keepdim=True)),
        ("rms", own.pow(2).mean(-1, keepdim=True).sqrt()),
        ("std", own.std(-1, keepdim=True, unbiased=False)),
    ):
        close(apply(Moment(site="s", x="x", out="out", of=of), x=x), wanted)


def test_moment_of_no_rows() -> None:
    assert apply(Moment(site="s", x="x", out="out", of="std"), x=np.zeros((0, 3), np.float32)).shape == (0, 1)


def test_moment_refuses() -> None:
    refuses(Moment(site="s", x="x", out="out", of="median"), "of='median'; use one of mean, rms, std", x="f32[T, 8]")
    refuses(Moment(site="s", x="x", out="out"), r"wanted a matrix \[rows, columns\]", x="f32[8]")


def test_moment_work() -> None:
    table = tensors(x="f32[T, 8]", out="f32[T, 1]")
    for of, each in (("mean", 1), ("rms", 2), ("std", 4)):
        work = Moment(site="s", x="x", out="out", of=of).work(table, BATCH)
        assert work == Work(each * 5 * 8, 0, 0, 5 * 8 * 4 + 5 * 4)
