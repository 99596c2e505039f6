"""GGUF tensors and metadata of recurrent and other newer models, as llama.cpp's converters write them.

Used by gguf_files.py and test_gguf_architectures.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

Values = dict[str, np.ndarray]
Converted = tuple[str, np.ndarray, Callable[[np.ndarray], Values]]
ARCHITECTURES = {  # model_type -> llama.cpp's
    "mamba": "mamba", "falcon_mamba": "mamba", "mamba2": "mamba2", "jamba": "jamba", "falcon_h1": "falcon-h1",
    "granitemoehybrid": "granitehybrid", "nemotron_h": "nemotron_h", "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe", "gemma4_text": "gemma4", "exaone_moe": "exaone-moe",
    "glm_moe_dsa": "glm-dsa", "deepseek_v32": "deepseek32", "jais2": "jais2", "apertus": "apertus", "dbrx": "dbrx",
    "bitnet": "bitnet", "mimo_v2_flash": "mimo2", "gemma3n_text": "gemma3n", "cohere2_moe": "cohere2moe",
    "mellum": "mellum", "hy_v3": "hy_v3",
}  # fmt: skip
# architectures that the library does not know, and one with the same names
NAMED_AS = {"deepseek32": "glm-dsa", "cohere2moe": "dots1", "mellum": "dots1", "hy_v3": "dots1"}
BESIDE = {  # of Gemma 4: llama.cpp's names of the tensors of experts and router
    "router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight", "experts.down_proj": "ffn_down_exps.weight",
}  # fmt: skip
SCANS, TILED = ("mamba", "jamba"), ("qwen35", "qwen35moe")
HEADS = ("mamba2", "falcon-h1", "granitehybrid", "nemotron_h", "nemotron_h_moe")  # with Mamba-2 blocks
DELTA = ("qwen3next", *TILED)
SHIFTED = ("gemma", "gemma2", "gemma3", "nemotron", *DELTA)  # whose norms have 1 added


def prepared(arrays: Values, arch: str) -> Values:
    """The values that a file of this architecture stands for: BitNet's converter makes matrices ternary."""
    if arch != "bitnet":
        return arrays
    out = dict(arrays)
    for name in [n for n in arrays if n.endswith("_proj.weight")]:
        scale = np.float32(max(np.abs(arrays[name]).mean(), 1e-5))
        out[name] = (np.clip(np.rint(arrays[name] / scale), -1, 1) * scale).astype(np.float32)
    return out


def added(c: Mapping[str, Any], arrays: Values, arch: str) -> dict[str, Any]:
    """Metadata under keys without the architecture's name."""
    if arch != "apertus":
        return {}
    at = [f"model.layers.{i}.mlp.act_fn." for i in range(c["num_hidden_layers"])]
    return {f"xielu.{n}": [float(arrays[a + n].reshape(())) for a in at] for n in ("alpha_n", "alpha_p", "beta", "eps")}


