"""Converts the metadata of a GGUF file to the keys of config.json, with one function per model family.

Keys and defaults are those of llama.cpp (gguf-py/gguf/constants.py, src/models/*.cpp). What converters do not write has
the value that llama.cpp's loader assumes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from intaglio.models.config import PortError
from intaglio.models.files.gguf.metadata import Metadata

SIGMOID = 2  # expert_gating_func


def base(m: Metadata, norm: str = "rms", width: int = 0, kv_heads: int = 0) -> dict[str, Any]:
    """The keys of config.json that all model families have, as a dict, made from the metadata `m` of a GGUF file.

    Args:
        m: the metadata.
        norm: "rms" or "layer", the kind of norm whose epsilon the file has.
        width: value of the key intermediate_size. 0: the value in the metadata, which must be equal in all layers.
        kv_heads: value of the key num_key_value_heads. 0: the value in the metadata, which must be equal in all layers
            with attention.

    Raises CheckpointError for a missing key, PortError for a scaling of rope that is not supported.
    """
    eps = m.real("attention.layer_norm_rms_epsilon" if norm == "rms" else "attention.layer_norm_epsilon")
    return {
        "vocab_size": m.tables.shape("model.embed_tokens.weight")[0], "hidden_size": m.hidden,
        "intermediate_size": width or m.whole("feed_forward_length", 0) or None, "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads, "num_key_value_heads": kv_heads or m.kv_heads, "head_dim": m.head_dim,
        "max_position_embeddings": m.whole("context_length"),
        "rms_norm_eps" if norm == "rms" else "layer_norm_eps": eps,
        "rope_theta": m.real("rope.freq_base", 10000.0), "rope_scaling": scaling(m),
        "tie_word_embeddings": "lm_head.weight" not in m.tables.names,
        "attention_bias": m.has("self_attn.q_proj.bias"),
    }  # fmt: skip


def pretrained(m: Metadata) -> int:
    """The context length, in tokens, for which rope was trained before it was scaled to longer contexts."""
    return m.whole("rope.scaling.original_context_length", m.whole("context_length"))


def first_with(m: Metadata, name: str) -> int | None:
    """The number of the first layer that has the tensor `name`; None if no layer has it.

    name: name of the tensor in transformers, without the layer's prefix, such as mlp.gate_proj.weight.
    """
    return next((i for i in range(m.layers) if m.has(name, i)), None)


def rows(m: Metadata, name: str) -> int | None:
    """The number of rows of a layer's tensor `name`; None if no layer has it.

    The first layer that has the tensor is taken. name: name of the tensor in transformers, without the layer's prefix,
    such as mlp.gate_proj.weight.
    """
    at = first_with(m, name)
    return None if at is None else m.tables.shape(f"model.layers.{at}.{name}")[0]


def scaling(m: Metadata) -> dict[str, Any] | None:
    """The value of the key rope_scaling in config.json, as a dict; None if rope is not scaled.

    A GGUF file has a scaling type and its numbers, or a frequency factor per pair of columns (Llama 3, LongRoPE). Older
    files have only rope.scale_linear. Raises PortError for an unknown scaling type.
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
    """A dict with the key partial_rotary_factor of config.json.

    Its value is the fraction of a head's columns that rope rotates: 1.0 if the file has no key rope.dimension_count.
    """
    return {"partial_rotary_factor": m.whole("rope.dimension_count", m.head_dim) / m.head_dim}


def whole_heads(m: Metadata) -> None:
    """Raise PortError if rope rotates only part of each head.

    Called for model families that are supported only with rope on whole heads.
    """
    turned = m.whole("rope.dimension_count", m.head_dim)
    if turned != m.head_dim:
        raise PortError(
            f"{m.file.path}: rope.dimension_count={turned}, but {m.file.architecture} turns whole heads of {m.head_dim}"
        )


