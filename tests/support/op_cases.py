"""Helpers of the op tests: random operands, tensor tables, and applying one op after its shape rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st

from intaglio import formats
from intaglio.batch import Batch, Chunk, bind
from intaglio.formats import Quantised
from intaglio.ops import (
    Attend,
    KvWrite,
    Op,
    OpError,
    Rope,
    Tensor,
)  # fmt: skip
from intaglio.ops.op import Shape, Value

quick = settings(max_examples=30, deadline=None, derandomize=True)
sides = st.integers(1, 40)
seeds = st.integers(0, 2**31)
BATCH = bind([Chunk([5, 6, 7], 0, [1], rows=[2]), Chunk([8, 9], 4, [0, 2], rows=[0, 1])], 4)  # T 5, S 2, R 3


TORCH = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp,
    "softplus": F.softplus,
}  # fmt: skip


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def torched(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).double()


def tensors(**types: str) -> dict[str, Tensor]:
    """Declarations such as x="f32[T, 8]"."""
    table = {}
    for name, text in types.items():
        format, _, dims = text.rstrip("]").partition("[")
        shape = tuple(int(d) if d.isdigit() else d for d in dims.split(", "))
        role = "weight" if name in ("w", "bias", "weight") else "state" if name.endswith(("cache", "state")) else "temp"
        table[name] = Tensor(name, shape, format, role)
    return table


def apply(op: Op, batch: Batch = BATCH, **values: Value) -> np.ndarray:
    """The op's first result, after its shape rule has accepted the operands and predicted the results' types."""
    kinds = {np.dtype(np.float32): "f32", np.dtype(np.int32): "i32", formats.BF16: "bf16"}
    table, tokens = {}, 0
    for name, v in values.items():
        if isinstance(v, Quantised):
            table[name] = Tensor(name, v.codes.shape, f"int8g{v.group}", "weight")
        else:
            shape: Shape = ("P", "B", *v.shape[2:]) if v.ndim == 4 else v.shape
            if isinstance(op, Rope | KvWrite | Attend) and (v.ndim == 2 or v.dtype == np.int32):
                shape, tokens = ("T", *v.shape[1:]), len(v)
            table[name] = Tensor(name, shape, kinds[v.dtype], "state" if v.ndim == 4 else "temp")
    said = op.shapes(table)
    results = op.reference(values, batch)
    assert list(results) == list(said) == list(op.outputs)
    for name, (shape, format) in said.items():
        bound = tuple(tokens if d == "T" else d for d in shape)
        assert results[name].shape == bound and results[name].dtype == formats.get(format).dtype
    return next(iter(results.values()), np.empty(0))


def close(got: np.ndarray, want: torch.Tensor | np.ndarray, rel: float = 1e-6) -> None:
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=rel, atol=rel * max(1.0, float(np.abs(want).max())))


def refuses(op: Op, says: str, **types: str) -> None:
    with pytest.raises(OpError, match=rf"^s \({op.kind}\): .*{says}"):
        op.shapes(tensors(**types))
