"""Merging projections and fusing ops: which ops become one, which stay separate, and the names of results."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.toy import SAME, VOCABULARY, Toy, apart, finish, random_weights, run, site, transformer

from intaglio.compiler import build
from intaglio.compiler.fusions import fuse_epilogues, fuse_glu, fuse_residual_norm
from intaglio.compiler.projections import merge_projections
from intaglio.ops import Embed, Linear, Map, Norm
from intaglio.program import Builder, Program, verify

# merge_projections


def test_merged_projections_have_conventional_names() -> None:
    p = merge_projections(transformer(Toy(up_first=True, bias=True)))
    qkv = p.tensors["layers.0.attn.qkv_proj"]
    assert qkv.shape == ("T", 64)
    starts = {leaf: p.tensors[f"layers.0.attn.{leaf}_proj"].view for leaf in "qkv"}
    assert starts == {"q": (qkv.name, 0), "k": (qkv.name, 32), "v": (qkv.name, 48)}
    gate_up = p.tensors["layers.1.mlp.gate_up_proj.weight"]
    assert gate_up.source == ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")
    assert p.tensors["layers.1.mlp.gate_up_proj.bias"].shape == (80,)
    assert "layers.0.attn.q_proj.weight" not in p.tensors


def two_linears(first: dict[str, object], second: dict[str, object]) -> Program:
    """Two linears that read one x, each with fields of its own; their sum goes on."""
    b = Builder("two", 64)
    x = b.op(Embed, "embed", "tokens", b.weight("embed.weight", (VOCABULARY, 8), "embed"))
    made = []
    for leaf, fields in zip("ab", (first, second), strict=True):
        own = dict(fields)
        kept = own.pop("format", "f32")
        w = str(own.pop("w", f"{leaf}.weight"))
        if w not in b.tensors:
            b.weight(w, (8, 8), w, str(kept))
        if own.pop("biased", False):
            own["bias"] = b.weight(f"{leaf}.bias", (8,), f"{leaf}.bias")
        if own.pop("residual", False):
            own["residual"] = x
        made.append(b.op(Linear, str(own.pop("site", leaf)), x, w, **own))  # type: ignore[arg-type]
    y = b.op(Map, "both", made[0], b=made[1], expr="a * b")
    return finish(b, y)


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ({}, {}, "a_b"),
        ({"biased": True}, {"biased": True}, "a_b"),
        ({"scale": 0.5}, {"scale": 0.5}, "a_b"),
        ({"scale": 0.5}, {}, None),
        ({"biased": True}, {}, None),
        ({"activation": "silu"}, {"activation": "silu"}, None),
        ({"residual": True}, {}, None),
        ({"format": "bf16"}, {}, None),
        ({"format": "bf16", "x_format": "bf16"}, {"format": "bf16"}, None),
        ({"w": "shared"}, {"w": "shared"}, None),
        ({"site": "layers.0.attn.a"}, {"site": "layers.0.mlp.b"}, None),
        ({"site": "layers.0.attn.v_proj"}, {"site": "layers.0.attn.q_proj"}, "layers.0.attn.qv_proj"),
        ({"site": "layers.0.mlp.one_proj"}, {"site": "layers.0.mlp.two_proj"}, "layers.0.mlp.one_two_proj"),
    ],
)
def test_linears_merge_only_with_equal_attributes(
    first: dict[str, object], second: dict[str, object], name: str | None
) -> None:
    p = two_linears(first, second)
    merged = merge_projections(p)
    verify(merged)
    assert {op.site for op in merged.ops} - {op.site for op in p.ops} == ({name} if name else set())


def test_merged_name_avoids_existing_names() -> None:
    p = two_linears({}, {})
    taken = replace(p.ops[0], site="a_b")
    merged = merge_projections(p.with_ops((taken, *p.ops[1:]), p.tensors))
    assert site(merged, "a_b_merged").kind == "linear"


def test_views_of_merged_results_move_along() -> None:
    b = Builder("views", 64)
    x = b.op(Embed, "embed", "tokens", b.weight("embed.weight", (VOCABULARY, 8), "embed"))
    b.op(Linear, "a", x, b.weight("a.weight", (4, 8), "a"))
    b.op(Linear, "b", x, b.weight("b.weight", (8, 8), "b"))
    y = b.op(Map, "sum", "a", b=b.view("right", "b", 4, 8), expr="a + b")
    p = finish(b, y)
    merged = merge_projections(p)
    assert merged.tensors["right"].view == ("a_b", 8)
    weights = random_weights(p)
    assert apart(run(p, weights), run(merged, weights)) <= SAME


# The fusions


def test_a_llama_layer_is_ten_ops() -> None:
    p = build(transformer(Toy()))
    own = [op for op in p.ops if op.site.startswith("layers.1.")]
    assert [(op.site.removeprefix("layers.1."), op.kind) for op in own] == [
        ("attn.norm", "norm"), ("attn.qkv_proj", "linear"), ("attn.q_rope", "rope"), ("attn.k_rope", "rope"),
        ("attn.kv_write", "kv_write"), ("attn.attend", "attend"), ("attn.o_proj", "linear"), ("mlp.norm", "norm"),
        ("mlp.gate_up_proj", "linear"), ("mlp.down_proj", "linear"),
    ]  # fmt: skip
    assert site(p, "layers.1.attn.o_proj").inputs[-1] == "layers.0.mlp.down_proj"
    glu = site(p, "layers.1.mlp.gate_up_proj")
    assert isinstance(glu, Linear) and glu.glu and glu.activation == "silu"


def halves(expr: str, gate: tuple[int, int] = (0, 8), up: tuple[int, int] = (8, 16), **fields: object) -> Program:
    """expr of two views of one linear of 16 columns."""
    b = Builder("halves", 64)
    x = b.op(Embed, "embed", "tokens", b.weight("embed.weight", (VOCABULARY, 8), "embed"))
    y = b.op(Linear, "both", x, b.weight("both.weight", (16, 8), "both"), **fields)  # type: ignore[arg-type]
    y = b.op(Map, "glu", b.view("gate", y, *gate), b=b.view("up", y, *up), expr=expr)
    return finish(b, y)


@pytest.mark.parametrize(
    ("program", "activation"),
    [
        (halves("silu(a) * b"), "silu"),
        (halves("b * gelu(a)"), "gelu"),
        (halves("relu2(a) * b", scale=0.5), "relu2"),
        (halves("a * silu(b)", gate=(8, 16), up=(0, 8)), "silu"),
        (halves("a * silu(b)"), None),  # up first
        (halves("exp(a) * b"), None),  # not an activation of linear
        (halves("silu(a) + b"), None),
        (halves("a * b"), None),
        (halves("silu(a) * b", gate=(0, 8), up=(4, 12)), None),
        (halves("silu(a) * b", gate=(0, 4), up=(8, 12)), None),
        (halves("silu(a) * b", activation="tanh"), None),
    ],
)
def test_glu_fuses_the_two_halves(program: Program, activation: str | None) -> None:
    fused = fuse_glu(program)
    verify(fused)
    op = site(fused, "both")
    assert isinstance(op, Linear)
    assert (op.glu, op.activation) == ((True, activation) if activation else (False, op.activation))
    assert ("gate" in fused.tensors) == (activation is None)
    weights = random_weights(program)
    assert apart(run(program, weights), run(fused, weights)) <= SAME


def test_glu_is_not_fused_if_another_op_reads_the_result() -> None:
    b = Builder("shared", 64)
    x = b.op(Embed, "embed", "tokens", b.weight("embed.weight", (VOCABULARY, 8), "embed"))
    y = b.op(Linear, "both", x, b.weight("both.weight", (16, 8), "both"))
    y = b.op(Map, "glu", b.view("gate", y, 0, 8), b=b.view("up", y, 8, 16), expr="silu(a) * b")
    p = finish(b, b.op(Map, "again", y, b="up", expr="a + b"))
    assert fuse_glu(p) == p


def after_linear(expr: str, *, twice: bool = False, **fields: object) -> Program:
    """expr of x (a: the embedding) and of a linear's result (b), or of the result alone (a)."""
    b = Builder("epilogue", 64)
    x = b.op(Embed, "embed", "tokens", b.weight("embed.weight", (VOCABULARY, 8), "embed"))
    r = b.op(Norm, "early", x)
    fields = {n: r if v == "early" else v for n, v in fields.items()}
    y = b.op(Linear, "proj", x, b.weight("proj.weight", (8, 8), "proj"), **fields)  # type: ignore[arg-type]
    late = b.op(Norm, "late", x, norm="l2")  # written after the linear: the fused op must stand after it
    z = b.op(Map, "map", late, b=y, expr=expr) if "b" in expr else b.op(Map, "map", y, expr=expr)
    return finish(b, b.op(Map, "again", z, b=y, expr="a * b") if twice else z)


