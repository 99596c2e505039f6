"""Experts, latent attention, sinks and chunked attention on the host: every instruction set against the reference.

Sizes are random and odd. Models with experts are batch-invariant.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.host_bench import EPS, ISAS, PAGE, Bench, finish, hold, keep_company
from support.tiny import tiny

from intaglio import formats
from intaglio.batch import Chunk, bind
from intaglio.compiler import build
from intaglio.devices import ArrayWeights, DeviceError, StateSpec, StepRequest
from intaglio.devices.host import HostDevice
from intaglio.models import Checkpoint, port
from intaglio.ops import Attend, Experts, HeadLinear, KvWrite, Linear, Map, Rope, Route, Sample, Select
from intaglio.ops.experts import SCORES

pytest.importorskip("transformers")
Rng = np.random.Generator


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("trial", range(3))
def test_route(score: str, trial: int, rng: Rng) -> None:
    """Weights agree within a few roundings; they are all different, so wrong ids would show."""
    groups = int(rng.choice([0, 3, 4])) if score not in ("chosen", "sparsemixer") else 0
    experts = int(rng.choice([12, 24, 60]))
    fields: dict[str, Any] = {"top": int(rng.integers(1, 5)), "normalise": bool(rng.integers(2)), "scale": 1.7}
    if groups:
        fields |= {"groups": groups, "kept_groups": 2, "group_best": int(rng.integers(1, 3))}
    if score == "sparsemixer":
        fields |= {"jitter": 0.1}
    bench = Bench(rng, 33, experts)
    if score not in ("chosen", "sparsemixer") and rng.integers(2):
        fields["bias"] = bench.weight("bias", rng.normal(size=experts) * 0.1)
    if rng.integers(2):
        fields["factors"] = bench.weight("factors", rng.uniform(-1, 1, size=experts))
    y = bench.b.op(Route, "y", bench.x, ids="ids", score=score, **fields)
    hold(bench.run(y), 64 * EPS * 1.7)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_route_by_a_table(score: str, rng: Rng) -> None:
    """Experts are those listed for the token's id, in that order; a wrong one would show in its weight."""
    bench, experts, top = Bench(rng, 33, 24), 24, int(rng.integers(1, 5))
    table = bench.b.weight("table", (33, top), "table", "i32")
    bench.arrays["table"] = rng.integers(0, experts, (33, top)).astype(np.int32)
    fields: dict[str, Any] = {"top": top, "normalise": bool(rng.integers(2)), "scale": 1.7, "score": score}
    tokens = rng.permutation(33).tolist()
    batch = bind([Chunk(tokens[:20], 0, [0, 1]), Chunk(tokens[20:], 0, [2])], PAGE)
    hold(bench.run(bench.b.op(Route, "y", bench.x, ids="ids", table=table, **fields), batch), 64 * EPS * 1.7)


def test_route_by_a_table_of_unknown_experts(rng: Rng) -> None:
    bench = Bench(rng, 9, 8)
    table = bench.b.weight("table", (9, 2), "table", "i32")
    bench.arrays["table"] = np.full((9, 2), 8, np.int32)
    y = bench.b.op(Route, "y", bench.x, ids="ids", table=table, top=2)
    bench.x = bench.b.op(Map, "z", y, expr="a")
    with pytest.raises(DeviceError, match="table lists expert 8 of 8"):
        HostDevice(1).load(finish(bench), ArrayWeights(bench.arrays), StateSpec(2, PAGE))


def test_route_breaks_ties_by_the_lowest_id(rng: Rng) -> None:
    """With equal logits the first experts are chosen; each has its own column of weights, so that a wrong one shows."""
    bench = Bench(rng, 5, 8)
    level = bench.b.op(Map, "level", bench.x, expr="a * 0.0")
    y = bench.b.op(Route, "route", level, ids="ids", top=3)
    gate, *rest = [
        bench.weight(n, rng.normal(size=s)) for n, s in (("g", (8, 6, 8)), ("u", (8, 6, 8)), ("d", (8, 8, 6)))
    ]
    y = bench.b.op(Experts, "y", bench.x, y, "ids", *rest, gate=gate)
    hold(bench.run(y), 1e-5)


