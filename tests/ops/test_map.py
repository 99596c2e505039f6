"""The op map: definition compared with an independent computation, shape rules, and work counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from support.op_cases import BATCH, TORCH, apply, close, quick, random, refuses, seeds, sides, tensors, torched

from intaglio.ops import (
    Map,
    OpError,
)  # fmt: skip
from intaglio.ops.elementwise import FUNCTIONS, postfix
from intaglio.ops.op import Work


@pytest.mark.parametrize("name", FUNCTIONS)
def test_map_functions(name: str) -> None:
    x = np.concatenate([np.linspace(-30, 30, 601), [0.0, -0.0, 1e-20, -1e-20]]).astype(np.float32)[None]
    got = apply(Map(site="s", a="a", out="out", expr=f"{name}(a)"), a=x)
    np.testing.assert_allclose(got, TORCH[name](torched(x)), rtol=3e-6, atol=1e-7)


@quick
@given(seeds, sides, sides)
def test_map(seed: int, rows: int, cols: int) -> None:
    a, b, c = (random(seed + i, rows, cols) for i in range(3))
    x, y, z = torched(a), torched(b), torched(c)
    for expr, want in (
        ("a + b * 0.22", x + y * 0.22), ("(a - b) / -4 - c", (y - x) / 4 - z), ("silu(a) * b", F.silu(x) * y),
        ("30 * tanh(a / 30)", 30 * torch.tanh(x / 30)), ("a - b - c", x - y - z),
        ("gelu(a + relu(b)) * c", F.gelu(x + F.relu(y)) * z),
    ):  # fmt: skip
        given = {n: v for n, v in (("a", a), ("b", b), ("c", c)) if ("operand", n) in postfix(expr)}
        close(apply(Map(site="s", out="out", expr=expr, **{n: n for n in given}), **given), want, 2e-6)


@quick
@given(seeds, sides, sides, sides)
def test_map_broadcasts_runs(seed: int, rows: int, heads: int, span: int) -> None:
    """A column per head, and one column, broadcast to the columns of a."""
    a, b, c = (random(seed + i, rows, n) for i, n in enumerate((heads * span, heads, 1)))
    got = apply(Map(site="s", a="a", b="b", c="c", out="out", expr="a * sigmoid(b) + c"), a=a, b=b, c=c)
    close(got, torched(a) * torch.sigmoid(torched(b)).repeat_interleave(span, 1) + torched(c), 2e-6)


def test_map_expressions_as_steps() -> None:
    a, b, two = ("operand", "a"), ("operand", "b"), ("number", 2.0)
    assert postfix("silu(a) * b") == (a, ("call", "silu"), b, ("binary", "*"))
    assert postfix("a - (b - 2)") == (a, b, two, ("binary", "-"), ("binary", "-"))
    assert postfix("a * -2") == (a, ("number", -2.0), ("binary", "*"))


@pytest.mark.parametrize(
    "expr",
    ["a **b", "a @ b", "d", "a +", "", "sin(a)", "silu(a, b)", "silu(x=a)", "silu", "-a", "a if a else b", "True * a",
     "a[0]", "a.b", "'a'", "a < b", "lambda: a", "a; b", "silu(silu)"],
)  # fmt: skip
def test_map_expressions_not_understood(expr: str) -> None:
    with pytest.raises(OpError, match=r"^expression .* (is not understood; use a, b, c, numbers|does not parse)"):
        postfix(expr)


def test_map_refuses() -> None:
    refuses(Map(site="s", a="a", out="out", expr="a + b"), r"uses \['a', 'b'\] but operands are \['a'\]", a="f32[T, 8]")
    two = Map(site="s", a="a", b="b", out="out", expr="a * 2")
    refuses(two, r"uses \['a'\] but operands are \['a', 'b'\]", a="f32[T, 8]", b="f32[T, 8]")
    two = Map(site="s", a="a", b="b", out="out", expr="a + b")
    refuses(two, r"a is f32\[T, 8\] but b is f32\[R, 8\]; they must have one shape", a="f32[T, 8]", b="f32[R, 8]")
    refuses(two, r"a is f32\[T, 8\] but b is f32\[T, 3\]; they must have one shape", a="f32[T, 8]", b="f32[T, 3]")


def test_map_work() -> None:
    op = Map(site="s", a="a", b="b", out="out", expr="silu(a) * b + 2")
    table = tensors(a="f32[T, 8]", b="f32[T, 8]", out="f32[T, 8]")
    assert op.work(table, BATCH) == Work(3 * 5 * 8, 0, 0, 3 * 5 * 8 * 4)
