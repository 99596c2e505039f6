"""Converts the metadata of a GGUF file to the keys of config.json, for mixtures of experts, by model family."""

from __future__ import annotations

from typing import Any

from intaglio.models.config import PortError
from intaglio.models.files.gguf.config import SIGMOID, base, experts, partial, rows, whole_heads
from intaglio.models.files.gguf.metadata import Metadata


def groups(m: Metadata) -> dict[str, Any]:
    """The keys of config.json for routing in groups, shared experts and dense layers, as a dict.

    They have the names that DeepSeek-V3 uses. Raises CheckpointError for a missing key.
    """
    count, used = m.whole("expert_group_count", 1), m.whole("expert_group_used_count", 1)
    return {
        "n_group": count, "topk_group": used if count > 1 else 1,
        "routed_scaling_factor": m.real("expert_weights_scale", 0.0) or 1.0,
        "n_shared_experts": m.whole("expert_shared_count"), "norm_topk_prob": m.flag("expert_weights_norm"),
        "first_k_dense_replace": m.whole("leading_dense_block_count", 0),
        "num_nextn_predict_layers": m.whole("nextn_predict_layers", 0),
    }  # fmt: skip


def mlp_types(m: Metadata, router: str = "mlp.gate") -> list[str]:
    """The value of the key mlp_layer_types in config.json: a list with "sparse" or "dense" for each layer.

    A layer is "sparse" if the file has a router for it. router: name of the router in transformers, without the layer's
    prefix and .weight.
    """
    return ["sparse" if m.has(f"{router}.weight", i) else "dense" for i in range(m.layers)]


def llama4(m: Metadata) -> dict[str, Any]:
    """The config.json of Llama 4 as a dict, made from the metadata `m` of a GGUF file.

    The metadata has no keys for the attention chunk (8192 tokens) and for scale (0.1) and start (8192) of the attention
    temperature. The dict has the values that are built into llama.cpp. Raises CheckpointError for a missing key,
    PortError for a value that is not supported.
    """
    full = m.get("attention.sliding_window") == 0
    count = m.whole("expert_count")
    c = base(m) | experts(m) | {
        "architectures": ["Llama4ForCausalLM"], "intermediate_size": m.whole("expert_feed_forward_length"),
        "intermediate_size_mlp": m.whole("feed_forward_length"), "use_qk_norm": count != 128,
        "attention_chunk_size": 8192, "attn_scale": 0.1, "floor_scale": 8192, "attn_temperature_tuning": not full,
        "moe_layers": [i for i in range(m.layers) if m.has("feed_forward.router.weight", i)],
        "no_rope_layers": [int(full or (i + 1) % 4 != 0) for i in range(m.layers)],
    }  # fmt: skip
    return c | ({"layer_types": ["full_attention"] * m.layers} if full else {})


def qwen_moe(model: str, normalised: bool) -> Any:
    """Make the function that turns the metadata of a Qwen2-MoE or Qwen3-MoE GGUF file into a config.json (a dict).

    The function raises CheckpointError for a missing key, PortError for a value that is not supported.

    model: value of the key `architectures`, such as Qwen3MoeForCausalLM. normalised: True if the weights of the chosen
    experts are divided by their sum.
    """

    def describe(m: Metadata) -> dict[str, Any]:
        whole_heads(m)
        c = base(m) | experts(m) | {"architectures": [model], "norm_topk_prob": normalised}
        dense = [i for i in range(m.layers) if not m.has("mlp.gate.weight", i)]
        shared = m.get("expert_shared_feed_forward_length") or rows(m, "mlp.shared_expert.gate_proj.weight")
        return c | {"mlp_only_layers": dense, "qkv_bias": c["attention_bias"],
                    "shared_expert_intermediate_size": shared}  # fmt: skip

    return describe


def phimoe(m: Metadata) -> dict[str, Any]:
    """The config.json of Phi-3.5-MoE as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    c = base(m) | experts(m) | {
        "architectures": ["PhimoeForCausalLM"], "lm_head_bias": "lm_head.bias" in m.tables.names,
        "intermediate_size": m.whole("feed_forward_length"),
        "sliding_window": m.whole("attention.sliding_window", 0) or None,
    }  # fmt: skip
    if c["rope_scaling"] and "long_factor" in c["rope_scaling"]:
        heat = m.real("rope.scaling.attn_factor", 1.0)
        c["rope_scaling"] |= {"short_mscale": heat, "long_mscale": heat}
    return c


def olmoe(m: Metadata) -> dict[str, Any]:
    """The config.json of OLMoE as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    width = m.whole("feed_forward_length")
    return base(m) | experts(m) | {"architectures": ["OlmoeForCausalLM"], "intermediate_size": width}