WEIGHTS = ["f32", "f16", "bf16", "bf16 x bf16", "int8g32", "int8g128", "int4g32"]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("trial", range(3))
def test_experts(kind: str, trial: int, gated: bool, rng: Rng) -> None:
    format, _, rounded = kind.partition(" x ")
    grouped = formats.get(format).grouped
    rows, k, inner = int(rng.choice([1, 2, 9, 70])), int(rng.integers(5, 200)), int(rng.integers(3, 90))
    count, top = int(rng.choice([3, 8, 17])), int(rng.integers(1, 4))
    bench = Bench(rng, rows, k)
    logits = bench.matrix("scores", rows, count)
    weights = bench.b.op(Route, "route", logits, ids="ids", top=top, normalise=True)
    shapes = {"gate": (inner, k), "up": (inner, k), "down": (k, inner)}
    if not gated:
        del shapes["gate"]
    stacks = {n: bench.weight(n, rng.normal(size=(count, *s)) / s[1] ** 0.5, format) for n, s in shapes.items()}
    fields: dict[str, Any] = {"x_format": "int8" if grouped else rounded or "f32", "gate": stacks.get("gate")}
    if rng.integers(2):
        fields |= {f"{n}_bias": bench.weight(n + ".bias", rng.normal(size=(count, s[0]))) for n, s in shapes.items()}
    if gated and rng.integers(2):
        fields |= {"alpha": 1.7, "limit": 1.2, "shift": 1.0}
    if rng.integers(2):
        fields["residual"] = bench.matrix("r", rows, k)
    fields |= {"activation": str(rng.choice(["silu", "gelu", "relu2"])), "scale_input": bool(rng.integers(2))}
    for name, columns in (("order", k), ("down_order", inner)):
        if rng.integers(2):
            own = rng.permuted(np.tile(np.arange(columns, dtype=np.int32), (count, 1)), axis=1)
            fields[name] = bench.weight(name, own, "i32")
    y = bench.b.op(Experts, "y", bench.x, weights, "ids", stacks["up"], stacks["down"], **fields)
    results = bench.run(y)
    size = np.abs(results["reference"]).max()
    # A value of the inner row near a rounding boundary may round differently: one step of its format in one term.
    step = {"f32": 0.0, "bf16": 2.0**-8, "int8": 2.0**-7}[fields["x_format"]]
    hold(results, size * (60 * EPS * (k + inner) ** 0.5 + 4 * step / inner**0.5))


@pytest.mark.parametrize("format", ["f32", "bf16", "f16"])
def test_head_linear(format: str, rng: Rng) -> None:
    heads, k, n, rest = (int(rng.integers(*span)) for span in ((1, 7), (1, 90), (1, 90), (0, 20)))
    bench = Bench(rng, 23, heads * (k + rest))
    w = bench.weight("w", rng.normal(size=(heads, n, k)) / k**0.5, format)
    hold(bench.run(bench.b.op(HeadLinear, "y", bench.x, w)), 60 * EPS * k**0.5 * 5)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rope_trailing(style: str, rng: Rng) -> None:
    bench = Bench(rng, 9, 3 * 22)
    table = bench.b.const("f", [1.0, 0.3, 0.01])
    y = bench.b.op(Rope, "y", bench.x, "positions", table, head_dim=22, style=style, trailing=True)
    hold(bench.run(y), 16 * EPS * 5)


def test_map_with_a_column(rng: Rng) -> None:
    bench = Bench(rng, 9, 37)
    b, c = bench.matrix("b", 9, 37), bench.matrix("c", 9, 1)
    hold(bench.run(bench.b.op(Map, "y", bench.x, b=b, c=c, expr="a + b * sigmoid(c)")), 64 * EPS * 8)


def latent(bench: Bench, length: int, heads: int, rank: int, rope: int, cache: str, **fields: Any) -> str:
    r, q = bench.matrix("r", length, rope), bench.matrix("q", length, heads * (rank + rope))
    caches = [bench.b.cache(n, 1, d, cache) for n, d in (("latent_cache", rank), ("rope_cache", rope))]
    bench.b.op(KvWrite, "kv_write", bench.x, r, *caches)
    fields |= {"heads": heads, "scale": (rank + rope) ** -0.5, "rope_cache": caches[1]}
    return bench.b.op(Attend, "y", q, caches[0], caches[0], **fields)


