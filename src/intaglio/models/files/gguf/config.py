"""Converts the metadata of a GGUF file to the keys of config.json, with one function per model family.

Keys and defaults are those of llama.cpp (gguf-py/gguf/constants.py, src/models/*.cpp). What converters do not write has
the value that llama.cpp's loader assumes.
"""

from __future__ import annotations

from typing import Any

from intaglio.models.config import PortError
from intaglio.models.files.gguf.metadata import Metadata

SIGMOID = 2  # expert_gating_func


def base(m: Metadata, norm: str = "rms") -> dict[str, Any]:
    """A dict of the config keys that all families share.

    norm: "rms" or "layer", the normalisation whose epsilon the file has.
    """
    eps = m.real("attention.layer_norm_rms_epsilon" if norm == "rms" else "attention.layer_norm_epsilon")
    return {
        "vocab_size": m.tables.shape("model.embed_tokens.weight")[0], "hidden_size": m.hidden,
        "intermediate_size": m.whole("feed_forward_length", 0) or None, "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads, "num_key_value_heads": m.kv_heads, "head_dim": m.head_dim,
        "max_position_embeddings": m.whole("context_length"),
        "rms_norm_eps" if norm == "rms" else "layer_norm_eps": eps,
        "rope_theta": m.real("rope.freq_base", 10000.0), "rope_scaling": scaling(m),
        "tie_word_embeddings": "lm_head.weight" not in m.tables.names,
        "attention_bias": m.has("self_attn.q_proj.bias"),
    }  # fmt: skip


def pretrained(m: Metadata) -> int:
    """The context length in tokens with which rope was trained, before it was scaled."""
    return m.whole("rope.scaling.original_context_length", m.whole("context_length"))


def scaling(m: Metadata) -> dict[str, Any] | None:
    """The value of the config key rope_scaling, as a dict; None if rope is not scaled.

    Files have a scaling type with its numbers, or frequency factors per pair of columns (llama3, longrope), or,
    older ones, rope.scale_linear alone. Raises PortError for another scaling type.
    """
    kind = str(m.get("rope.scaling.type", "none"))
    factor = m.real("rope.scaling.factor", m.real("rope.scale_linear", 1.0))
    if "freqs" in m.factors:
        both = {"short_factor": m.factors["freqs"], "long_factor": m.factors["freqs"], "attention_factor": 1.0}
        return {"rope_type": "longrope", **both, "original_max_position_embeddings": m.whole("context_length")}
    if "long" in m.factors:
        heat = {"attention_factor": m.real("rope.scaling.attn_factor")} if m.get("rope.scaling.attn_factor") else {}
        both = {"short_factor": m.factors["short"], "long_factor": m.factors["long"]}
        return {"rope_type": "longrope", **both, **heat, "original_max_position_embeddings": pretrained(m)}
    if kind == "linear" or (kind == "none" and factor != 1 and not m.get("rope.scaling.type")):
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        keys = {
            "attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow",
        }  # fmt: skip
        own = {name: m.real(f"rope.scaling.{key}") for name, key in keys.items() if m.get(f"rope.scaling.{key}")}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": pretrained(m), **own}
    if kind == "longrope":
        return {"rope_type": "longrope", "original_max_position_embeddings": pretrained(m)}  # whose factors are missing
    if kind != "none":
        raise PortError(f"{m.file.path}: rope.scaling.type {kind!r} is not ported; known are linear, yarn, longrope")
    return None


def partial(m: Metadata) -> dict[str, Any]:
    """A dict with the config key partial_rotary_factor: the fraction of each head's columns that rope rotates."""
    return {"partial_rotary_factor": m.whole("rope.dimension_count", m.head_dim) / m.head_dim}


def whole_heads(m: Metadata) -> None:
    """Raise PortError if rope rotates only part of each head, for families whose port rotates all of it."""
    turned = m.whole("rope.dimension_count", m.head_dim)
    if turned != m.head_dim:
        raise PortError(
            f"{m.file.path}: rope.dimension_count={turned}, but {m.file.architecture} turns whole heads of {m.head_dim}"
        )


