"""The ops decay and linear_attention: definitions compared with PyTorch and transformers, shape rules, work by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.op_cases import BATCH, close, quick, random, refuses, seeds, tensors, torched

from intaglio.batch import Batch, Chunk, bind
from intaglio.ops import Decay, LinearAttention
from intaglio.ops.op import Work

TOKENS = 9


def batch(tokens: int = TOKENS) -> Batch:
    """One sequence from its start, with its state in slot 1 afterwards."""
    return bind([Chunk(range(tokens), 0, range(tokens), state=(-1, 1))], 1)


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 3), st.sampled_from([(0.0, 0.0), (0.1, 0.9)]))
def test_decay(seed: int, heads: int, span: int, limits: tuple[float, float]) -> None:
    x, rate, bias = random(seed, 5, heads * span) * 3, random(seed + 1, heads), random(seed + 2, heads * span)
    op = Decay(site="s", x="x", rate="rate", bias="bias", step="step", decay="decay", low=limits[0], high=limits[1])
    step = F.softplus(torched(x) + torched(bias)).clamp(limits[0], limits[1] or None)
    got = op.reference({"x": x, "rate": rate, "bias": bias}, BATCH)
    close(got["step"], step)
    close(got["decay"], -torched(rate).exp().repeat_interleave(span) * step)


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 3))
def test_decay_with_a_floor(seed: int, heads: int, span: int) -> None:
    x, rate, bias = random(seed, 5, heads * span) * 3, random(seed + 1, heads), random(seed + 2, heads * span)
    op = Decay(site="s", x="x", rate="rate", bias="bias", step="step", decay="decay", floor=-5.0)
    got = op.reference({"x": x, "rate": rate, "bias": bias}, BATCH)["decay"]
    close(got, -5 * torch.sigmoid(torched(rate).exp().repeat_interleave(span) * (torched(x) + torched(bias))), 2e-5)


def test_decay_refuses() -> None:
    op = Decay(site="s", x="x", rate="rate", bias="bias", step="step", decay="decay")
    refuses(op, "8 columns are no multiple of 3 rates", x="f32[T, 8]", rate="f32[3]", bias="f32[8]")
    refuses(op, r"bias is f32\[4\]; wanted \[8\]", x="f32[T, 8]", rate="f32[4]", bias="f32[4]")
    wrong = Decay(site="s", x="x", rate="rate", step="step", decay="decay", low=2.0, high=1.0)
    refuses(wrong, r"low=2.0, high=1.0; wanted 0 <= low <= high", x="f32[T, 8]", rate="f32[4]")
    wrong = Decay(site="s", x="x", rate="rate", step="step", decay="decay", floor=1.0)
    refuses(wrong, "floor=1.0; wanted 0, for none, or a log decay below 0", x="f32[T, 8]", rate="f32[4]")


def test_decay_work() -> None:
    op = Decay(site="s", x="x", rate="weight", step="step", decay="decay")
    table = tensors(x="f32[T, 8]", weight="f32[4]", step="f32[T, 8]", decay="f32[T, 8]")
    assert op.work(table, BATCH) == Work(6 * 5 * 8, 4 * 4, 0, 3 * 5 * 8 * 4)


def operands(seed: int, groups: int, share: int, keys: int, values: int, wide: bool) -> dict[str, Any]:
    heads = groups * share
    return {
        "q": random(seed, TOKENS, groups * keys), "k": random(seed + 1, TOKENS, groups * keys) / keys**0.5,
        "v": random(seed + 2, TOKENS, heads * values), "beta": np.abs(random(seed + 3, TOKENS, heads)),
        "decay": -np.abs(random(seed + 4, TOKENS, heads * (keys if wide else 1))),
        "state": np.full((2, heads, keys, values), np.nan, np.float32),
    }  # fmt: skip


def op_of(heads: int, **more: Any) -> LinearAttention:
    given = {"q": "q", "k": "k", "v": "v", "state": "state", "decay": "decay", "beta": "beta", "out": "out"}
    return LinearAttention(site="s", heads=heads, **{**given, **more})


def expected(v: dict[str, Any], heads: int, delta: bool, scale: float) -> torch.Tensor:
    """The recurrence in PyTorch, in float64, from its definition in the papers."""
    keys, values = v["state"].shape[2:]
    share = heads // (v["k"].shape[1] // keys)
    q, k = (torched(v[n]).reshape(TOKENS, -1, keys).repeat_interleave(share, 1) for n in "qk")
    x, beta = torched(v["v"]).reshape(TOKENS, heads, values), torched(v["beta"])
    decay = torched(v["decay"]).reshape(TOKENS, heads, -1).expand(-1, -1, keys)
    s, out = torch.zeros(heads, keys, values, dtype=torch.float64), []
    for t in range(TOKENS):
        s = s * decay[t].exp()[..., None]
        u = x[t] - (s.transpose(1, 2) @ k[t][..., None])[..., 0] if delta else x[t]
        s = s + k[t][..., None] @ (beta[t][:, None] * u)[:, None]
        out.append(scale * (s.transpose(1, 2) @ q[t][..., None])[..., 0])
    return torch.stack(out).reshape(TOKENS, -1)


@quick
@given(seeds, st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
def test_linear_attention(seed: int, groups: int, share: int, keys: int, values: int, wide: bool, delta: bool) -> None:
    v = operands(seed, groups, share, keys, values, wide)
    want = expected(v, groups * share, delta, 0.7)
    got = op_of(groups * share, delta=delta, scale=0.7).reference(v, batch())["out"]
    close(got, want, 1e-5)
    assert np.isfinite(v["state"][1]).all() and np.isnan(v["state"][0]).all()


def test_linear_attention_with_rates_and_skip() -> None:
    v = operands(0, 2, 1, 4, 3, wide=False)
    rates = np.array([-0.3, -1.2], np.float32)
    v["decay"] = np.broadcast_to(rates, (TOKENS, 2)).copy()
    want = expected(v, 2, False, 1.0)
    skip = np.array([0.5, -2.0], np.float32)
    got = op_of(2, decay=None, rates="rates", skip="skip").reference({**v, "rates": rates, "skip": skip}, batch())[
        "out"
    ]
    close(got, want + (torched(skip)[:, None] * torched(v["v"]).reshape(TOKENS, 2, 3)).reshape(TOKENS, 6), 1e-5)


def test_linear_attention_is_that_of_qwen3_next() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    v = operands(3, 2, 2, 8, 6, wide=False)
    got = op_of(4, delta=True, scale=8**-0.5).reference(v, batch())["out"]
    q, k = (torch.from_numpy(v[n]).reshape(1, TOKENS, 2, 8) for n in "qk")
    x = torch.from_numpy(v["v"]).reshape(1, TOKENS, 4, 6)
    decay, beta = (torch.from_numpy(v[n])[None] for n in ("decay", "beta"))
    theirs, _ = modeling.torch_recurrent_gated_delta_rule(q, k, x, g=decay, beta=beta)
    close(got, theirs.reshape(TOKENS, -1).numpy(), 1e-5)


def test_linear_attention_refuses() -> None:
    good = {
        "q": "f32[T, 8]", "k": "f32[T, 8]", "v": "f32[T, 12]", "decay": "f32[T, 4]", "beta": "f32[T, 4]",
        "state": "f32[N, 4, 4, 3]",
    }  # fmt: skip
    op = op_of(4)
    op.shapes(tensors(**good))
    for change, says in (
        ({"state": "f32[N, 3, 4, 3]"}, r"state is f32\[N, 3, 4, 3\]; wanted f32\[N, 4, K, V\]"),
        ({"state": "bf16[N, 4, 4, 3]"}, r"state is bf16.*wanted f32\[N, 4, 4, 3\]"),
        ({"k": "f32[T, 12]", "q": "f32[T, 12]"}, "wanted groups of 4 columns that divide 4 heads"),
        ({"q": "f32[T, 4]"}, "must have one shape"),
        ({"v": "f32[T, 11]"}, "wanted 4 heads of 3"),
        ({"decay": "f32[T, 5]"}, "wanted 4 or 16 columns"),
        ({"beta": "f32[T, 8]"}, "wanted 4 columns"),
    ):
        refuses(op, says, **{**good, **change})
    refuses(op_of(4, decay=None), "decay=None, rates=None; give one of them", **good)


def test_linear_attention_work() -> None:
    table = tensors(
        q="f32[T, 8]", k="f32[T, 8]", v="f32[T, 12]", decay="f32[T, 4]", beta="f32[T, 4]", state="f32[N, 4, 4, 3]",
        out="f32[T, 12]",
    )  # fmt: skip
    moved, state = 5 * (8 + 8 + 12 + 4 + 4 + 12) * 4, 2 * 2 * 4 * 4 * 3 * 4
    assert op_of(4).work(table, BATCH) == Work(5 * 4 * 4 * 3 * 5, 0, state, moved)
    assert op_of(4, delta=True).work(table, BATCH) == Work(5 * 4 * 4 * 3 * 7, 0, state, moved)
