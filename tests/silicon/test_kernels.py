"""Chip kernels against their ops' reference(), on random shapes, formats and chips."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.silicon import CHIPS, batch_of, compare, normal, run_kernel, some_batch

from intaglio import formats
from intaglio.batch import Edits, Sampling
from intaglio.formats import Quantised
from intaglio.ops import (
    REGISTRY,
    Attend,
    AttendPooled,
    ChooseKeys,
    Concat,
    Embed,
    Experts,
    HeadLinear,
    KvWrite,
    Linear,
    Map,
    MixStreams,
    Moment,
    Norm,
    Permute,
    PoolKeys,
    Rope,
    Sample,
    Select,
    Send,
    Sinkhorn,
    Sinusoid,
    Tensor,
    Value,
)
from intaglio.silicon.kernels import CHIP_KERNELS, kernel_class, unsupported_reason
from intaglio.silicon.memory import MachineError

CHIP = st.sampled_from(sorted(CHIPS))
SEED = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=12, deadline=None)
EPS = float(np.finfo(np.float32).eps)


@FEW
@given(chip=CHIP, seed=SEED, fmt=st.sampled_from(["f32", "bf16", "f16", "int8g32", "int4g32", "int8g256", "int8row",
                                                                 "mxfp4", "fp8g32", "fp8row"]),
       glu=st.booleans(), extras=st.booleans())  # fmt: skip
def test_linear(chip: str, seed: int, fmt: str, glu: bool, extras: bool) -> None:
    rng = np.random.default_rng(seed)
    batch = some_batch(rng)
    rows, k, n = len(batch.tokens), int(rng.integers(1, 5)) * 32 + int(rng.integers(0, 2)) * 6, int(rng.integers(2, 40))
    n *= 2 if glu else 1
    info = formats.get(fmt)
    w: Value = formats.quantise(normal(rng, n, k), fmt) if info.grouped else normal(rng, n, k).astype(info.dtype)
    x_format = "int8" if info.integer else ("bf16", "f32", "fp8row" if info.grouped else "f32")[seed % 3]
    out = n // 2 if glu else n
    op = Linear(
        site="l", x="x", w="w", out="y", x_format=x_format, glu=glu, activation="silu" if glu else "gelu_tanh",
        bias="b" if extras else None, residual="r" if extras else None, scale=0.5 if extras else 1.0,
    )  # fmt: skip
    tensors = [Tensor("x", ("T", k), "f32", "temp"), Tensor("w", (n, k), fmt, "weight"),
               Tensor("b", (n,), "f32", "weight"), Tensor("r", ("T", out), "f32", "temp")]  # fmt: skip
    values: dict[str, Value] = {"x": normal(rng, rows, k), "w": w, "b": normal(rng, n), "r": normal(rng, rows, out)}
    # one rounding to FP32 for each step over K and each that follows; the GLU multiplies two such errors
    steps = k / 32 + 8
    compare(chip, op, tensors, values, batch, 4 * steps * EPS * max(1, np.sqrt(k)))


@FEW
@given(
    chip=CHIP,
    seed=SEED,
    kind=st.sampled_from(["rms", "layer", "l2", "none"]),
    grouped=st.booleans(),
    extras=st.booleans(),
)
def test_norm(chip: str, seed: int, kind: str, grouped: bool, extras: bool) -> None:
    rng = np.random.default_rng(seed)
    batch = some_batch(rng)
    group = int(rng.integers(2, 20))
    width = group * int(rng.integers(1, 5))
    span = group if grouped else width
    op = Norm(site="n", x="x", out="y", weight="w", bias="b" if extras else None, residual="r" if extras else None,
              norm=kind, group=group if grouped else 0, offset=float(extras))  # fmt: skip
    tensors = [Tensor("x", ("T", width), "f32", "temp"), Tensor("r", ("T", width), "f32", "temp"),
               Tensor("w", (span,), "f32", "weight"), Tensor("b", (span,), "f32", "weight")]  # fmt: skip
    rows = len(batch.tokens)
    values: dict[str, Value] = {"x": normal(rng, rows, width), "r": normal(rng, rows, width),
                                "w": normal(rng, span), "b": normal(rng, span)}  # fmt: skip
    compare(chip, op, tensors, values, batch, 8 * EPS)


@FEW
@given(chip=CHIP, seed=SEED, style=st.sampled_from(["half", "interleaved"]), trailing=st.booleans())
def test_rope(chip: str, seed: int, style: str, trailing: bool) -> None:
    rng = np.random.default_rng(seed)
    batch = some_batch(rng)
    head_dim, heads = int(rng.integers(2, 12)) * 2, int(rng.integers(1, 4))
    pairs = int(rng.integers(1, head_dim // 2 + 1))
    op = Rope(site="r", x="x", positions="p", frequencies="f", out="y", head_dim=head_dim, style=style, factor=1.25,
              trailing=trailing)  # fmt: skip
    tensors = [Tensor("x", ("T", heads * head_dim), "f32", "temp"), Tensor("p", ("T",), "i32", "input"),
               Tensor("f", (pairs,), "f32", "const")]  # fmt: skip
    values: dict[str, Value] = {"x": normal(rng, len(batch.tokens), heads * head_dim), "p": batch.positions,
                                "f": np.abs(normal(rng, pairs))}  # fmt: skip
    compare(chip, op, tensors, values, batch, 0)


@FEW
@given(chip=CHIP, seed=SEED, first=st.integers(0, 3))
def test_sinusoid(chip: str, seed: int, first: int) -> None:
    rng = np.random.default_rng(seed)
    batch, pairs = some_batch(rng), int(rng.integers(1, 40))
    op = Sinusoid(site="p", positions="p", frequencies="f", out="y", first=first)
    tensors = [Tensor("p", ("T",), "i32", "input"), Tensor("f", (pairs,), "f32", "const")]
    compare(chip, op, tensors, {"p": batch.positions, "f": np.abs(normal(rng, pairs))}, batch, 0)


@FEW
@given(chip=CHIP, seed=SEED, expr=st.sampled_from(["silu(a) * b", "tanh(a / 30.0) * 30.0", "a + b * 0.5 - c", "-2.0"]))
def test_map(chip: str, seed: int, expr: str) -> None:
    rng = np.random.default_rng(seed)
    batch, width = some_batch(rng), int(rng.integers(1, 50))
    used = [n for n in "abc" if n in expr.replace("tanh", "").replace("silu", "")]
    if not used:
        expr, used = "a * -2.0", ["a"]
    op = Map(site="m", out="y", expr=expr, **{n: n for n in used})
    columns = {"a": width, "b": (1, width)[seed % 2], "c": (1, width)[seed // 2 % 2]}
    tensors = [Tensor(n, ("T", cols), "f32", "temp") for n, cols in columns.items()]
    values: dict[str, Value] = {n: normal(rng, len(batch.tokens), cols) for n, cols in columns.items()}
    compare(chip, op, tensors, values, batch, 0)


@FEW
@given(chip=CHIP, seed=SEED, fmt=st.sampled_from(["f32", "bf16", "int8g32", "int4g32", "fp8row"]))
def test_embed_and_select(chip: str, seed: int, fmt: str) -> None:
    rng = np.random.default_rng(seed)
    batch, width, info = some_batch(rng), int(rng.integers(1, 4)) * 30, formats.get(fmt)
    table = normal(rng, 50, width)
    w: Value = formats.quantise(table, fmt) if info.grouped else table.astype(info.dtype)
    op = Embed(site="e", tokens="t", w="w", out="y", scale=1.5)
    tensors = [Tensor("t", ("T",), "i32", "input"), Tensor("w", (50, width), fmt, "weight")]
    compare(chip, op, tensors, {"t": batch.tokens, "w": w}, batch, 0)
    pick = Select(site="s", x="x", rows="rows", out="y")
    tensors = [Tensor("x", ("T", width), "f32", "temp"), Tensor("rows", ("R",), "i32", "input")]
    compare(chip, pick, tensors, {"x": normal(rng, len(batch.tokens), width), "rows": batch.rows}, batch, 0)


@FEW
@given(chip=CHIP, seed=SEED)
def test_concat(chip: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, (m, n) = some_batch(rng), rng.integers(1, 90, 2).tolist()
    op = Concat(site="c", a="a", b="b", out="y")
    tensors = [Tensor("a", ("T", m), "f32", "temp"), Tensor("b", ("T", n), "f32", "temp")]
    values = {"a": normal(rng, len(batch.tokens), m), "b": normal(rng, len(batch.tokens), n)}
    compare(chip, op, tensors, values, batch, 0)
    compare(chip, replace(op, b="a"), tensors, values, batch, 0)  # a tensor beside itself


@FEW
@given(chip=CHIP, seed=SEED)
def test_permute(chip: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, width = some_batch(rng), int(rng.integers(1, 90))
    op = Permute(site="p", x="x", order="order", out="y")
    tensors = [Tensor("x", ("T", width), "f32", "temp"), Tensor("order", (width,), "i32", "weight")]
    values: dict[str, Value] = {"x": normal(rng, len(batch.tokens), width)}
    compare(chip, op, tensors, values | {"order": rng.permutation(width).astype(np.int32)}, batch, 0)


@FEW
@given(chip=CHIP, seed=SEED, of=st.sampled_from(["mean", "rms", "std"]))
def test_moment(chip: str, seed: int, of: str) -> None:
    rng = np.random.default_rng(seed)
    batch, width = some_batch(rng), int(rng.integers(1, 90))
    op = Moment(site="m", x="x", out="y", of=of)
    values: dict[str, Value] = {"x": normal(rng, len(batch.tokens), width)}
    compare(chip, op, [Tensor("x", ("T", width), "f32", "temp")], values, batch, 0)


@FEW
@given(chip=CHIP, seed=SEED, n=st.integers(1, 5), iterations=st.integers(1, 4))
def test_sinkhorn(chip: str, seed: int, n: int, iterations: int) -> None:
    rng = np.random.default_rng(seed)
    batch = some_batch(rng)
    op = Sinkhorn(site="s", x="x", out="y", iterations=iterations, eps=1e-3)
    values: dict[str, Value] = {"x": normal(rng, len(batch.tokens), n * n)}
    compare(chip, op, [Tensor("x", ("T", n * n), "f32", "temp")], values, batch, 0)


@FEW
@given(
    chip=CHIP, seed=SEED, n=st.integers(1, 4), m=st.integers(1, 4), width=st.integers(1, 40), wide=st.booleans(),
    branch=st.booleans(),
)  # fmt: skip
def test_mix_streams(chip: str, seed: int, n: int, m: int, width: int, wide: bool, branch: bool) -> None:
    """A wide row is divided into jobs."""
    rng = np.random.default_rng(seed)
    batch = batch_of(rng, [(2, 3), (1, 0)]) if wide else some_batch(rng)
    width += 2030 * wide
    given = {"branch": "b", "gains": "g"} if branch else {}
    op = MixStreams(site="m", x="x", weights="w", out="y", streams=n, **given)
    columns = {"x": n * width, "w": n * m, "b": width, "g": m}
    tensors = [Tensor(name, ("T", count), "f32", "temp") for name, count in columns.items()]
    values: dict[str, Value] = {name: normal(rng, len(batch.tokens), count) for name, count in columns.items()}
    compare(chip, op, tensors, values, batch, 2 * (n + 1) * EPS)  # two roundings for each term


@FEW
@given(chip=CHIP, seed=SEED, every=st.integers(2, 6), overlap=st.booleans(), fmt=st.sampled_from(["f32", "bf16"]))
def test_pool_keys(chip: str, seed: int, every: int, overlap: bool, fmt: str) -> None:
    """Entries of complete runs agree within their roundings; other rows of the cache stay as they were."""
    rng = np.random.default_rng(seed)
    batch, d, n = some_batch(rng), 2 * int(rng.integers(1, 20)), 1 + overlap
    pairs, page = int(rng.integers(1, d // 2 + 1)), -(-4 // every)
    names = {"value_cache": "v", "gate_cache": "g", "bias": "b", "weight": "w", "frequencies": "f", "entries": "e"}
    op = PoolKeys(site="p", **names, every=every, overlap=overlap, factor=1.25)
    caches = {"v": ("P", "B", n, d), "g": ("P", "B", n, d), "e": ("P", f"B/{every}", 1, d)}
    tensors = {name: Tensor(name, shape, fmt, "state") for name, shape in caches.items()}
    tensors |= {"b": Tensor("b", (every, n * d), "f32", "weight"), "w": Tensor("w", (d,), "f32", "weight"),
                "f": Tensor("f", (pairs,), "f32", "const")}  # fmt: skip
    dtype = formats.get(fmt).dtype
    values: dict[str, Value] = {name: normal(rng, 64, 4, n, d).astype(dtype) for name in "vg"}
    entries = normal(rng, 64, page, 1, d).astype(dtype)
    values |= {"e": entries, "b": normal(rng, every, n * d), "w": normal(rng, d), "f": np.abs(normal(rng, pairs))}
    _, memory = run_kernel(CHIPS[chip], op, tensors, {**values, "e": entries.copy()}, batch)
    op.reference(values, batch)
    tolerance = 16 * EPS if fmt == "f32" else 2**-8
    got, want = memory.read("e").reshape(entries.shape).astype(np.float32), entries.astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@FEW
@given(chip=CHIP, seed=SEED, fmt=st.sampled_from(["f32", "bf16", "int8row", "e4m3"]))
def test_kv_write(chip: str, seed: int, fmt: str) -> None:
    rng = np.random.default_rng(seed)
    batch, heads, d = some_batch(rng), int(rng.integers(1, 4)), int(rng.integers(1, 20))
    scales, given = head_scales(rng, heads)
    op = KvWrite(site="w", k="k", v="v", k_cache="kc", v_cache="vc", **given)
    tensors = {n: Tensor(n, ("T", heads * d), "f32", "temp") for n in "kv"}
    tensors |= {n: Tensor(n, (heads,), "f32", "const", values=tuple(x)) for n, x in scales.items()}
    tensors |= {n: Tensor(n, ("P", "B", heads, d), fmt, "state") for n in ("kc", "vc")}
    caches = {n: cache(rng, fmt, heads, d) for n in ("kc", "vc")}
    values: dict[str, Value] = {n: normal(rng, len(batch.tokens), heads * d) for n in "kv"} | caches
    values |= scales
    _, memory = run_kernel(CHIPS[chip], op, tensors, values, batch)
    op.reference(values, batch)
    for n, held in caches.items():
        codes = held.codes if isinstance(held, Quantised) else held
        np.testing.assert_array_equal(memory.hbm.read(memory.codes(n)).reshape(codes.shape), codes)
        scales = memory.scales(n)
        if isinstance(held, Quantised) and scales is not None:
            np.testing.assert_array_equal(memory.hbm.read(scales).reshape(held.scales.shape), held.scales)


def head_scales(rng: np.random.Generator, heads: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Scales of an e4m3 cache, and the operands that name them; in one of four cases an op has none."""
    scales = {n: rng.uniform(0.002, 0.02, heads).astype(np.float32) for n in ("ks", "vs")}
    return scales, {"k_scale": "ks", "v_scale": "vs"} if rng.random() < 0.75 else {}