def glm4_moe(m: Metadata) -> dict[str, Any]:
    """The config.json of GLM-4.5 as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    m.fixed("expert_gating_func", SIGMOID)
    return base(m) | partial(m) | experts(m) | groups(m) | {
        "architectures": ["Glm4MoeForCausalLM"], "use_qk_norm": m.has("self_attn.q_norm.weight"),
    }  # fmt: skip


def gpt_oss(m: Metadata) -> dict[str, Any]:
    """The config.json of gpt-oss as a dict, made from the metadata `m` of a GGUF file.

    Layers 0, 2, 4 and so on have a sliding window, the others full attention. Raises CheckpointError for a missing key,
    PortError for a value that is not supported.
    """
    c = base(m) | experts(m)
    if c["rope_scaling"]:
        c["rope_scaling"]["truncate"] = False  # no key; so are the released models
    return c | {
        "architectures": ["GptOssForCausalLM"], "intermediate_size": c["moe_intermediate_size"],
        "sliding_window": m.whole("attention.sliding_window"),
        "layer_types": ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(m.layers)],
    }  # fmt: skip


def dots1(m: Metadata) -> dict[str, Any]:
    """The config.json of dots.llm1 as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    m.fixed("expert_gating_func", SIGMOID)
    return base(m) | experts(m) | groups(m) | {"architectures": ["Dots1ForCausalLM"], "sliding_window": None}


def ernie4_5_moe(m: Metadata) -> dict[str, Any]:
    """The config.json of ERNIE 4.5 with experts as a dict, made from the metadata `m` of a GGUF file.

    A layer has experts if the file has a router for it. Raises CheckpointError for a missing key, PortError unless the
    layers with experts follow each other without a gap.
    """
    whole_heads(m)
    mixed = [i for i in range(m.layers) if m.has("mlp.gate.weight", i)]
    if not mixed or mixed != list(range(mixed[0], mixed[-1] + 1)):
        raise PortError(f"{m.file.path}: layers {mixed} have experts; wanted one run of layers")
    width = m.whole("expert_feed_forward_length")
    return base(m) | {
        "architectures": ["Ernie4_5_MoeForCausalLM"], "moe_num_experts": m.whole("expert_count"),
        "moe_k": m.whole("expert_used_count"), "moe_intermediate_size": width, "moe_layer_interval": 1,
        "moe_layer_start_index": mixed[0], "moe_layer_end_index": mixed[-1],
        "moe_num_shared_experts": (rows(m, "mlp.shared_experts.gate_proj.weight") or 0) // width,
        "use_bias": m.has("mlp.up_proj.bias"),
    }  # fmt: skip


def minimax_m2(m: Metadata) -> dict[str, Any]:
    """The config.json of MiniMax-M2 as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    m.fixed("expert_gating_func", SIGMOID)
    c = base(m) | partial(m) | experts(m)
    return c | {"architectures": ["MiniMaxM2ForCausalLM"], "intermediate_size": c["moe_intermediate_size"]}


def hunyuan_moe(m: Metadata) -> dict[str, Any]:
    """The config.json of Hunyuan-A13B as a dict, made from the metadata `m` of a GGUF file.

    The rope base in the file is already scaled by the model's alpha. Raises CheckpointError for a missing key,
    PortError for a value that is not supported.
    """
    whole_heads(m)
    c = base(m) | experts(m)
    return c | {"architectures": ["HunYuanMoEV1ForCausalLM"], "intermediate_size": c["moe_intermediate_size"]}


def afmoe(m: Metadata) -> dict[str, Any]:
    """The config.json of AFMoE as a dict, made from the metadata `m` of a GGUF file.

    The key mup_enabled (embeddings are multiplied by sqrt(hidden size)) is always True. llama.cpp does the same. Raises
    CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    m.fixed("expert_gating_func", SIGMOID)
    return base(m) | experts(m) | {
        "architectures": ["AfmoeForCausalLM"], "sliding_window": m.whole("attention.sliding_window"),
        "layer_types": m.sliding(4), "num_dense_layers": m.whole("leading_dense_block_count", 0),
        "num_shared_experts": m.whole("expert_shared_count", 0), "mup_enabled": True,
        "route_scale": m.real("expert_weights_scale", 0.0) or 1.0, "route_norm": m.flag("expert_weights_norm"),
    }  # fmt: skip


