"""Every llama.cpp architecture with a port: a tiny GGUF file has the checkpoint's logits; and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import gguf_files, gguf_hybrids
from support.gguf_files import ARCHITECTURES as WRITTEN
from support.gguf_files import architecture, write
from support.published import logits, typical
from support.tiny import FAMILIES, MIXTURES, MSCALE, error, tiny, truth

from intaglio.models import Checkpoint, CheckpointError, PortError, account, port
from intaglio.models.files.gguf import open_gguf
from intaglio.models.files.gguf.architectures import ARCHITECTURES, REFUSED

gguf = pytest.importorskip("gguf")
# What a file has no key for: llama.cpp has these values built in, those of the released models.
BUILT_IN = {
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {"query_pre_attn_scalar": 32},
    "smollm3": {"use_sliding_window": False},
    "qwen2moe": {"mlp_only_layers": []},
    "qwen3moe": {"decoder_sparse_step": 1},
    "gptoss": {"swiglu_limit": 7.0},
    "phimoe": {"router_jitter_noise": 0.01},
    "llama4": {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1},
    "deepseekv2": {"rope_parameters": {**MSCALE, "mscale": 0.7}},
    "hunyuan_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "cohere": {"attention_bias": False},
    "dots1": {"sliding_window": None},
    "ernie4_5_moe": {"use_bias": False},
    "olmo": {"attention_bias": False},
    "starcoder2": {"sliding_window": None},
    "gpt2": {"scale_attn_by_inverse_layer_idx": False},
    "phi": {"qk_layernorm": False},
    "mpt_six_heads": {"attn_config": {"clip_qkv": 0.9}},
    "falcon_new": {"bias": True},
    "afmoe": {"tie_word_embeddings": False},
    "minicpm3": {"dim_model_base": 256, "v_head_dim": 16, "mlp_bias": False},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "deepseekv3": {"rope_parameters": {**MSCALE, "mscale": 0.7}, "attention_bias": False},
    "deepseek_v32": {"attention_bias": False},
    "mamba": {"intermediate_size": 128, "expand": 2},
    "falcon_mamba": {"intermediate_size": 128, "mixer_rms_eps": 1e-5},
    "mamba2": {"time_step_limit": [0.0, float("inf")]},
    "nemotron_h": {"time_step_min": 0.001},
    "qwen3_next": {"mlp_only_layers": []},
    "bitnet": {"hidden_act": "silu", "tie_word_embeddings": True},
    "mimo_v2_flash": {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
    "gemma3n": {"vocab_size_per_layer_input": 263},
    "nemotron_h_moe": {"time_step_min": 0.001},
    "nemotron_h_latent": {"time_step_min": 0.001},
    "ministral3": {"sliding_window": None},
    "solar_open": {"first_k_dense_replace": 0},
    "youtu": {"attention_bias": False},
    "glm4_moe_lite": {"attention_bias": False},
}
OTHERS = [
    "gemma", "cohere", "seed_oss", "arcee", "hunyuan_dense", "ernie4_5", "exaone4", "nemotron", "starcoder2",
    "dots1", "ernie4_5_moe", "olmo", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_sequential", "falcon", "falcon_new",
    "phi", "stablelm", "stablelm_parallel", "bloom", "bloom_six_heads", "mpt", "mpt_six_heads", "glm", "hunyuan_moe",
    "afmoe", "minicpm3", "lfm2", "lfm2_moe", "mamba", "falcon_mamba", "mamba2", "jamba", "falcon_h1",
    "granitemoehybrid", "granitemoehybrid_dense", "nemotron_h", "qwen3_next", "qwen3_5", "qwen3_5_moe", "gemma4",
    "gemma4_keys", "glm_moe_dsa", "deepseek_v32", "jais2", "exaone_moe", "apertus", "dbrx", "bitnet", "mimo_v2_flash",
    "gemma3n", "gemma4_shared", "gemma4_experts", "nemotron_h_moe", "nemotron_h_latent", "ministral3",
    "granitemoeshared", "solar_open", "glm4_moe_lite", "youtu", "cohere2_moe", "mellum", "hy_v3",
]  # fmt: skip
SAME_AS = {
    "qwen2vl": "qwen2", "qwen3vl": "qwen3", "qwen3vlmoe": "qwen3moe", "bitnet-b1.58": "bitnet",
    "nemotron_h_moe": "nemotron_h",
}  # fmt: skip
TOKENS = list(range(40))


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES, *OTHERS])
def test_architecture(tmp_path, family):
    """Sums of up to 1000 products in float32 in another order than transformers': 1000 * 2^-24, and some layers."""
    path = tiny(family, tmp_path / "source", **BUILT_IN.get(family, {}))
    file, plain, wanted = write(path, tmp_path / "out")
    opened = Checkpoint.open(file)
    assert opened.config.get("llama_names") or {n for n in wanted if "norm" in n} <= opened.names
    assert error(logits(file, "reference", tokens=TOKENS), truth(plain, TOKENS)) < 2e-4
    a, stored = account(file), open_gguf(file)
    assert [t.name for t in a.tensors] == [t.name for _, t in stored.tensors]
    assert all(t.becomes for t in a.tensors) and not [k.note for k in a.keys if k.note]
    assert [k.key for k in a.keys] == list(stored.fields)
    weights = {t.name for t in port(opened, 32).of_role("weight") if ".act." not in t.name}  # xIELU's are metadata
    assert weights <= {b for t in a.tensors for b in t.becomes}


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gptoss", "MXFP4"), ("qwen3moe", "Q8_0"), ("granitemoe", "Q5_1"), ("llama4", "IQ4_NL"), ("deepseekv3", "Q8_0")],
)
def test_quantised_experts(tmp_path, family, kind):
    """Experts of a stack are read one by one, in their blocks; latents' up-projections become bf16."""
    widths = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    if family == "deepseekv3":
        widths = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "moe_intermediate_size": 64,
                  "q_lora_rank": 32}  # fmt: skip
    if family == "qwen3moe":
        widths["moe_intermediate_size"] = 64
    path = tiny(family, tmp_path / "source", **{**widths, **BUILT_IN.get(family, {})})
    file, plain, _ = write(path, tmp_path / "out", lambda name: kind if "exps" in name or "_b." in name else "F32")
    c = Checkpoint.open(file)
    names = [n for n in c.names if ".experts." in n and n.endswith("weight")]
    wanted = {"MXFP4": "mxfp4", "Q8_0": "int8g32f16", "IQ4_NL": "int8g32f16", "Q5_1": "affine8g32f16"}[kind]
    assert names and {c.format(n) for n in names} == {wanted}
    for device in ("reference", "host"):
        assert typical(logits(file, device), truth(plain, TOKENS)) < 0.05


