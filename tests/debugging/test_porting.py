"""Port search and bisect: which port fits an architecture, and where two of our own runs differ."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from support.tiny import tiny

from intaglio.compiler import build
from intaglio.debugging.bisect import bisect
from intaglio.debugging.check import CheckError
from intaglio.debugging.porting import PortingError, Trial, investigate, lacking
from intaglio.models import Checkpoint, port

pytest.importorskip("transformers")


def some_families(monkeypatch, *names):
    """Let the search try these ports only."""
    from intaglio import models

    others = {k: v for k, v in models.families().items() if k in names}
    monkeypatch.setattr("intaglio.models.families", lambda: others)


def test_an_architecture_that_a_port_fits(monkeypatch):
    some_families(monkeypatch, "LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma2ForCausalLM")
    found = investigate("seed_oss")
    assert not found.known and found.trials[0].fits and found.trials[0].architecture == "Qwen2ForCausalLM"
    assert found.row.startswith('Family("SeedOssForCausalLM", "...", {**DEFAULTS') and found.row.endswith("qwen2),")
    assert "not in the table" in str(found) and found.row in str(found)


def test_an_architecture_that_nothing_fits(monkeypatch):
    some_families(monkeypatch, "LlamaForCausalLM", "Qwen2ForCausalLM", "Cohere2ForCausalLM")
    found = investigate("starcoder2")
    assert not found.known and found.row == "" and not any(t.fits for t in found.trials)
    assert all(t.why for t in found.trials)
    gaps = [lacking(t) for t in found.trials if not t.sites]
    assert gaps == sorted(gaps) and "No port fits. --auto derives one" in str(found)


def test_tensors_that_a_port_misses_are_counted():
    missed = Trial("OneForCausalLM", 0, False, "lacks 18 tensors (model.a.weight, ...), which its config.json asks for")
    assert lacking(missed) == 18
    assert lacking(Trial("TwoForCausalLM", 0, False, "config.json: use_bias=True is not supported")) == float("inf")


def test_a_folder_whose_architecture_is_ported(tmp_path):
    found = investigate(str(tiny("olmo2", tmp_path)))
    assert found.known and found.row == ""
    assert [t.fits for t in found.trials] == [True] and "Olmo2ForCausalLM: ported" in str(found)


def test_nearest_port_and_its_first_difference(tmp_path, monkeypatch):
    """Without its own port, SmolLM3 is nearest to one that turns every layer; they part where one is not turned."""
    some_families(monkeypatch, "MinistralForCausalLM", "GraniteForCausalLM")
    found = investigate("smollm3")
    best = found.trials[0]
    assert best.architecture == "MinistralForCausalLM" and best.sites > 40
    assert best.why.startswith("first difference at layers.3.attn.k_rope")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("no_such_model", "'no_such_model' is neither a folder nor a model type"),
        ("vit", "no causal language model for 'vit'"),
        (".", "has no config.json"),
    ],
)
def test_architectures_that_cannot_be_tried(target, says):
    with pytest.raises(PortingError, match=says):
        investigate(target)


def test_the_command(tmp_path):
    command = [sys.executable, "-c", "from intaglio.cli import app; app()", "port", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "has no config.json" in done.stderr


def test_bisect(tmp_path):
    path = tiny("qwen3moe", tmp_path)
    assert bisect(path, ["reference", "host"]).ok
    good = build(port(Checkpoint.open(path), context=61))
    wrong = good.with_ops(
        [replace(op, normalise=False) if op.site == "layers.1.mlp.route" else op for op in good.ops], good.tensors
    )
    report = bisect(path, ["reference", "host"], programs=[good, wrong])
    assert report.first_bad == "layers.1.mlp.route" and "against reference" in str(report)
    assert bisect(path, ["host", "host:int8"]).first_bad == "layers.0.attn.qkv_proj"
    for wrong_runs in (["host"], ["host", "abacus"], ["host", "oracle"]):
        with pytest.raises(CheckError, match="such as"):
            bisect(path, wrong_runs)
