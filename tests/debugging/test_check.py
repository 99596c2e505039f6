"""The check against transformers: good checkpoints pass at every site, and a wrong one is named where it goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.tiny import FAMILIES, tiny

from intaglio.debugging.check import CheckError, check, reference_model
from intaglio.devices import DEVICES
from intaglio.models import Checkpoint, port
from intaglio.ops import Norm

pytest.importorskip("transformers")


NORM_AND_GATE = ("qwen3_next", "olmo_hybrid", "kimi_linear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("check")


@pytest.mark.parametrize("family", FAMILIES)
def test_good_checkpoints_pass(folder, family):
    report = check(tiny(family, folder / family))
    assert report.ok and report.first_bad is None, str(report)
    assert max(row.error / row.tolerance for row in report.rows) < 0.1
    sites = {row.site for row in report.rows}
    assert {"embed", "layers.2.attn.attend", "layers.3.attn.o_proj", "layers.3.mlp.glu", "norm", "logits"} <= sites
    assert any(f"layers.3.attn.{n}" in sites for n in ("k_rope", "k_norm", "k_proj"))


@pytest.mark.parametrize(
    "family", [*NORM_AND_GATE, "mamba2", "bamba", "jamba", "lfm2", "lfm3", "bailing_hybrid", "zamba2"]
)
def test_recurrent_checkpoints_pass(folder, family):
    path = tiny(family, folder / family)
    report = check(path)
    assert report.ok and report.first_bad is None, str(report)
    p = port(Checkpoint.open(path))
    for op in p.ops:  # the module of such a norm has the gate, too, so the gated result shows a wrong epsilon
        if isinstance(op, Norm) and op.site in ("layers.0.linear_attn.norm", "layers.0.linear_attn.o_norm"):
            wrong = check(path, program=change(p, op.site, eps=0.5))
            assert wrong.first_bad == "layers.0.linear_attn.gated"


def test_modules_that_are_called_twice(folder):
    """Gemma 3n: router and its norm run before and after each layer; each call is compared with its own op."""
    path = tiny("gemma3n", folder / "gemma3n")
    report = check(path)
    assert report.ok, str(report)
    sites = {row.site for row in report.rows}
    assert {f"layers.2.altup.{part}.router" for part in ("predict", "correct")} <= sites
    p = port(Checkpoint.open(path))
    swapped = change(p, "layers.1.altup.correct.norm", eps=0.5)
    assert check(path, program=swapped).first_bad == "layers.1.altup.correct.norm"


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("gemma2", "bfloat16"), ("gemma3", "float16")])
def test_other_stored_types_pass(tmp_path, family, dtype):
    assert check(tiny(family, tmp_path, dtype)).ok


def change(p, site, **fields):
    ops = [replace(op, **fields) if op.site == site else op for op in p.ops]
    assert tuple(ops) != p.ops
    return p.with_ops(ops, p.tensors)


def test_a_wrong_window_is_named(folder):
    path = tiny("mistral", folder / "mistral")
    report = check(path, program=change(port(Checkpoint.open(path)), "layers.2.attn.attend", window=16))
    assert not report.ok and report.first_bad == "layers.2.attn.attend"
    assert "layers.2.attn.attend" in str(report) and "OUT OF LINE" in str(report)


def test_a_wrong_theta_is_named(folder):
    path = tiny("qwen3", folder / "qwen3")
    p = port(Checkpoint.open(path))
    table = p.tensors["rope.frequencies"]
    wrong = replace(table, values=tuple(v * 0.9 for v in table.values))
    assert check(path, program=p.with_ops(p.ops, {**p.tensors, table.name: wrong})).first_bad == "layers.0.attn.k_rope"


def test_swapped_norms_are_named(folder):
    path = tiny("gemma2", folder / "gemma2")
    p = port(Checkpoint.open(path))
    p = change(p, "layers.1.attn.post_norm", weight="layers.1.mlp.post_norm.weight")
    p = change(p, "layers.1.mlp.post_norm", weight="layers.1.attn.post_norm.weight")
    assert check(path, program=p).first_bad == "layers.1.attn.post_norm"


@pytest.mark.parametrize(
    ("site", "fields"),
    [
        ("layers.1.attn.norm", {"eps": 0.1}),
        ("layers.0.mlp.norm", {"offset": 1.0}),
        ("layers.3.mlp.glu", {"expr": "gelu(a) * b"}),
        ("layers.2.mlp.down_proj", {"bias": None}),
        ("lm_head", {"scale": 1.01}),
    ],
)
def test_other_faults_are_named(folder, site, fields):
    path = tiny("llama", folder / "llama")
    wrong = check(path, program=change(port(Checkpoint.open(path)), site, **fields))
    assert wrong.first_bad == ("logits" if site == "lm_head" else site)


def test_a_residual_multiplier_is_named(folder):
    path = tiny("granite", folder / "granite")
    p = change(port(Checkpoint.open(path)), "layers.1.mlp.add", expr="a + b * 0.3")
    assert check(path, program=p).first_bad == "layers.1.mlp.add"


def test_the_report_is_json(folder):
    report = check(tiny("olmo2", folder / "olmo2"), tokens=[5, 6, 7], seed=3)
    table = json.loads(json.dumps(report.as_dict()))
    assert (table["tokens"], table["ok"], table["first_bad"]) == (3, True, None)
    assert table["rows"][0]["site"] == "embed" and table["rows"][0]["ok"]


def test_prompts_are_drawn_from_the_seed(folder):
    path = tiny("olmo2", folder / "olmo2")
    assert check(path, seed=1).logits == check(path, seed=1).logits != check(path, seed=2).logits


def test_the_host_agrees_too(folder):
    if "host" not in DEVICES:
        pytest.skip("no host device")
    assert check(tiny("llama", folder / "llama"), "host").ok


def test_transformers_missing(monkeypatch, folder):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(CheckError, match=r"a check needs torch and transformers .*pip install"):
        reference_model(folder)


def test_deepseek_v4(folder):
    """Projections, norms and experts have modules in transformers; a wrong window shows after the first attention."""
    path = tiny("deepseek_v4", folder / "deepseek_v4")
    report = check(path)
    sites = {row.site for row in report.rows}
    assert report.ok and len(sites) > 60, report
    assert {"layers.1.attn.indexer.q_proj", "layers.2.attn.compressor.wgate", "layers.0.mlp.experts"} <= sites
    wrong = check(path, program=change(port(Checkpoint.open(path)), "layers.1.attn.attend", window=5))
    assert wrong.first_bad == "layers.1.attn.o_a_proj", wrong
