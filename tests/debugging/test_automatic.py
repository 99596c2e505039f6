"""Automatic ports: derived from the behaviour of tiny models, without the table of ports, and verified."""

from __future__ import annotations

import ast
import importlib
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.debugging.automatic import port_automatically
from intaglio.debugging.automatic.rotation import observe_rotation
from intaglio.debugging.automatic.trace import Unmatched
from intaglio.debugging.porting import PortingError

pytest.importorskip("transformers")


@pytest.fixture
def no_ports(monkeypatch):
    """Hide the table of ports."""
    monkeypatch.setattr(importlib.import_module("intaglio.models.port"), "families", dict)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("arcee", ['activation=c.activation("hidden_act")', "gated=False", 'qkv_bias=c.flag("attention_bias")']),
        ("ernie4_5_moe", ['correction="moe_statics.e_score_correction_bias|v"', 'c.whole("moe_layer_interval")']),
        ("olmo2", ["attn.post_norm", "mlp.post_norm", 'qk_norm="flat"']),
    ],
)
def test_ports_that_are_derived_and_verified(no_ports, kind, says):
    made = port_automatically(kind)
    assert made.verified, str(made)
    assert len(made.deviations) >= 5 and max(made.deviations.values()) < 1e-5
    ast.parse(made.text)
    for words in says:
        assert words in made.text, made.text


@pytest.mark.parametrize(
    ("kind", "module", "missing", "nearest"),
    [
        ("diffllama", "model.layers.0", "2 calls of attention", "Layer.mixer"),
        ("doge", "model.layers.0.self_attn", "attention that is not softmax", "attend"),
        ("hrm_text", "layers.0", "a layer that is called", "Decoder.layers"),
    ],
)
def test_refusals_name_the_module_what_is_missing_and_the_nearest(kind, module, missing, nearest):
    made = port_automatically(kind)
    assert not made.verified and made.text == ""
    assert module in made.failure and missing in made.failure and nearest in made.failure


def test_layers_that_the_tiny_model_has_not_are_named():
    made = port_automatically("lfm2")
    assert not made.verified and made.text == "" and "layer_types may be conv" in made.failure
    assert "by hand: step 2 of docs/adding-a-model.md" in made.failure


def test_the_command_writes_a_port_file(tmp_path):
    path = tmp_path / "starcoder.py"
    result = CliRunner().invoke(app, ["port", "starcoder2", "--auto", "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert "verified" in result.output and "FAMILIES" in path.read_text()
    refused = CliRunner().invoke(app, ["port", "starcoder2", "-o", str(path)])
    assert refused.exit_code != 0


def test_a_missing_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PortingError, match="pip install torch transformers"):
        port_automatically("llama")


def turned(x, dim, style, step=0.3):
    """x [heads, tokens, columns] with the first `dim` columns of each head turned by step / (pair + 1) per position."""
    out = x.copy()
    half = dim // 2
    a, b = (x[..., :half], x[..., half:dim]) if style == "half" else (x[..., 0:dim:2], x[..., 1:dim:2])
    angle = np.arange(x.shape[1])[:, None] * step / (1 + np.arange(half))
    c, s = np.cos(angle), np.sin(angle)
    first, second = a * c - b * s, b * c + a * s
    if style == "half":
        out[..., :half], out[..., half:dim] = first, second
    else:
        out[..., 0:dim:2], out[..., 1:dim:2] = first, second
    return out


@pytest.mark.parametrize(("dim", "style"), [(16, "half"), (16, "interleaved"), (8, "half"), (8, "interleaved")])
def test_rotations_are_observed(dim, style):
    x = np.random.default_rng(5).standard_normal((2, 40, 16))
    found = observe_rotation(x, turned(x, dim, style))
    assert found is not None and (found.dim, found.style) == (dim, style)
    assert np.allclose(found.angles, 0.3 / (1 + np.arange(dim // 2)))
    assert observe_rotation(x, x).dim == 0
    assert observe_rotation(x, x + np.arange(40)[None, :, None]) is None


def test_an_unmatched_part_says_all_three():
    e = Unmatched("layers.0.mlp", "a hexagonal gate", "map")
    assert str(e) == "layers.0.mlp: a hexagonal gate; the nearest is map"
