"""DeepSeek-V4: variants of its config and names of released files, against transformers; settings that are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny import compare, error, tiny, truth

from intaglio import LLM, SamplingParams
from intaglio.batch import Chunk, bind
from intaglio.compiler import build, build_mesh
from intaglio.devices import MeshDevice, StateSpec, StepRequest, open_device
from intaglio.models import Checkpoint, PortError, port
from intaglio.program import ProgramError, parse_program

pytest.importorskip("transformers")
LIMIT = 2e-4
SPARSE, HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"
TWO: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": [SPARSE, HEAVY], "mlp_layer_types": ["moe", "hash_moe"]}


def test_text_form_and_caches(tmp_path):
    program = port(Checkpoint.open(tiny("deepseek_v4", tmp_path / "whole")))
    assert parse_program(str(program)) == program and not program.recurrent
    shapes = {t.name: t.shape for t in program.of_role("state")}
    assert shapes["layers.1.attn.compressor.entries"] == ("P", "B/4", 1, 24)
    assert shapes["layers.2.attn.compressor.entries"] == ("P", "B/11", 1, 24)
    assert program.windows["layers.0.attn.cache"] == program.windows["layers.1.attn.cache"] == 13
    assert program.windows["layers.1.attn.compressor.gates"] == 8  # a run and the one before
    assert program.windows["layers.2.attn.compressor.values"] == 11
    assert not any(name.endswith("entries") for name in program.windows)


@pytest.mark.parametrize(
    "overrides",
    [
        {**TWO, "scoring_func": "sigmoid", "hc_mult": 1, "hc_sinkhorn_iters": 1, "tie_word_embeddings": True},
        {**TWO, "hc_mult": 4, "o_groups": 4, "index_topk": 64, "sliding_window": 1},
        {**TWO, "rope_parameters": None, "partial_rotary_factor": 0.25, "routed_scaling_factor": 2.5, "hc_eps": 1e-3},
        {
            **TWO,
            "compress_rates": {SPARSE: 2, HEAVY: 70},
            "head_dim": 40,
            "index_head_dim": 16,
            "partial_rotary_factor": 0.25,
        },
    ],
)
def test_variants(tmp_path, overrides):
    errors = compare(tiny("deepseek_v4", tmp_path / "variant", **overrides), "host", steps=40)
    assert max(errors.values()) < LIMIT, errors


@pytest.mark.parametrize("layout", ["tp4", "tp2sp", "tp2pp2", "ep2r2"])
def test_layouts(tmp_path, layout):
    """tp4 divides heads within a group whose results are projected together: every lane then computes that whole."""
    path = tiny("deepseek_v4", tmp_path / "whole")
    checkpoint, tokens = Checkpoint.open(path), np.random.default_rng(5).integers(0, 256, 50).tolist()
    mesh = build_mesh(port(checkpoint), layout, "auto")
    ex = MeshDevice(open_device("host")).load(mesh, checkpoint, StateSpec(6, 16))
    chunk = Chunk(tokens, 0, [2, 1, 0, 4], range(50))
    got = ex.step(StepRequest(bind([chunk], 16), logits=True)).logits
    assert got is not None and error(got, truth(path, tokens)) < LIMIT


def released(path: Path) -> Path:
    """The checkpoint under the names and config keys of released files, which transformers reads too."""
    tensors = {}
    for name, x in load_file(path / "model.safetensors").items():
        name = name.removeprefix("model.").replace("embed_tokens.", "embed.").replace("hc_head.hc_", "hc_head_")
        tensors[name] = x
    save_file({**tensors, "mtp.0.norm.weight": np.ones(3, np.float32)}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    for key in ("layer_types", "compress_rates", "mlp_layer_types", "rope_parameters", "partial_rotary_factor"):
        del config[key]
    rope = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    config |= {
        "compress_ratios": [4, 128], "compress_rate_hca": 11, "num_hash_layers": 1, "qk_rope_head_dim": 8,
        "rope_scaling": rope,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_names_and_keys_of_released_files(tmp_path):
    from support.published import logits  # needs torch

    told = {**TWO, "mlp_layer_types": ["hash_moe", "moe"]}
    results = []
    for name, change in (("saved", Path), ("released", released)):
        path = change(tiny("deepseek_v4", tmp_path / name, **told))
        results.append(logits(path, "reference", port(Checkpoint.open(path)), tokens=range(30)))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scoring_func": "tanh"}, "scoring_func='tanh' is not ported; known are sqrtsoftplus, sigmoid"),
        ({"o_groups": 3}, "num_key_value_heads=1 and o_groups=3 for 4 heads; wanted 1 and a divisor"),
        ({"compress_rates": {SPARSE: 1}}, "wanted runs of 2 tokens or more"),
        ({"mlp_layer_types": ["moe", "dense"]}, "mlp_layer_types has 'dense'; wanted hash_moe or moe"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types[0]='full_attention'"),
        ({"layer_types": None, "compress_ratios": [4, 8]}, "compress_ratios=[4, 8]; wanted a list of 0, 4 and 128"),
        ({"index_head_dim": 6}, "index_head_dim=6; wanted at least the 8 columns that rope turns"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False; DeepSeek-V4 divides the weights by their sum"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"n_shared_experts": 2}, "n_shared_experts=2"),
    ],
)
def test_settings_that_are_refused(tmp_path, change, says):
    path = tiny("deepseek_v4", tmp_path / "refused", **TWO)
    config = {**json.loads((path / "config.json").read_text()), **change}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(PortError, match=re.escape(says)):
        port(Checkpoint.open(path))


def test_narrow_caches_are_refused_and_weights_are_not(tmp_path):
    path = tiny("deepseek_v4", tmp_path / "formats", **TWO)
    program = port(Checkpoint.open(path))
    for kv_format in ("int8", "fp8"):
        with pytest.raises(ProgramError, match=r"wanted \[P, B, 2, head_dim\] in f32 or bf16"):
            build(program, "auto", kv_format=kv_format)
    llm = LLM(path, threads=1, cache=None, weights="int8")
    (got,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=20, ignore_eos=True))
    assert len(got.token_ids) == 20