def cache(rng: np.random.Generator, fmt: str, heads: int, d: int) -> Value:
    """A K/V cache of 64 pages of 4 tokens with random values."""
    x = normal(rng, 64, 4, heads, d)
    if fmt != "int8row":
        return x.astype(formats.get(fmt).dtype)
    q = formats.quantise(x.reshape(-1, d), fmt)
    return Quantised(q.codes.reshape(x.shape), q.scales.reshape(*x.shape[:3], -1)[..., :1], d)


@FEW
@given(chip=CHIP, seed=SEED, window=st.sampled_from([0, 5]), softcap=st.sampled_from([0.0, 3.0]),
       fmt=st.sampled_from(["f32", "bf16", "int8row", "e4m3"]))  # fmt: skip
def test_attend(chip: str, seed: int, window: int, softcap: float, fmt: str) -> None:
    rng = np.random.default_rng(seed)
    batch = batch_of(rng, [(1, int(rng.integers(0, 150))), (int(rng.integers(2, 9)), int(rng.integers(0, 9)))])
    kv, group, d, dv = (int(rng.integers(1, 4)) for _ in range(4))
    d, dv = 8 * d, 8 * dv
    scales, given = head_scales(rng, kv)
    op = Attend(site="a", q="q", k_cache="kc", v_cache="vc", out="y", heads=kv * group, scale=d**-0.5, window=window,
                softcap=softcap, **given, temper=0.3 * (seed % 2), temper_every=5)  # fmt: skip
    tensors = [Tensor("q", ("T", kv * group * d), "f32", "temp"), Tensor("kc", ("P", "B", kv, d), fmt, "state"),
               Tensor("vc", ("P", "B", kv, dv), fmt, "state"),
               *(Tensor(n, (kv,), "f32", "const", values=tuple(x)) for n, x in scales.items())]  # fmt: skip
    values: dict[str, Value] = {"q": normal(rng, len(batch.tokens), kv * group * d), "kc": cache(rng, fmt, kv, d),
                                "vc": cache(rng, fmt, kv, dv), **scales}  # fmt: skip
    # the fused engine rounds attention weights to the cache's format; matrix array and vector lanes use FP32
    rounding = 2.0**-8 if CHIPS[chip].chip.att_lanes and fmt == "bf16" else 0
    compare(chip, op, tensors, values, batch, rounding + 64 * EPS)


