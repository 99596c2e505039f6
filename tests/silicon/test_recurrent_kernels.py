"""Chip kernels of the ops with recurrent state against their ops' reference(): results, and slots of the state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.silicon import CHIPS, compare, normal, run_kernel, some_batch
from support.tiny import tiny
from support.toy import CONTEXT, PAGE

from intaglio import formats
from intaglio.batch import Batch, Chunk, bind
from intaglio.compiler import build
from intaglio.devices import StateSpec, StepRequest, open_device
from intaglio.devices.silicon import SiliconDevice
from intaglio.models import Checkpoint, port
from intaglio.ops import Decay, LinearAttention, RgLru, SelectiveScan, ShortConv, Tensor, Value

CHIP = st.sampled_from(sorted(CHIPS))
SEED = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=12, deadline=None)
EPS = float(np.finfo(np.float32).eps)
SLOTS = 8


def stateful_batch(rng: np.random.Generator, longest: int = 40) -> Batch:
    """A batch of up to four sequences, some at their start, with slots of recurrent state in random order."""
    slots, chunks = rng.permutation(SLOTS).tolist(), list[Chunk]()
    for _ in range(rng.integers(1, 5)):
        n, start = int(rng.integers(1, longest + 1)), int(rng.integers(0, 3))
        before = slots.pop() if start else -1
        blocks = range(32 * len(chunks), 32 * len(chunks) + 32)
        chunks.append(Chunk([0] * n, start, blocks, rows=(n - 1,), state=(before, slots.pop())))
    return bind(chunks, 4)


def compare_with_state(
    chip: str, op: Any, tensors: list[Tensor], values: dict[str, Value], batch: Batch, tolerance: float
) -> None:
    """Assert that results and every slot of the state agree within `tolerance` times the largest value."""
    table = {t.name: t for t in tensors}
    table |= {n: Tensor(n, shape, fmt, "temp") for n, (shape, fmt) in op.shapes(table).items()}
    held = np.array(values[op.state])
    got, memory = run_kernel(CHIPS[chip], op, table, values, batch)
    want = op.reference({**values, op.state: held}, batch)
    for found, expected in ((got[op.out], want[op.out]), (memory.read(op.state).reshape(held.shape), held)):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@FEW
@given(
    chip=CHIP, seed=SEED, low=st.sampled_from([0.0, 0.5]), high=st.sampled_from([0.0, 1.25]), bias=st.booleans(),
    floor=st.sampled_from([0.0, -5.0]), fmt=st.sampled_from(["f32", "bf16"]),
)  # fmt: skip
def test_decay(chip: str, seed: int, low: float, high: float, bias: bool, floor: float, fmt: str) -> None:
    """Rows of one head, of several, and with a rate for each column; the last wider than a job's columns."""
    rng = np.random.default_rng(seed)
    batch, heads, per = some_batch(rng), *((int(rng.integers(1, 9)), int(rng.integers(1, 20))), (2050, 1))[seed % 2]
    width = heads * per
    op = Decay(
        site="d", x="x", rate="r", bias="b" if bias else None, step="s", decay="d", low=low, high=high, floor=floor
    )  # fmt: skip
    dtype = formats.get(fmt).dtype
    tensors = [Tensor("x", ("T", width), "f32", "temp"), Tensor("r", (heads,), fmt, "weight"),
               Tensor("b", (width,), fmt, "weight")]  # fmt: skip
    values: dict[str, Value] = {
        "x": normal(rng, len(batch.tokens), width), "r": normal(rng, heads).astype(dtype),
        "b": normal(rng, width).astype(dtype),
    }  # fmt: skip
    compare(chip, op, tensors, values, batch, 16 * EPS)