def experts(m: Metadata) -> dict[str, Any]:
    """A dict of the config keys with the sizes of a mixture of experts.

    GGUF stores each expert's matrices separately, even where transformers fuses them.
    """
    count = m.whole("expert_count")
    return {
        "num_local_experts": count, "num_experts": count, "n_routed_experts": count,
        "num_experts_per_tok": m.whole("expert_used_count"), "separate_experts": True,
        "moe_intermediate_size": m.whole("expert_feed_forward_length", m.whole("feed_forward_length", 0)) or None,
    }  # fmt: skip


def llama(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for Llama and models like it.

    That is Mixtral if there are experts, or Qwen2 if q, k and v have biases but the output projection has none. Raises
    PortError if rope rotates only part of each head.
    """
    whole_heads(m)
    c = base(m)
    if m.get("expert_count"):
        width = m.whole("expert_feed_forward_length", m.whole("feed_forward_length"))
        return c | experts(m) | {"architectures": ["MixtralForCausalLM"], "intermediate_size": width}
    if c["attention_bias"] and not m.has("self_attn.o_proj.bias"):
        return c | {"architectures": ["Qwen2ForCausalLM"]}
    return c | {"architectures": ["LlamaForCausalLM"], "mlp_bias": m.has("mlp.gate_proj.bias")}


def mistral3(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for Mistral 3, whose text model is a Llama."""
    m.refuse("attention.temperature_scale", "queries are not scaled by their position here")
    return llama(m)


def llama4(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for Llama 4.

    The attention chunk, temperature and temperature floor are not in the metadata: llama.cpp hard-codes these values.
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


def qwen(model: str) -> Any:
    """A function from metadata to the config (a dict) of dense Qwen2 or Qwen3, for the architecture `model`."""

    def describe(m: Metadata) -> dict[str, Any]:
        whole_heads(m)
        return base(m) | {"architectures": [model]}

    return describe


def qwen_moe(model: str, normalised: bool) -> Any:
    """A function from metadata to the config (a dict) of Qwen2-MoE or Qwen3-MoE, for the architecture `model`.

    normalised: the router's top-k weights are divided by their sum.
    """

    def describe(m: Metadata) -> dict[str, Any]:
        whole_heads(m)
        c = base(m) | experts(m) | {"architectures": [model], "norm_topk_prob": normalised}
        dense = [i for i in range(m.layers) if not m.has("mlp.gate.weight", i)]
        shared = m.get("expert_shared_feed_forward_length") or _rows(m, "mlp.shared_expert.gate_proj.weight")
        return c | {"mlp_only_layers": dense, "qkv_bias": c["attention_bias"],
                    "shared_expert_intermediate_size": shared}  # fmt: skip

    return describe


def _rows(m: Metadata, name: str) -> int | None:
    at = next((i for i in range(m.layers) if m.has(name, i)), None)
    return None if at is None else m.tables.shape(f"model.layers.{at}.{name}")[0]


def _scale(m: Metadata, largest: int) -> float:
    """The value of query_pre_attn_scalar for Gemma, whose metadata may lack it.

    Without the key attention.scale it is the head's width or, in the model with `largest` layers, hidden size over
    heads.
    """
    if m.get("attention.scale"):
        return m.real("attention.scale") ** -2
    return m.hidden / m.heads if m.layers == largest else float(m.head_dim)


def gemma2(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for Gemma 2. Raises PortError, CheckpointError."""
    whole_heads(m)
    caps = {
        "attn_logit_softcapping": m.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.real("final_logit_softcapping", 30.0),
    }
    return base(m) | caps | {
        "architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": _scale(m, 46),
        "sliding_window": m.whole("attention.sliding_window", 4096), "layer_types": m.sliding(2),
    }  # fmt: skip


def gemma3(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for Gemma 3's text model. Raises PortError, CheckpointError."""
    whole_heads(m)
    window = m.whole("attention.sliding_window", 0)
    return base(m) | {
        "architectures": ["Gemma3ForCausalLM"], "query_pre_attn_scalar": _scale(m, 62),
        "sliding_window": window or None, "layer_types": m.sliding(6 if window else 0),
        "rope_local_base_freq": m.real("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": m.real("final_logit_softcapping", 0.0) or None,
    }  # fmt: skip


def phi3(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for Phi-3 and Phi-4. Raises PortError, CheckpointError."""
    return base(m) | partial(m) | {
        "architectures": ["Phi3ForCausalLM"], "sliding_window": m.whole("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": pretrained(m),
    }  # fmt: skip


def phimoe(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for Phi-3.5-MoE. Raises PortError, CheckpointError."""
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


def granite(model: str) -> Any:
    """A function from metadata to the config (a dict) of Granite, dense or with experts.

    model: the architecture's name.
    """

    def describe(m: Metadata) -> dict[str, Any]:
        whole_heads(m)
        return base(m) | (experts(m) if m.get("expert_count") else {}) | {
            "architectures": [model], "embedding_multiplier": m.real("embedding_scale", 1.0),
            "residual_multiplier": m.real("residual_scale", 1.0), "logits_scaling": m.real("logit_scale", 1.0),
            "attention_multiplier": m.real("attention.scale", m.head_dim**-0.5),
            "mlp_bias": m.has("mlp.gate_proj.bias"),
        }  # fmt: skip

    return describe


def olmo2(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for OLMo 2, or for OLMo 3 if the file has a sliding window."""
    whole_heads(m)
    window = m.whole("attention.sliding_window", 0)
    if not window:
        return base(m) | {"architectures": ["Olmo2ForCausalLM"]}
    return base(m) | {
        "architectures": ["Olmo3ForCausalLM"], "sliding_window": window, "layer_types": m.sliding(4),
    }  # fmt: skip


def olmoe(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for OLMoE. Raises PortError, CheckpointError."""
    whole_heads(m)
    width = m.whole("feed_forward_length")
    return base(m) | experts(m) | {"architectures": ["OlmoeForCausalLM"], "intermediate_size": width}


def cohere2(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for Cohere 2 (Command R7B, Command A). Raises PortError, CheckpointError."""
    whole_heads(m)
    return base(m, norm="layer") | {
        "architectures": ["Cohere2ForCausalLM"], "logit_scale": m.real("logit_scale"),
        "sliding_window": m.whole("attention.sliding_window"), "layer_types": m.sliding(4), "rope_scaling": None,
    }  # fmt: skip


def plain(model: str) -> Any:
    """A function from metadata to the config (a dict) of architecture `model`.

    For architectures whose port has its differences from Llama built in.
    """

    def describe(m: Metadata) -> dict[str, Any]:
        whole_heads(m)
        bias = m.has("mlp.up_proj.bias")
        return base(m) | {
            "architectures": [model], "mlp_bias": bias, "use_bias": bias,
            "attention_out_bias": m.has("self_attn.o_proj.bias"),
        }  # fmt: skip

    return describe


def command_r(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for Cohere 1 (Command R, Aya). Raises PortError, CheckpointError."""
    whole_heads(m)
    return base(m, norm="layer") | {
        "architectures": ["CohereForCausalLM"], "logit_scale": m.real("logit_scale"), "rope_scaling": None,
        "use_qk_norm": m.has("self_attn.q_norm.weight"),
    }  # fmt: skip


def exaone4(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for EXAONE 4.

    If it has a sliding window, every fourth layer has full attention, without rope. Raises PortError, CheckpointError.
    """
    whole_heads(m)
    window = m.whole("attention.sliding_window", 0)
    return base(m) | {
        "architectures": ["Exaone4ForCausalLM"], "sliding_window": window or None,
        "layer_types": m.sliding(4 if window else 0),
    }  # fmt: skip


def nemotron(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for Nemotron-3 and Nemotron-4. Raises PortError, CheckpointError."""
    c = base(m, norm="layer") | partial(m)
    return c | {
        "architectures": ["NemotronForCausalLM"], "norm_eps": c["layer_norm_eps"],
        "mlp_bias": m.has("mlp.up_proj.bias"),
    }  # fmt: skip


def starcoder2(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for StarCoder 2.

    Every layer has full attention, as in llama.cpp: GGUF files do not record the window of the published models
    (4,096 tokens), so logits of longer sequences differ from transformers'. Raises PortError, CheckpointError.
    """
    whole_heads(m)
    c = base(m, norm="layer")
    return c | {
        "architectures": ["Starcoder2ForCausalLM"], "norm_epsilon": c["layer_norm_eps"], "sliding_window": None,
        "use_bias": m.has("mlp.c_fc.bias"),
    }  # fmt: skip


def smollm3(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for SmolLM3, which has no rope in every fourth layer."""
    whole_heads(m)
    return base(m) | {
        "architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(m.layers)],
        "mlp_bias": m.has("mlp.gate_proj.bias"),
    }  # fmt: skip


def glm4(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for GLM-4-0414. Raises PortError for GLM-4V."""
    m.refuse("rope.dimension_sections", "GLM-4V keeps queries and keys in another order")
    return base(m) | partial(m) | {"architectures": ["Glm4ForCausalLM"]}


def _groups(m: Metadata) -> dict[str, Any]:
    groups = m.whole("expert_group_count", 1)
    return {
        "n_group": groups, "topk_group": m.whole("expert_group_used_count", 1) if groups > 1 else 1,
        "routed_scaling_factor": m.real("expert_weights_scale", 0.0) or 1.0,
        "n_shared_experts": m.whole("expert_shared_count"), "norm_topk_prob": m.flag("expert_weights_norm"),
        "first_k_dense_replace": m.whole("leading_dense_block_count", 0),
        "num_nextn_predict_layers": m.whole("nextn_predict_layers", 0),
    }  # fmt: skip


def glm4_moe(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for GLM-4.5. Raises PortError, CheckpointError."""
    m.fixed("expert_gating_func", SIGMOID)
    return base(m) | partial(m) | experts(m) | _groups(m) | {
        "architectures": ["Glm4MoeForCausalLM"], "use_qk_norm": m.has("self_attn.q_norm.weight"),
    }  # fmt: skip


def gpt_oss(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for gpt-oss, which has a sliding window in every other layer."""
    c = base(m) | experts(m)
    if c["rope_scaling"]:
        c["rope_scaling"]["truncate"] = False  # no key; so are the released models
    return c | {
        "architectures": ["GptOssForCausalLM"], "intermediate_size": c["moe_intermediate_size"],
        "sliding_window": m.whole("attention.sliding_window"),
        "layer_types": ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(m.layers)],
    }  # fmt: skip


def dots1(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for dots.llm1. Raises PortError, CheckpointError."""
    whole_heads(m)
    m.fixed("expert_gating_func", SIGMOID)
    return base(m) | experts(m) | _groups(m) | {"architectures": ["Dots1ForCausalLM"], "sliding_window": None}


def ernie4_5_moe(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for ERNIE 4.5 with experts.

    The layers with experts are those with a router's tensor. Raises PortError unless they are one run of layers.
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
        "moe_num_shared_experts": (_rows(m, "mlp.shared_experts.gate_proj.weight") or 0) // width,
        "use_bias": m.has("mlp.up_proj.bias"),
    }  # fmt: skip


def olmo(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for OLMo (2024). Raises PortError, CheckpointError."""
    whole_heads(m)
    clip = m.real("attention.clamp_kqv", 0.0)
    return base(m, norm="layer") | {"architectures": ["OlmoForCausalLM"], "clip_qkv": clip or None}


def minimax_m2(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for MiniMax-M2. Raises PortError, CheckpointError."""
    m.fixed("expert_gating_func", SIGMOID)
    c = base(m) | partial(m) | experts(m)
    return c | {"architectures": ["MiniMaxM2ForCausalLM"], "intermediate_size": c["moe_intermediate_size"]}


def chatglm(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for ChatGLM3 and GLM-4-9B of 2024. Raises PortError, CheckpointError."""
    return base(m) | partial(m) | {"architectures": ["GlmForCausalLM"]}


def hunyuan_moe(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for Hunyuan-A13B. Its base of rope is stored as scaled by alpha."""
    whole_heads(m)
    c = base(m) | experts(m)
    return c | {"architectures": ["HunYuanMoEV1ForCausalLM"], "intermediate_size": c["moe_intermediate_size"]}


def afmoe(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for AFMoE. llama.cpp multiplies embeddings by sqrt(hidden) always."""
    whole_heads(m)
    m.fixed("expert_gating_func", SIGMOID)
    return base(m) | experts(m) | {
        "architectures": ["AfmoeForCausalLM"], "sliding_window": m.whole("attention.sliding_window"),
        "layer_types": m.sliding(4), "num_dense_layers": m.whole("leading_dense_block_count", 0),
        "num_shared_experts": m.whole("expert_shared_count", 0), "mup_enabled": True,
        "route_scale": m.real("expert_weights_scale", 0.0) or 1.0, "route_norm": m.flag("expert_weights_norm"),
    }  # fmt: skip


def lfm2(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for LFM2, whose layers without K/V heads have a convolution instead."""
    whole_heads(m)
    c = base(m)
    kinds = ["full_attention" if n else "conv" for n in m.kv_heads_by_layer]
    return c | {
        "architectures": ["Lfm2ForCausalLM"], "layer_types": kinds, "norm_eps": c["rms_norm_eps"],
        "conv_L_cache": m.whole("shortconv.l_cache"),
        "conv_bias": any(m.has("conv.conv.bias", i) for i in range(m.layers)),
        "block_auto_adjust_ff_dim": False,
    }  # fmt: skip


def lfm2_moe(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for LFM2 with experts. Raises PortError, CheckpointError."""
    m.fixed("expert_gating_func", SIGMOID)
    dense = m.whole("leading_dense_block_count", 0)
    return lfm2(m) | experts(m) | {
        "architectures": ["Lfm2MoeForCausalLM"], "num_dense_layers": dense, "norm_topk_prob": True,
        "use_expert_bias": m.has("feed_forward.expert_bias", dense),
        "routed_scaling_factor": m.real("expert_weights_scale", 0.0) or 1.0,
    }  # fmt: skip


def minicpm3(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for MiniCPM3. llama.cpp has the scales of embeddings and depth built in."""
    rope, key = m.whole("rope.dimension_count"), m.whole("attention.key_length")
    return base(m) | {
        "architectures": ["MiniCPM3ForCausalLM"], "q_lora_rank": m.whole("attention.q_lora_rank"),
        "kv_lora_rank": m.whole("attention.kv_lora_rank"), "qk_rope_head_dim": rope, "qk_nope_head_dim": key - rope,
        "v_head_dim": m.whole("attention.value_length", m.hidden // m.heads), "head_dim": None,
        "attention_bias": False, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
    }  # fmt: skip


def deepseek2(m: Metadata) -> dict[str, Any]:
    """The keys of config.json, as a dict, for DeepSeek-V3 if a sigmoid scores the experts, else for DeepSeek-V2.

    Heads are attention.key_length_mla wide if the file has this key; attention.key_length is then the latent's width.
    There is no key for mscale: all released models have it equal to mscale_all_dim, of which yarn_log_multiplier is a
    tenth. Raises PortError, CheckpointError.
    """
    rope, rank = m.whole("rope.dimension_count"), m.whole("attention.kv_lora_rank")
    key = m.whole("attention.key_length_mla", m.whole("attention.key_length", 0))
    value = m.whole("attention.value_length_mla", m.whole("attention.value_length", 0))
    third = m.whole("expert_gating_func", 1) == SIGMOID or any("e_score_correction" in n for n in m.tables.names)
    c = base(m) | experts(m) | _groups(m) | {
        "architectures": ["DeepseekV3ForCausalLM" if third else "DeepseekV2ForCausalLM"],
        "q_lora_rank": m.get("attention.q_lora_rank"), "kv_lora_rank": rank, "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key - rope, "v_head_dim": value, "attention_bias": False, "rope_interleave": True,
        "head_dim": None,
    }  # fmt: skip
    if not third:
        c["topk_method"] = "group_limited_greedy" if c["n_group"] > 1 else "greedy"
    heat = m.real("rope.scaling.yarn_log_multiplier", 0.0) * 10
    if c["rope_scaling"] and heat:
        c["rope_scaling"] |= {"mscale": heat, "mscale_all_dim": heat}
    return c