@FEW
@given(chip=CHIP, seed=SEED, chunk=st.sampled_from([0, 3, 16]), fmt=st.sampled_from(["f32", "bf16", "int8row", "e4m3"]),
       sinks=st.sampled_from(["", "f32", "bf16"]), latent=st.booleans(), slopes=st.booleans())  # fmt: skip
def test_attend_with_chunks_sinks_slopes_and_latent_caches(
    chip: str, seed: int, chunk: int, fmt: str, sinks: str, latent: bool, slopes: bool
) -> None:
    rng = np.random.default_rng(seed)
    batch = batch_of(rng, [(1, int(rng.integers(0, 150))), (int(rng.integers(2, 40)), int(rng.integers(0, 9)))])
    kv, group, d, r = int(rng.integers(1, 3)), int(rng.integers(1, 4)), 8 * int(rng.integers(1, 4)), 4
    op = Attend(site="a", q="q", k_cache="kc", v_cache="kc" if latent else "vc", rope_cache="rc" if latent else None,
                sinks="s" if sinks else None, out="y", heads=kv * group, scale=d**-0.5, chunk=chunk,
                slopes="b" if slopes else None, temper=0.1, temper_every=9, temper_from=seed % 2)  # fmt: skip
    biases = tuple(float(x) for x in rng.uniform(0, 0.3, kv * group).astype(np.float32))
    width = kv * group * (d + r * latent)
    tensors = [Tensor("q", ("T", width), "f32", "temp"), Tensor("s", (kv * group,), sinks or "f32", "weight"),
               Tensor("b", (kv * group,), "f32", "const", values=biases),
               *(Tensor(n, ("P", "B", kv, w), fmt, "state") for n, w in (("kc", d), ("vc", d), ("rc", r)))]  # fmt: skip
    values: dict[str, Value] = {n: cache(rng, fmt, kv, w) for n, w in (("kc", d), ("vc", d), ("rc", r))}
    values["q"], values["s"] = normal(rng, len(batch.tokens), width), normal(rng, kv * group)
    values["s"] = values["s"].astype(formats.get(sinks or "f32").dtype)
    values["b"] = np.array(biases, np.float32)
    rounding = 2.0**-8 if CHIPS[chip].chip.att_lanes and fmt == "bf16" else 0  # as in test_attend
    compare(chip, op, tensors, values, batch, rounding + 64 * EPS)


