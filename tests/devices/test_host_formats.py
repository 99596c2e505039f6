"""Checkpoint-only formats (read, never quantised to) on the host: every instruction set against the reference.

Also: weights are kept with the checkpoint's codes and size, and results are batch-invariant. Sizes are random and odd.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.coded import random_codes
from support.host_bench import EPS, ISAS, PAGE, Bench, finish, hold
from support.tiny import tiny

from intaglio import _native, formats
from intaglio.batch import Chunk, bind
from intaglio.compiler import build, build_mesh
from intaglio.devices import ArrayWeights, DeviceError, MeshDevice, StateSpec, StepRequest
from intaglio.devices.host import HostDevice, fill_codes
from intaglio.models import Checkpoint, port
from intaglio.ops import Embed, Experts, Linear, Route, Value, x_format
from intaglio.program import Program
from intaglio.program.source import names

FORMATS = ["int8g32f16", "int8rowf32", "int4g32f16", "int4g128f32", "int4row", "uint4g32", "uint4g128f16"]
FORMATS += ["uint8g32f16", "uint8g128", "uint8row", "uint4rowf16", "nvfp4", "q4_k", "q5_k", "q6_k"]
FORMATS += ["nf4g32", "nf4g64", "fp4g64", "nf4g1024"]
FORMATS += ["affine4g32f16", "affine4g64", "affine4g128f32", "affine4rowf32", "affine8g64f16", "affine8row"]
Rng = np.random.Generator


def width(rng: Rng, format: str, most: int = 300) -> int:
    """A random number of columns that the format supports: any, or whole blocks."""
    whole = formats.get(format).block == formats.BLOCK
    return formats.BLOCK * int(rng.integers(1, 4)) if whole else int(rng.integers(1, most))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("trial", range(3))
def test_linear(format: str, trial: int, rng: Rng) -> None:
    rows, k, n = int(rng.integers(1, 40)), width(rng, format), 2 * int(rng.integers(1, 70))
    bench = Bench(rng, rows, k)
    w = random_codes(rng, format, n, k)
    glu = bool(rng.integers(2))
    fields: dict[str, Any] = {"x_format": x_format(format), "glu": glu, "activation": "silu" if glu else ""}
    if rng.integers(2):
        fields["bias"] = bench.weight("bias", rng.normal(size=n))
    y = bench.b.op(Linear, "y", bench.x, bench.weight("w", w), **fields)
    x, codes = np.abs(bench.arrays["x.table"]), np.asarray(w.levels)[w.codes] if w.levels else w.codes * 1.0
    dense = np.abs(codes - (0 if w.zeros is None else w.spread(w.zeros)))
    # Sums of integers are exact within a group, then scaled, and a minimum taken off: roundings of parts of this size.
    parts = x @ (dense * np.abs(w.spread(w.scales)) + (0 if w.minima is None else np.abs(w.spread(w.minima)))).T
    size, roundings = 1 + parts.max(), 16 + (k if w.levels else k / w.group)
    hold(bench.run(y), 4 * np.sqrt(roundings) * EPS * size * (2 * size if glu else 2))


@pytest.mark.parametrize("format", FORMATS)
def test_experts(format: str, rng: Rng) -> None:
    rows, k, inner = int(rng.choice([1, 2, 9, 70])), width(rng, format, 200), width(rng, format, 90)
    count, top = int(rng.choice([3, 8])), int(rng.integers(1, 4))
    bench = Bench(rng, rows, k)
    weights = bench.b.op(Route, "route", bench.matrix("scores", rows, count), ids="ids", top=top, normalise=True)
    shapes = {"gate": (inner, k), "up": (inner, k), "down": (k, inner)}
    gate, *rest = [bench.weight(n, random_codes(rng, format, count, *s)) for n, s in shapes.items()]
    how = {"x_format": x_format(format), "activation": "silu"}
    y = bench.b.op(Experts, "y", bench.x, weights, "ids", *rest, gate=gate, **how)
    results = bench.run(y)
    # Where the inner row is rounded, a value at the edge may round the other way: one step of int8 in one term.
    hold(results, np.abs(results["reference"]).max() * (60 * EPS * (k + inner) ** 0.5 + 4 * 2.0**-7 / inner**0.5))


@pytest.mark.parametrize("format", FORMATS)
def test_embedding_rows_equal_the_checkpoints_values(format: str, rng: Rng) -> None:
    n, k = int(rng.integers(1, 50)), width(rng, format)
    bench = Bench(rng, n, k)
    table = random_codes(rng, format, n, k)
    results = bench.run(bench.b.op(Embed, "y", "tokens", bench.weight("table", table)))
    np.testing.assert_array_equal(results["reference"], table.rows(slice(None)))
    hold(results, 0.0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("glu", [False, True])
def test_codes_are_packed_unchanged(format: str, glu: bool, rng: Rng) -> None:
    """Codes unpack to their values, packed at once or in parts, and take no more memory than in the checkpoint."""
    fmt, n, k = formats.get(format), 2 * int(rng.integers(1, 70)), width(rng, format)
    q = random_codes(rng, format, n, k)
    weight = _native.Weight(fmt.family, n, k, fmt.group_of(k), glu)
    cut = int(rng.integers(0, n))
    for first, last in ((0, cut), (cut, n)):
        fill_codes(weight, q.each(lambda x, first=first, last=last: x[first:last]), first, 2)
    got = np.empty((n, k), np.float32)
    for i in range(n):
        weight.unpack(i, got[i])
    np.testing.assert_array_equal(got, q.rows(slice(None)))
    half, groups = (n // 2, 2) if glu else (n, 1)
    padded = -(-k // fmt.group_of(k)) * fmt.group_of(k)
    assert weight.nbytes == fmt.nbytes(-(-half // 32) * 32 * groups, padded)  # panels of 32 rows, whole groups


def test_values_are_not_quantised_to_checkpoint_only_formats(rng: Rng) -> None:
    bench = Bench(rng, 3, 256)
    table = bench.weight("w", rng.normal(size=(8, 256)))
    bench.b.tensors[table] = replace(bench.b.tensors[table], format="q6_k")
    bench.b.op(Linear, "y", bench.x, table, x_format="int8")
    with pytest.raises(DeviceError, match=r"weight w is q6_k\[8, 256\].* but w is plain values"):
        HostDevice(1).load(finish(bench), ArrayWeights(bench.arrays), StateSpec(4, PAGE))
    packed = _native.Weight("uint4f16", 8, 64, 32, False)
    with pytest.raises(ValueError, match="values are not quantised to this format"):
        packed.fill(np.zeros(8 * 64, np.float32).view(np.uint8), "f32", 0, 8, 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "format",
    ["int8g32f16", "uint4g128", "uint8g1024", "affine4g64f16", "affine8g64", "nf4g64", "nvfp4", "q4_k", "q5_k", "q6_k"],
)
def test_many_rows_and_large_k(format: str, isa: str, rng: Rng) -> None:
    """More rows than a tile and K over several blocks: each row has the same bits as when computed alone."""
    bench = Bench(rng, 530, 2304)
    w = bench.weight("w", random_codes(rng, format, 70, 2304))
    y = bench.b.op(Linear, "y", bench.x, w, x_format=x_format(format))
    few = bind([Chunk([7], 0, [0], [0]), Chunk([529], 0, [1], [0]), Chunk([3], 0, [2], [0])], PAGE)
    ex = HostDevice(2, isa).load(finish(bench), ArrayWeights(bench.arrays), StateSpec(64, PAGE))
    all_rows = ex.step(StepRequest(bind([Chunk(range(530), 0, range(34), [0])], PAGE), taps=[y])).taps[y]
    np.testing.assert_array_equal(ex.step(StepRequest(few, taps=[y])).taps[y], all_rows[[7, 529, 3]])


def stored(c: Checkpoint, p: Program, rng: Rng) -> dict[str, Value]:
    """Tensors of a checkpoint, with random codes for weights in checkpoint-only formats."""
    arrays: dict[str, Value] = {}
    for t in p.of_role("weight"):
        for name in (name for source in t.source for name in names(source)):
            only_read = formats.get(t.format).grouped and formats.get(t.format).published
            arrays[name] = random_codes(rng, t.format, *c.shape(name)) if only_read else c.read(name)
    return arrays


@pytest.mark.parametrize("format", ["q4_k", "q5_k", "q6_k", "uint8g256"])
@pytest.mark.parametrize(("family", "sizes"), [
    ("llama", {"intermediate_size": 768}), ("qwen3moe", {"moe_intermediate_size": 768, "decoder_sparse_step": 1}),
])  # fmt: skip
def test_lanes_get_whole_blocks(tmp_path: Path, family: str, sizes: dict[str, int], format: str, rng: Rng) -> None:
    """Three blocks of inner columns for two lanes: the first lane gets two of them; no block is split."""
    more = {"hidden_size": 512, "num_hidden_layers": 1, "head_dim": 128}
    c = Checkpoint.open(tiny(family, tmp_path / "model", **more, **sizes))
    whole, ranks = build(port(c), format), build_mesh(port(c), "tp2", format)
    down = "layers.0.mlp.down_proj.weight" if family == "llama" else "layers.0.mlp.experts.down"
    assert [int(p.tensors[down].shape[-1]) for p in ranks.programs] == [512, 256]
    arrays = stored(c, whole, rng)
    batch = bind([Chunk(range(40), 0, range(3), range(40))], PAGE)
    want = (
        HostDevice(1)
        .load(whole, ArrayWeights(arrays), StateSpec(12, PAGE))
        .step(StepRequest(batch, logits=True))
        .logits
    )
    got = (
        MeshDevice(HostDevice(1))
        .load(ranks, ArrayWeights(arrays), StateSpec(12, PAGE))
        .step(StepRequest(batch, logits=True))
        .logits
    )
    gaps = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    # Sums in another order, by 2^-23 or so; few tokens have a value that they round to another int8, or expert. Other
    # codes in place of down's make the median 2e-3 or more.
    assert np.median(gaps) < 1e-4


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2, "intermediate_size": 256},
    "qwen3moe": {"num_hidden_layers": 2, "moe_intermediate_size": 256, "decoder_sparse_step": 1, "head_dim": 64},
}
PUBLISHED = [*FORMATS, "fp8g128", "fp8row", "mxfp4"]
MIXES = 10  # of each of 2 models in 10 formats or more: 200 or more


@pytest.mark.parametrize("format", PUBLISHED)
@pytest.mark.parametrize("family", MODELS)
def test_logits_are_batch_invariant(tmp_path: Path, family: str, format: str, rng: Rng) -> None:
    """Sequences alone, together, and in random chunks beside random other sequences, on 1 or 2 threads."""
    c = Checkpoint.open(tiny(family, tmp_path / "model", hidden_size=256, **MODELS[family]))
    p = build(port(c), format)
    arrays = stored(c, p, rng)
    assert any(op.kind == "experts" for op in p.ops) == (family == "qwen3moe")
    assert format in {t.format for t in p.of_role("weight")}
    loaded = [HostDevice(n).load(p, ArrayWeights(arrays), StateSpec(12, PAGE)) for n in (1, 2)]
    texts = [rng.integers(0, 263, int(rng.integers(1, 2 * PAGE))).tolist() for _ in range(6)]

    def run(ex: Any, parts: dict[int, range]) -> np.ndarray:
        chunks = [
            Chunk(texts[s][r.start : r.stop], r.start, [2 * s, 2 * s + 1], range(len(r))) for s, r in parts.items()
        ]
        logits: np.ndarray = ex.step(StepRequest(bind(chunks, PAGE), logits=True)).logits
        return logits

    alone = [run(loaded[0], {s: range(len(text))}) for s, text in enumerate(texts)]
    assert all(np.isfinite(x).all() for x in alone)
    for mix in range(MIXES):
        left = {s: 0 for s in rng.permutation(6)[: rng.integers(2, 7)].tolist()}
        while left:
            picked = rng.permutation(list(left))[: rng.integers(1, len(left) + 1)].tolist()
            parts = {s: range(left[s], int(rng.integers(left[s], len(texts[s]))) + 1) for s in picked}
            got = run(loaded[mix % 2], parts)
            for s, r in parts.items():
                np.testing.assert_array_equal(got[: len(r)], alone[s][r.start : r.stop])
                got, left[s] = got[len(r) :], r.stop
            left = {s: at for s, at in left.items() if at < len(texts[s])}
