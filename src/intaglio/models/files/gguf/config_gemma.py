"""Converts the metadata of a GGUF file to the keys of config.json, for Gemma 2, 3, 3n and 4."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

from intaglio.models.config import PortError
from intaglio.models.files.gguf.config import base, experts, rows, whole_heads
from intaglio.models.files.gguf.metadata import Metadata

UNTURNED = 1e20  # frequency factors of this size or more are those of columns without rope
SPARSE_LAYERS, SPARSITY = 10, 0.95  # of Gemma 3n as released, which llama.cpp has built in
OWN_CACHES = 20  # layers of Gemma 3n as released that have K/V caches of their own; built in there too
PER_LAYER = "model.embed_tokens_per_layer.weight"


def _scale(m: Metadata, largest: int) -> float:
    """Returns the value of config.json's key query_pre_attn_scalar for Gemma, a float.

    The model divides attention scores by the square root of this value. The metadata's key attention.scale is the
    factor of the scores; if the file has this key, the value is 1 / attention.scale ** 2. If it does not, the value is
    hidden size / heads for a model of `largest` layers, and the number of columns of a head for any other model.
    """
    if m.get("attention.scale"):
        return m.real("attention.scale") ** -2
    return m.hidden / m.heads if m.layers == largest else float(m.head_dim)


def gemma2(m: Metadata) -> dict[str, Any]:
    """The config.json of Gemma 2 as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
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
    """The config.json of Gemma 3's text model as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    window = m.whole("attention.sliding_window", 0)
    return base(m) | {
        "architectures": ["Gemma3ForCausalLM"], "query_pre_attn_scalar": _scale(m, 62),
        "sliding_window": window or None, "layer_types": m.sliding(6 if window else 0),
        "rope_local_base_freq": m.real("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": m.real("final_logit_softcapping", 0.0) or None,
    }  # fmt: skip


def gemma3n(m: Metadata) -> dict[str, Any]:
    """The config.json of Gemma 3n's text model as a dict, made from the metadata `m` of a GGUF file.

    In some layers, gate values of the MLP below a limit become 0. The file states the limit as mean + x * (standard
    deviation). The key activation_sparsity_pattern of config.json states the fraction of values that become 0, so x is
    converted. Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    widths = [int(x) for x in m.by_layer("feed_forward_length")]
    usual = [NormalDist().inv_cdf(SPARSITY)] * SPARSE_LAYERS + [-float("inf")] * max(0, m.layers - SPARSE_LAYERS)
    multipliers = m.by_layer("activation_sparsity_scale", usual)
    return base(m, width=max(widths)) | {
        "architectures": ["Gemma3nForCausalLM"], "intermediate_size": widths, "layer_types": m.sliding(5),
        "sliding_window": m.whole("attention.sliding_window"),
        "rope_local_base_freq": m.real("rope.freq_base_swa", 10000.0),
        "activation_sparsity_pattern": [NormalDist().cdf(x) for x in multipliers],
        "altup_num_inputs": m.whole("altup.num_inputs", 4), "altup_active_idx": m.whole("altup.active_idx", 0),
        "laurel_rank": rows(m, "laurel.linear_left.weight"),
        "num_kv_shared_layers": m.whole("attention.shared_kv_layers", max(0, m.layers - OWN_CACHES)),
        "hidden_size_per_layer_input": m.whole("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": m.tables.shape(PER_LAYER)[0],
        "final_logit_softcapping": m.real("final_logit_softcapping", 0.0) or None,
    }  # fmt: skip


def gemma4(m: Metadata) -> dict[str, Any]:
    """The config.json of Gemma 4's text model as a dict, made from the metadata `m` of a GGUF file.

    Layers with full attention have another head width than layers with a window, and rope rotates only part of their
    heads. If the file has no value projection for these layers, their keys are also the values. Raises CheckpointError
    for a missing key, PortError for a value that is not supported.
    """
    kinds, heads = m.sliding(6), m.kv_heads_by_layer
    shared = m.whole("attention.shared_kv_layers", 0)
    widths = {
        "full_attention": m.whole("attention.key_length"),
        "sliding_attention": m.whole("attention.key_length_swa"),
    }
    local = widths["sliding_attention"]
    turned = m.whole("rope.dimension_count_swa", local)
    if turned != local:
        raise PortError(f"{m.file.path}: rope.dimension_count_swa={turned}, but heads of {local} are turned whole")
    factors = m.factors.get("freqs", [])
    part = sum(f == 1 for f in factors) / len(factors) if factors else 1.0
    if any(f != 1 and f < UNTURNED for f in factors):
        raise PortError(f"{m.file.path}: rope_freqs is not ported for gemma4 unless its values are 1, or without rope")
    full = [i for i, kind in enumerate(kinds[: m.layers - shared]) if kind == "full_attention"]
    same = [i for i in full if not m.has("self_attn.v_proj.weight", i)]
    if same not in ([], full):
        raise PortError(f"{m.file.path}: layers {same} have no tensor attn_v; wanted all or none of {full}")
    m.factors.clear()  # not those of other architectures
    width = m.whole("embedding_length_per_layer_input", 0)
    inner = _inner_widths(m, shared)
    c = base(m, width=inner[0], kv_heads=max(heads))
    c["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": m.real("rope.freq_base_swa", 10000.0)},
        "full_attention": {
            "rope_type": "proportional", "partial_rotary_factor": part, "rope_theta": c.pop("rope_theta"),
        },
    }  # fmt: skip
    return c | _experts_beside(m) | {
        "architectures": ["Gemma4ForCausalLM"], "layer_types": kinds, "attention_k_eq_v": bool(same),
        "sliding_window": m.whole("attention.sliding_window"), "rope_scaling": None,
        "per_layer_config": {
            str(i): {"head_dim": widths[kind], "num_key_value_heads": heads[i]} for i, kind in enumerate(kinds)
        },
        "num_kv_shared_layers": shared, "use_double_wide_mlp": inner[-1] != inner[0],
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": m.tables.shape(PER_LAYER)[0] if width else None,
        "final_logit_softcapping": m.real("final_logit_softcapping", 0.0) or None,
    }  # fmt: skip


