"""The host device against the reference, with random odd sizes: every op, code path and format; batch invariance."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.host_bench import EPS, ISAS, PAGE, Bench, finish, hold, keep_company
from support.toy import MANNERS, Toy, random_weights, transformer

from intaglio import _native, formats
from intaglio.batch import Chunk, Edits, Sampling, bind
from intaglio.compiler import build
from intaglio.devices import ArrayWeights, DeviceError, StateSpec, StepRequest
from intaglio.devices.host import HostDevice
from intaglio.devices.reference import ReferenceDevice
from intaglio.ops import (
    REGISTRY,
    Attend,
    Collective,
    Concat,
    Embed,
    Experts,
    KvWrite,
    Linear,
    Map,
    Moment,
    Norm,
    Permute,
    Rope,
    Route,
    Sample,
    Select,
    Sinusoid,
)  # fmt: skip
from intaglio.ops.elementwise import FUNCTIONS
from intaglio.ops.linear import ACTIVATIONS
from intaglio.ops.moment import MOMENTS
from intaglio.program import Builder

IN_OTHER_TESTS = {
    "embed",
    "select",
    "kv_write",
}  # embed and select are part of every test here, kv_write of test_attend


def test_every_op_is_covered() -> None:
    """Each op has a test_KIND...() in a file tests/devices/test_host*.py. Collectives run between calls of the host:
    test_mesh.py tests them."""
    source = "\n".join(f.read_text(encoding="utf-8") for f in Path(__file__).parent.glob("test_host*.py"))
    own = {kind for kind, op in REGISTRY.items() if not issubclass(op, Collective)}
    for kind in own - IN_OTHER_TESTS:
        assert re.search(rf"^def test_{kind}", source, re.MULTILINE), f"write test_{kind}...() in a test_host*.py"


WEIGHTS = ["f32", "f16", "bf16", "bf16 x bf16", "f32 x bf16", "int8g32", "int8g128", "int4g32", "int4g64", "int4g128"]
WEIGHTS += ["int8row", "mxfp4", "fp8g64", "fp8g32 x bf16", "fp8g128 x bf16", "fp8row x bf16"]


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("trial", range(3))
def test_linear(kind: str, trial: int, rng: np.random.Generator) -> None:
    format, _, rounded = kind.partition(" x ")
    rows, k, n = (int(rng.integers(1, high)) for high in (40, 300, 150))
    glu = bool(rng.integers(2))
    n += n % 2 if glu else 0
    bench = Bench(rng, rows, k)
    w = bench.weight("w", rng.normal(size=(n, k)) / np.sqrt(k), format)
    out = n // 2 if glu else n
    fields: dict[str, object] = {
        "x_format": "int8" if formats.get(format).integer else rounded or "f32",
        "glu": glu,
        "scale": float(rng.choice([1, 0.3])),
    }
    fields["activation"] = str(rng.choice(ACTIVATIONS if glu else (*ACTIVATIONS, "")))
    if rng.integers(2):
        fields["bias"] = bench.weight("bias", rng.normal(size=n))
    if rng.integers(2):
        fields["residual"] = bench.matrix("residual", rows, out)
    y = bench.b.op(Linear, "y", bench.x, w, **fields)
    results = bench.run(y)
    # K roundings of partial sums as large as the result, adding up like a random walk, 16 sigma; a pair multiplies two
    size = 1 + np.abs(bench.arrays["x.table"] @ bench.arrays["w"].astype(np.float32).T).max()
    hold(results, 16 * np.sqrt(k + 16) * EPS * size * (2 * size if glu else 2))


def test_linear_with_many_rows_and_large_k(rng: np.random.Generator) -> None:
    """More rows than a tile and K over several blocks: each row has the same bits as when computed alone."""
    for format in ("f32", "bf16", "int8g128", "int8row", "int4g32", "fp8row"):
        bench = Bench(rng, 530, 4200)
        fmt = formats.get(format)
        x_format = "int8" if fmt.integer else "bf16" if fmt.grouped else format
        w = bench.weight("w", rng.normal(size=(70, 4200)) / 65, format)
        y = bench.b.op(Linear, "y", bench.x, w, x_format=x_format)
        few = bind([Chunk([7], 0, [0], [0]), Chunk([529], 0, [1], [0]), Chunk([3], 0, [2], [0])], PAGE)
        program = finish(bench)
        for isa in ISAS if format != "f32" else ISAS[:1]:
            ex = HostDevice(2, isa).load(program, ArrayWeights(bench.arrays), StateSpec(64, PAGE))
            all_rows = ex.step(StepRequest(bind([Chunk(range(530), 0, range(34), [0])], PAGE), taps=[y])).taps[y]
            np.testing.assert_array_equal(
                ex.step(StepRequest(few, taps=[y])).taps[y], all_rows[[7, 529, 3]], err_msg=f"{isa} {format}"
            )


def test_permute(rng: np.random.Generator) -> None:
    rows, width = int(rng.integers(1, 30)), int(rng.integers(1, 300))
    bench = Bench(rng, rows, width)
    order = bench.b.weight("order", (width,), "order", "i32")
    bench.arrays["order"] = rng.permutation(width).astype(np.int32)
    results = bench.run(bench.b.op(Permute, "y", bench.x, order))
    np.testing.assert_array_equal(results["reference"], bench.arrays["x.table"][:, bench.arrays["order"]])
    hold(results, 0.0)


def test_concat(rng: np.random.Generator) -> None:
    rows, m, n = (int(rng.integers(1, top)) for top in (30, 300, 300))
    bench = Bench(rng, rows, m)
    results = bench.run(bench.b.op(Concat, "y", bench.x, bench.matrix("b", rows, n)))
    np.testing.assert_array_equal(results["reference"][:, m:], bench.arrays["b.table"])
    hold(results, 0.0)


@pytest.mark.parametrize("norm", ["rms", "layer", "l2", "none"])
@pytest.mark.parametrize("group", [0, 20])
def test_norm(norm: str, group: int, rng: np.random.Generator) -> None:
    rows, width = int(rng.integers(1, 30)), 20 * int(rng.integers(1, 12))
    bench = Bench(rng, rows, width)
    span = group or width
    fields = {"weight": bench.weight("w", rng.normal(size=span)), "bias": bench.weight("b", rng.normal(size=span))}
    fields["residual"] = bench.matrix("r", rows, width)
    y = bench.b.op(Norm, "y", bench.x, **fields, norm=norm, group=group, offset=1.0, eps=1e-5)
    hold(bench.run(y), (span + 16) * EPS * 30)


@pytest.mark.parametrize("of", MOMENTS)
def test_moment(of: str, rng: np.random.Generator) -> None:
    rows, width = int(rng.integers(1, 30)), int(rng.integers(1, 300))
    bench = Bench(rng, rows, width)
    hold(bench.run(bench.b.op(Moment, "y", bench.x, of=of)), (width + 16) * EPS * 8)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rope(style: str, rng: np.random.Generator) -> None:
    bench = Bench(rng, 37, 3 * 80)
    table = bench.b.const("frequencies", list(10000.0 ** -(np.arange(int(rng.integers(1, 41))) / 40)))
    y = bench.b.op(Rope, "y", bench.x, "positions", table, head_dim=80, style=style, factor=1.2)
    hold(bench.run(y), 8 * EPS * 6)


@pytest.mark.parametrize("first", [0, 2])
def test_sinusoid(first: int, rng: np.random.Generator) -> None:
    bench = Bench(rng, 37, 8)
    table = bench.b.const("frequencies", list(10000.0 ** -(np.arange(int(rng.integers(1, 41))) / 40)))
    hold(bench.run(bench.b.op(Sinusoid, "y", "positions", table, first=first)), 2 * EPS)


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_map_function(function: str, rng: np.random.Generator) -> None:
    bench = Bench(rng, 5, 133, scale=6.0)
    y = bench.b.op(Map, "y", bench.x, expr=f"{function}(a)")
    results = bench.run(y)
    hold(results, 16 * EPS * (1 + np.abs(results["reference"])))


def test_map_broadcasts_runs(rng: np.random.Generator) -> None:
    rows, heads, span = int(rng.integers(1, 9)), int(rng.integers(1, 9)), int(rng.integers(1, 40))
    bench = Bench(rng, rows, 6 * heads * span)
    b, c = bench.matrix("b", rows, 2 * heads), bench.matrix("c", rows, 3)
    y = bench.b.op(Map, "y", bench.x, b=b, c=c, expr="a * sigmoid(b) + c")
    hold(bench.run(y), 64 * EPS)


def test_map_expression(rng: np.random.Generator) -> None:
    bench = Bench(rng, 9, 51)
    b, c = bench.matrix("b", 9, 51), bench.matrix("c", 9, 51)
    y = bench.b.op(Map, "y", bench.x, b=b, c=c, expr="silu(a) * b / (3.5 + tanh(c)) - -2.0 * (a - c)")
    hold(bench.run(y), 64 * EPS * 30)


def test_views_are_read_without_a_copy(rng: np.random.Generator) -> None:
    bench = Bench(rng, 6, 96)
    y = bench.b.op(
        Map, "y", bench.b.view("left", bench.x, 5, 45), b=bench.b.view("right", bench.x, 40, 80), expr="a - b * 2.0"
    )
    hold(bench.run(y), 4 * EPS * 12)


@pytest.mark.parametrize("cache", ["f32", "bf16", "int8row", "e4m3"])
@pytest.mark.parametrize("trial", range(6))
def test_attend(cache: str, trial: int, rng: np.random.Generator) -> None:
    """GQA, MQA, MHA; head sizes 80, 96 and odd ones; window and softcap; contexts across splits of 512."""
    kv_heads, share = int(rng.choice([1, 2, 3])), int(rng.choice([1, 2, 5, 40]))
    head_dim, v_dim = int(rng.choice([8, 20, 64, 80, 96])), int(rng.choice([8, 16, 72, 96]))
    length = int(rng.choice([1, 5, 40, 700, 1000]))
    window, softcap = int(rng.choice([0, 0, 3, 100, 600])), float(rng.choice([0, 0, 5]))
    bench = Bench(rng, length, kv_heads * head_dim)
    v = bench.matrix("v", length, kv_heads * v_dim)
    q = bench.matrix("q", length, kv_heads * share * head_dim)
    caches = [bench.b.cache(n, kv_heads, d, cache) for n, d in (("k_cache", head_dim), ("v_cache", v_dim))]
    own = {n: bench.b.const(n, rng.uniform(0.002, 0.02, kv_heads).tolist()) for n in ("k_scale", "v_scale")}
    scales = own if rng.random() < 0.7 else {}
    bench.b.op(KvWrite, "kv_write", bench.x, v, *caches, **scales)
    y = bench.b.op(
        Attend, "y", q, *caches, heads=kv_heads * share, scale=head_dim**-0.5, window=window, softcap=softcap, **scales
    )
    pages = [int(p) for p in rng.permutation(64)[: -(-length // PAGE)]]
    results = bench.run(y, bind([Chunk(range(length), 0, pages, [0])], PAGE))
    # A score has an error of gamma_hd * sum|q||k|, which changes its weight by that factor; the weights sum to one.
    score = (head_dim + 32) * EPS * 6 * np.sqrt(head_dim)
    hold(results, (2 * score + (length + 64) * EPS) * 5)


def draw_changes(rng: np.random.Generator, s: Sampling, vocabulary: int) -> Sampling:
    """Add random logit edits and a random mask, each with probability 3/4."""
    ids = np.sort(rng.choice(vocabulary, int(rng.integers(0, 60)), replace=False)).astype(np.int32)
    scale, add = rng.uniform(0.5, 2, len(ids)).astype(np.float32), rng.normal(size=len(ids)).astype(np.float32)
    edits = Edits(ids, scale, add * np.float32(3)) if rng.random() < 0.75 else None
    mask = rng.integers(0, 2**32, -(-vocabulary // 32), np.uint32) if rng.random() < 0.75 else None
    return replace(s, edits=edits, mask=mask)


def test_logit_edits_of_wrong_sizes_are_refused() -> None:
    b = Builder("sample", 512)
    x = b.op(Embed, "x", "tokens", b.weight("t", (4, 40), "t"))
    b.op(Map, "pick", b.op(Select, "select", x, "rows"), expr="a", out="logits", role="output")
    b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
    host = HostDevice(1).load(b.done(), ArrayWeights({"t": np.ones((4, 40), np.float32)}), StateSpec(8, PAGE))
    one = np.ones(1, np.float32)
    for sampling, message in (
        (Sampling(mask=np.ones(3, np.uint32)), r"a mask is uint32 [3]; the vocabulary takes uint32 [2]"),
        (Sampling(mask=np.ones(2, np.int64)), "a mask is int64 [2]"),
        (Sampling(edits=Edits(np.int32([40]), one, one)), "edits touch ids 40..40, outside 0..39"),
        (Sampling(edits=Edits(np.int32([-1]), one, one)), "edits touch ids -1..-1, outside 0..39"),
    ):
        with pytest.raises(DeviceError, match=re.escape(message)):
            host.step(StepRequest(bind([Chunk([1], 0, [0], [0], sampling)], PAGE)))


@pytest.mark.parametrize("site", ["head", "mlp"])
def test_an_unsupported_activation_format_is_refused(site: str) -> None:
    b = Builder("rounded", 512)
    rows, stacks = {"embed": 40, "router": 4, "w": 40}, ("gate", "up", "down")
    names = {n: b.weight(n, (count, 64), n) for n, count in rows.items()}
    named = {n: b.weight(n, (4, 64, 64), n, "fp8row") for n in stacks}
    x = b.op(Embed, "x", "tokens", names["embed"])
    b.op(Route, "route", b.op(Linear, "logits0", x, "router"), top=2)
    rounding = {"x_format": "fp8row"}
    operands = ("route", "route.ids", named["up"], named["down"])
    y = b.op(Experts, "mlp", x, *operands, gate=named["gate"], **(rounding if site == "mlp" else {}))
    b.tensors["w"] = replace(b.tensors["w"], format="fp8row")
    last = b.op(Select, "select", y, "rows")
    b.op(Linear, "head", last, "w", out="logits", role="output", **(rounding if site == "head" else {}))
    b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
    arrays = {n: np.ones((count, 64), np.float32) for n, count in rows.items()}
    arrays |= {n: np.ones((4, 64, 64), np.float32) for n in stacks}
    with pytest.raises(DeviceError, match=f"{site}: x_format=fp8row; the host rounds activations to f32, bf16 or int8"):
        HostDevice(1).load(b.done(), ArrayWeights(arrays), StateSpec(8, PAGE))


def test_sample_agrees_with_reference(rng: np.random.Generator) -> None:
    """Same log-probabilities and same tokens, except where a random number is within rounding of a boundary (1 %)."""
    rows, vocabulary = 200, 517
    b = Builder("sample", 512)
    arrays = {"t": rng.normal(size=(rows, vocabulary)).astype(np.float32) * 3}
    arrays["t"][0, :] = 1.0  # all logits equal: the lowest id is chosen
    arrays["t"][1, 5] = np.nan
    arrays["t"][2, :] = -np.inf
    arrays["t"][3, 100:] = -np.inf
    x = b.op(Embed, "x", "tokens", b.weight("t", (rows, vocabulary), "t"))
    b.op(Map, "pick", b.op(Select, "select", x, "rows"), expr="a", out="logits", role="output")
    b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
    program = replace(b.done(), context=512)
    for sampling, changed in itertools.product((
        Sampling(), Sampling(1.0, seed=7), Sampling(0.7, top_k=20, seed=2**64 - 1), Sampling(1.3, top_p=0.8, seed=3),
        Sampling(1.0, min_p=0.05, seed=4), Sampling(0.9, 40, 0.9, 0.02, 5),
    ), (False, True)):  # fmt: skip
        drawn = [draw_changes(rng, sampling, vocabulary) if changed else sampling for _ in range(rows)]
        drawn[4] = replace(drawn[4], mask=np.zeros(17, np.uint32))  # no token is allowed
        batch = bind([Chunk([i], 3, [i], [0], drawn[i]) for i in range(rows)], PAGE)
        want = ReferenceDevice().load(program, ArrayWeights(arrays), StateSpec(rows, PAGE)).step(StepRequest(batch))
        assert want.tokens[1] == want.tokens[2] == want.tokens[4] == -1
        for isa in ISAS:
            got = HostDevice(2, isa).load(program, ArrayWeights(arrays), StateSpec(rows, PAGE)).step(StepRequest(batch))
            assert (got.tokens != want.tokens).sum() <= (2 if sampling.temperature else 0), f"{isa} {sampling}"
            same = got.tokens == want.tokens
            np.testing.assert_allclose(got.logprobs[same], want.logprobs[same], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "format",
    ["f32", "f16", "bf16", "int8g32", "int8g128", "int4g32", "int4g96", "q4_k", "int8row", "mxfp4", "fp8g32", "fp8row"],
)
def test_packing_equals_formats_quantise(format: str, rng: np.random.Generator) -> None:
    """Codes and scales as formats.quantise() chooses them, from every source type, by every instruction set, whole and
    in parts, with and without glu's order."""
    fmt = formats.get(format)
    n, k = 2 * int(rng.integers(1, 70)), int(rng.integers(1, 2400 if fmt.group == formats.ROW else 290))
    k = k if fmt.block != formats.BLOCK else formats.BLOCK * int(rng.integers(1, 4))
    for source, isa in zip(("f32", "f16", "bf16"), itertools.cycle(ISAS), strict=False):
        stored = (
            (rng.normal(size=(n, k)) * np.exp2(rng.integers(-9, 9, k)))
            .astype(np.float32)
            .astype(formats.get(source).dtype)
        )
        stored[0] = 0
        stored[1, rng.integers(k)] = rng.choice([np.nan, np.inf, -np.inf])
        wide = stored.astype(np.float32)
        want = formats.quantise(wide, format).rows(slice(None)) if fmt.grouped else formats.round_to(wide, format)
        for glu in (False, True):
            packed = _native.Weight(fmt.family, n, k, fmt.group_of(k) if fmt.grouped else 0, glu)
            cut = int(rng.integers(0, n))
            for first, last in ((0, cut), (cut, n)):
                rows = np.ascontiguousarray(stored[first:last])
                packed.fill(rows.reshape(-1).view(np.uint8), source, first, last - first, 2, isa)
            got = np.empty((n, k), np.float32)
            for i in range(n):
                packed.unpack(i, got[i])
            np.testing.assert_array_equal(got, want)