@FEW
@given(chip=CHIP, seed=SEED, fmt=st.sampled_from(["f32", "bf16"]))
def test_head_linear(chip: str, seed: int, fmt: str) -> None:
    rng = np.random.default_rng(seed)
    batch = some_batch(rng)
    heads, n, k, rest = (int(rng.integers(1, most)) for most in (5, 70, 200, 3))
    rest = (rest - 1) * 12
    op = HeadLinear(site="h", x="x", w="w", out="y")
    tensors = [Tensor("x", ("T", heads * (k + rest)), "f32", "temp"), Tensor("w", (heads, n, k), fmt, "weight")]
    values: dict[str, Value] = {"x": normal(rng, len(batch.tokens), heads * (k + rest)),
                                "w": normal(rng, heads, n, k).astype(formats.get(fmt).dtype)}  # fmt: skip
    # one rounding to FP32 a step over K, each of a partial sum of some sqrt(k)
    compare(chip, op, tensors, values, batch, 4 * (k / 32 + 2) * EPS * np.sqrt(k))


def test_a_chip_with_an_extra_instruction_uses_it() -> None:
    """The example of docs/codesign.md: with SoftmaxStep the values are the same and the modelled time is shorter."""
    rng = np.random.default_rng()
    batch = batch_of(rng, [(5, 60)])
    op = Attend(site="a", q="q", k_cache="kc", v_cache="vc", out="y", heads=2, scale=0.25)
    tensors = {"q": Tensor("q", ("T", 32), "f32", "temp"), "y": Tensor("y", ("T", 32), "f32", "temp")}
    tensors |= {n: Tensor(n, ("P", "B", 2, 16), "f32", "state") for n in ("kc", "vc")}
    values: dict[str, Value] = {"q": normal(rng, 5, 32), "kc": cache(rng, "f32", 2, 16), "vc": cache(rng, "f32", 2, 16)}
    ran = {}
    for name in ("small", "stepped"):
        got, memory = run_kernel(CHIPS[name], op, tensors, values, batch)
        memory.allocate("y", 5, 32, "f32")
        streams = kernel_class(op).streams(memory, op, tensors, batch)
        ran[name] = got["y"], memory.run(streams).seconds, {type(i).__name__ for s in streams for i in s.instructions}
    np.testing.assert_array_equal(ran["small"][0], ran["stepped"][0])
    assert ran["stepped"][1] < ran["small"][1]
    assert "SoftmaxStep" in ran["stepped"][2] and not {"Softmax", "Rescale"} & ran["stepped"][2]