def experts(m: Metadata) -> dict[str, Any]:
    """The keys of config.json with the sizes of a mixture of experts, as a dict.

    The key separate_experts is True: each expert of a GGUF file has its own gate, up and down matrix, while checkpoints
    of transformers may store them joined. Raises CheckpointError for a missing key.
    """
    count = m.whole("expert_count")
    return {
        "num_local_experts": count, "num_experts": count, "n_routed_experts": count,
        "num_experts_per_tok": m.whole("expert_used_count"), "separate_experts": True,
        "moe_intermediate_size": m.whole("expert_feed_forward_length", 0) or m.whole("feed_forward_length", 0) or None,
    }  # fmt: skip


def llama(m: Metadata) -> dict[str, Any]:
    """The config.json of a Llama, Mixtral or Qwen2 as a dict, made from the metadata `m` of a GGUF file.

    For files of llama.cpp's architecture llama. The model is a Mixtral if the file has experts; a Qwen2 if q, k and v
    have biases but the output projection has none; otherwise a Llama. Raises CheckpointError for a missing key,
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
    """The config.json of Mistral 3 or Ministral 3 as a dict, made from the metadata `m` of a GGUF file.

    The text model of Mistral 3 is a Llama. The model is a Ministral 3 if the file has a temperature by which queries
    are scaled depending on their position. YaRN's mscale gets the same value as mscale_all_dim, so YaRN does not scale
    queries and keys. Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    c, heat = llama(m), m.real("attention.temperature_scale", 0.0)
    if not heat:
        return c
    if c["architectures"] != ["LlamaForCausalLM"] or (c["rope_scaling"] or {}).get("rope_type") != "yarn":
        raise PortError(
            f"{m.file.path}: {m.file.architecture}.attention.temperature_scale={heat} is ported for a dense model with "
            "rope.scaling.type yarn only"
        )
    both = m.real("rope.scaling.yarn_log_multiplier", 0.0)
    rope = {**c["rope_scaling"], "rope_theta": c["rope_theta"], "llama_4_scaling_beta": heat}
    rope |= {"mscale": both, "mscale_all_dim": both} if both else {}
    return c | {"architectures": ["Ministral3ForCausalLM"], "rope_parameters": rope, "rope_scaling": None}


def qwen(model: str) -> Any:
    """Make the function that turns the metadata of a dense Qwen2 or Qwen3 GGUF file into a config.json (a dict).

    The function raises CheckpointError for a missing key, PortError for a value that is not supported.

    model: value of the key `architectures`, such as Qwen2ForCausalLM.
    """

    def describe(m: Metadata) -> dict[str, Any]:
        whole_heads(m)
        return base(m) | {"architectures": [model]}

    return describe


def phi3(m: Metadata) -> dict[str, Any]:
    """The config.json of Phi-3 or Phi-4 as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    return base(m) | partial(m) | {
        "architectures": ["Phi3ForCausalLM"], "sliding_window": m.whole("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": pretrained(m),
    }  # fmt: skip


def granite(model: str) -> Any:
    """Make the function that turns the metadata of a Granite GGUF file into a config.json (a dict).

    The function raises CheckpointError for a missing key, PortError for a value that is not supported.

    model: value of the key `architectures`. If the file has a shared expert, the value is GraniteMoeSharedForCausalLM
    instead.
    """

    def describe(m: Metadata) -> dict[str, Any]:
        whole_heads(m)
        shared = rows(m, "block_sparse_moe.shared_mlp.gate_proj.weight")
        named = {"shared_intermediate_size": shared, "llama_names": True} if shared else {}
        return base(m) | (experts(m) if m.get("expert_count") else {}) | named | {
            "architectures": ["GraniteMoeSharedForCausalLM" if shared else model],
            "embedding_multiplier": m.real("embedding_scale", 1.0),
            "residual_multiplier": m.real("residual_scale", 1.0), "logits_scaling": m.real("logit_scale", 1.0),
            "attention_multiplier": m.real("attention.scale", m.head_dim**-0.5),
            "mlp_bias": m.has("mlp.gate_proj.bias"),
        }  # fmt: skip

    return describe


def olmo2(m: Metadata) -> dict[str, Any]:
    """The config.json of OLMo 2 or OLMo 3 as a dict, made from the metadata `m` of a GGUF file.

    The model is OLMo 3 if the file has a sliding window. Raises CheckpointError for a missing key, PortError if layers
    with and without a window have different rope bases.
    """
    whole_heads(m)
    window = m.whole("attention.sliding_window", 0)
    if not window:
        return base(m) | {"architectures": ["Olmo2ForCausalLM"]}
    one, other = m.real("rope.freq_base", 10000.0), m.get("rope.freq_base_swa")
    if other not in (None, one):
        raise PortError(f"{m.file.path}: rope.freq_base_swa={other} is not ported; wanted rope.freq_base, {one}")
    return base(m) | {
        "architectures": ["Olmo3ForCausalLM"], "sliding_window": window, "layer_types": m.sliding(4),
    }  # fmt: skip


def cohere2(m: Metadata) -> dict[str, Any]:
    """The config.json of Cohere 2 (Command R7B, Command A) as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    return base(m, norm="layer") | {
        "architectures": ["Cohere2ForCausalLM"], "logit_scale": m.real("logit_scale"),
        "sliding_window": m.whole("attention.sliding_window"), "layer_types": m.sliding(4), "rope_scaling": None,
    }  # fmt: skip