@FEW
@given(chip=CHIP, seed=SEED, taps=st.integers(2, 20), bias=st.booleans(), fmt=st.sampled_from(["f32", "bf16"]))
def test_short_conv(chip: str, seed: int, taps: int, bias: bool, fmt: str) -> None:
    """Filters shorter and longer than a block of rows, and than the chunk."""
    rng = np.random.default_rng(seed)
    batch, width, dtype = stateful_batch(rng), int(rng.integers(1, 90)), formats.get(fmt).dtype
    op = ShortConv(site="c", x="x", w="w", state="s", bias="b" if bias else None, out="y")
    tensors = [
        Tensor("x", ("T", width), "f32", "temp"), Tensor("w", (width, taps), fmt, "weight"),
        Tensor("b", (width,), fmt, "weight"), Tensor("s", ("N", taps - 1, width), "f32", "state"),
    ]  # fmt: skip
    values: dict[str, Value] = {
        "x": normal(rng, len(batch.tokens), width), "w": normal(rng, width, taps).astype(dtype),
        "b": normal(rng, width).astype(dtype), "s": normal(rng, SLOTS, taps - 1, width),
    }  # fmt: skip
    compare_with_state(chip, op, tensors, values, batch, 2 * taps * EPS)


@FEW
@given(chip=CHIP, seed=SEED, fmt=st.sampled_from(["f32", "bf16"]))
def test_rg_lru(chip: str, seed: int, fmt: str) -> None:
    """The error of a row's log decay is that of some roundings; the state forgets it as fast as it grows."""
    rng = np.random.default_rng(seed)
    batch, width, dtype = stateful_batch(rng), int(rng.integers(1, 90)), formats.get(fmt).dtype
    names = {"x": "x", "input_gate": "i", "decay_gate": "g", "rate": "r", "input_bias": "ib", "decay_bias": "gb"}
    op = RgLru(site="l", **names, state="s", out="y")
    tensors = [Tensor(name, ("T", width), "f32", "temp") for name in ("x", "i", "g")]
    tensors += [Tensor(name, (width,), fmt, "weight") for name in ("r", "ib", "gb")]
    tensors.append(Tensor("s", ("N", width), "f32", "state"))
    values: dict[str, Value] = {name: normal(rng, len(batch.tokens), width) for name in ("x", "i", "g")}
    values |= {name: normal(rng, width).astype(dtype) for name in ("r", "ib", "gb")}
    compare_with_state(chip, op, tensors, {**values, "s": normal(rng, SLOTS, width)}, batch, 64 * EPS)


@FEW
@given(chip=CHIP, seed=SEED, n=st.integers(1, 20), fmt=st.sampled_from(["f32", "bf16"]))
def test_selective_scan(chip: str, seed: int, n: int, fmt: str) -> None:
    """Values of the stream against the reference. Each token rounds the state a few times, which decays with it."""
    rng = np.random.default_rng(seed)
    batch, width, dtype = stateful_batch(rng), int(rng.integers(1, 90)), formats.get(fmt).dtype
    op = SelectiveScan(site="s", x="x", step="d", b="b", c="c", rate="r", skip="k", state="s", out="y")
    columns = {"x": width, "d": width, "b": n, "c": n}
    tensors = [Tensor(name, ("T", count), "f32", "temp") for name, count in columns.items()]
    tensors += [Tensor("r", (width, n), fmt, "weight"), Tensor("k", (width,), fmt, "weight"),
                Tensor("s", ("N", width, n), "f32", "state")]  # fmt: skip
    values: dict[str, Value] = {name: normal(rng, len(batch.tokens), count) for name, count in columns.items()}
    values |= {"r": normal(rng, width, n).astype(dtype), "k": normal(rng, width).astype(dtype)}
    compare_with_state(chip, op, tensors, {**values, "s": normal(rng, SLOTS, width, n)}, batch, 64 * EPS)