def deepseek2(m: Metadata) -> dict[str, Any]:
    """The config.json of a model of llama.cpp's architecture deepseek2 as a dict, made from the metadata `m`.

    - The model is Youtu-LLM if the file has no experts, DeepSeek-V3 if a sigmoid scores the experts, else DeepSeek-V2.
    - The width of a head is attention.key_length_mla, or attention.key_length in a file without this key.
    - GGUF has no key for YaRN's mscale. In all released models mscale equals mscale_all_dim, which is 10 times the key
      rope.scaling.yarn_log_multiplier.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    rope, rank = m.whole("rope.dimension_count"), m.whole("attention.kv_lora_rank")
    key = m.whole("attention.key_length_mla", m.whole("attention.key_length", 0))
    value = m.whole("attention.value_length_mla", m.whole("attention.value_length", 0))
    third = m.whole("expert_gating_func", 1) == SIGMOID or any("e_score_correction" in n for n in m.tables.names)
    mixed = m.get("expert_count")
    model = "YoutuForCausalLM" if not mixed else "DeepseekV3ForCausalLM" if third else "DeepseekV2ForCausalLM"
    c = base(m) | (experts(m) | groups(m) if mixed else {}) | {
        "architectures": [model],
        "q_lora_rank": m.get("attention.q_lora_rank"), "kv_lora_rank": rank, "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key - rope, "v_head_dim": value, "attention_bias": False, "rope_interleave": True,
        "head_dim": None,
    }  # fmt: skip
    if mixed and not third:
        c["topk_method"] = "group_limited_greedy" if c["n_group"] > 1 else "greedy"
    heat = m.real("rope.scaling.yarn_log_multiplier", 0.0) * 10
    if c["rope_scaling"] and heat:
        c["rope_scaling"] |= {"mscale": heat, "mscale_all_dim": heat}
    return c


def indexed(model: str) -> Any:
    """Make the function that turns the metadata of a DeepSeek-V3.2 or GLM-5 GGUF file into a config.json (a dict).

    The sparse attention of these models has an indexer. The key `indexer_types` is "full" for a layer with tensors of
    an indexer, and "shared" for a layer that uses an earlier layer's indexer. The function raises CheckpointError for a
    missing key, PortError for a value that is not supported.

    model: value of the key `architectures`.
    """

    def describe(m: Metadata) -> dict[str, Any]:
        m.fixed("expert_gating_func", SIGMOID)
        own = [m.has("self_attn.indexer.wk.weight", i) for i in range(m.layers)]
        return deepseek2(m) | {
            "architectures": [model], "index_n_heads": m.whole("attention.indexer.head_count"),
            "index_head_dim": m.whole("attention.indexer.key_length"),
            "index_topk": m.whole("attention.indexer.top_k"),
            "indexer_types": ["full" if has else "shared" for has in own],
        }  # fmt: skip

    return describe


def exaone_moe(m: Metadata) -> dict[str, Any]:
    """The config.json of K-EXAONE as a dict, made from the metadata `m` of a GGUF file.

    Layers with full attention have no rope. Raises CheckpointError for a missing key, PortError for a value that is not
    supported.
    """
    whole_heads(m)
    m.fixed("expert_gating_func", SIGMOID)
    c = base(m) | experts(m) | groups(m)
    return c | {
        "architectures": ["ExaoneMoeForCausalLM"], "sliding_window": m.whole("attention.sliding_window"),
        "layer_types": m.sliding(4), "num_shared_experts": c["n_shared_experts"],
    }  # fmt: skip


def dbrx(m: Metadata) -> dict[str, Any]:
    """The config.json of DBRX as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    c, clip = base(m, norm="layer") | experts(m), m.real("attention.clamp_kqv", 0.0)
    return c | {
        "architectures": ["DbrxForCausalLM"], "llama_names": True, "d_model": m.hidden, "n_layers": m.layers,
        "n_heads": m.heads, "max_seq_len": c["max_position_embeddings"],
        "attn_config": {"kv_n_heads": m.kv_heads, "rope_theta": c["rope_theta"], "clip_qkv": clip or None},
        "ffn_config": {
            "ffn_hidden_size": c["intermediate_size"], "moe_num_experts": c["num_experts"],
            "moe_top_k": c["num_experts_per_tok"],
        },
    }  # fmt: skip