def plain(model: str) -> Any:
    """Make the function that turns the metadata of a Llama-like GGUF file into a config.json (a dict).

    It serves model families whose GGUF files have the same keys as those of Llama. The function raises CheckpointError
    for a missing key, PortError for a value that is not supported.

    model: value of the key `architectures`, such as OlmoForCausalLM.
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
    """The config.json of Cohere 1 (Command R, Aya) as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    return base(m, norm="layer") | {
        "architectures": ["CohereForCausalLM"], "logit_scale": m.real("logit_scale"), "rope_scaling": None,
        "use_qk_norm": m.has("self_attn.q_norm.weight"),
    }  # fmt: skip


def exaone4(m: Metadata) -> dict[str, Any]:
    """The config.json of EXAONE 4 as a dict, made from the metadata `m` of a GGUF file.

    If the model has a sliding window, every fourth layer has full attention and no rope. Raises CheckpointError for a
    missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    window = m.whole("attention.sliding_window", 0)
    return base(m) | {
        "architectures": ["Exaone4ForCausalLM"], "sliding_window": window or None,
        "layer_types": m.sliding(4 if window else 0),
    }  # fmt: skip


def nemotron(m: Metadata) -> dict[str, Any]:
    """The config.json of Nemotron-3 or Nemotron-4 as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    c = base(m, norm="layer") | partial(m)
    return c | {
        "architectures": ["NemotronForCausalLM"], "norm_eps": c["layer_norm_eps"],
        "mlp_bias": m.has("mlp.up_proj.bias"),
    }  # fmt: skip


def jais2(m: Metadata) -> dict[str, Any]:
    """The config.json of Jais 2 as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    return base(m, norm="layer") | {
        "architectures": ["Jais2ForCausalLM"], "mlp_bias": m.has("mlp.up_proj.bias"),
    }  # fmt: skip


def starcoder2(m: Metadata) -> dict[str, Any]:
    """The config.json of StarCoder 2 as a dict, made from the metadata `m` of a GGUF file.

    Every layer has full attention. GGUF files do not record the window of the published models (4,096 tokens), so
    logits of longer sequences differ from those of transformers. llama.cpp does the same. Raises CheckpointError for a
    missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    c = base(m, norm="layer")
    return c | {
        "architectures": ["Starcoder2ForCausalLM"], "norm_epsilon": c["layer_norm_eps"], "sliding_window": None,
        "use_bias": m.has("mlp.c_fc.bias"),
    }  # fmt: skip


def smollm3(m: Metadata) -> dict[str, Any]:
    """The config.json of SmolLM3 as a dict, made from the metadata `m` of a GGUF file.

    Every fourth layer has no rope. Raises CheckpointError for a missing key, PortError for a value that is not
    supported.
    """
    whole_heads(m)
    return base(m) | {
        "architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(m.layers)],
        "mlp_bias": m.has("mlp.gate_proj.bias"),
    }  # fmt: skip


