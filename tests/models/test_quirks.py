"""Checkpoints with leftovers, old names and settings added by hand.

Results equal those of transformers on the same files, or the error says why the checkpoint is refused.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from support.published import logits
from support.tiny import MIXTURES, YARN, error, tiny, truth

from intaglio.models import Checkpoint, CheckpointError, PortError, port

safetensors = pytest.importorskip("safetensors.torch")
TOKENS = list(range(3, 43))
LIMIT = 2e-5  # of float32 sums in other orders
SMALL = {"num_hidden_layers": 2}


def tensors(path):
    return safetensors.load_file(path / "model.safetensors")


def store(path, held, name="model.safetensors"):
    safetensors.save_file({n: x.contiguous().clone() for n, x in held.items()}, path / name, {"format": "pt"})


def configure(path, file="config.json", drop=(), **change):
    at = path / file
    table = json.loads(at.read_text()) if at.exists() else {}
    at.write_text(json.dumps({k: v for k, v in {**table, **change}.items() if k not in drop}))


def ours(path, context=None, tokens=TOKENS):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(path, "reference", port(Checkpoint.open(path), context), tokens=tokens)


def same(path, context=None, tokens=TOKENS):
    """Whether logits are those of transformers."""
    assert error(ours(path, context, tokens), truth(path, tokens)) < LIMIT


@pytest.fixture
def llama(tmp_path):
    return tiny("llama", tmp_path / "llama", **SMALL)


def test_a_head_that_differs_from_the_embedding_it_should_be_tied_to(tmp_path):
    path = tiny("qwen2", tmp_path / "m", **SMALL)
    held = tensors(path)
    assert "lm_head.weight" not in held
    store(path, held | {"lm_head.weight": held["model.embed_tokens.weight"]})
    same(path)
    store(path, held | {"lm_head.weight": held["model.embed_tokens.weight"].flip(0)})
    same(path)
    with pytest.warns(UserWarning, match=r"tie_word_embeddings is true, but lm_head.weight differs"):
        port(Checkpoint.open(path))


def test_the_head_alone_is_there(tmp_path):
    path = tiny("qwen2", tmp_path / "m", **SMALL)
    held = tensors(path)
    held["lm_head.weight"] = held.pop("model.embed_tokens.weight")
    store(path, held)
    same(path)


def test_a_head_is_asked_for_and_missing(tmp_path):
    path = tiny("qwen2", tmp_path / "m", **SMALL)
    configure(path, tie_word_embeddings=False)
    with pytest.raises(PortError, match=r"lacks 1 tensors \(lm_head.weight\).*set tie_word_embeddings to true"):
        port(Checkpoint.open(path))


SCALINGS = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with its base": {**YARN, "rope_theta": 1e6},
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_rope_scaling_added_by_hand_wins(tmp_path, how, family):
    path = tiny(family, tmp_path / "m", **SMALL)
    configure(path, rope_scaling=SCALINGS[how])
    same(path)


@pytest.mark.parametrize("how", sorted(SCALINGS))
def test_a_number_of_rope_scaling_that_is_none_is_refused(tmp_path, how):
    """None of them becomes a table of NaN. Where a number has a default, null and 0 stand for it."""
    path = tiny("qwen3", tmp_path / "m", **SMALL)
    keys = [key for key, value in SCALINGS[how].items() if not isinstance(value, str | list)]
    for key in keys:
        needed = how in ("dynamic", "llama3", "linear") or key == "rope_theta"
        for wrong in ("abc", [2.0], True, -1.0, *((None, 0) if needed else ())):
            configure(path, rope_scaling={**SCALINGS[how], key: wrong})
            with pytest.raises(PortError, match=rf"config.json: (rope |rope_scaling\.)?{key}="):
                port(Checkpoint.open(path))


def test_a_longrope_factor_that_is_no_list_of_numbers_is_refused(tmp_path):
    path = tiny("phi3", tmp_path / "m", **SMALL)
    for wrong in (None, 1.0, [1.0, "abc"]):
        configure(path, rope_scaling={"type": "longrope", "short_factor": [1.0, 1.0], "long_factor": wrong})
        with pytest.raises(PortError, match=r"config.json: rope long_factor=.*wanted a list of numbers above 0"):
            port(Checkpoint.open(path))


def test_what_a_replaced_rope_loses_is_said(tmp_path):
    path = tiny("qwen3", tmp_path / "m", **SMALL, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    configure(path, rope_scaling=SCALINGS["yarn"])
    with pytest.warns(UserWarning, match=r"rope_parameters is ignored: rope_scaling takes its place.*500000"):
        port(Checkpoint.open(path))
    same(path)


def test_yarn_makes_the_context_longer(tmp_path):
    path = tiny("qwen3", tmp_path / "m", **SMALL, max_position_embeddings=32)
    configure(path, rope_scaling=SCALINGS["yarn"])
    assert port(Checkpoint.open(path)).context == 128
    same(path, 100, list(range(60)))
    with pytest.raises(PortError, match=r"context=129 is outside 1\.\.128"):
        port(Checkpoint.open(path), 129)


def test_dynamic_ntk_and_longer_sequences(tmp_path):
    path = tiny("qwen3", tmp_path / "m", **SMALL, max_position_embeddings=32)
    configure(path, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    with pytest.warns(UserWarning, match=r"the context is 32 tokens.*--context 128"):
        assert port(Checkpoint.open(path)).context == 32
    same(path, None, list(range(30)))
    same(path, 60, list(range(60)))  # transformers' table is that of the sequence's length


def test_longrope_has_short_factors_by_default(tmp_path):
    path = tiny("phi3", tmp_path / "m", **SMALL)
    with pytest.warns(UserWarning, match=r"the context is 32 tokens.*--context 256"):
        assert port(Checkpoint.open(path)).context == 32
    same(path, None, list(range(32)))
    same(path, 256, list(range(60)))


def test_files_that_are_not_the_model(llama):
    wanted = truth(llama, TOKENS)
    store(llama, {"layers.0.attention.wq.weight": torch.ones(4, 4)}, "consolidated.safetensors")
    store(llama, {"x": torch.ones(4, 4)}, "mtp.safetensors")
    store(llama, {"x": torch.ones(4, 4)}, "adapter_model.safetensors")
    configure(llama, "model.safetensors.index.json", weight_map={"x": "model-00001-of-00002.safetensors"})
    assert error(ours(llama), wanted) < LIMIT
    assert Checkpoint.open(llama).unlisted == [
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "mtp.safetensors",
    ]
    configure(llama, "adapter_config.json", base_model_name_or_path="a/base")
    with pytest.warns(UserWarning, match=r"the LoRA of adapter_model.safetensors is not applied"):
        port(Checkpoint.open(llama))
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated.safetensors is the model in Mistral's own layout"):
        Checkpoint.open(llama)


def sharded(tmp_path):
    path = tiny("llama", tmp_path / "m", **SMALL, max_shard_size="100KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return path, index


def test_an_index_that_does_not_list_all(tmp_path):
    path, index = sharded(tmp_path)
    index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = index["weight_map"]["lm_head.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    same(path)


def test_a_tensor_in_two_shards(tmp_path):
    path, index = sharded(tmp_path)
    files = sorted(set(index["weight_map"].values()))
    at = index["weight_map"]["model.norm.weight"]
    other = next(f for f in files if f != at)
    norm = safetensors.load_file(path / at)["model.norm.weight"]
    store(path, safetensors.load_file(path / other) | {"model.norm.weight": norm}, other)
    same(path)
    store(path, safetensors.load_file(path / other) | {"model.norm.weight": norm + 1}, other)
    with pytest.raises(CheckpointError, match=r"tensor model.norm.weight is in .* with other values"):
        Checkpoint.open(path)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_tensors_of_the_inner_model(tmp_path, family):
    path = tiny(family, tmp_path / "m", **SMALL)
    held = tensors(path)
    store(path, {n.removeprefix("model."): x for n, x in held.items()})
    same(path)
    store(path, {f"transformer.{n}": x for n, x in held.items()})
    with pytest.raises(PortError, match=r"the tensors stand under 'transformer.model.'.*has them under 'model.'"):
        port(Checkpoint.open(path))


@pytest.mark.parametrize("family", [f for f in MIXTURES if f not in ("gptoss", "llama4")])
def test_experts_as_transformers_5_holds_them(tmp_path, family):
    import transformers

    path = tiny(family, tmp_path / "m", num_hidden_layers=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "kept", save_original_format=False)
    assert any(n.endswith("experts.gate_up_proj") for n in Checkpoint.open(tmp_path / "kept").names)
    same(tmp_path / "kept")


def test_architectures_by_other_names(llama):
    wanted = truth(llama, TOKENS)
    for change in (
        {"architectures": None}, {"architectures": ["LLaMAForCausalLM"]}, {"architectures": ["LlamaModel"]},
        {"architectures": []}, {"architectures": ["LLaMAForCausalLM"], "model_type": "of_my_own"},
        {"architectures": ["MistralForCausalLM"], "model_type": "llama"},  # transformers goes by model_type
    ):  # fmt: skip
        configure(llama, **change)
        assert error(ours(llama), wanted) < LIMIT
    configure(llama, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(PortError, match="a model with a head for another task"):
        port(Checkpoint.open(llama))
    configure(llama, architectures=None, model_type=None)
    with pytest.raises(PortError, match=r"config.json has architectures=None and no model_type"):
        port(Checkpoint.open(llama))


LEFT = {
    "rotary_emb.inv_freq": torch.ones(8),
    "model.rotary_emb.original_inv_freq": torch.ones(8),
    "model.layers.0.self_attn.bias": torch.ones(1, 1, 16, 16).tril().bool(),
    "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
    "model.layers.1.input_layernorm.bias": torch.zeros(64),
    "model.layers.1.self_attn.kv_scale": torch.tensor(0.3),
    "model.layers.1.self_attn.k_scale": torch.tensor(0.3),
    "model.layers.1.mlp.up_proj.input_scale": torch.tensor(0.3),
    "v_head.summary.weight": torch.ones(1, 64),
    "model.position_ids": torch.arange(9),
    "nothing": torch.zeros(0, 3),
}


def test_leftovers_that_change_nothing(llama):
    wanted = truth(llama, TOKENS)
    store(llama, tensors(llama) | LEFT)
    assert error(ours(llama), wanted) < LIMIT


@pytest.mark.parametrize(
    ("name", "x"),
    [
        ("model.layers.1.input_layernorm.bias", torch.full((64,), 0.1)),
        ("model.layers.0.self_attn.bias", torch.ones(1, 1, 16, 16)),
        ("model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(2, 64)),
        ("model.layers.0.mlp.up_proj.weight_scale", torch.ones(2, 64)),
    ],
)
def test_leftovers_that_might(llama, name, x):
    store(llama, tensors(llama) | {name: x})
    with pytest.raises(PortError, match=rf"holds 1 tensors \({name}\)"):
        port(Checkpoint.open(llama))


def test_folders_that_are_something_else(tmp_path):
    configure(tmp_path, "adapter_config.json", base_model_name_or_path="meta-llama/Llama-3.2-1B")
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter.*merge it into meta-llama/Llama-3.2-1B"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    configure(tmp_path, "params.json", dim=1)
    with pytest.raises(CheckpointError, match=r"no config.json but params.json: .*Mistral's own layout"):
        Checkpoint.open(tmp_path)
    (tmp_path / "params.json").unlink()
    (tmp_path / "checkpoint-500").mkdir()
    configure(tmp_path / "checkpoint-500", a=1)
    with pytest.raises(CheckpointError, match=r"its folder checkpoint-500 has one"):
        Checkpoint.open(tmp_path)


def test_keys_that_nothing_reads_are_named(llama):
    wanted = truth(llama, TOKENS)
    configure(llama, unsloth_version="2024.9", attention_multiplier=0.3, rope_scalling={"factor": 4})
    with pytest.warns(UserWarning) as said:
        port(Checkpoint.open(llama))
    text = " ".join(str(w.message) for w in said)
    assert "attention_multiplier=0.3 is ignored" in text and "rope_scalling=" in text and "unsloth" not in text
    assert error(ours(llama), wanted) < LIMIT
    configure(llama, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    with pytest.raises(PortError, match=r"attention_multiplier=0.3 is read by nothing.*auto_map"):
        port(Checkpoint.open(llama))


def test_fixed_keys(tmp_path):
    path = tiny("deepseekv3", tmp_path / "m", num_hidden_layers=2)
    configure(path, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        port(Checkpoint.open(path))
    configure(path, scoring_func="softmax")
    with pytest.raises(PortError, match=r"scoring_func='softmax'; the port of .* computes 'sigmoid'"):
        port(Checkpoint.open(path))


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseekv3", "phi3"])
def test_every_key_that_transformers_saves_has_a_fate(tmp_path, family):
    """And none of them is one that a user should be warned of, but LongRoPE's two lengths."""
    from intaglio.models.port import port_checkpoint

    path = tiny(family, tmp_path / "m", num_hidden_layers=2)
    ported = port_checkpoint(Checkpoint.open(path))
    table = json.loads((path / "config.json").read_text())
    names = [fate.key for fate in ported.keys]
    assert len(set(names)) == len(names) and set(table) <= set(names)
    assert [n for n in ported.notes if "the context is" not in n] == []
    assert np.all([fate.why for fate in ported.keys])