@pytest.mark.parametrize("lost", ["k_b", "v_b"])
def test_half_of_a_latent_projection_is_refused(tmp_path, monkeypatch, lost):
    converted = gguf_files.converted
    monkeypatch.setattr(gguf_files, "converted", lambda *a: (x for x in converted(*a) if f".{lost}_proj" not in x[0]))
    path = tiny("deepseekv3", tmp_path / "source", **BUILT_IN["deepseekv3"])
    file, _, _ = write(path, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn has only one of attn_k_b and attn_v_b; .* again"):
        Checkpoint.open(file)


WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
NETS = {
    "linear_key_head_dim": 32, "linear_value_head_dim": 64, "linear_num_value_heads": 8, "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
SPARSE = {"mlp_only_layers": [], "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}


@pytest.mark.parametrize(
    ("family", "kind", "more"),
    [
        ("qwen3_5", "Q4_K", NETS), ("qwen3_5", "Q8_0", NETS), ("qwen3_next", "Q5_K", {**NETS, **SPARSE}),
        ("falcon_h1", "Q8_0", {"mamba_d_ssm": 256}), ("jamba", "Q5_0", {}),
    ],
)  # fmt: skip
def test_quantised_recurrent_blocks(tmp_path, family, kind, more):
    """Rows are put in order with their codes; the columns of out_proj stay, and what they multiply is permuted."""
    path = tiny(family, tmp_path / "source", **WIDE, **more)
    file, plain, _ = write(
        path, tmp_path / "out", lambda name: kind if "blk" in name and "ssm_dt" not in name else "F32"
    )
    c = Checkpoint.open(file)
    out = "model.layers.0.linear_attn.out_proj.weight"
    assert family != "qwen3_5" or (c.format(out) in ("q4_k", "int8g32f16") and c.order(out) in c.orders)
    for device in ("reference", "host"):
        assert typical(logits(file, device), truth(plain, TOKENS)) < 0.05


def test_queries_to_gate_in_one_matrix(tmp_path, monkeypatch):
    """Qwen3-Next in older files, with the rows as transformers has them."""
    monkeypatch.setattr(gguf_hybrids, "qkvz", lambda name, x, c, layer: [(name, x, lambda y: {name: y})])
    path = tiny("qwen3_next", tmp_path / "source", **BUILT_IN["qwen3_next"])
    file, plain, _ = write(path, tmp_path / "out")
    assert any(t.name.endswith("ssm_in.weight") for _, t in open_gguf(file).tensors)
    assert error(logits(file, "reference", tokens=TOKENS), truth(plain, TOKENS)) < 2e-4


@pytest.mark.parametrize(
    ("family", "key", "value", "says"),
    [
        ("gemma4", "attention.shared_kv_layers", 3, "leaves no layer of type full_attention with a K/V cache"),
        (
            "gemma4",
            "feed_forward_length",
            [96, 96, 96, 48],
            "feed_forward_length=.* wanted one number for all 4 layers",
        ),
        ("ministral3", "rope.scaling.type", "linear", "temperature_scale=.* with rope.scaling.type yarn only"),
        ("nemotron_h_moe", "expert_gating_func", 1, "expert_gating_func=1 is not ported"),
        ("cohere2_moe", "expert_weights_scale", 2.5, "expert_weights_scale=2.5 is not ported"),
        ("hy_v3", "expert_weights_norm", 0, "expert_weights_norm=0 is not ported"),
        ("gemma4", "rope.dimension_count_swa", 8, "heads of 16 are turned whole"),
        ("mimo_v2_flash", "attention.head_count_kv", [1, 4, 4, 4], "twice that in those with a window"),
        ("jamba", "attention.head_count_kv", [0, 2, 2, 0], "layers .1, 2. have attention; wanted every n-th layer"),
        ("nemotron_h", "feed_forward_length", [0, 96, 0, 48], "layers of different sizes are not ported"),
        ("exaone_moe", "expert_gating_func", 1, "expert_gating_func=1 is not ported"),
        ("bitnet", "hidden_act", "tanh", "hidden_act='tanh' is not ported; known are silu, relu2"),
        ("granitemoehybrid", "rope.dimension_count", 8, "turns whole heads of 16"),
        ("llama", "attention.scale", 0.25, "attention.scale=0.25 is not ported for this architecture"),
        ("llama", "rope.scaling.attn_factor", 1.25, "rope.scaling.attn_factor=1.25 is not ported"),
        ("qwen2", "logit_scale", 0.5, "logit_scale=0.5 is not ported .* wanted no such key, or 0 or 1"),
        ("qwen3", "attention.sliding_window", 16, "attention.sliding_window=16 is not ported"),
        ("qwen2moe", "expert_weights_scale", 2.5, "expert_weights_scale=2.5 is not ported"),
        ("qwen3moe", "expert_gating_func", 2, "expert_gating_func=2 is not ported"),
        ("olmo2", "attn_logit_softcapping", 30.0, "attn_logit_softcapping=30.0 is not ported"),
    ],
)
def test_what_no_port_computes_is_refused(tmp_path, family, key, value, says):
    path = tiny(family, tmp_path / "source", **BUILT_IN.get(family, {}))
    arch = architecture(json.loads((path / "config.json").read_text()))
    add = {int: "add_uint32", float: "add_float32", list: "add_array", str: "add_string"}[type(value)]
    more = {"extra": lambda w: getattr(w, add)(f"{arch}.{key}", value), "leave_out": (key,)}
    file, _, _ = write(path, tmp_path / "out", **more)
    with pytest.raises(PortError, match=says):
        port(Checkpoint.open(file))


def test_keys_of_a_wrong_type_or_without_effect(tmp_path):
    path = tiny("llama", tmp_path / "source")
    file, plain, _ = write(path, tmp_path / "out", extra=lambda w: w.add_float32("llama.logit_scale", 1.0))
    assert error(logits(file, "reference", tokens=TOKENS), truth(plain, TOKENS)) < 2e-4
    for name, add, value in (("text", "add_string", "many"), ("nan", "add_float32", float("nan"))):
        more = {"extra": lambda w, add=add, value=value: getattr(w, add)("llama.context_length", value)}
        file, _, _ = write(path, tmp_path / name, leave_out=("context_length",), **more)
        with pytest.raises(CheckpointError, match="llama.context_length=.*; wanted a finite number"):
            Checkpoint.open(file)


def test_a_key_that_nothing_reads_is_reported(tmp_path):
    """And attention that is not causal is refused; a key that is off is not worth a word."""
    path = tiny("llama", tmp_path / "source")

    def more(w):
        w.add_float32("llama.attention.sharpness", 3.0)
        w.add_bool("llama.attention.blurred", False)

    file, _, _ = write(path, tmp_path / "out", extra=more)
    with pytest.warns(UserWarning, match="llama.attention.sharpness=3.0 is ignored: nothing here reads it"):
        port(Checkpoint.open(file))
    noted = [k.key for k in account(file).keys if k.note]
    assert noted == ["llama.attention.sharpness"]
    file, _, _ = write(path, tmp_path / "other", extra=lambda w: w.add_bool("llama.attention.causal", False))
    with pytest.raises(PortError, match="attention.causal=False is not ported"):
        Checkpoint.open(file)


def test_experts_beside_the_mlp_of_some_layers_are_refused(tmp_path):
    path = tiny("gemma4", tmp_path / "source")
    router = np.ones((8, 64), np.float32)
    file, _, _ = write(path, tmp_path / "out", extra=lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", router))
    with pytest.raises(PortError, match=r"layers \[0\] have experts; wanted all 4 layers, or none"):
        Checkpoint.open(file)


def test_experts_without_factors_of_their_weights(tmp_path):
    """Converters may multiply the down matrices of Gemma 4's experts by the factors, and leave these out."""
    path = tiny("gemma4_experts", tmp_path / "source")
    arrays = load_file(path / "model.safetensors")
    ones = {n: np.ones_like(x) for n, x in arrays.items() if n.endswith("per_expert_scale")}
    assert len(ones) == 4
    save_file(arrays | ones, path / "model.safetensors", {"format": "pt"})
    add = gguf.GGUFWriter.add_tensor
    drop = lambda w, name, *a, **k: None if name.endswith("down_exps.scale") else add(w, name, *a, **k)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", drop)
        file, plain, _ = write(path, tmp_path / "out")
    assert error(logits(file, "reference", tokens=TOKENS), truth(plain, TOKENS)) < 2e-4


@pytest.mark.parametrize("family", ["gemma3n", "gemma4_shared"])
def test_keys_and_values_of_layers_that_read_other_caches_are_ignored(tmp_path, family):
    """Released checkpoints have them, and so have the files made of them."""
    path = tiny(family, tmp_path / "source", **BUILT_IN.get(family, {}))
    last = json.loads((path / "config.json").read_text())["num_hidden_layers"] - 1
    spare = {f"blk.{last}.attn_{x}.weight": np.ones((24, 64), np.float32) for x in "kv"}

    def more(w):
        for name, x in spare.items():
            w.add_tensor(name, x)

    file, plain, _ = write(path, tmp_path / "out", extra=more)
    assert error(logits(file, "reference", tokens=TOKENS), truth(plain, TOKENS)) < 2e-4
    why = {t.name: t.why for t in account(file).tensors if not t.becomes}
    assert set(why) == set(spare) and all("reads the keys and values of layer" in text for text in why.values())


@pytest.mark.parametrize("act", ["relu2", "silu"])
def test_bitnet_of_bitnet_cpp(tmp_path, act):
    """bitnet.cpp's architecture has squared ReLU, unless the file says otherwise."""
    path = tiny("bitnet", tmp_path / "source", **{**BUILT_IN["bitnet"], "hidden_act": act})
    said = {"extra": lambda w: w.add_string("bitnet-b1.58.hidden_activation", act)} if act == "silu" else {}
    file, plain, _ = write(path, tmp_path / "out", named="bitnet-b1.58", **said)
    assert error(logits(file, "reference", tokens=TOKENS), truth(plain, TOKENS)) < 2e-4


def test_types_of_bitnet_cpp_are_refused(tmp_path):
    path = tiny("bitnet", tmp_path / "source", **BUILT_IN["bitnet"])
    file, _, _ = write(path, tmp_path / "out", "F16", named="bitnet-b1.58")
    held, name = bytearray(file.read_bytes()), b"blk.0.attn_q.weight"
    at = held.index(name) + len(name) + 4 + 2 * 8  # its number of dimensions and these lie before the type
    held[at : at + 4] = (36).to_bytes(4, "little")
    file.write_bytes(held)
    with pytest.raises(PortError, match="blk.0.attn_q.weight is type 36, which is not read .I2_S of bitnet.cpp"):
        Checkpoint.open(file)


@pytest.mark.parametrize("value", [[0.5], ["many"] * 6])
def test_a_list_that_does_not_fit_the_layers_is_refused(tmp_path, value):
    path = tiny("gemma3n", tmp_path / "source", **BUILT_IN["gemma3n"])
    key = "gemma3n.activation_sparsity_scale"
    more = {"extra": lambda w: w.add_array(key, value), "leave_out": ("activation_sparsity_scale",)}
    file, _, _ = write(path, tmp_path / "out", **more)
    with pytest.raises(CheckpointError, match=f"{key}=.*; wanted a number, or one for each of the 6 layers"):
        Checkpoint.open(file)


def test_frequency_factors_that_a_port_does_not_use_are_refused(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    file, _, _ = write(tiny("cohere2", tmp_path / "source", rope_parameters=rope), tmp_path / "out")
    with pytest.raises(PortError, match="the port of 'cohere2' has no rope with frequency factors"):
        Checkpoint.open(file)


def test_biases_of_gate_and_up_in_one_tensor_are_refused(tmp_path):
    path, biases = tiny("qwen3moe", tmp_path / "source", decoder_sparse_step=1), np.ones((8, 64), np.float32)
    file, _, _ = write(path, tmp_path / "out", extra=lambda w: w.add_tensor("blk.0.ffn_gate_up_exps.bias", biases))
    with pytest.raises(PortError, match=r"tensor blk.0.ffn_gate_up_exps.bias is \[8, 64\]; .* matrices only"):
        Checkpoint.open(file)


@pytest.mark.parametrize("arch", REFUSED)
def test_a_near_architecture_is_refused_with_its_reason(tmp_path, arch):
    w = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    w.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(PortError, match=f"architecture '{arch}' is not read: it"):
        Checkpoint.open(tmp_path / "m.gguf")


def test_gemma_with_quantised_embeddings(tmp_path):
    """Embeddings are times sqrt(hidden) as it is, where no format of values rounds it."""
    path = tiny("gemma3", tmp_path / "source", **BUILT_IN["gemma3"])
    file, plain, _ = write(path, tmp_path / "out", "Q8_0")
    for device in ("reference", "host"):
        assert typical(logits(file, device), truth(plain, TOKENS)) < 0.05


def test_predictors_are_left_out(tmp_path):
    """GLM-4.5 has a layer more in the file, which predicts the token after the next."""
    path = tiny("glm4moe", tmp_path / "source", **BUILT_IN.get("glm4moe", {}))

    def more(w):
        w.add_uint32("glm4moe.block_count", 5)
        w.add_uint32("glm4moe.nextn_predict_layers", 1)
        w.add_tensor("blk.4.nextn.eh_proj.weight", np.ones((64, 128), np.float32))
        w.add_tensor("blk.4.attn_norm.weight", np.ones(64, np.float32))

    file, _, _ = write(path, tmp_path / "out", extra=more, leave_out=("block_count",))
    assert error(logits(file, "reference", tokens=TOKENS), truth(path, TOKENS)) < 2e-4


def test_a_correction_bias_makes_a_deepseek_v3(tmp_path):
    """Converters write expert_gating_func only where config.json names the function."""
    path = tiny("deepseekv3", tmp_path / "source", **BUILT_IN["deepseekv3"])
    file, _, _ = write(path, tmp_path / "out", leave_out=("expert_gating_func",))
    assert error(logits(file, "reference", tokens=TOKENS), truth(path, TOKENS)) < 2e-4


@pytest.mark.parametrize("family", ["afmoe", "glm4moe", "lfm2_moe"])
def test_another_score_of_experts_is_refused(tmp_path, family):
    """llama.cpp scores experts as the file says; these ports have a sigmoid."""
    path = tiny(family, tmp_path / "source", **BUILT_IN.get(family, {}))
    arch = WRITTEN[json.loads((path / "config.json").read_text())["model_type"]]
    leave = ("expert_gating_func",)
    more = {"extra": lambda w: w.add_uint32(f"{arch}.expert_gating_func", 1), "leave_out": leave}
    file, _, _ = write(path, tmp_path / "out", **more)
    with pytest.raises(PortError, match="expert_gating_func=1 is not ported; wanted 2"):
        Checkpoint.open(file)


def test_all_architectures_are_written_here():
    assert set(ARCHITECTURES) == set(WRITTEN.values()) | set(SAME_AS)


def test_scales_of_experts_that_an_architecture_does_not_have_are_refused(tmp_path):
    path, scales = tiny("qwen3moe", tmp_path / "source", decoder_sparse_step=1), np.ones(8, np.float32)
    file, _, _ = write(path, tmp_path / "out", extra=lambda w: w.add_tensor("blk.0.ffn_down_exps.scale", scales))
    with pytest.raises(PortError, match=r"tensor blk.0.ffn_down_exps.scale is \[8\]; .* weights with 3 dimensions"):
        Checkpoint.open(file)
