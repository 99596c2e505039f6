"""Planted faults: the check names the site where each shows, and mostly the fault itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.tiny import MIXTURES, tiny

from intaglio.debugging.check import check
from intaglio.models import Checkpoint, port

pytest.importorskip("transformers")


def fields(site, **change):
    """The op at `site` with these fields."""
    return lambda p: p.with_ops([replace(op, **change) if op.site == site else op for op in p.ops], p.tensors)


def swap(site, a, b):
    def change(p):
        (op,) = (op for op in p.ops if op.site == site)
        return fields(site, **{a: getattr(op, b), b: getattr(op, a)})(p)

    return change


def source(name, new):
    """A weight read from another place."""
    return lambda p: p.with_ops(p.ops, {**p.tensors, name: replace(p.tensors[name], source=(new,))})


def scaled(name, by):
    def change(p):
        t = p.tensors[name]
        return p.with_ops(p.ops, {**p.tensors, name: replace(t, values=tuple(v * by for v in t.values))})

    return change


def regrouped(p):
    """GPT-NeoX joins q, k and v by head; read them as if they came one after another."""
    tensors = dict(p.tensors)
    for i, part in enumerate("qkv"):
        for kind, cut in (("weight", "r"), ("bias", "c")):
            t = tensors[f"layers.1.attn.{part}_proj.{kind}"]
            n = t.shape[0]
            tensors[t.name] = replace(t, source=(f"{t.source[0].split('|')[0]}|{cut}{n * i}:{n * (i + 1)}/{3 * n}",))
    return p.with_ops(p.ops, tensors)


def whole_heads(p):
    """The frequencies of a rope that turns whole heads of 16 columns."""
    t = p.tensors["rope.frequencies"]
    values = tuple(float(x) for x in np.float32(10000.0 ** (-np.arange(8) / 8)))
    return p.with_ops(p.ops, {**p.tensors, t.name: replace(t, shape=(8,), values=values)})


def swapped_norms(p):
    """The attention's norm with weight and bias of the MLP's, and the other way round."""
    for own, other in (("attn", "mlp"), ("mlp", "attn")):
        names = {x: f"layers.1.{other}.norm.{x}" for x in ("weight", "bias")}
        p = fields(f"layers.1.{own}.norm", **names)(p)
    return p


M = "model.layers.1."
# fault: (family, what is done, the first site that can show it, words of the cause; none for one that is not told)
FAULTS = {
    "swapped gate and up": (
        "llama", swap("layers.1.mlp.glu", "a", "b"),
        "layers.1.mlp.glu", "gate and up are swapped",
    ),
    "wrong rope style": (
        "qwen3", fields("layers.0.attn.k_rope", style="interleaved"),
        "layers.0.attn.k_rope", "rope style: pairs are half",
    ),
    "dropped bias": (
        "llama", fields("layers.2.attn.o_proj", bias=None),
        "layers.2.attn.o_proj", "missing bias: model.layers.2.self_attn.o_proj.bias",
    ),
    "off-by-one window": (
        "mistral", fields("layers.1.attn.attend", window=23),
        "layers.1.attn.attend", "window: 24, not 23",
    ),
    "transposed weight": (
        "llama", source("layers.1.attn.q_proj.weight", M + "self_attn.q_proj.weight|T"),
        "layers.1.attn.q_proj", "transposed weight",
    ),
    "transposed experts": (
        "olmoe", source("layers.1.mlp.experts.down", M + "mlp.experts.{0..7}.down_proj.weight|T"),
        "layers.1.mlp.experts", "experts' down matrices are transposed",
    ),
    "wrong renormalisation": (
        "qwen3moe", fields("layers.1.mlp.route", normalise=False),
        "layers.1.mlp.experts", "wrong renormalisation",
    ),
    "missing correction bias": (
        "minimaxm2", fields("layers.1.mlp.route", bias=None),
        "layers.1.mlp.experts", "missing correction bias",
    ),
    "swapped experts' gate and up": (
        "mixtral", swap("layers.1.mlp.experts", "gate", "up"),
        "layers.1.mlp.experts", "gate and up of the experts are swapped",
    ),
    "norm offset": ("gemma2", fields("layers.1.mlp.norm", offset=0.0), "layers.1.mlp.norm", "stored as weight - 1"),
    "swapped norms": (
        "gemma2", fields("layers.1.attn.post_norm", weight="layers.1.mlp.post_norm.weight"),
        "layers.1.attn.post_norm", "",
    ),
    "wrong activation": (
        "llama", fields("layers.2.mlp.glu", expr="gelu(a) * b"),
        "layers.2.mlp.glu", "activation: silu, not gelu",
    ),
    "wrong attention scale": (
        "qwen3", fields("layers.1.attn.attend", scale=1 / 8),
        "layers.1.attn.attend", "attention scale: 1 / sqrt(32)",
    ),
    "dropped sinks": (
        "gptoss", fields("layers.1.attn.attend", sinks=None),
        "layers.1.attn.attend", "missing attention sinks",
    ),
    "no clamp": (
        "gptoss", fields("layers.1.mlp.experts", limit=0.0, shift=0.0, alpha=1.0),
        "layers.1.mlp.experts", "alpha 1.702, limit 1.5, shift 1",
    ),
    "weights on the result": (
        "llama4", fields("layers.1.mlp.experts", scale_input=False),
        "layers.1.mlp.add", "routing weights belong on the experts' input",
    ),
    "wrong chunk": ("llama4", fields("layers.1.attn.attend", chunk=15), "layers.1.attn.attend", "chunk: 16, not 15"),
    "wrong theta": (
        "qwen3", scaled("rope.frequencies", 0.9),
        "layers.0.attn.k_rope", "later tokens differ: a rope table",
    ),
    "wrong residual scale": (
        "granite", fields("layers.1.mlp.add", expr="a + b * 0.3"),
        "layers.1.mlp.add", "residual's scale: 0.22",
    ),
    "wrong eps": ("llama", fields("layers.1.attn.norm", eps=0.1), "layers.1.attn.norm", "the norm's eps"),
    "softcap forgotten": (
        "gemma2", fields("layers.1.attn.attend", softcap=0.0),
        "layers.1.attn.attend", "missing softcap: 4 fits",
    ),
    "q, k and v joined by head": (
        "gpt_neox", regrouped, "layers.1.attn.k_rope", "q, k and v are joined by head, not one after another",
    ),
    "norms swapped with their bias": (
        "gpt_neox", swapped_norms, "layers.1.attn.norm", "layers.1.attn.norm.weight and layers.1.attn.norm.bias fit",
    ),
    "sequential for parallel residual": (
        "gpt_neox", fields("layers.1.mlp.norm", x="layers.1.attn.add"),
        "layers.1.attn.add", "parallel, not sequential; what follows reads the layer's input layers.0.mlp.add",
    ),
    "parallel for sequential residual": (
        "llama", fields("layers.1.mlp.norm", x="layers.0.mlp.add"),
        "layers.1.mlp.norm", "sequential, not parallel; it reads the sum layers.1.attn.add",
    ),
    "whole head turned": (
        "phi", whole_heads, "layers.0.attn.k_rope", "rope turns 8 of 16 columns of a head, not 16",
    ),
    "scale of the logits": ("cohere2", fields("lm_head", scale=0.5), "logits", "theirs is 0.5 times ours"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("causes")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_named(folder, fault):
    family, change, site, words = FAULTS[fault]
    square = {"num_key_value_heads": 4} if fault == "transposed weight" else {}
    square |= {"intermediate_size": 64} if fault == "transposed experts" else {}
    path = tiny(family, folder / (family + fault), **square)
    good = port(Checkpoint.open(path))
    wrong = change(good)
    assert wrong != good
    report = check(path, program=wrong)
    assert not report.ok and report.first_bad == site, str(report)
    assert words in report.cause, report.cause
    assert report.cause in str(report)


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_pass_at_every_site(folder, family):
    report = check(tiny(family, folder / family))
    assert report.ok and report.cause == report.origin == "", str(report)
    assert max(row.error / row.tolerance for row in report.rows) < 0.1
    sites = {row.site for row in report.rows}
    assert {"layers.3.mlp.router", "layers.3.attn.o_proj", "norm", "logits"} <= sites
    ratios = [row.ratio for row in report.rows if row.ratio is not None]
    assert len(ratios) > 20 and max(ratios) < 0.1  # float32 beside bf16


def test_where_a_nan_arises(tmp_path):
    path = tiny("llama", tmp_path)
    p = port(Checkpoint.open(path))
    wrong = fields("layers.2.mlp.glu", expr="a / (b - b)")(p)
    with np.errstate(all="ignore"):
        report = check(path, program=wrong)
    assert report.first_bad == "layers.2.mlp.glu"
    assert report.origin == "the first NaN or infinity arises at layers.2.mlp.glu (map), whose operands are finite"
    assert "NaN or infinite here" in report.cause and report.origin in str(report)
