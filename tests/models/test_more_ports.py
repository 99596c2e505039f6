"""Ports of more families against transformers: logits whole, in chunks, by decoding, and of sharded Programs.

Relative logit error is max |ours - theirs| / max |theirs|, in float32.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.tiny import OTHERS, architecture, compare, compare_sharded, drawn, error, tiny

from intaglio.batch import Chunk, bind
from intaglio.compiler import LayoutError, build_mesh
from intaglio.devices import StateSpec, StepRequest, open_device
from intaglio.models import Checkpoint, port, port_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
LIMIT = 2e-4
TOKENS = 24


@pytest.mark.parametrize("family", OTHERS)
def test_logits(tmp_path, family):
    path = tiny(family, tmp_path / family)
    errors = compare(path, "host", program=port(Checkpoint.open(path)), steps=8)
    assert max(errors.values()) < LIMIT, errors
    compare_sharded(path, LIMIT)


def test_layers_that_share_positions_stay_in_one_stage(tmp_path):
    path = tiny("glm_moe_dsa", tmp_path / "shared", indexer_types=["full", "shared", "shared", "full"])
    compare_sharded(path, LIMIT)
    with pytest.raises(LayoutError, match="pp=4 leaves a stage of .* without layers"):
        build_mesh(port(Checkpoint.open(path)), "pp4")


def test_falcon_with_linear_biases(tmp_path):
    """Falcon-RW. With eager attention transformers 5 adds the biases twice, so this compares with its sdpa."""
    overrides = {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}
    path = tiny("falcon", tmp_path / "alibi", **overrides)
    tokens = drawn(path, np.random.default_rng(4), 263, TOKENS)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
    with torch.no_grad():
        wanted = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    ex = open_device("host").load(port(Checkpoint.open(path)), Checkpoint.open(path), StateSpec(4, 16))
    got = ex.step(StepRequest(bind([Chunk(tokens, 0, [2, 1], range(TOKENS))], 16), logits=True)).logits
    assert got is not None and error(got, wanted) < LIMIT


@pytest.mark.parametrize("family", OTHERS)
def test_defaults_are_those_of_transformers(family):
    """A config.json with nothing but sizes gives the Program that the full one of transformers gives."""
    row = OTHERS[family]
    kind = row.get("config", f"{row['class'].removesuffix('LMHeadModel')}Config")
    alone = {"is_encoder_decoder": False} if "decoder_layers" in row else {}
    told = {key: row[key] for key in ("is_decoder", "attention_type", "pad_token_id") if key in row}
    bare = {**SIZES, **alone, **told, **NEEDED.get(family, {}), "architectures": [architecture(row["class"])]}
    full = getattr(transformers, kind)(**json.loads(json.dumps({"pad_token_id": 0, **bare}))).to_dict()
    assert port_config(bare, 64) == port_config({**full, "dtype": "bfloat16"}, 64)


SIZES = {
    "hidden_size": 128, "num_attention_heads": 32, "intermediate_size": 64, "num_hidden_layers": 6, "vocab_size": 64,
}  # fmt: skip
NEEDED = {  # what a config of the family has to say besides
    "plbart": {"decoder_attention_heads": 8},
    "trocr": {"decoder_attention_heads": 32, "decoder_layers": 6, "decoder_ffn_dim": 64},
    "xglm": {"attention_heads": 32, "num_layers": 6, "ffn_dim": 64},
    "bitnet": {"num_key_value_heads": 8},
    "got_ocr2": {"text_config": {**SIZES, "model_type": "qwen2", "tie_word_embeddings": True}},
    "helium": {"num_attention_heads": 20},
    "stablelm": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "stablelm_parallel": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "gpt_neox": {"num_attention_heads": 8},
    "gpt_neox_sequential": {"num_attention_heads": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "nanochat": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "ministral": {"head_dim": 24},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gemma3n": {"num_kv_shared_layers": 1},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 128},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
}