@FEW
@given(chip=CHIP, seed=SEED)
def test_sample(chip: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = some_batch(rng)
    edits = [Edits(rng.choice(50, n, replace=False).astype(np.int32), 1 + rng.random(n, np.float32), normal(rng, n))
             for n in (0, 7, 20)]  # fmt: skip
    mask = rng.integers(0, 2**32, 2, dtype=np.uint32)
    ways = [Sampling(), Sampling(0.8, 5, 0.9, 0.01, seed=7), Sampling(1.2, seed=int(rng.integers(100))),
            *(Sampling(edits=e) for e in edits), Sampling(mask=mask), Sampling(mask=mask & 0),
            Sampling(0.9, seed=3, edits=edits[1], mask=mask)]  # fmt: skip
    chosen = tuple(ways[i] for i in rng.integers(0, len(ways), len(batch.rows)))
    batch = replace(batch, sampling=chosen)
    op = Sample(site="s", logits="x", tokens="t", logprobs="p")
    logits = normal(rng, len(batch.rows), 50)
    logits[0, 3] = np.nan if seed % 5 == 0 else logits[0, 3]
    compare(chip, op, [Tensor("x", ("R", 50), "f32", "output")], {"x": logits}, batch, 0)


def test_every_op_has_a_kernel_or_is_refused() -> None:
    """Collectives run on all chips of a group together: see test_links.py."""
    for kind, op in REGISTRY.items():
        own = op.__module__.startswith("intaglio.")
        assert not own or op in CHIP_KERNELS, f"write a chip kernel for {kind}, in a file of silicon/kernels/"
    op = Send(site="layer 3", x="x", peer=1)
    batch = some_batch(np.random.default_rng())
    tensors = {"x": Tensor("x", ("T", 8), "f32", "temp")}
    with pytest.raises(
        MachineError, match="op send at layer 3: a message runs on two chips together, see run_collective"
    ):
        run_kernel(CHIPS["small"], op, tensors, {"x": normal(np.random.default_rng(), len(batch.tokens), 8)}, batch)


def test_unsupported_formats_and_column_orders_are_refused() -> None:
    linear = Linear(site="l", x="x", w="w", out="y", x_format="int8")
    for format in ("q4_k", "nf4g64", "affine4g64f16"):
        tensors = {"x": Tensor("x", ("T", 256), "f32", "temp"), "w": Tensor("w", (4, 256), format, "weight")}
        assert f"weight w of l is {format}; chip kernels take f32, " in str(unsupported_reason(linear, tensors))
    stacks = {"gate": "w", "up": "w", "down": "w", "order": "o"}
    experts = Experts(site="e", x="x", weights="p", ids="i", out="y", **stacks)
    tensors = {n: Tensor(n, (4, 8, 8), "f32", "weight") for n in experts.inputs}
    assert "e: chip kernels do not permute columns of experts" in str(unsupported_reason(experts, tensors))
    assert unsupported_reason(replace(experts, order=None), tensors) is None


@FEW
@given(chip=CHIP, seed=SEED, every=st.sampled_from([1, 1, 3, 4]), fmt=st.sampled_from(["f32", "bf16"]))
def test_choose_keys(chip: str, seed: int, every: int, fmt: str) -> None:
    """Whole numbers, whose products and sums are exact: the choice is equal, with many ties."""
    rng = np.random.default_rng(seed)
    batch = batch_of(rng, [(int(rng.integers(1, 7)), int(rng.integers(0, 60))) for _ in range(rng.integers(1, 4))])
    heads, d, top, page = int(rng.integers(1, 5)), int(rng.integers(1, 20)), int(rng.integers(1, 30)), -(-4 // every)
    op = ChooseKeys(site="i", q="q", weights="w", cache="k", chosen="c", heads=heads, top=top, scale=0.5, every=every)
    tensors = [Tensor("q", ("T", heads * d), "f32", "temp"), Tensor("w", ("T", heads), "f32", "temp"),
               Tensor("k", ("P", "B" if every == 1 else f"B/{every}", 1, d), fmt, "state")]  # fmt: skip
    shapes = {"q": (len(batch.tokens), heads * d), "w": (len(batch.tokens), heads), "k": (64, page, 1, d)}
    values: dict[str, Value] = {name: rng.integers(-3, 4, shape).astype(np.float32) for name, shape in shapes.items()}
    values["k"] = np.asarray(values["k"]).astype(formats.get(fmt).dtype)
    compare(chip, op, tensors, values, batch, 0)


@FEW
@given(chip=CHIP, seed=SEED, latent=st.booleans(), fmt=st.sampled_from(["f32", "bf16"]), temper=st.booleans())
def test_attend_to_chosen_positions(chip: str, seed: int, latent: bool, fmt: str, temper: bool) -> None:
    """Lists shorter and longer than a tile of keys and than the context, with one position or more."""
    rng = np.random.default_rng(seed)
    batch = batch_of(rng, [(int(rng.integers(1, 5)), int(rng.integers(0, 40))) for _ in range(rng.integers(1, 3))])
    kv, group, d, dv = (int(n) for n in (1 if latent else rng.integers(1, 3), *rng.integers(1, 5, 3)))
    d, dv, places = 8 * d, 8 * dv, int(rng.integers(1, 60))
    keys = {"k_cache": "vc", "rope_cache": "kc"} if latent else {"k_cache": "kc"}
    op = Attend(site="a", q="q", **keys, v_cache="vc", chosen="c", out="y", heads=kv * group, scale=d**-0.5,
                temper=0.3 * temper, temper_every=5)  # fmt: skip
    width = d + dv if latent else d
    tensors = [Tensor("q", ("T", kv * group * width), "f32", "temp"), Tensor("kc", ("P", "B", kv, d), fmt, "state"),
               Tensor("vc", ("P", "B", kv, dv), fmt, "state"), Tensor("c", ("T", places), "i32", "temp")]  # fmt: skip
    chosen = np.full((len(batch.tokens), places), -1, np.int32)
    for row, at in zip(chosen, batch.positions.tolist(), strict=True):
        some = np.sort(rng.permutation(at + 1)[: rng.integers(1, places + 1)])
        row[places - len(some) :] = some
    values: dict[str, Value] = {"q": normal(rng, len(batch.tokens), kv * group * width), "c": chosen,
                                "kc": cache(rng, fmt, kv, d), "vc": cache(rng, fmt, kv, dv)}  # fmt: skip
    compare(chip, op, tensors, values, batch, 32 * EPS * np.sqrt(width))


@FEW
@given(
    chip=CHIP, seed=SEED, every=st.sampled_from([2, 3, 4]), listed=st.booleans(), sinks=st.booleans(),
    fmt=st.sampled_from(["f32", "bf16"]),
)  # fmt: skip
def test_attend_pooled(chip: str, seed: int, every: int, listed: bool, sinks: bool, fmt: str) -> None:
    """Windows shorter and longer than the context, and no entries yet. Blocks of 4 tokens hold lists of 2 or 4."""
    rng = np.random.default_rng(seed)
    batch = batch_of(rng, [(int(rng.integers(1, 5)), int(rng.integers(0, 40))) for _ in range(rng.integers(1, 3))])
    every, heads, d, places = 2 if listed and every == 3 else every, int(rng.integers(1, 7)), 8, int(rng.integers(1, 9))
    op = AttendPooled(
        site="a", q="q", cache="k", entries="e", sinks="s" if sinks else None, chosen="c" if listed else None, out="y",
        heads=heads, scale=d**-0.5, window=int(rng.integers(1, 30)), every=every,
    )  # fmt: skip
    tensors = [
        Tensor("q", ("T", heads * d), "f32", "temp"), Tensor("k", ("P", "B", 1, d), fmt, "state"),
        Tensor("e", ("P", f"B/{every}", 1, d), fmt, "state"), Tensor("s", (heads,), fmt, "weight"),
        Tensor("c", ("T", places), "i32", "temp"),
    ]  # fmt: skip
    chosen = np.full((len(batch.tokens), places), -1, np.int32)
    for row, at in zip(chosen, batch.positions.tolist(), strict=True):
        some = np.sort(rng.permutation((at + 1) // every)[: rng.integers(0, places + 1)])
        row[places - len(some) :] = some
    dtype = formats.get(fmt).dtype
    values: dict[str, Value] = {
        "q": normal(rng, len(batch.tokens), heads * d), "k": normal(rng, 64, 4, 1, d).astype(dtype),
        "e": normal(rng, 64, -(-4 // every), 1, d).astype(dtype), "s": normal(rng, heads).astype(dtype), "c": chosen,
    }  # fmt: skip
    compare(chip, op, tensors, values, batch, 32 * EPS * np.sqrt(d))


def test_some_sparse_attention_is_refused() -> None:
    op = Attend(site="a", q="q", k_cache="k", v_cache="v", chosen="c", out="y", heads=2, scale=1.0)
    cache = {n: Tensor(n, ("P", "B", 2, 3), "f32", "state") for n in "kv"}
    tensors = cache | {"q": Tensor("q", ("T", 6), "f32", "temp"), "c": Tensor("c", ("T", 2), "i32", "temp")}
    assert unsupported_reason(op, tensors) is None
    assert "a: chip kernels attend to chosen positions of" in str(unsupported_reason(replace(op, window=3), tensors))
    index = ChooseKeys(site="i", q="q", weights="w", cache="k", chosen="c", heads=3, top=2)
    tensors |= {"w": Tensor("w", ("T", 3), "f32", "temp"), "k": Tensor("k", ("P", "B", 1, 2), "int8row", "state")}
    assert "i: chip kernels do not choose among keys in int8row" in str(unsupported_reason(index, tensors))