# ---- batch-invariance ----

MODELS = {
    "llama-f32": (Toy(kv_heads=2, heads=6, head_dim=20), "f32", "f32"),
    "qwen-bf16": (replace(MANNERS["qwen3"], format="bf16", inner=72), "bf16", "bf16"),
    "gemma-int8": (replace(MANNERS["gemma"], format="bf16", window=70), "int8", "int8"),
    "olmo-int4": (replace(MANNERS["olmo2"], format="bf16"), "int4", "bf16"),
    "llama-fp8": (Toy(kv_heads=2, heads=6, head_dim=20, format="bf16"), "fp8", "int8"),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_batch_invariant(isa: str, name: str, rng: np.random.Generator) -> None:
    """50 random mixes a model and path (250 a path): prompts, chunk sizes, pages, 1 and 2 threads; each sequence's
    logits and tokens are those of it running alone, whole, on one thread."""
    toy, weights, kv_format = MODELS[name]
    raw = transformer(toy)
    program = replace(build(raw, weights, kv_format), context=2048)
    keep_company(program, random_weights(raw, seed=int(rng.integers(2**31))), isa, rng)


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("isa", ISAS)
def test_whole_models_agree_with_reference(manner: str, isa: str) -> None:
    raw = transformer(MANNERS[manner])
    program, arrays, state = build(raw), random_weights(raw), StateSpec(8, PAGE)
    batch = bind([Chunk(range(40), 0, [4, 1, 2], range(40)), Chunk([3, 5], 0, [7], [0, 1])], PAGE)
    want = ReferenceDevice().load(program, arrays, state).step(StepRequest(batch, logits=True)).logits
    got = HostDevice(2, isa).load(program, arrays, state).step(StepRequest(batch, logits=True)).logits
    assert want is not None and got is not None
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


# ---- errors ----


def test_nan_weights_give_token_minus_one(rng: np.random.Generator) -> None:
    """A NaN weight gives token -1 in every format, never a plausible token."""
    for weights in ("f32", "bf16", "int8", "int4", "fp8", "int8row"):
        raw = transformer(Toy(format="bf16"))
        arrays = dict(random_weights(raw).arrays)
        arrays["model.embed_tokens.weight"][3, 2] = np.nan
        untied = transformer(Toy(format="bf16", tied=False))
        arrays |= {
            t.source[0]: arrays.get(t.source[0], np.ones(t.shape, formats.BF16)) for t in untied.of_role("weight")
        }
        ex = HostDevice(1).load(build(untied, weights), ArrayWeights(arrays), StateSpec(4, PAGE))
        got = ex.step(StepRequest(bind([Chunk([3], 0, [0], [0]), Chunk([4], 0, [1], [0])], PAGE)))
        assert got.tokens[0] == -1 and np.isnan(got.logprobs[0]) and got.tokens[1] >= 0, weights


def test_refusals() -> None:
    raw = transformer()
    with pytest.raises(DeviceError, match="page_tokens=20.*multiple of 16"):
        HostDevice(1).load(raw, random_weights(raw), StateSpec(4, 20))
    with pytest.raises(DeviceError, match="threads=999"):
        HostDevice(999)
    with pytest.raises(DeviceError, match="instruction set 'mmx'"):
        HostDevice(1, "mmx")
    ex = HostDevice(1).load(raw, random_weights(raw), StateSpec(4, PAGE))
    with pytest.raises(DeviceError, match="token id 61 is outside 0..60"):
        ex.step(StepRequest(bind([Chunk([61], 0, [0], [0])], PAGE)))
    with pytest.raises(DeviceError, match="slot 64 is outside 0..63"):
        ex.step(StepRequest(bind([Chunk([1] * 17, 0, [0, 4], [0])], PAGE)))
    arrays = dict(random_weights(raw).arrays)
    arrays["model.layers.0.attn.q_proj.weight"] = np.ones((32, 31), np.float32)
    with pytest.raises(DeviceError, match=r"q_proj.*\[32, 31\]"):
        HostDevice(1).load(raw, ArrayWeights(arrays), StateSpec(4, PAGE))


def test_roofs_are_measured() -> None:
    assert _native.read_bandwidth(1, 8, 2) > 1e8
    assert _native.matrix_peak(1, "bf16", 0, 2) > 1e7
