"""Odd values in config.json: every port takes a value of a wrong type, or raises a PortError that names the key.

Also null values, layer numbers beyond the model, and keys that replace other keys.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from support.tiny import BASE, FAMILIES, MIXTURES, OTHERS, RECURRENT, architecture

from intaglio.models import PortError
from intaglio.models.port import port_config
from intaglio.models.ports import families

transformers = pytest.importorskip("transformers")
ROWS = FAMILIES | MIXTURES | OTHERS | RECURRENT
WRONG: list[Any] = ["abc", -1, -1.5, [], [1], ["a"], {}, {"a": 1}, float("nan"), float("inf"), True, 0, 2.5, None]
HYBRIDS = ("bamba", "granitemoehybrid", "falcon_h1", "jamba")


def config_of(row: str) -> dict[str, Any]:
    """config.json of a tiny model."""
    table = {**BASE, **ROWS[row]}
    name = table.pop("class")
    kind = getattr(transformers, table.pop("config", f"{name}Config"))
    config = json.loads(json.dumps(kind(**json.loads(json.dumps(table))).to_dict()))
    return {**config, "architectures": [architecture(name)]}


def places(table: dict[str, Any], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all values of a config, with those in its tables."""
    inner = [path for key, x in table.items() if isinstance(x, dict) for path in places(x, (*at, key))]
    return [(*at, key) for key in table] + inner


def altered(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of a config with one value replaced."""
    out = copy.deepcopy(config)
    table = out
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    return out


@pytest.mark.parametrize("row", ROWS)
def test_wrong_types_are_port_errors_that_name_the_key(row):
    config, draw = config_of(row), random.Random()
    if config.get("is_encoder_decoder"):
        pytest.skip("only decoders alone are ported")
    paths = [path for path in places(config) if path[0] not in ("architectures", "model_type", "text_config")]
    for path in draw.sample(paths, min(12, len(paths))):
        value = draw.choice(WRONG)
        try:
            port_config(altered(config, path, value), 64, format="f32")
        except PortError as e:  # a value of the right type may clash with another key, which the error then names
            clear = value == "abc" or value != value
            assert not clear or path[-1] in str(e) or path[0] in str(e), (path, value, str(e))


@pytest.mark.parametrize(
    ("row", "key", "value", "says"),
    [
        ("mamba2", "time_step_limit", [1.0], "time_step_limit=.* wanted two numbers, 0 <= low < high"),
        ("mamba2", "time_step_limit", "abc", "time_step_limit='abc'; wanted two numbers"),
        ("mamba2", "time_step_limit", [0.5, 0.1], "time_step_limit=.* wanted two numbers"),
        ("mamba", "time_step_rank", "abc", "time_step_rank='abc'; wanted an integer of 1"),
        ("falcon_h1", "ssm_multipliers", [1.0], r"ssm_multipliers=\[1.0\]; wanted 5 numbers"),
        ("gpt2", "n_embd", "abc", "n_embd='abc'; wanted an integer of 1"),
        ("qwen2moe", "num_experts", 2.5, " num_experts=2.5; wanted an integer of 1"),
        ("gemma2", "final_logit_softcapping", float("nan"), "final_logit_softcapping=nan; wanted a number"),
        ("glm4_moe_lite", "mlp_layer_types", ["dense"], "mlp_layer_types lists 1 layers but num_hidden_layers=4"),
        ("mellum", "mlp_layer_types", ["dense"] * 3 + ["moe"], "mlp_layer_types has 'moe'; wanted dense or sparse"),
        ("qwen2", "layer_types", 7, "layer_types=7; wanted a list of names"),
        ("llama", "hidden_act", ["silu"], r"hidden_act=\['silu'\] is not ported"),
        ("gpt_neo", "attention_types", [["global"]], "attention_types=.*; wanted a list of"),
        ("deepseekv2", "topk_method", "noaux_tc", "topk_method='noaux_tc' is not ported; known are greedy"),
        ("ministral3", "sliding_window", 0, "sliding_window=0; wanted an integer of 1 or more"),
        ("mistral", "sliding_window", 0, "sliding_window=0; wanted an integer of 1 or more"),
        ("starcoder2", "sliding_window", 0, "sliding_window=0; wanted an integer of 1 or more"),
        ("minicpm3", "scale_depth", 0.0, "scale_depth=0.0; wanted a number above 0"),
        ("modernbert_decoder", "sliding_window", 0, "sliding_window=0; wanted an integer of 1 or more"),
        ("olmo", "clip_qkv", 0, "clip_qkv=0; wanted a number above 0"),
        *((row, "hidden_act", "gelu", "hidden_act='gelu'; Mamba blocks are ported with silu") for row in HYBRIDS),
        ("nemotron_h", "mamba_hidden_act", "gelu", "mamba_hidden_act='gelu'; Mamba blocks are ported with silu"),
        ("gptoss", "hidden_act", "gelu", "hidden_act='gelu'; gpt-oss has silu"),
        ("gemma2", "attn_logit_softcapping", 0.0, "attn_logit_softcapping=0.0; wanted a number above 0"),
        ("aria_text", "hidden_act", "gelu", "hidden_act='gelu'; routed experts take silu alone"),
        (
            "minimax",
            "rope_parameters",
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 with rope_type='linear', but this family rotates whole heads",
        ),
        (
            "glm4_moe_lite",
            "rope_parameters",
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5; wanted 1, since qk_rope_head_dim is the turned part",
        ),
        ("mpt", "attn_config", {"clip_qkv": "abc"}, "attn_config.clip_qkv='abc'; wanted a number of 0 or more"),
    ],
)
def test_wrong_types_named(row, key, value, says):
    with pytest.raises(PortError, match=says):
        port_config({**config_of(row), key: value}, 64, format="f32")


def test_a_number_of_experts_that_is_null():
    """Neither name of the number has a value in the file: the family's default holds."""
    config = {**config_of("flint"), "num_experts": None}
    config.pop("num_local_experts", None)
    with pytest.raises(PortError):
        port_config({**config, "num_experts_per_tok": 10**6}, 64, format="f32")


def test_time_step_limits_without_an_upper_one():
    for high in (float("inf"), {"__float__": "Infinity"}, "Infinity"):
        config = {**config_of("mamba2"), "time_step_limit": [0.25, high]}
        scan = next(op for op in port_config(config, 64, format="f32").ops if hasattr(op, "low"))
        assert (scan.low, scan.high) == (0.25, 0.0)
    assert "Mamba2ForCausalLM" in families()


def test_older_names_of_nemotron_h_replace_the_newer():
    old = {"mamba_n_groups": 4, "mamba_d_conv": 3, "mamba_conv_bias": False, "mamba_dt_min": 0.25}
    new = {"n_groups": 4, "conv_kernel": 3, "use_conv_bias": False, "time_step_min": 0.25}
    config = config_of("nemotron_h")
    programs = [port_config(config | more, 64, format="f32") for more in (old, new)]
    assert programs[0] == programs[1] != port_config(config, 64, format="f32")


def test_last_sparse_layer_of_ernie_beyond_the_model():
    config = config_of("ernie4_5_moe")
    programs = [port_config({**config, "moe_layer_end_index": end}, 64, format="f32") for end in (-1, 3, 4, 9)]
    assert programs.count(programs[0]) == 4


def test_attention_layers_of_gpt_neo_replace_attention_types():
    config, kinds = config_of("gpt_neo"), ["local", "global", "global", "local"]
    ops = port_config({**config, "attention_layers": kinds}, 64, format="f32").ops
    assert [bool(op.window) for op in ops if op.kind == "attend"] == [kind == "local" for kind in kinds]
