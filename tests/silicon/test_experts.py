"""Chip kernels of route and experts compared with the ops' reference(), on random shapes, formats and chips."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.silicon import CHIPS, batch_of, compare, normal, run_kernel, some_batch

from intaglio import formats
from intaglio.formats import Quantised
from intaglio.ops import Experts, Route, Tensor, Value
from intaglio.silicon.memory import MachineError

CHIP = st.sampled_from(sorted(CHIPS))
SEED = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=15, deadline=None)
EPS = float(np.finfo(np.float32).eps)


@FEW
@given(chip=CHIP, seed=SEED, tied=st.booleans(), grouped=st.booleans(), biased=st.booleans(), normalise=st.booleans(),
       score=st.sampled_from(["softmax", "sigmoid", "sqrt_softplus", "chosen", "sparsemixer"]))  # fmt: skip
def test_route(chip: str, seed: int, tied: bool, grouped: bool, biased: bool, normalise: bool, score: str) -> None:
    """Ids are equal, also with ties; weights agree within the roundings of a sum over the chosen and one division."""
    rng = np.random.default_rng(seed)
    factored = seed % 3 == 0
    batch = some_batch(rng)
    plain = score in ("chosen", "sparsemixer")
    groups, each = (int(rng.integers(2, 5)), int(rng.integers(2, 7))) if grouped and not plain else (0, 20)
    experts = max(1, groups) * each
    kept = int(rng.integers(1, groups + 1)) if groups else 0
    top = int(rng.integers(1, 1 + (kept * each if groups else experts) // 2))
    op = Route(
        site="r", logits="x", bias="b" if biased and not plain else None, weights="w", ids="i", top=top, score=score,
        groups=groups, kept_groups=kept, group_best=int(rng.integers(1, each + 1)) if groups else 1,
        normalise=normalise, scale=2.5, jitter=0.2, factors="f" if factored else None,
    )  # fmt: skip
    shape = (len(batch.tokens), experts)
    x = (2 * rng.integers(-2, 3, shape) + 1).astype(np.float32) if tied else normal(rng, *shape)
    bias = rng.integers(0, 2, experts).astype(np.float32) if tied else normal(rng, experts)
    tensors = [Tensor("x", ("T", experts), "f32", "temp"), *(Tensor(n, (experts,), "f32", "weight") for n in "bf")]
    compare(chip, op, tensors, {"x": x, "b": bias, "f": normal(rng, experts)}, batch, (top + 5) * EPS)


@FEW
@given(
    chip=CHIP, seed=SEED, normalise=st.booleans(), factored=st.booleans(),
    score=st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"]),
)  # fmt: skip
def test_route_by_a_table(chip: str, seed: int, normalise: bool, factored: bool, score: str) -> None:
    """The table lists each token's experts, some of them twice. `some_batch` has token ids below 50."""
    rng = np.random.default_rng(seed)
    batch, experts = some_batch(rng), int(rng.integers(2, 20))
    top = int(rng.integers(1, experts + 1))
    op = Route(
        site="r", logits="x", weights="w", ids="i", table="t", top=top, score=score, normalise=normalise, scale=2.5,
        factors="f" if factored else None,
    )  # fmt: skip
    tensors = [Tensor("x", ("T", experts), "f32", "temp"), Tensor("t", (50, top), "i32", "weight"),
               Tensor("f", (experts,), "f32", "weight")]  # fmt: skip
    table = rng.integers(0, experts, (50, top)).astype(np.int32)
    values: dict[str, Value] = {"x": normal(rng, len(batch.tokens), experts), "t": table, "f": normal(rng, experts)}
    compare(chip, op, tensors, values, batch, (top + 5) * EPS)


def stack(rng: np.random.Generator, fmt: str, *shape: int) -> Value:
    """Random matrices in a weight format, scaled so that products have unit variance."""
    values = normal(rng, shape[0] * shape[1], shape[2]) / np.float32(np.sqrt(shape[2]))
    info = formats.get(fmt)
    if info.grouped:
        return formats.quantise(values, fmt).stacked(shape)
    return values.reshape(shape).astype(info.dtype)


def largest(w: Value) -> float:
    """The largest absolute value in a weight."""
    if isinstance(w, Quantised):
        return float((np.abs(w.codes.astype(np.float32)).max(axis=-1) * np.abs(w.scales).max(axis=-1)).max())
    return float(np.abs(w.astype(np.float32)).max())


@FEW
@given(chip=CHIP, seed=SEED, fmt=st.sampled_from(["f32", "bf16", "f16", "int8g32", "int4g32", "int8g256", "int8row",
                                                  "mxfp4", "fp8g32", "fp8row"]),
       clamped=st.booleans(), extras=st.booleans(), scale_input=st.booleans())  # fmt: skip