@pytest.mark.parametrize(
    ("program", "want"),
    [
        (after_linear("a + b"), ("late", "", 1.0)),
        (after_linear("b + a"), ("late", "", 1.0)),
        (after_linear("a + b * 0.22"), ("late", "", 0.22)),
        (after_linear("0.22 * b + a", scale=2.0), ("late", "", 0.44)),
        (after_linear("a * 0.5"), (None, "", 0.5)),
        (after_linear("gelu(a)"), (None, "gelu", 1.0)),
        (after_linear("tanh(a * 3)"), (None, "tanh", 3.0)),
        (after_linear("a + silu(0.5 * b)"), ("late", "silu", 0.5)),
        (after_linear("a + b", activation="relu"), ("late", "relu", 1.0)),
        (after_linear("a + b", glu=False, residual="early"), None),  # one residual at most
        (after_linear("a * 0.5", residual="early"), None),  # the scale would miss the residual
        (after_linear("tanh(a)", residual="early"), None),
        (after_linear("a * 0.5", activation="relu"), None),  # the linear scales before it activates
        (after_linear("relu(a)", activation="tanh"), None),
        (after_linear("tanh(a) * 0.5"), None),
        (after_linear("(a + b) * 0.5"), None),
        (after_linear("a * 0.5 + b * 0.5"), None),
        (after_linear("a - b"), None),
        (after_linear("a * b"), None),
        (after_linear("exp(a)"), None),
        (after_linear("a + 1.0"), None),
        (after_linear("a + a"), None),
        (after_linear("a + b", twice=True), None),  # somebody else reads the result
    ],
)
def test_epilogues(program: Program, want: tuple[str | None, str, float] | None) -> None:
    fused = fuse_epilogues(program)
    verify(fused)
    op = site(fused, "proj")
    assert isinstance(op, Linear)
    assert (fused == program) == (want is None)
    if want:
        assert (op.residual, op.activation, op.scale) == want
        assert "map" not in fused.tensors and op.out == "proj"
    weights = random_weights(program)
    assert apart(run(program, weights), run(fused, weights)) <= SAME


def test_epilogues_follow_one_another_and_reach_outputs() -> None:
    p = fuse_epilogues(transformer(Toy(logits_scale=0.125, parallel=True, layers=1)))
    head = site(p, "lm_head")
    assert isinstance(head, Linear) and (head.out, head.scale) == ("logits", 0.125)
    down, o = site(p, "layers.0.mlp.down_proj"), site(p, "layers.0.attn.o_proj")
    assert isinstance(down, Linear) and isinstance(o, Linear)
    assert (down.residual, o.residual) == (o.out, "embed")
    assert [op.kind for op in p.ops].count("map") == 1  # the glu


def test_residual_norm() -> None:
    program = transformer(Toy(post_norm=True, layers=1))
    fused = fuse_residual_norm(program)
    norm = site(fused, "layers.0.mlp.post_norm")
    assert isinstance(norm, Norm) and norm.residual == "layers.0.attn.post_norm"
    scaled = transformer(Toy(post_norm=True, layers=1, residual_scale=0.5))
    assert fuse_residual_norm(scaled) == scaled  # a norm does not scale
    assert fuse_residual_norm(fused) == fused