def tiled(x: np.ndarray, first: int, c: Mapping[str, Any], width: int, axis: int = 0) -> np.ndarray:
    """x with its rows from `first` on, `width` for each value head, ordered by number in the key head first."""
    keys = c["linear_num_key_heads"]
    head, rest = np.split(x, [first], axis=axis)
    shape = rest.shape
    rest = rest.reshape(*shape[:axis], keys, c["linear_num_value_heads"] // keys, width, *shape[axis + 1 :])
    return np.concatenate([head, rest.swapaxes(axis, axis + 1).reshape(shape)], axis=axis)


def untiled(y: np.ndarray, first: int, c: Mapping[str, Any], width: int, axis: int = 0) -> np.ndarray:
    """And back."""
    order = tiled(np.arange(y.shape[axis]), first, c, width)
    return np.ascontiguousarray(np.take(y, np.argsort(order), axis=axis))


def special(name: str, x: np.ndarray, c: Mapping[str, Any], arch: str) -> list[Converted] | None:
    """What becomes of one tensor, in the form of gguf_files.converted(); None if nothing special."""
    end, layer = name.split(".")[-1], name.split("layers.")[-1].split(".")[0]
    same = lambda y: {name: y}  # noqa: E731
    if arch in TILED and "linear_attn." in name:
        name_as, x, back = in_tiles(name, x, c)
        return _recurrent(name_as, x, c, arch) or [(name_as, x, back)]
    if arch == "qwen3next" and "in_proj_qkvz" in name:
        return qkvz(name, x, c, layer)
    if found := _recurrent(name, x, c, arch):
        return found
    if arch == "falcon-h1":
        return [(name, x * (by := multiplier(name, x, c)), lambda y: {name: (y / by).astype(np.float32)})]
    if arch in ("granitehybrid", "granitemoe") and "shared_mlp" in name:
        parts = ("gate", "up") if "input_linear" in name else ("down",)
        of = "_shexp" if c.get("num_local_experts") else ""
        pieces = np.split(x, len(parts))
        return [(f"blk.{layer}.ffn_{n}{of}.weight", p, lambda y: {}) for n, p in zip(parts, pieces, strict=True)]
    if arch == "dbrx" and "experts.mlp" in name:
        stack = x.reshape(c["ffn_config"]["moe_num_experts"], -1, x.shape[1])
        return [(f"{name}.weight", stack.swapaxes(1, 2) if end == "w2" else stack, lambda y: {})]
    if arch == "bitnet" and "sub_norm" in name:
        return [(f"blk.{layer}.{name.split('.')[-2]}.weight", x, same)]
    if arch == "apertus" and "act_fn" in name:
        return []
    if end in ("layer_scalar", "attention_sink_bias", "correct_output_scale"):
        return [(f"{name}.weight", x, same)]
    if arch == "gemma4" and (found := BESIDE.get(name.split(f"layers.{layer}.")[-1])):
        return [(f"blk.{layer}.{found}", x, same)]
    if name.endswith("linear_attn.norm.weight"):
        return [(name, x, same)]
    return None


def _recurrent(name: str, x: np.ndarray, c: Mapping[str, Any], arch: str) -> list[Converted] | None:
    """Decay, skip, step, convolution and norm of a recurrent block."""
    if arch not in (*SCANS, *HEADS, *DELTA):
        return None
    end, column = name.split(".")[-1], arch in HEADS
    if end == "A_log":
        a = -np.exp(x)
        return [(name, a[:, None] if column else a, lambda y: {})]
    if end == "D" and column:
        return [(name, x[:, None], lambda y: {})]
    if end == "dt_bias":
        return [(name.replace("dt_bias", "dt_proj.bias"), x, lambda y: {})]
    if name.endswith("conv1d.weight"):
        return [(name, x[:, 0] if x.ndim == 3 else x, lambda y: {})]
    if column and name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
        groups = c.get("n_groups") or c["mamba_n_groups"]
        return [(name, x.reshape(groups, -1), lambda y: {})]
    return None


def in_tiles(name: str, x: np.ndarray, c: Mapping[str, Any]) -> Converted:
    """A tensor of a gated delta net of Qwen3.5, its value heads in another order."""
    keys, value = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"], c["linear_value_head_dim"]
    part = name.split("linear_attn.")[1].split(".")[0]
    x = x[:, 0] if part == "conv1d" else x
    at = {"in_proj_qkv": (keys, value), "conv1d": (keys, value), "in_proj_z": (0, value), "out_proj": (0, value)}
    if part == "norm":
        return name, x, lambda y: {name: y}
    first, width = at.get(part, (0, 1))
    axis = int(part == "out_proj")
    return name, tiled(x, first, c, width, axis), lambda y: {name: untiled(y, first, c, width, axis)}


def qkvz(name: str, x: np.ndarray, c: Mapping[str, Any], layer: str) -> list[Converted]:
    """in_proj_qkvz of Qwen3-Next as two matrices, with the rows of all key heads together."""
    keys, key = c["linear_num_key_heads"], c["linear_key_head_dim"]
    value = c["linear_num_value_heads"] // keys * c["linear_value_head_dim"]
    ends = np.cumsum([key, key, value])
    whole = x.reshape(keys, -1, x.shape[1]).copy()

    def parts(y: np.ndarray) -> list[np.ndarray]:
        return np.split(y, ends, axis=1)

    def joined(y: np.ndarray, own: list[np.ndarray]) -> Values:
        at = 0
        for part in own:
            count = part.shape[0] * part.shape[1]
            part[:] = y[at : at + count].reshape(part.shape)
            at += count
        return {name: whole.reshape(x.shape)}

    q, k, v, z = parts(whole)
    flat = [np.ascontiguousarray(p).reshape(-1, x.shape[1]) for p in (q, k, v, z)]
    return [
        (f"blk.{layer}.attn_qkv.weight", np.concatenate(flat[:3]), lambda y: joined(y, [q, k, v])),
        (f"blk.{layer}.attn_gate.weight", flat[3], lambda y: joined(y, [z])),
    ]


def multiplier(name: str, x: np.ndarray, c: Mapping[str, Any]) -> np.ndarray:
    """What Falcon-H1's converter multiplies a tensor with."""
    into = c["attention_in_multiplier"]
    by = {
        "down_proj": c["mlp_multipliers"][1], "gate_proj": c["mlp_multipliers"][0], "q_proj": into, "v_proj": into,
        "k_proj": c["key_multiplier"] * into, "o_proj": c["attention_out_multiplier"],
        "out_proj": c["ssm_out_multiplier"], "lm_head": c["lm_head_multiplier"],
        "embed_tokens": c["embedding_multiplier"],
    }  # fmt: skip
    part = name.split(".")[-2]
    if part != "in_proj":
        return np.float32(by.get(part, 1.0))
    inner, group = c["mamba_d_ssm"], c["mamba_n_groups"] * c["mamba_d_state"]
    counts = (inner, inner, group, group, c["mamba_n_heads"])
    return np.repeat(np.array(c["ssm_multipliers"]) * c["ssm_in_multiplier"], counts).astype(np.float32)[:, None]


def rope_factors(c: Mapping[str, Any], arch: str) -> Iterator[Converted]:
    """The frequency factors of Gemma 4's full layers: 1e30 in columns without rope."""
    if arch == "gemma4":
        width = c["per_layer_config"]["1"]["head_dim"] // 2
        turned = int(width * c["rope_parameters"]["full_attention"]["partial_rotary_factor"])
        yield "rope_freqs.weight", np.array([1.0] * turned + [1e30] * (width - turned), np.float32), lambda y: {}


def metadata(c: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """What converters write for these architectures, by keys of llama.cpp without the architecture."""
    hidden, kinds = c.get("hidden_size", 0), c.get("layer_types") or c.get("layers_block_type") or []
    kv = c.get("num_key_value_heads")
    attends = [kv if k in ("attention", "full_attention") else 0 for k in kinds]
    if arch in ("mamba", "mamba2"):
        heads = {"ssm.time_step_rank": c["time_step_rank"], "ssm.inner_size": c["intermediate_size"]}
        if arch == "mamba2":
            inner = c["num_heads"] * c["head_dim"]
            heads = {"ssm.time_step_rank": c["num_heads"], "ssm.inner_size": inner, "ssm.group_count": c["n_groups"]}
        return heads | {
            "attention.head_count": 0, "attention.head_count_kv": None, "feed_forward_length": 0,
            "attention.key_length": None, "attention.value_length": None, "ssm.state_size": c["state_size"],
            "attention.layer_norm_rms_epsilon": c["layer_norm_epsilon"], "ssm.conv_kernel": c["conv_kernel"],
            "ssm.dt_b_c_rms": c["model_type"] == "falcon_mamba" if arch == "mamba" else None,
            "context_length": 1 << 20, "rope.dimension_count": None, "rope.freq_base": None,
            "attention.layer_norm_epsilon": None,
        }  # fmt: skip
    if arch == "jamba":
        return {
            "ssm.conv_kernel": c["mamba_d_conv"], "ssm.inner_size": c["mamba_expand"] * hidden,
            "ssm.state_size": c["mamba_d_state"], "ssm.time_step_rank": c["mamba_dt_rank"],
            "attention.head_count_kv": [
                kv if i % c["attn_layer_period"] == c["attn_layer_offset"] else 0 for i in range(c["num_hidden_layers"])
            ],
        }  # fmt: skip
    if arch in ("falcon-h1", "granitehybrid"):
        own = {
            "ssm.conv_kernel": c["mamba_d_conv"], "ssm.state_size": c["mamba_d_state"],
            "ssm.group_count": c["mamba_n_groups"], "ssm.time_step_rank": c["mamba_n_heads"],
            "ssm.inner_size": c.get("mamba_d_ssm") or c["mamba_expand"] * hidden,
        }  # fmt: skip
        return own if arch == "falcon-h1" else own | {
            "attention.head_count_kv": attends, "rope.scaling.finetuned": c.get("position_embedding_type") == "rope",
            "attention.scale": c["attention_multiplier"], "embedding_scale": float(c["embedding_multiplier"]),
            "residual_scale": float(c["residual_multiplier"]), "logit_scale": float(c["logits_scaling"]),
            "expert_shared_feed_forward_length": c["shared_intermediate_size"],
        }  # fmt: skip
    if arch in ("nemotron_h", "nemotron_h_moe"):
        width = c["moe_intermediate_size" if arch == "nemotron_h_moe" else "intermediate_size"]
        experts = dict.fromkeys((
            "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_group_count",
            "expert_group_used_count",
        ))  # fmt: skip
        if arch == "nemotron_h_moe":
            experts = {
                "expert_weights_norm": c["norm_topk_prob"], "expert_weights_scale": float(c["routed_scaling_factor"]),
                "expert_shared_count": c["n_shared_experts"], "moe_latent_size": c.get("moe_latent_size"),
                "expert_shared_feed_forward_length": c["moe_shared_expert_intermediate_size"],
            }  # fmt: skip
        return experts | {
            "ssm.conv_kernel": c["conv_kernel"], "ssm.state_size": c["ssm_state_size"],
            "ssm.group_count": c["n_groups"], "ssm.inner_size": c["mamba_num_heads"] * c["mamba_head_dim"],
            "ssm.time_step_rank": c["mamba_num_heads"], "attention.head_count_kv": attends,
            "feed_forward_length": [width if k in ("mlp", "moe") else 0 for k in kinds],
            "attention.layer_norm_rms_epsilon": c["layer_norm_epsilon"],
        }  # fmt: skip
    if arch in DELTA:
        return {
            "ssm.conv_kernel": c["linear_conv_kernel_dim"], "ssm.state_size": c["linear_key_head_dim"],
            "ssm.group_count": c["linear_num_key_heads"], "ssm.time_step_rank": c["linear_num_value_heads"],
            "ssm.inner_size": c["linear_num_value_heads"] * c["linear_value_head_dim"],
            "expert_shared_feed_forward_length": c.get("shared_expert_intermediate_size"),
            "rope.dimension_sections": [11, 11, 10, 0] if arch in TILED else None,
            "attention.recurrent_layers": [k == "linear_attention" for k in kinds],
        }  # fmt: skip
    return _others(c, arch, [int(k == "sliding_attention") for k in kinds])


def _others(c: Mapping[str, Any], arch: str, slides: list[int]) -> dict[str, Any]:
    if arch == "gemma4":
        own, shared = c["per_layer_config"]["1"], c.get("num_kv_shared_layers", 0)
        width, local, kv = own["head_dim"], c["head_dim"], c["num_key_value_heads"]
        inner = c["intermediate_size"]
        if c.get("use_double_wide_mlp"):
            inner = [inner] * (len(slides) - shared) + [2 * inner] * shared
        return {
            "attention.key_length": width, "attention.value_length": width, "attention.key_length_swa": local,
            "attention.value_length_swa": local, "attention.sliding_window": c["sliding_window"],
            "attention.sliding_window_pattern": list(map(bool, slides)), "attention.shared_kv_layers": shared,
            "embedding_length_per_layer_input": c.get("hidden_size_per_layer_input") or 0,
            "attention.head_count_kv": [kv if s else own["num_key_value_heads"] for s in slides]
            if "num_key_value_heads" in own
            else kv,
            "rope.dimension_count": width, "rope.dimension_count_swa": local,
            "final_logit_softcapping": c.get("final_logit_softcapping"),
            "expert_used_count": c.get("top_k_experts"), "feed_forward_length": inner,
        }  # fmt: skip
    if arch == "gemma3n":
        normal = NormalDist()
        return {
            "attention.sliding_window": c["sliding_window"], "final_logit_softcapping": c["final_logit_softcapping"],
            "attention.sliding_window_pattern": list(map(bool, slides)),
            "attention.shared_kv_layers": c["num_kv_shared_layers"], "altup.num_inputs": c["altup_num_inputs"],
            "altup.active_idx": c["altup_active_idx"],
            "embedding_length_per_layer_input": c["hidden_size_per_layer_input"],
            "activation_sparsity_scale": [
                normal.inv_cdf(x) if x else -float("inf") for x in c["activation_sparsity_pattern"]
            ],
        }  # fmt: skip
    if arch in ("mellum", "cohere2moe"):
        own = {
            "attention.sliding_window": c["sliding_window"],
            "attention.sliding_window_pattern": list(map(bool, slides)),
        }  # fmt: skip
        return own if arch == "mellum" else own | {
            "logit_scale": c["logit_scale"], "rope.scaling.type": "none", "expert_gating_func": 2,
            "expert_feed_forward_length": c["intermediate_size"], "expert_weights_norm": c["norm_topk_prob"],
            "feed_forward_length": c["prefix_dense_intermediate_size"], "leading_dense_block_count": 1,
            "expert_shared_count": c["num_shared_experts"],
            "expert_shared_feed_forward_length": c["num_shared_experts"] * c["intermediate_size"],
        }  # fmt: skip
    if arch == "hy_v3":
        return {
            "expert_weights_norm": True, "expert_weights_scale": float(c["router_scaling_factor"]),
            "expert_gating_func": 2, "leading_dense_block_count": 1,
            "expert_shared_feed_forward_length": c["moe_intermediate_size"] * c["num_shared_experts"],
        }  # fmt: skip
    if arch == "exaone-moe":
        return {
            "attention.sliding_window": c["sliding_window"], "rope.scaling.type": "none",
            "attention.sliding_window_pattern": list(map(bool, slides)), "expert_shared_count": c["num_shared_experts"],
            "expert_weights_scale": float(c["routed_scaling_factor"]), "expert_weights_norm": c["norm_topk_prob"],
            "leading_dense_block_count": 1, "expert_gating_func": 2, "nextn_predict_layers": 0,
        }  # fmt: skip
    if arch in ("glm-dsa", "deepseek32"):
        return {
            "attention.indexer.head_count": c["index_n_heads"], "attention.indexer.key_length": c["index_head_dim"],
            "attention.indexer.top_k": c["index_topk"], "leading_dense_block_count": 1,
        }  # fmt: skip
    if arch == "dbrx":
        ffn, attention = c["ffn_config"], c["attn_config"]
        return {
            "attention.head_count_kv": attention["kv_n_heads"], "attention.clamp_kqv": attention["clip_qkv"],
            "feed_forward_length": ffn["ffn_hidden_size"], "expert_count": ffn["moe_num_experts"],
            "expert_used_count": ffn["moe_top_k"], "attention.layer_norm_epsilon": 1e-5,
            "attention.layer_norm_rms_epsilon": None, "rope.freq_base": float(attention["rope_theta"]),
        }  # fmt: skip
    if arch == "bitnet":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}
    if arch == "mimo2":
        head, kv = c["head_dim"], c["num_key_value_heads"]
        ropes = c["rope_parameters"]
        return {
            "attention.head_count_kv": [kv * (1 + s) for s in slides], "attention.sliding_window_pattern": slides,
            "attention.sliding_window": c["sliding_window"] - 1,  # of the reference, without the query's own position
            "attention.value_length": c["v_head_dim"], "attention.value_scale": c["attention_value_scale"],
            "rope.dimension_count": int(head * ropes["full_attention"]["partial_rotary_factor"]),
            "rope.freq_base": float(ropes["full_attention"]["rope_theta"]),
            "rope.freq_base_swa": float(ropes["sliding_attention"]["rope_theta"]), "expert_gating_func": 2,
            "attention.layer_norm_rms_epsilon": c.get("layernorm_epsilon") or c["rms_norm_eps"],
        }  # fmt: skip
    return {}