def test_experts(chip: str, seed: int, fmt: str, clamped: bool, extras: bool, scale_input: bool) -> None:
    rng = np.random.default_rng(seed)
    batch = some_batch(rng)
    rows, experts = len(batch.tokens), int(rng.integers(1, 7))
    k, inner, n = (int(rng.integers(1, 5)) * 32 + int(rng.integers(0, 2)) * 6 for _ in range(3))
    top = int(rng.integers(1, min(experts, 4) + 1))
    info = formats.get(fmt)
    x_format = "int8" if info.integer else ("bf16", "f32", "fp8row" if info.grouped else "f32")[seed % 3]
    how: dict[str, Any] = {"alpha": 1.702, "limit": 0.7, "shift": 1.0} if clamped else {}
    how |= {"gate_bias": "gb", "up_bias": "ub", "down_bias": "db", "residual": "r"} if extras else {}
    ungated = not clamped and seed % 3 == 0
    if ungated:
        how |= {"gate": None, "activation": "relu2", "gate_bias": None}
    others = int(rng.integers(0, 3))  # experts of ranks before and after this one
    how |= {"first": others, "of": experts + 2 * others} if others else {}
    how = {"gate": "g", "activation": "silu" if clamped or extras else "gelu"} | how
    op = Experts(
        site="e", x="x", weights="w", ids="i", up="u", down="d", out="y", x_format=x_format, scale_input=scale_input,
        **how,
    )  # fmt: skip
    shapes = {"g": (experts, inner, k), "u": (experts, inner, k), "d": (experts, n, inner)}
    tensors = [Tensor("x", ("T", k), "f32", "temp"), Tensor("r", ("T", n), "f32", "temp"),
               Tensor("w", ("T", top), "f32", "temp"), Tensor("i", ("T", top), "i32", "temp"),
               *(Tensor(name, shape, fmt, "weight") for name, shape in shapes.items()),
               *(Tensor(f"{name}b", shape[:2], "bf16", "weight") for name, shape in shapes.items())]  # fmt: skip
    ids = np.stack([rng.permutation(experts + 2 * others)[:top] for _ in range(rows)]).astype(np.int32)
    values: dict[str, Value] = {"x": normal(rng, rows, k), "r": normal(rng, rows, n), "i": ids,
                                "w": rng.random((rows, top), np.float32)}  # fmt: skip
    values |= {name: stack(rng, fmt, *shape) for name, shape in shapes.items()}
    values |= {f"{name}b": normal(rng, *shape[:2]).astype(formats.get("bf16").dtype) for name, shape in shapes.items()}
    # roundings to FP32, a step over K each, of sums of some sqrt(k); the gate multiplies two of them
    tolerance = 8 * (max(k, inner) / 32 + 8) * EPS * np.sqrt(max(k, inner))
    # an inner value rounded before down may tip to the next code on a rounding: two of a row's, each of that distance
    step = {"int8": 1 / 127, "fp8row": 32 / 448, "bf16": 2**-8, "f32": 0}[x_format]
    peak = 0.7 * 1.7 if clamped else 25.0 if ungated else 12.0 if extras else 6.0
    compare(chip, op, tensors, values, batch, tolerance, 2 * step * peak * largest(values["d"]))


@FEW
@given(chip=CHIP, seed=SEED, fmt=st.sampled_from(["int8g128", "int4g128", "int8row"]))
def test_integer_values_are_exact(chip: str, seed: int, fmt: str) -> None:
    """INT8 experts equal the reference bit for bit if values are integers and scales powers of two."""
    rng = np.random.default_rng(seed)
    batch, experts, k, inner, n = some_batch(rng), 4, 128, 96, 24
    rows = len(batch.tokens)
    op = Experts(site="e", x="x", weights="w", ids="i", gate="g", up="u", down="d", out="y", x_format="int8",
                 activation="relu")  # fmt: skip
    x = rng.integers(-1, 2, (rows, k)).astype(np.float32)
    x[:, 5] = 127
    shapes = {"g": (experts, inner, k), "u": (experts, inner, k), "d": (experts, n, inner)}
    table = {m: Tensor(m, s, fmt, "weight") for m, s in shapes.items()}
    table |= {m: Tensor(m, ("T", cols), "f32", "temp") for m, cols in (("x", k), ("w", 2), ("y", n))}
    table["i"] = Tensor("i", ("T", 2), "i32", "temp")
    ids = np.stack([rng.permutation(experts)[:2] for _ in range(rows)]).astype(np.int32)
    values: dict[str, Value] = {"x": x, "w": rng.random((rows, 2), np.float32), "i": ids}
    for name, shape in shapes.items():
        scales = np.exp2(rng.integers(-3, 3, (*shape[:2], 1))).astype(np.float32)
        values[name] = Quantised(rng.integers(-1, 2, shape).astype(np.int8), scales, 128 if name != "d" else 96)
    got, _ = run_kernel(CHIPS[chip], op, table, values, batch)
    np.testing.assert_array_equal(got["y"], op.reference(values, batch)["y"])


def test_an_expert_id_out_of_range_is_refused() -> None:
    rng = np.random.default_rng()
    batch = batch_of(rng, [(2, 0)])
    op = Experts(site="mlp", x="x", weights="w", ids="i", gate="g", up="u", down="d", out="y")
    shapes = {"g": (3, 8, 16), "u": (3, 8, 16), "d": (3, 16, 8)}
    table = {m: Tensor(m, s, "f32", "weight") for m, s in shapes.items()}
    table |= {m: Tensor(m, ("T", 16), "f32", "temp") for m in "xy"}
    table |= {"w": Tensor("w", ("T", 1), "f32", "temp"), "i": Tensor("i", ("T", 1), "i32", "temp")}
    values: dict[str, Value] = {m: normal(rng, *s) for m, s in shapes.items()}
    values |= {"x": normal(rng, 2, 16), "w": normal(rng, 2, 1), "i": np.array([[1], [3]], np.int32)}
    with pytest.raises(MachineError, match="site mlp, engine VEC, instruction Group: a row is routed to expert 3"):
        run_kernel(CHIPS["small"], op, table, values, batch)