def mimo2(m: Metadata) -> dict[str, Any]:
    """The config.json of MiMo-V2-Flash as a dict, made from the metadata `m` of a GGUF file.

    A layer has experts if the file has a router for it. Raises CheckpointError for a missing key, PortError unless
    layers with a window have twice as many K/V heads as layers with full attention.
    """
    m.fixed("expert_gating_func", SIGMOID)
    kinds, heads = m.sliding(6), m.kv_heads_by_layer
    full = {n for n, kind in zip(heads, kinds, strict=True) if kind == "full_attention"}
    local = {n for n, kind in zip(heads, kinds, strict=True) if kind != "full_attention"}
    if len(full) != 1 or local - {2 * max(full)}:
        raise PortError(
            f"{m.file.path}: attention.head_count_kv is {heads}; wanted one number in the layers with full "
            "attention and twice that in those with a window"
        )
    c = base(m, kv_heads=max(full)) | experts(m)
    turned = m.whole("rope.dimension_count", m.head_dim) / m.head_dim
    ropes = {"full_attention": c["rope_theta"], "sliding_attention": m.real("rope.freq_base_swa", c["rope_theta"])}
    return c | {
        "architectures": ["MiMoV2FlashForCausalLM"], "v_head_dim": m.whole("attention.value_length", m.head_dim),
        "attention_value_scale": m.real("attention.value_scale", 1.0), "norm_topk_prob": True, "layer_types": kinds,
        "sliding_window": m.whole("attention.sliding_window") + 1, "topk_group": m.whole("expert_group_used_count", 1),
        "n_group": m.whole("expert_group_count", 1), "rope_scaling": None,
        "routed_scaling_factor": m.real("expert_weights_scale", 0.0) or 1.0,
        "mlp_layer_types": mlp_types(m),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": turned}
            for kind, theta in ropes.items()
        },
    }  # fmt: skip


def cohere2_moe(m: Metadata) -> dict[str, Any]:
    """The config.json of Cohere 2 with experts as a dict, made from the metadata `m` of a GGUF file.

    A layer is dense if the file has no router for it. Dense layers have rope even with full attention; llama.cpp does
    the same. The result of an MLP is the average of its shared and its routed experts. Raises CheckpointError for a
    missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    m.fixed("expert_gating_func", SIGMOID)
    rms = bool(m.real("attention.layer_norm_rms_epsilon", 0.0))
    c = base(m, norm="rms" if rms else "layer") | experts(m)
    return c | {
        "architectures": ["Cohere2MoeForCausalLM"], "logit_scale": m.real("logit_scale"), "rope_scaling": None,
        "sliding_window": m.whole("attention.sliding_window"), "layer_types": m.sliding(4),
        "mlp_layer_types": mlp_types(m), "first_k_dense_replace": 0,
        "prefix_dense_intermediate_size": m.whole("feed_forward_length"), "prefix_dense_sliding_window_pattern": 1,
        "intermediate_size": c["moe_intermediate_size"], "num_shared_experts": m.whole("expert_shared_count", 0),
        "shared_expert_combination_strategy": "average", "expert_selection_fn": "sigmoid",
        "norm_topk_prob": m.flag("expert_weights_norm"),
    }  # fmt: skip


def mellum(m: Metadata) -> dict[str, Any]:
    """The config.json of Mellum 2 as a dict, made from the metadata `m` of a GGUF file.

    Rope is scaled only in layers with full attention, not in layers with a window. Raises CheckpointError for a missing
    key, PortError for a value that is not supported.
    """
    whole_heads(m)
    c = base(m) | experts(m) | {"architectures": ["MellumForCausalLM"], "norm_topk_prob": True}
    window = m.whole("attention.sliding_window", 0)
    scaled = c.pop("rope_scaling") or {"rope_type": "default"}
    local = m.real("rope.freq_base_swa", c["rope_theta"])
    return c | {
        "sliding_window": window or None, "layer_types": m.sliding(4 if window else 0),
        "rope_parameters": {
            "full_attention": {**scaled, "rope_theta": c["rope_theta"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "mlp_layer_types": mlp_types(m),
    }  # fmt: skip


def hy_v3(m: Metadata) -> dict[str, Any]:
    """The config.json of Hy3 as a dict, made from the metadata `m` of a GGUF file.

    A layer has experts if the file has a router for it. Raises CheckpointError for a missing key, PortError for a value
    that is not supported.
    """
    whole_heads(m)
    m.fixed("expert_gating_func", SIGMOID)
    m.fixed("expert_weights_norm", True)
    c = base(m) | experts(m)
    shared = rows(m, "mlp.shared_mlp.gate_proj.weight") or 0
    return c | {
        "architectures": ["HYV3ForCausalLM"], "num_shared_experts": shared // c["moe_intermediate_size"],
        "router_scaling_factor": m.real("expert_weights_scale", 0.0) or 1.0,
        "mlp_layer_types": mlp_types(m, "mlp.router.gate"),
    }  # fmt: skip
