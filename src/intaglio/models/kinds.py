"""Kinds of values of config.json: keys that hold a list, a count or a number, and the check of a value against them.

The table has the keys that ports read without Config.whole(), real() or flag(), because null, 0 or another type is
allowed too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def _integer(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list | tuple) and all(map(check, x))


def _count(x: Any) -> bool:
    return _integer(x) and x >= 0


KINDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a list": (_list_of(lambda x: True), ("attention_types", "attn_type_list")),
    "a list of names": (_list_of(lambda x: isinstance(x, str)), (
        "layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types", "attention_layers",
    )),
    "a list of layer numbers": (_list_of(_count), (
        "mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers",
    )),
    "a list of numbers": (_list_of(_number), (
        "no_rope_layers", "layer_rope_theta", "ssm_multipliers", "mlp_multipliers",
    )),
    "an integer of 0 or more": (_count, (
        "sliding_window", "sliding_window_size", "max_window_layers", "attention_chunk_size", "n_group", "topk_group",
        "q_lora_rank", "first_k_dense_replace", "num_dense_layers", "num_shared_experts", "n_shared_experts",
        "moe_num_shared_experts", "moe_layer_start_index", "moe_layer_freq", "num_local_experts", "moe_num_experts",
        "moe_top_k", "shared_intermediate_size", "type_vocab_size", "hidden_size_per_layer_input",
        "num_global_key_value_heads", "attn_layer_offset", "expert_layer_offset", "full_attention_interval",
        "embedding_size", "word_embed_proj_dim", "rotary_dim", "mamba_d_ssm", "index_topk_freq",
        "index_skip_topk_offset", "ffn_hidden_size", "n_inner", "num_kv_heads", "v_head_dim",
        "num_kv_shared_layers", "altup_active_idx", "moe_latent_size",
        "num_hash_layers", "compress_rate_csa", "compress_rate_hca",
    )),
    "an integer of 0 or more, or a list of them": (lambda x: _count(x) or _list_of(_count)(x), ("eos_token_id",)),
    "an integer of 1 or more": (lambda x: _integer(x) and x > 0, ("head_dim", "num_key_value_heads")),
    "an integer": (_integer, ("pad_token_id", "moe_layer_end_index")),
    "a number of 0 or more": (lambda x: _number(x) and x >= 0, (
        "clip_qkv", "softmax_scale", "alpha", "llama_4_scaling_beta", "attention_multiplier", "time_step_min",
        "factor", "mscale", "mscale_all_dim",
    )),
    "a number above 0": (lambda x: _number(x) and x > 0, (
        "rope_theta", "original_max_position_embeddings", "scale_depth", "attn_logit_softcapping",
        "final_logit_softcapping",
    )),
    "a number": (_number, ("attention_value_scale",)),
    "a name": (lambda x: isinstance(x, str), (
        "topk_method", "shared_expert_combination_strategy", "expert_selection_fn", "position_embedding_type",
    )),
    "an object {...}": (lambda x: isinstance(x, Mapping), ("per_layer_config", "rope_parameters")),
    "true or false": (lambda x: isinstance(x, bool), ("norm_topk_prob", "truncate")),
}  # fmt: skip
CHECKS = {key: (kind, check) for kind, (check, keys) in KINDS.items() for key in keys}


def kind_wanted(key: str, value: Any) -> str:
    """Check the value of a config.json key. Returns "" if it is right, else the wanted kind, such as "a list of names".

    null is right for every key. Every value is right for a key that KINDS does not list.
    """
    kind, check = CHECKS.get(key, ("", None))
    return "" if value is None or check is None or check(value) else kind
