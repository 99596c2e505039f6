"""The ops of mixtures of experts, compared with transformers' modules and with computations written out.

Also their shape rules, and their work compared with numbers worked out by hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.op_cases import apply, close, quick, random, refuses, seeds, tensors, torched
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV4Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    PhimoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from intaglio import formats
from intaglio.batch import Chunk, bind
from intaglio.ops import Experts, Linear, Route
from intaglio.ops.op import Work
from intaglio.program.expert_placement import ExpertPlacement, turns

COUNT, TOP, HIDDEN = 12, 3, 16
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_attention_heads": 2, "pad_token_id": 0, "vocab_size": 8}


def routed(op: Route, logits: np.ndarray, **more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(weights, ids), once the shape rule has agreed."""
    table = tensors(logits=f"f32[T, {logits.shape[1]}]") | {
        n: tensors(x=f"f32[{len(v)}]")["x"] for n, v in more.items()
    }
    said = op.shapes(table)
    got = op.reference({"logits": logits, **more}, None)  # type: ignore[arg-type]
    assert list(got) == list(said) == ["p", "i"]
    assert all(
        got[n].shape == (len(logits), op.top) and got[n].dtype == formats.get(f).dtype for n, (_, f) in said.items()
    )
    return got["p"], got["i"]


LOCAL = {"num_local_experts": COUNT, "num_experts_per_tok": TOP}
ROUTERS = {
    "mixtral": (MixtralTopKRouter, MixtralConfig(**SIZES, **LOCAL), {"normalise": True}),
    "granite": (GraniteMoeTopKRouter, GraniteMoeConfig(**SIZES, **LOCAL), {"score": "chosen"}),
    "deepseek v2": (
        DeepseekV2TopkRouter,
        DeepseekV2Config(
            **SIZES, n_routed_experts=COUNT, num_experts_per_tok=TOP, n_group=4, topk_group=2,
            routed_scaling_factor=1.5, topk_method="group_limited_greedy",
        ),
        {"groups": 4, "kept_groups": 2, "scale": 1.5},
    ),
    "deepseek v3": (
        DeepseekV3TopkRouter,
        DeepseekV3Config(**SIZES, n_routed_experts=COUNT, num_experts_per_tok=TOP, n_group=3, topk_group=2),
        {"score": "sigmoid", "groups": 3, "kept_groups": 2, "group_best": 2, "normalise": True, "scale": 2.5},
    ),
    "phimoe": (
        PhimoeTopKRouter, PhimoeConfig(**SIZES, num_local_experts=COUNT, router_jitter_noise=0.2),
        {"score": "sparsemixer", "jitter": 0.2, "top": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ROUTERS)
@quick
@given(seed=seeds)
def test_route(family: str, seed: int) -> None:
    """As the router of each family decides and weighs, in whatever order it lists the chosen."""
    module, config, fields = ROUTERS[family]
    router = module(config).eval()
    x, w, b = random(seed, 9, HIDDEN), random(seed + 1, COUNT, HIDDEN), random(seed + 2, COUNT)
    router.weight.data = torch.from_numpy(w)
    more = {}
    if family == "deepseek v3":
        router.e_score_correction_bias.data = torch.from_numpy(b)
        more = {"bias": b}
    with torch.no_grad():
        logits, weights, ids = router(torch.from_numpy(x))
    op = Route(site="s", logits="logits", weights="p", ids="i", **{"top": TOP, **fields}, **{n: n for n in more})
    got, chosen = routed(op, logits.numpy(), **more)
    order, own = np.argsort(ids.numpy(), axis=1), np.argsort(chosen, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(chosen, own, 1), np.take_along_axis(ids.numpy(), order, 1))
    close(np.take_along_axis(got, own, 1), np.take_along_axis(weights.numpy(), order, 1), 2e-6)


@quick
@given(seed=seeds, normalise=st.booleans())
def test_route_with_factors_of_experts(seed: int, normalise: bool) -> None:
    """As Gemma 4's router weighs, whose sum may be something else than 1."""
    logits, factors = random(seed, 7, COUNT), random(seed + 1, COUNT)
    op = Route(site="s", logits="logits", weights="p", ids="i", top=TOP, normalise=normalise, scale=1.5)
    plain, ids = routed(op, logits)
    got, chosen = routed(replace(op, factors="f"), logits, f=factors)
    np.testing.assert_array_equal(chosen, ids)
    np.testing.assert_array_equal(got, plain * factors[ids])


def test_route_breaks_ties_by_the_lowest_index() -> None:
    logits = np.array([[1, 2, 2, 0, 2], [3, 3, 3, 3, 3]], np.float32)
    for score in ("softmax", "sigmoid", "chosen"):
        _, ids = routed(Route(site="s", logits="logits", weights="p", ids="i", top=3, score=score), logits)
        assert ids.tolist() == [[1, 2, 4], [0, 1, 2]]
    grouped = Route(site="s", logits="logits", weights="p", ids="i", top=2, groups=2, kept_groups=1)
    assert routed(grouped, np.array([[1, 5, 5, 1]], np.float32))[1].tolist() == [[1, 0]]  # the first of equal groups


def test_route_lists_the_best_first_and_softplus_is_its_formula() -> None:
    logits = random(3, 5, COUNT) * 20
    weights, ids = routed(Route(site="s", logits="logits", weights="p", ids="i", top=4, score="sqrt_softplus"), logits)
    assert (np.diff(weights, axis=1) <= 0).all()
    close(weights, torch.nn.functional.softplus(torched(np.take_along_axis(logits, ids, 1))).sqrt(), 1e-6)


def test_route_by_a_table() -> None:
    """As transformers' DeepseekV4HashRouter: the table chooses the experts of an id, the scores only weigh them."""
    batch, x, w = bind([Chunk([3, 0, 6, 3], 0, [0])], 4), random(5, 4, HIDDEN), random(6, COUNT, HIDDEN)
    table = np.random.default_rng(7).integers(0, COUNT, (7, TOP))
    config = DeepseekV4Config(
        hidden_size=HIDDEN, n_routed_experts=COUNT, num_experts_per_tok=TOP, vocab_size=7, routed_scaling_factor=1.5
    )
    router = DeepseekV4HashRouter(config).eval()
    router.weight.data, router.tid2eid.data = torch.from_numpy(w), torch.from_numpy(table)
    with torch.no_grad():
        logits, weights, ids = router(torch.from_numpy(x), torch.from_numpy(batch.tokens))
    names: dict[str, Any] = {"site": "s", "logits": "logits", "weights": "p", "ids": "i", "table": "t"}
    op = Route(**names, top=TOP, score="sqrt_softplus", normalise=True, scale=1.5)
    got = op.reference({"logits": logits.numpy(), "t": table.astype(np.int32)}, batch)
    np.testing.assert_array_equal(got["i"], ids.numpy())
    close(got["p"], weights.numpy(), 2e-6)
    types = {"logits": f"f32[T, {COUNT}]", "p": f"f32[T, {TOP}]", "i": f"i32[T, {TOP}]", "t": f"i32[7, {TOP}]"}
    plain = replace(op, table=None).work(tensors(**types), batch)
    assert op.work(tensors(**types), batch) == plain + Work(weight_bytes=4 * TOP * 4)
    refuses(op, rf"t is i32\[7, 9\]; wanted i32\[vocabulary, {TOP}\]", **{**types, "t": "i32[7, 9]"})
    refuses(replace(op, score="chosen"), "t lists the experts; score=chosen", **types)
    refuses(replace(op, bias="bias"), "t lists the experts", **types, bias=f"f32[{COUNT}]")


def test_route_refuses() -> None:
    def op(**fields: object) -> Route:
        return Route(site="s", logits="x", weights="p", ids="i", **{"top": 2, **fields})  # type: ignore[arg-type]

    refuses(op(score="max"), "score='max'; use one of softmax, sigmoid", x="f32[T, 8]")
    refuses(op(top=9), r"top=9 is outside 1\.\.8", x="f32[T, 8]")
    refuses(op(bias="bias"), r"bias is f32\[7\]; wanted \[8\]", x="f32[T, 8]", bias="f32[7]")
    refuses(op(factors="f"), r"f is f32\[7\]; wanted \[8\]", x="f32[T, 8]", f="f32[7]")
    refuses(op(groups=3, kept_groups=1), "groups=3 does not divide the 8 experts", x="f32[T, 8]")
    refuses(op(groups=4, kept_groups=1, top=3), "kept_groups=1 of 4 groups of 2 for top=3", x="f32[T, 8]")
    refuses(op(groups=4, kept_groups=2, group_best=3), r"group_best=3 is outside 1\.\.2", x="f32[T, 8]")
    refuses(op(score="chosen", groups=2, kept_groups=1), "chosen takes neither groups nor a bias", x="f32[T, 8]")


def test_route_work() -> None:
    table = tensors(logits="f32[T, 8]", p="f32[T, 2]", i="i32[T, 2]")
    op = Route(site="s", logits="logits", weights="p", ids="i", top=2)
    batch = bind([Chunk(range(5), 0, [0, 1])], 4)
    assert op.work(table, batch) == Work(8 * 5 * 8, 0, 0, 5 * 4 * (8 + 2 + 2))


def mixture(seed: int, rows: int, inner: int, n: int = HIDDEN, biased: bool = False) -> dict[str, np.ndarray]:
    """Operands of an experts op, each token with experts of its own."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(COUNT)[:TOP] for _ in range(rows)]).astype(np.int32)
    v = {"x": random(seed, rows, HIDDEN), "p": random(seed + 1, rows, TOP), "i": ids}
    for j, (name, shape) in enumerate([("gate", (inner, HIDDEN)), ("up", (inner, HIDDEN)), ("down", (n, inner))]):
        v[name] = random(seed + 10 + j, COUNT, *shape)
        if biased:
            v[name + "_bias"] = random(seed + 20 + j, COUNT, shape[0])
    return v


def run(op: Experts, v: dict[str, np.ndarray]) -> np.ndarray:
    batch = bind([Chunk(range(len(v["x"])), 0, range(9))], 4)

    def type_of(n: str) -> str:
        rows = "T" if n in ("x", "p", "i", "r") else v[n].shape[0]
        return f"{'i32' if v[n].dtype == np.int32 else 'f32'}[{', '.join(map(str, (rows, *v[n].shape[1:])))}]"

    table = tensors(**{n: type_of(n) for n in v})
    said, got = op.shapes(table), op.reference(v, batch)
    assert list(said) == list(got) == ["out"]
    assert got["out"].shape == (len(v["x"]), said["out"][0][1]) and got["out"].dtype == np.float32
    return got["out"]


def experts(v: dict[str, np.ndarray], **fields: object) -> Experts:
    biases = {n: n for n in v if n.endswith("_bias")}
    names = {"x": "x", "weights": "p", "ids": "i", "gate": "gate", "up": "up", "down": "down"}
    return Experts(site="s", out="out", **{**names, **biases, **fields})  # type: ignore[arg-type]


@quick
@given(seeds, st.integers(1, 9), st.integers(1, 30))
def test_experts(seed: int, rows: int, inner: int) -> None:
    v = mixture(seed, rows, inner)
    module = MixtralExperts(MixtralConfig(**{**SIZES, "intermediate_size": inner}, num_local_experts=COUNT)).double()
    module.config._experts_implementation = "eager"
    module.gate_up_proj.data = torched(np.concatenate([v["gate"], v["up"]], axis=1))
    module.down_proj.data = torched(v["down"])
    with torch.no_grad():
        want = module(torched(v["x"]), torch.from_numpy(v["i"]).long(), torched(v["p"])).numpy()
    close(run(experts(v), v), want, 4e-6)
    r = random(seed + 5, rows, HIDDEN)
    close(run(replace(experts(v), residual="r"), {**v, "r": r}), want + r, 4e-6)


@quick
@given(seeds, st.integers(1, 9))
def test_experts_with_biases_and_a_clamped_gate(seed: int, rows: int) -> None:
    v = mixture(seed, rows, 24, biased=True)
    config = GptOssConfig(**SIZES, num_local_experts=COUNT, num_hidden_layers=1, swiglu_limit=2.0)
    module = GptOssExperts(config).double()
    module.config._experts_implementation = "eager"
    both = np.stack([v["gate"], v["up"]], axis=2).reshape(COUNT, -1, HIDDEN)  # gate and up alternate
    module.gate_up_proj.data = torched(both.swapaxes(1, 2))
    module.gate_up_proj_bias.data = torched(np.stack([v["gate_bias"], v["up_bias"]], axis=2).reshape(COUNT, -1))
    module.down_proj.data, module.down_proj_bias.data = torched(v["down"].swapaxes(1, 2)), torched(v["down_bias"])
    with torch.no_grad():
        want = module(torched(v["x"]), torch.from_numpy(v["i"]).long(), torched(v["p"])).numpy()
    close(run(experts(v, alpha=1.702, limit=2.0, shift=1.0), v), want, 4e-6)


@quick
@given(seeds, st.integers(1, 9), st.booleans())
def test_experts_without_a_gate(seed: int, rows: int, biased: bool) -> None:
    """Nemotron-H's, whose activation is squared ReLU."""
    v = {n: x for n, x in mixture(seed, rows, 24, biased=biased).items() if not n.startswith("gate")}
    want = np.zeros((rows, HIDDEN))
    for t in range(rows):
        for j, e in enumerate(v["i"][t]):
            up, down = (torched(v[f"{n}_bias"][e]) if biased else 0.0 for n in ("up", "down"))
            inner = torch.nn.functional.relu(torched(v["up"][e]) @ torched(v["x"][t]) + up).square()
            want[t] += v["p"][t, j] * (torched(v["down"][e]) @ inner + down).numpy()
    close(run(experts(v, gate=None, activation="relu2"), v), want, 8e-6)


def test_experts_with_scaled_input() -> None:
    v = mixture(4, 7, 24)
    want = np.zeros((7, HIDDEN))
    for t in range(7):
        for j, e in enumerate(v["i"][t]):
            x = torched(v["x"][t] * v["p"][t, j])
            inner = torch.nn.functional.gelu(torched(v["gate"][e]) @ x) * (torched(v["up"][e]) @ x)
            want[t] += (torched(v["down"][e]) @ inner).numpy()
    close(run(experts(v, scale_input=True, activation="gelu"), v), want, 4e-6)


@quick
@given(seeds, st.integers(1, 9), st.integers(1, COUNT - 1))
def test_shares_of_experts_add_up(seed: int, rows: int, first: int) -> None:
    """Two ranks' experts, each with its own stacks; a rank that has none of a token's experts gives it zeros."""
    v = mixture(seed, rows, 11, biased=True)
    op, parts = experts(v), []
    for low, high in ((0, first), (first, COUNT)):
        held = {n: x[low:high] if n.startswith(("gate", "up", "down")) else x for n, x in v.items()}
        parts.append(run(replace(op, first=low, of=COUNT), held))
        elsewhere = ((v["i"] < low) | (v["i"] >= high)).all(axis=1)
        assert not parts[-1][elsewhere].any()
    close(parts[0] + parts[1], run(op, v).astype(np.float64), 4e-6)


@quick
@given(seeds, st.integers(1, 9), st.integers(1, 4), st.integers(0, 6), st.booleans())
def test_experts_by_placement(seed: int, rows: int, ranks: int, redundant: int, residual: bool) -> None:
    """Each slot's result is that of one rank, with zeros on the others, and the slots of a token are its experts."""
    held = ExpertPlacement.even(["s"], COUNT, ranks, min(redundant, (ranks - 1) * COUNT)).layers["s"]
    v = mixture(seed, rows, 11, biased=True)
    base, total = experts(v, slots=TOP + residual, of=COUNT), np.zeros((rows, (TOP + residual) * HIDDEN), np.float32)
    for rank, own in enumerate(held):
        mine = {n: x[list(own)] if n.startswith(("gate", "up", "down")) else x for n, x in v.items()}
        if residual and rank == 0:
            mine["r"] = random(seed + 5, rows, HIDDEN)
        got = run(replace(base, residual="r" if "r" in mine else None, **turns(held, rank)), mine)
        assert not (got.astype(bool) & total.astype(bool)).any()
        total += got
    parts = total.reshape(rows, TOP + residual, HIDDEN)
    close(parts[:, :TOP].sum(axis=1), run(experts(v), v).astype(np.float64), 4e-6)
    if residual:
        np.testing.assert_array_equal(parts[:, TOP], random(seed + 5, rows, HIDDEN))


@quick
@given(seeds, st.integers(1, 9), st.integers(1, 30))
def test_columns_in_an_order_of_each_expert(seed: int, rows: int, inner: int) -> None:
    """Matrices whose columns change places, and orders that say so, are the matrices as they were."""
    v, rng = mixture(seed, rows, inner), np.random.default_rng(seed)
    orders = {n: rng.permuted(np.tile(np.arange(k), (COUNT, 1)), axis=1) for n, k in (("o", HIDDEN), ("q", inner))}
    held = v | {n: x.astype(np.int32) for n, x in orders.items()}
    for name, by in (("gate", "o"), ("up", "o"), ("down", "q")):
        held[name] = np.take_along_axis(v[name], orders[by][:, None], axis=2)
    close(run(experts(held, order="o", down_order="q"), held), run(experts(v), v).astype(np.float64), 4e-6)


@pytest.mark.parametrize("format", ["int8g32", "int4g32"])
def test_experts_in_groups_are_their_linears(format: str) -> None:
    v = mixture(9, 6, 40)
    stacks = {
        n: formats.quantise(v[n].reshape(-1, v[n].shape[2]), format).stacked(v[n].shape) for n in ("gate", "up", "down")
    }
    op = experts(v, x_format="int8")
    got = op.reference({**v, **stacks}, None)["out"]  # type: ignore[arg-type]
    for t in range(6):
        want = np.zeros(HIDDEN, np.float64)
        for j, e in enumerate(v["i"][t]):

            def linear(x: np.ndarray, name: str, e: int = int(e)) -> np.ndarray:
                return apply(Linear(site="l", x="x", w="w", out="out", x_format="int8"), x=x, w=stacks[name].matrix(e))

            x = v["x"][t : t + 1]
            inner = torch.nn.functional.silu(torch.from_numpy(linear(x, "gate"))).numpy() * linear(x, "up")
            want += v["p"][t, j] * linear(inner, "down")[0]
        close(got[t], want, 2e-5)


def test_experts_refuses() -> None:
    own = {"x": "f32[T, 8]", "p": "f32[T, 2]", "i": "i32[T, 2]"}
    own |= {"gate": "f32[4, 6, 8]", "up": "f32[4, 6, 8]", "down": "f32[4, 8, 6]"}
    op = experts({})
    assert op.shapes(tensors(**own)) == {"out": (("T", 8), "f32")}
    refuses(op, r"i is f32\[T, 2\]; wanted i32", **{**own, "i": "f32[T, 2]"})
    refuses(op, r"p is f32\[T, 2\] but i is i32\[T, 3\]", **{**own, "i": "i32[T, 3]"})
    refuses(op, r"gate is f32\[6, 8\]; wanted a stack of matrices", **{**own, "gate": "f32[6, 8]"})
    refuses(op, r"gate is f32\[4, 6, 9\] but x has 8 columns", **{**own, "gate": "f32[4, 6, 9]"})
    refuses(op, r"gate is f32\[4, 6, 8\] but up is f32\[4, 5, 8\]", **{**own, "up": "f32[4, 5, 8]"})
    refuses(op, r"down is f32\[4, 8, 5\]; wanted \[4, N, 6\] as gate", **{**own, "down": "f32[4, 8, 5]"})
    refuses(op, "gate is f32 but up is bf16; wanted one format", **{**own, "up": "bf16[4, 6, 8]"})
    refuses(op, "x_format=f32 with int8g32 weights", **{**own, "down": "int8g32[4, 8, 6]"})
    many = {"p": "f32[T, 5]", "i": "i32[T, 5]"}
    refuses(op, "chooses 5 of 4 experts", **{**own, **many})
    refuses(replace(op, x_format="int8"), "x_format=int8 with f32 weights", **own)
    refuses(replace(op, activation="exp"), "activation='exp'; use one of silu", **own)
    refuses(replace(op, alpha=0.0), "alpha=0.0, limit=0.0; above 0", **own)
    refuses(replace(op, first=3, of=6), r"first=3, of=6, but gate has 4 experts", **own)
    placed = {"held": (0, 2, 3, 5), "copy": (0, 0, 1, 0), "copies": (1, 1, 2, 1), "of": 6, "rank": 1, "ranks": 2}
    assert replace(op, **placed, slots=2).shapes(tensors(**own)) == {"out": (("T", 16), "f32")}
    refuses(replace(op, **{**placed, "held": (0, 2, 2, 5)}), "wanted 4 different experts of 6, ascending", **own)
    refuses(replace(op, **{**placed, "held": (0, 2, 3, 6)}), "wanted 4 different experts of 6, ascending", **own)
    refuses(replace(op, **{**placed, "copy": (0, 0, 2, 0)}), "wanted 0 <= copy < copies for each matrix", **own)
    refuses(replace(op, **{**placed, "rank": 2}), "rank=2, ranks=2; wanted 0 <= rank < ranks", **own)
    refuses(replace(op, slots=4), "slots=4, but i has 2 columns; allowed: 0, 3 or, without a residual, 2", **own)
    refuses(replace(op, up_bias="b"), "gate and up have biases both, or none", **own, b="f32[4, 6]")
    plain = replace(op, gate=None)
    assert plain.shapes(tensors(**own)) == {"out": (("T", 8), "f32")}
    refuses(replace(plain, gate_bias="b"), "gate_bias b without a gate", **own, b="f32[4, 6]")
    refuses(replace(plain, limit=7.0), "limit=7.0, alpha=1.0, shift=0.0; without a gate, wanted 0, 1 and 0", **own)
    refuses(plain, r"up is f32\[4, 6, 9\] but x has 8 columns", **{**own, "up": "f32[4, 6, 9]"})
    three = {"gate_bias": "g", "up_bias": "u", "down_bias": "d"}
    biases = {"g": "f32[4, 6]", "u": "f32[4, 7]", "d": "f32[4, 8]"}
    refuses(replace(op, **three), r"u is f32\[4, 7\]; wanted \[4, 6\]", **own, **biases)
    refuses(replace(op, residual="r"), r"residual r is f32\[T, 9\]", **own, r="f32[T, 9]")
    refuses(replace(op, order="o"), r"o is i32\[4, 6\]; wanted i32\[4, 8\]", **own, o="i32[4, 6]")
    refuses(replace(op, down_order="o"), r"o is f32\[4, 6\]; wanted i32\[4, 6\]", **own, o="f32[4, 6]")


def test_experts_work_counts_the_experts_even_routing_touches() -> None:
    own = {"x": "f32[T, 8]", "p": "f32[T, 2]", "i": "i32[T, 2]", "out": "f32[T, 8]"}
    table = tensors(**own, gate="bf16[4, 6, 8]", up="bf16[4, 6, 8]", down="bf16[4, 8, 6]")
    op = experts({})
    for n in ("gate", "up", "down"):
        table[n] = replace(table[n], role="weight")
    one, two = (bind([Chunk(range(n), 0, [0])], 4) for n in (1, 2))
    each = 3 * 6 * 8
    assert op.work(table, one) == Work(2 * 2 * each, 2 * each * 2, 0, 4 * (8 + 2 + 2 + 8))
    placed = replace(op, held=(0, 1, 2, 3), copy=(0, 1, 0, 0), copies=(2, 2, 1, 1), of=8, ranks=2)
    assert placed.work(table, two).flops == 2 * 2 * 2 * each * 3 // 8
    assert op.work(table, two) == Work(2 * 2 * 2 * each, 3 * each * 2, 0, 2 * 4 * (8 + 2 + 2 + 8))  # 4 * (1 - 1/4)
