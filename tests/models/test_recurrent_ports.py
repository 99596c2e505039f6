"""Ports with recurrent state against transformers: logits whole, in chunks, by decoding, and of sharded Programs.

Relative logit error is max |ours - theirs| / max |theirs|, in float32.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny import RECURRENT, compare, compare_sharded, tiny

from intaglio.models import Checkpoint, PortError, port, port_config
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


def rewritten(path: Path, rename: Callable[[str], str], config: dict[str, Any], rows: Sequence[int] = ()) -> Path:
    """The checkpoint with other names of tensors, other config keys, and q, k and v convolutions of `rows` channels."""
    tensors = load_file(path / "model.safetensors")
    if rows:
        for name in [n for n in tensors if n.endswith("q_conv1d.weight")]:
            names = [name.replace("q_conv1d", f"{n}_conv1d") for n in "qkv"]
            joined = np.concatenate([tensors[n] for n in names])
            parts = np.split(joined, np.cumsum(rows)[:-1])
            tensors |= {n: np.ascontiguousarray(x) for n, x in zip(names, parts, strict=True)}
    save_file({rename(name): x for name, x in tensors.items()}, path / "model.safetensors")
    held = {**json.loads((path / "config.json").read_text()), **config}
    (path / "config.json").write_text(json.dumps({k: v for k, v in held.items() if v is not None}))
    return path


def test_names_and_cuts_of_released_files(tmp_path):
    """transformers 5.24 saves files with other names and cuts than the released ones have; both give the same bits."""
    from support.published import logits  # needs torch

    def ported(path: Path) -> np.ndarray:
        got = logits(path, "reference", port(Checkpoint.open(path)), tokens=range(9))
        assert got is not None
        return got

    full = re.compile(r"(layers\.[13]\.)feedforward_layer_norm")
    cases: list[tuple[str, Callable[[str], str], dict[str, Any], tuple[int, ...]]] = [
        ("olmo_hybrid", lambda n: full.sub(r"\1post_attention_layernorm", n), {}, (24, 24, 120)),
        (
            "olmo_hybrid",  # the names inside transformers
            lambda n: n.replace("attention_layer_norm", "input_layernorm").replace(
                "feedforward_layer_norm", "post_attention_layernorm"
            ),
            {}, (24, 24, 120),
        ),
        (
            "kimi_linear", lambda n: re.sub(r"block_sparse_moe\.(\w+_proj)", r"mlp.\1", n),
            {
                "layer_types": None, "mlp_layer_types": None, "linear_num_heads": None, "linear_head_dim": None,
                "linear_conv_kernel_dim": None, "first_k_dense_replace": 1, "mla_use_nope": True, "rope_theta": 1e4,
                "linear_attn_config": {
                    "full_attn_layers": [2, 4], "kda_layers": [1, 3], "num_heads": 6, "head_dim": 12,
                    "short_conv_kernel_size": 4,
                },
            }, (),
        ),
    ]  # fmt: skip
    for i, (family, rename, config, rows) in enumerate(cases):
        saved = tiny(family, tmp_path / f"{i}")
        wanted = ported(saved)
        released = rewritten(shutil.copytree(saved, tmp_path / f"{i}-released"), rename, config, rows)
        assert load_file(released / "model.safetensors").keys() != load_file(saved / "model.safetensors").keys()
        np.testing.assert_array_equal(ported(released), wanted, family)


def test_shared_blocks_are_read_in_turn(tmp_path):
    """Zamba2: uses 0 and 2 have the first block, use 1 the second; each has adapters and a K/V cache of its own."""
    kinds = ["hybrid"] * 3 + ["mamba"]
    path = tiny("zamba2", tmp_path / "zamba2", layers_block_type=kinds, num_mem_blocks=2)
    p = port(Checkpoint.open(path))
    linears = {op.site: op for op in p.ops if op.kind == "linear"}
    assert [linears[f"layers.{i}.shared.q_proj"].w for i in range(3)] == [
        f"layers.{i}.shared.q_proj.weight" for i in (0, 1, 0)
    ]
    assert p.tensors["layers.2.shared.q_adapter_a.weight"].source == (
        "model.layers.0.shared_transformer.self_attn.linear_q_adapter_list.2.0.weight",
    )
    assert sum(t.name.endswith("_cache") for t in p.of_role("state")) == 6


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("zamba2", {"num_key_value_heads": 2}, "num_key_value_heads=2; with use_shared_attention_adapter as many"),
        ("zamba2", {"num_attention_heads": 3}, "num_attention_heads=3 does not divide twice hidden_size=64"),
        ("zamba2", {"layers_block_type": ["moe"] * 4}, "layers_block_type has 'moe'; known are mamba"),
        ("bailing_hybrid", {"kda_lower_bound": 2.0}, "kda_lower_bound=2.0; wanted a number of 0 or less"),
        ("lfm3", {"layer_types": ["conv", "moe", "conv", "conv"]}, "layer_types[1]='moe' is not ported"),
        ("olmo_hybrid", {"hidden_act": "gelu"}, "hidden_act='gelu'; gated delta nets are ported with silu"),
        ("olmo_hybrid", {"linear_num_value_heads": 5}, "linear_num_value_heads=5 is not a multiple of 2 key heads"),
        ("olmo_hybrid", {"layer_types": ["linear_attention"] * 4}, "layer_types has linear_attention only"),
        ("olmo_hybrid", {"layer_types": ["mamba"] * 4}, "layer_types[0]='mamba' is not ported"),
        ("kimi_linear", {"moe_router_activation_func": "softmax"}, "moe_router_activation_func='softmax'; the port"),
        ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope=False; the port of Kimi-Linear-48B-A3B computes True"),
        (
            "kimi_linear",
            {"layer_types": None, "linear_attn_config": {"full_attn_layers": [1], "kda_layers": [1, 2, 3]}},
            "wanted each of the layers 1 to 4 in one of them",
        ),
    ],
)
def test_settings_that_are_refused(tmp_path, family, config, message):
    path = rewritten(tiny(family, tmp_path / family), str, config)
    with pytest.raises(PortError, match=re.escape(message)):
        port(Checkpoint.open(path))


SIZES = {
    "hidden_size": 128, "num_attention_heads": 32, "intermediate_size": 64, "num_hidden_layers": 6, "vocab_size": 64,
}  # fmt: skip
NEEDED: dict[str, dict[str, object]] = {  # what a config of the family has to say besides
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
    "zamba2_plain": {"layers_block_type": ["mamba", "hybrid", "hybrid"] * 2, "num_mem_blocks": 2},
    "mamba2": {"num_heads": 16, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 256},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp"] * 3},
}
