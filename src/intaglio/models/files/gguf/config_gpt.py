"""Converts the metadata of a GGUF file to the keys of config.json, for GPT-2 and models with similar layers.

These are StarCoder 1, GPT-NeoX, Falcon, Phi-1 and 2, StableLM, BLOOM and MPT. transformers
names their tensors in many ways. Here they are named as Decoder names them (the key llama_names).
"""

from __future__ import annotations

from typing import Any

from intaglio.models.config import PortError
from intaglio.models.files.gguf.config import base, partial, whole_heads
from intaglio.models.files.gguf.metadata import Metadata


def common(m: Metadata, model: str) -> dict[str, Any]:
    """The keys of config.json that the models of this module share, as a dict.

    model: value of the key `architectures`. Raises CheckpointError for a missing key.
    """
    c = base(m, norm="layer")
    return c | {"architectures": [model], "llama_names": True, "layer_norm_epsilon": c["layer_norm_eps"]}


def gpt2(m: Metadata) -> dict[str, Any]:
    """The config.json of GPT-2 as a dict, made from the metadata `m` of a GGUF file.

    GGUF has no key for scale_attn_by_inverse_layer_idx, so the dict does not have it: attention scores are divided only
    by the square root of the head's width, not also by the number of the layer. Raises CheckpointError for a missing
    key, PortError for a value that is not supported.
    """
    return common(m, "GPT2LMHeadModel") | {"n_inner": m.whole("feed_forward_length")}


def starcoder(m: Metadata) -> dict[str, Any]:
    """The config.json of StarCoder 1 as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError unless there is one K/V head or as many as query heads.
    """
    if m.kv_heads not in (1, m.heads):
        raise PortError(
            f"{m.file.path}: attention.head_count_kv={m.kv_heads}; StarCoder has 1 or as many as heads ({m.heads})"
        )
    c = common(m, "GPTBigCodeForCausalLM") | {"n_inner": m.whole("feed_forward_length")}
    return c | {"multi_query": m.kv_heads == 1 and m.heads > 1}


def gptneox(m: Metadata) -> dict[str, Any]:
    """The config.json of GPT-NeoX or Pythia as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    parallel = m.flag("use_parallel_residual", True)
    return common(m, "GPTNeoXForCausalLM") | partial(m) | {"use_parallel_residual": parallel}


def falcon(m: Metadata) -> dict[str, Any]:
    """The config.json of Falcon as a dict, made from the metadata `m` of a GGUF file.

    Layers have one norm, or two (Falcon 40B). GGUF files of Falcon always use rope, so the key `alibi` is False. Raises
    CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    two, kv = m.has("ln_attn.weight"), m.kv_heads
    new = two or 1 < kv < m.heads
    return common(m, "FalconForCausalLM") | {
        "new_decoder_architecture": new, "num_ln_in_parallel_attn": 2 if two else 1, "num_kv_heads": kv,
        "multi_query": kv == 1, "parallel_attn": True, "alibi": False, "bias": m.has("self_attn.q_proj.bias"),
        "ffn_hidden_size": m.whole("feed_forward_length"),
    }  # fmt: skip


def phi2(m: Metadata) -> dict[str, Any]:
    """The config.json of Phi-1, Phi-1.5 or Phi-2 as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    return common(m, "PhiForCausalLM") | partial(m)


def stablelm(m: Metadata) -> dict[str, Any]:
    """The config.json of StableLM as a dict, made from the metadata `m` of a GGUF file.

    If layers have only one norm, attention and MLP both read its result. Raises CheckpointError for a missing key,
    PortError for a value that is not supported.
    """
    c = common(m, "StableLmForCausalLM") | partial(m)
    return c | {
        "use_parallel_residual": not m.has("post_attention_layernorm.weight"), "use_qkv_bias": c["attention_bias"],
        "qk_layernorm": m.has("self_attn.q_norm.weight"),
    }  # fmt: skip


def bloom(m: Metadata) -> dict[str, Any]:
    """The config.json of BLOOM as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    _alibi(m, 8.0)
    return common(m, "BloomForCausalLM")


def mpt(m: Metadata) -> dict[str, Any]:
    """The config.json of MPT as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a model without ALiBi.
    """
    _alibi(m, 0.0)
    attention = {"clip_qkv": m.real("attention.clamp_kqv", 0.0) or None, "qk_ln": m.has("self_attn.q_norm.weight")}
    return common(m, "MptForCausalLM") | {"attn_config": attention, "no_bias": not m.has("self_attn.o_proj.bias")}


def _alibi(m: Metadata, default: float) -> None:
    """Raise PortError unless the metadata key attention.max_alibi_bias is 8.

    The key is the exponent of ALiBi's largest slope. default: the value to assume if the file does not have the key.
    """
    largest = m.real("attention.max_alibi_bias", default)
    if largest != 8:
        raise PortError(f"{m.file.path}: attention.max_alibi_bias={largest} is not ported; wanted 8")
