"""Ports with recurrent state against transformers: logits whole, in chunks, by decoding, and of sharded Programs.

Relative logit error is max |ours - theirs| / max |theirs|, in float32.
"""

from __future__ import annotations

import json

import pytest
from support.tiny import RECURRENT, compare, compare_sharded, tiny

from intaglio.compiler import build_mesh
from intaglio.models import Checkpoint, port, port_config
from intaglio.program import parse_program

transformers = pytest.importorskip("transformers")
LIMIT = 2e-4


@pytest.mark.parametrize("family", RECURRENT)
def test_logits(tmp_path, family):
    path = tiny(family, tmp_path / family)
    program = port(Checkpoint.open(path))
    assert program.recurrent and parse_program(str(program)) == program
    for device, steps in (("host", 8), ("reference", 3)):
        errors = compare(path, device, "auto" if device == "host" else None, steps=steps)
        assert max(errors.values()) < LIMIT, (device, errors)
    compare_sharded(path, LIMIT)


@pytest.mark.parametrize("family", RECURRENT)
def test_defaults_are_those_of_transformers(family):
    """A config.json with nothing but sizes gives the Program that the full one of transformers gives."""
    row = RECURRENT[family]
    bare = {**SIZES, **NEEDED.get(family, {}), "architectures": [f"{row['class']}ForCausalLM"]}
    config = getattr(transformers, row.get("config", f"{row['class']}Config"))
    full = config(**json.loads(json.dumps(bare)), pad_token_id=0).to_dict()
    assert port_config(bare, 64) == port_config({**full, "dtype": "bfloat16"}, 64)


SIZES = {
    "hidden_size": 128, "num_attention_heads": 32, "intermediate_size": 64, "num_hidden_layers": 6, "vocab_size": 64,
}  # fmt: skip
NEEDED: dict[str, dict[str, object]] = {  # what a config of the family has to say besides
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 16, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 256},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp"] * 3},
}


@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe"])
def test_lanes_hold_their_channels_of_a_convolution(tmp_path, family):
    """Weights of the convolution and its state; of other blocks with recurrent state every lane holds all."""
    program = port(Checkpoint.open(tiny(family, tmp_path / family)))
    lanes = build_mesh(program, "tp2").programs
    for name in ("layers.0.conv.conv.state", "layers.0.conv.conv.weight"):
        axis = 2 if name.endswith("state") else 0
        held = [int(lane.tensors[name].shape[axis]) for lane in lanes]
        assert sum(held) == program.tensors[name].shape[axis] and max(held) < sum(held)
    whole = port(Checkpoint.open(tiny("mamba2", tmp_path / "mamba2")))
    state = "layers.0.mixer.conv.state"
    assert build_mesh(whole, "tp2").programs[0].tensors[state].shape == whole.tensors[state].shape
