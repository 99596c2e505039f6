"""The ops sinkhorn and mix_streams of hyper-connections, against PyTorch and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from support.op_cases import BATCH, close, refuses, tensors

from intaglio.ops import MixStreams, Sinkhorn
from intaglio.ops.op import Work

MIX: dict[str, Any] = {"site": "s", "x": "x", "weights": "m", "out": "y", "streams": 3}


def test_sinkhorn(rng: np.random.Generator) -> None:
    """As transformers' DeepseekV4HyperConnection computes it; rows and columns sum to 1."""
    n, iterations = int(rng.integers(1, 6)), int(rng.integers(1, 25))
    x = rng.normal(size=(4, n * n)).astype(np.float32)
    got = Sinkhorn(site="s", x="x", out="y", iterations=iterations).reference({"x": x}, BATCH)["y"]
    m = torch.tensor(x).double().view(-1, n, n).softmax(-1) + 1e-6
    m = m / (m.sum(-2, keepdim=True) + 1e-6)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + 1e-6)
        m = m / (m.sum(-2, keepdim=True) + 1e-6)
    close(got, m.flatten(1))
    np.testing.assert_allclose(got.reshape(-1, n, n).sum(1), 1, atol=1e-5)


def test_sinkhorn_of_large_logits() -> None:
    """Rows whose logits would overflow e^x are still rows of weights."""
    x = np.array([[800.0, 0.0, 0.0, 800.0]], np.float32)
    got = Sinkhorn(site="s", x="x", out="y").reference({"x": x}, BATCH)["y"]
    np.testing.assert_allclose(got, [[1, 0, 0, 1]], atol=1e-5)


def test_sinkhorn_refuses() -> None:
    op = Sinkhorn(site="s", x="x", out="y")
    assert op.shapes(tensors(x="f32[R, 9]")) == {"y": (("R", 9), "f32")}
    refuses(op, r"x is f32\[T, 8\]; wanted n \* n columns", x="f32[T, 8]")
    refuses(Sinkhorn(site="s", x="x", out="y", iterations=0), "iterations=0; wanted 1 or more", x="f32[T, 9]")
    refuses(Sinkhorn(site="s", x="x", out="y", eps=-1.0), "eps=-1.0; wanted 0 or more", x="f32[T, 9]")


def test_sinkhorn_work() -> None:
    op = Sinkhorn(site="s", x="x", out="y", iterations=3)
    assert op.work(tensors(x="f32[T, 9]", y="f32[T, 9]"), BATCH) == Work((6 + 12) * 45, 0, 0, 4 * 5 * 18)


def test_mix_streams(rng: np.random.Generator) -> None:
    """The mixing matrix is read by its first index: out[k] is the sum over j of weights[j, k] * x[j]."""
    n, m, width = (int(rng.integers(1, 6)) for _ in range(3))
    x, weights, branch, gains = (
        rng.normal(size=(5, k)).astype(np.float32) for k in (n * width, n * m, width, m)
    )  # fmt: skip
    op = MixStreams(**{**MIX, "streams": n}, branch="b", gains="g")
    got = op.reference({"x": x, "m": weights, "b": branch, "g": gains}, BATCH)["y"]
    streams, mixing = torch.tensor(x).double().view(5, n, width), torch.tensor(weights).double().view(5, n, m)
    alone = torch.matmul(mixing.transpose(1, 2), streams)
    added = torch.tensor(gains).double()[:, :, None] * torch.tensor(branch).double()[:, None]
    close(got, (alone + added).flatten(1))
    close(MixStreams(**{**MIX, "streams": n}).reference({"x": x, "m": weights}, BATCH)["y"], alone.flatten(1))


def test_mix_streams_refuses() -> None:
    types = {"x": "f32[T, 12]", "m": "f32[T, 6]", "b": "f32[T, 4]", "g": "f32[T, 2]"}
    assert MixStreams(**MIX, branch="b", gains="g").shapes(tensors(**types)) == {"y": (("T", 8), "f32")}
    refuses(MixStreams(**{**MIX, "streams": 5}), "streams=5; wanted a divisor of the 12 columns", **types)
    refuses(MixStreams(**{**MIX, "streams": 0}), "streams=0; wanted a divisor", **types)
    refuses(MixStreams(**MIX), r"m is f32\[T, 7\]; wanted rows as in x, 3 \* m columns", **{**types, "m": "f32[T, 7]"})
    refuses(MixStreams(**MIX), r"m is f32\[R, 6\]; wanted rows as in x", **{**types, "m": "f32[R, 6]"})
    refuses(MixStreams(**MIX, branch="b"), "give branch and gains, or neither", **types)
    op = MixStreams(**MIX, branch="b", gains="g")
    refuses(op, r"b is f32\[T, 5\]; wanted \[T, 4\]", **{**types, "b": "f32[T, 5]"})
    refuses(op, r"g is f32\[T, 3\]; wanted \[T, 2\]", **{**types, "g": "f32[T, 3]"})


def test_mix_streams_work() -> None:
    types = {"x": "f32[T, 12]", "m": "f32[T, 6]", "b": "f32[T, 4]", "g": "f32[T, 2]", "y": "f32[T, 8]"}
    table = tensors(**types)
    assert MixStreams(**MIX).work(table, BATCH) == Work(2 * 3 * 40, 0, 0, 4 * 5 * (12 + 6 + 8))
    op = MixStreams(**MIX, branch="b", gains="g")
    assert op.work(table, BATCH) == Work(2 * 4 * 40, 0, 0, 4 * 5 * (12 + 6 + 4 + 2 + 8))