@pytest.mark.parametrize("cache", ["f32", "bf16", "int8row"])
@pytest.mark.parametrize("trial", range(5))
def test_latent_attention(cache: str, trial: int, rng: Rng) -> None:
    heads, rank, rope = int(rng.choice([1, 5, 33, 64])), int(rng.choice([8, 20, 72])), int(rng.choice([2, 12]))
    length = int(rng.choice([1, 5, 40, 530, 900]))
    bench = Bench(rng, length, rank)
    y = latent(bench, length, heads, rank, rope, cache)
    pages = [int(p) for p in rng.permutation(64)[: -(-length // PAGE)]]
    results = bench.run(y, bind([Chunk(range(length), 0, pages, [0])], PAGE))
    score = (rank + rope + 32) * EPS * 6 * np.sqrt(rank + rope)
    bias = 2 * EPS * 0.5 * length  # of the products of slope and distance
    hold(results, (2 * score + 2 * bias + (length + 64) * EPS) * 5)


@pytest.mark.parametrize("cache", ["f32", "bf16", "int8row"])
def test_slots_beyond_a_sequence_are_not_read(cache: str, rng: Rng) -> None:
    """A sequence reuses a page that another one left full of NaN; only slots written since may be read."""
    bench = Bench(rng, 40, 20)
    latent(bench, 40, 3, 20, 4, cache)
    bench.b.op(Linear, "lm_head", "y", bench.weight("head", rng.normal(size=(40, 60))), out="all")
    program = done(bench, "all")
    own = bind([Chunk(range(5), 0, [1], range(5))], PAGE)
    bad = {**bench.arrays, "x.table": np.where(np.arange(40)[:, None] >= 20, np.nan, bench.arrays["x.table"])}
    for isa in ISAS:
        want = (
            HostDevice(2, isa)
            .load(program, arrays(bench), StateSpec(4, PAGE))
            .step(StepRequest(own, logits=True))
            .logits
        )
        ex = HostDevice(2, isa).load(program, ArrayWeights(bad), StateSpec(4, PAGE))
        left = ex.step(StepRequest(bind([Chunk(range(20, 36), 0, [1], [0])], PAGE), logits=True)).logits
        assert left is not None and np.isnan(left).all()
        np.testing.assert_array_equal(ex.step(StepRequest(own, logits=True)).logits, want)


def done(bench: Bench, logits: str) -> Any:
    rows = bench.b.op(Select, "select", logits, "rows")
    bench.b.op(Map, "out", rows, expr="a", out="logits", role="output")
    bench.b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
    return bench.b.done()


def arrays(bench: Bench) -> Any:
    return ArrayWeights(bench.arrays)


@pytest.mark.parametrize("cache", ["f32", "bf16", "int8row"])
@pytest.mark.parametrize("trial", range(5))
def test_sinks_slopes_chunks_and_temperature(cache: str, trial: int, rng: Rng) -> None:
    kv_heads, share, head_dim = int(rng.choice([1, 2])), int(rng.choice([1, 3, 40])), int(rng.choice([20, 64]))
    length = int(rng.choice([5, 40, 700, 1000]))
    bench = Bench(rng, length, kv_heads * head_dim)
    v, q = bench.matrix("v", length, kv_heads * head_dim), bench.matrix("q", length, kv_heads * share * head_dim)
    caches = [bench.b.cache(n, kv_heads, head_dim, cache) for n in ("k_cache", "v_cache")]
    bench.b.op(KvWrite, "kv_write", bench.x, v, *caches)
    fields: dict[str, Any] = {"heads": kv_heads * share, "scale": head_dim**-0.5}
    fields |= [{"chunk": int(rng.choice([7, 64, 600]))}, {"window": 30}, {}][int(rng.integers(3))]
    if rng.integers(3):
        fields["sinks"] = bench.weight("sinks", rng.normal(size=kv_heads * share) * 3)
    if rng.integers(3):
        fields |= {"temper": 0.3, "temper_every": int(rng.choice([1, 50])), "temper_from": int(rng.integers(2))}
    if rng.integers(2):
        fields["slopes"] = bench.b.const("slopes", list(rng.uniform(0, 0.5, kv_heads * share)))
    y = bench.b.op(Attend, "y", q, *caches, **fields)
    pages = [int(p) for p in rng.permutation(64)[: -(-length // PAGE)]]
    results = bench.run(y, bind([Chunk(range(length), 0, pages, [0])], PAGE))
    score = (head_dim + 32) * EPS * 6 * np.sqrt(head_dim) * 3  # the attention temperature is at most 3
    hold(results, (2 * score + (length + 64) * EPS) * 5)


MIXED = {
    "qwen2moe": "f32", "gptoss": "int4", "deepseekv3": "bf16", "llama4": "int8", "deepseekv2": "int4g64",
}  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", MIXED)
def test_logits_are_batch_invariant(isa: str, family: str, tmp_path: Any, rng: Rng) -> None:
    """40 random batch compositions for each model and instruction set."""
    path = tiny(family, tmp_path, "bfloat16", max_position_embeddings=2048)
    checkpoint = Checkpoint.open(path)
    kv_format = "int8" if family == "deepseekv2" else "auto"
    keep_company(build(port(checkpoint), MIXED[family], kv_format), checkpoint, isa, rng, mixes=40)


def test_refusals(rng: Rng) -> None:
    bench = Bench(rng, 3, 70)
    bench.b.op(Route, "route", bench.x, ids="ids", top=65)
    program = done(bench, "route")
    with pytest.raises(DeviceError, match="route: top=65; the host's route supports up to 64"):
        HostDevice(1).load(program, arrays(bench), StateSpec(4, PAGE))