@FEW
@given(
    chip=CHIP, seed=SEED, repeat=st.integers(1, 3), decays=st.sampled_from(["rates", "head", "key"]),
    delta=st.booleans(), beta=st.booleans(), skip=st.booleans(),
)  # fmt: skip
def test_linear_attention(chip: str, seed: int, repeat: int, decays: str, delta: bool, beta: bool, skip: bool) -> None:
    """Keys of length below 1, as the delta rule wants: it then takes from the state no more than is there."""
    rng = np.random.default_rng(seed)
    batch, (groups, keys, wide) = stateful_batch(rng), rng.integers(1, 12, 3).tolist()
    heads, rows = groups * repeat, len(batch.tokens)
    given = {"rates": "r"} if decays == "rates" else {"decay": "a"}
    op = LinearAttention(
        site="l", q="q", k="k", v="v", state="s", out="y", heads=heads, delta=delta, scale=0.5, **given,
        beta="b" if beta else None, skip="d" if skip else None,
    )  # fmt: skip
    columns = {"q": groups * keys, "k": groups * keys, "v": heads * wide, "b": heads}
    columns["a"] = heads * keys if decays == "key" else heads
    tensors = [Tensor(name, ("T", count), "f32", "temp") for name, count in columns.items()]
    tensors += [Tensor("r", (heads,), "f32", "weight"), Tensor("d", (heads,), "f32", "weight"),
                Tensor("s", ("N", heads, keys, wide), "f32", "state")]  # fmt: skip
    values: dict[str, Value] = {name: normal(rng, rows, count) for name, count in columns.items()}
    k = normal(rng, rows, groups, keys)
    values["k"] = (k / (1 + np.linalg.norm(k, axis=-1, keepdims=True))).reshape(rows, -1)
    values |= {"a": -np.abs(normal(rng, rows, columns["a"])), "b": rng.uniform(0, 1, (rows, heads)).astype(np.float32)}
    values |= {"r": -np.abs(normal(rng, heads)), "d": normal(rng, heads), "s": normal(rng, SLOTS, heads, keys, wide)}
    compare_with_state(chip, op, tensors, values, batch, 128 * EPS)


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_a_wide_convolution_is_divided_into_jobs(chip: str, rng: np.random.Generator) -> None:
    """More columns than a job has, and more jobs than cores."""
    width, taps, batch = 2100, 4, stateful_batch(rng, longest=5)
    op = ShortConv(site="c", x="x", w="w", state="s", out="y")
    tensors = [
        Tensor("x", ("T", width), "f32", "temp"), Tensor("w", (width, taps), "f32", "weight"),
        Tensor("s", ("N", taps - 1, width), "f32", "state"),
    ]  # fmt: skip
    values: dict[str, Value] = {
        "x": normal(rng, len(batch.tokens), width), "w": normal(rng, width, taps),
        "s": normal(rng, SLOTS, taps - 1, width),
    }  # fmt: skip
    compare_with_state(chip, op, tensors, values, batch, 2 * taps * EPS)


@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe", "recurrent_gemma", "mamba", "qwen3_next", "kimi_linear"])
def test_models_with_recurrent_state_run_on_chip_instructions(tmp_path: Path, family: str) -> None:
    """A prompt, then its next token beside another prompt; each step writes other slots of state than it reads."""
    checkpoint = Checkpoint.open(tiny(family, tmp_path / family))
    program = build(port(checkpoint, CONTEXT), "auto")
    first = bind([Chunk([5, 7, 11, 2, 9], 0, [3, 1], rows=(0, 4), state=(-1, 2))], PAGE)
    second = bind(
        [Chunk([4], 5, [3, 1], rows=(0,), state=(2, 0)), Chunk([8, 8, 6], 0, [7], rows=(2,), state=(-1, 1))], PAGE
    )
    logits = []
    for device in (SiliconDevice(CHIPS["small"], values="chip"), open_device("reference")):
        executable = device.load(program, checkpoint, StateSpec(32, PAGE, 3))
        logits.append([executable.step(StepRequest(b, logits=True)).logits for b in (first, second)])
    for got, want in zip(*logits, strict=True):
        # FP32 against float64 through four layers, as in test_step.py
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