def _inner_widths(m: Metadata, shared: int) -> list[int]:
    """A list with the inner width of each layer's MLP.

    shared: number of layers, at the end, that read the K/V cache of an earlier layer. Raises PortError unless all
    widths are equal, or the last `shared` layers have twice the width of the others.
    """
    found = [int(x) for x in m.by_layer("feed_forward_length")]
    own = len(found) - shared
    if found not in ([found[0]] * own + [found[0] * wide] * shared for wide in (1, 2)):
        raise PortError(
            f"{m.file.path}: feed_forward_length={found} is not ported; wanted one number for all {len(found)} layers, "
            f"or twice that number in the last {shared} (attention.shared_kv_layers)"
        )
    return found


def _experts_beside(m: Metadata) -> dict[str, Any]:
    """The keys of config.json for experts that layers have in addition to the dense MLP, as a dict.

    {} if the file has no router. The model multiplies the routing weight of each expert by a stored factor. If the file
    lacks the factors of a layer, a tensor of ones is added to `m.tables`. Raises PortError if only some layers have
    experts.
    """
    mixed = [i for i in range(m.layers) if m.has("moe.router.proj.weight", i)]
    if not mixed:
        return {}
    if len(mixed) < m.layers:
        raise PortError(f"{m.file.path}: layers {mixed} have experts; wanted all {m.layers} layers, or none")
    c = experts(m)
    for i in mixed:
        if not m.has("moe.router.per_expert_scale", i):
            ones = np.ones(c["num_experts"], np.float32)
            m.tables.add_constant(f"model.layers.{i}.moe.router.per_expert_scale", ones)
    return c | {"enable_moe_block": True, "top_k_experts": c["num_experts_per_tok"], "llama_names": True}
