"""Ports with recurrent state against transformers: logits whole, in chunks, by decoding, and of sharded Programs.

Relative logit error is max |ours - theirs| / max |theirs|, in float32.
"""

from __future__ import annotations

import json

import pytest
from support.tiny import RECURRENT, compare, compare_sharded, tiny

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