def glm4(m: Metadata) -> dict[str, Any]:
    """The config.json of GLM-4-0414 as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for GLM-4V.
    """
    m.refuse("rope.dimension_sections", "GLM-4V keeps queries and keys in another order")
    return base(m) | partial(m) | {"architectures": ["Glm4ForCausalLM"]}


def olmo(m: Metadata) -> dict[str, Any]:
    """The config.json of OLMo (2024) as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    clip = m.real("attention.clamp_kqv", 0.0)
    return base(m, norm="layer") | {"architectures": ["OlmoForCausalLM"], "clip_qkv": clip or None}


def chatglm(m: Metadata) -> dict[str, Any]:
    """The config.json of ChatGLM3 or GLM-4-9B of 2024 as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    return base(m) | partial(m) | {"architectures": ["GlmForCausalLM"]}


def minicpm3(m: Metadata) -> dict[str, Any]:
    """The config.json of MiniCPM3 as a dict, made from the metadata `m` of a GGUF file.

    The file does not have scale_emb, scale_depth and dim_model_base. They get the values that are built into llama.cpp.
    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    rope, key = m.whole("rope.dimension_count"), m.whole("attention.key_length")
    return base(m) | {
        "architectures": ["MiniCPM3ForCausalLM"], "q_lora_rank": m.whole("attention.q_lora_rank"),
        "kv_lora_rank": m.whole("attention.kv_lora_rank"), "qk_rope_head_dim": rope, "qk_nope_head_dim": key - rope,
        "v_head_dim": m.whole("attention.value_length", m.hidden // m.heads), "head_dim": None,
        "attention_bias": False, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
    }  # fmt: skip


def bitnet(usual: str) -> Any:
    """Make the function that turns the metadata of a BitNet b1.58 GGUF file into a config.json (a dict).

    The function raises CheckpointError for a missing key, PortError for an activation that is not supported.

    usual: the activation for files that name none: silu for files of llama.cpp, relu2 (squared ReLU) for files of
    bitnet.cpp, which have another architecture name.
    """

    def describe(m: Metadata) -> dict[str, Any]:
        whole_heads(m)
        key = next((k for k in ("hidden_activation", "hidden_act") if m.get(k) is not None), "hidden_act")
        act = {"relu_sqr": "relu2", "relu2": "relu2", "silu": "silu"}.get(name := str(m.get(key, usual)))
        if act is None:
            raise PortError(f"{m.file.path}: {m.file.architecture}.{key}={name!r} is not ported; known are silu, relu2")
        return base(m) | {"architectures": ["BitNetForCausalLM"], "hidden_act": act, "rope_scaling": None}

    return describe


XIELU = {"beta": (0.5, 1e-6), "eps": (0.0, 1e-5)}  # value that the port has built in, and the largest difference


def apertus(m: Metadata) -> dict[str, Any]:
    """The config.json of Apertus as a dict, made from the metadata `m` of a GGUF file.

    Also adds two tensors per layer to `m.tables`: alpha_p and alpha_n, the learned numbers of the layer's activation
    (xIELU). Raises CheckpointError for a missing key. Raises PortError if a layer lacks these numbers, or if the file
    has other constants of xIELU than the supported ones.
    """
    whole_heads(m)
    for key, (wanted, gap) in XIELU.items():
        found = m.whole_key(f"xielu.{key}", [wanted])
        if any(abs(x - wanted) > gap for x in found):
            raise PortError(f"{m.file.path}: xielu.{key}={found} is not ported; wanted {wanted} in each layer")
    for key in ("alpha_p", "alpha_n"):
        values = m.whole_key(f"xielu.{key}", [])
        if len(values) < m.layers:
            raise PortError(f"{m.file.path}: xielu.{key} has {len(values)} values; wanted one for each layer")
        for i in range(m.layers):
            name = f"model.layers.{i}.mlp.act_fn.{key}"
            m.tables.add_constant(name, np.array(values[i : i + 1], np.float32))
    return base(m) | {"architectures": ["ApertusForCausalLM"], "hidden_act": "xielu"}
