"""Qwen2 and 2.5 (biases on q, k and v) and Qwen3 (norm on each head of q and k). Windows only where switched on.

Qwen2-MoE adds a gated shared expert to the chosen ones; Qwen3-MoE has none. Dense layers may stand between.
"""

from __future__ import annotations

from typing import Any

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, alike, sizes, sparse
from intaglio.models.family import Family
from intaglio.models.mixture import NAMED, Mixture

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 10000.0,
    "sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip


def windowed(c: Config) -> None:
    """Layers from max_window_layers on slide, if use_sliding_window; else a stored sliding_window means nothing."""
    n = c.whole("num_hidden_layers")
    first = int(c.get("max_window_layers")) if c.flag("use_sliding_window") else n
    if not c.get("layer_types"):
        c.table["layer_types"] = ["sliding_attention" if i >= first else "full_attention" for i in range(n)]


def qwen2(c: Config, context: int) -> Decoder:
    windowed(c)
    s = sizes(c)
    return Decoder(**s, **alike(c, s, context), norms=PRE, qkv_bias=True)


def qwen3(c: Config, context: int) -> Decoder:
    windowed(c)
    s, bias = sizes(c), c.flag("attention_bias")
    return Decoder(**s, **alike(c, s, context), norms=PRE, qk_norm="head", qkv_bias=bias, o_bias=bias)


def mixture(c: Config, **shared: Any) -> Mixture:
    return Mixture(
        count=c.whole("num_local_experts", c.get("num_experts")),  # transformers writes either name
        top=c.whole("num_experts_per_tok"), width=c.whole("moe_intermediate_size"),
        sources=NAMED, route={"normalise": c.flag("norm_topk_prob")}, **shared,
    )  # fmt: skip


def spread(c: Config, d: Decoder) -> Decoder:
    """Experts in each `decoder_sparse_step`-th layer, but not in those of mlp_only_layers."""
    step, dense = c.whole("decoder_sparse_step"), c.get("mlp_only_layers", [])
    return sparse(d, lambda i: (i + 1) % step == 0 and i not in dense)


def qwen2_moe(c: Config, context: int) -> Decoder:
    windowed(c)
    s = sizes(c)
    m = mixture(
        c, shared=c.whole("shared_expert_intermediate_size"), shared_source="shared_expert",
        shared_gate="shared_expert_gate",
    )  # fmt: skip
    return spread(c, Decoder(**s, **alike(c, s, context), norms=PRE, qkv_bias=c.flag("qkv_bias"), mixture=m))


def qwen3_moe(c: Config, context: int) -> Decoder:
    c.refuse("use_sliding_window", why="Qwen3-MoE is ported with full attention")
    c.table["sliding_window"] = None
    s, bias = sizes(c), c.flag("attention_bias")
    d = Decoder(
        **s, **alike(c, s, context), norms=PRE, qk_norm="head", qkv_bias=bias, o_bias=bias, mixture=mixture(c)
    )  # fmt: skip
    return spread(c, d)


QWEN2_MOE = {
    **DEFAULTS, "num_key_value_heads": 16, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True,
}  # fmt: skip
QWEN3_MOE = {
    **DEFAULTS, "num_key_value_heads": 4, "decoder_sparse_step": 1, "moe_intermediate_size": 768,
    "num_experts_per_tok": 8, "num_experts": 128,
}  # fmt: skip
FAMILIES = (
    Family("Qwen2MoeForCausalLM", "Qwen1.5-MoE, Qwen2-57B-A14B", QWEN2_MOE, qwen2_moe),
    Family("Qwen3MoeForCausalLM", "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder", QWEN3_MOE, qwen3_moe),
    Family("Qwen2ForCausalLM", "Qwen2, Qwen2.5", DEFAULTS, qwen2),
    Family("Qwen3ForCausalLM", "Qwen3 dense", {**DEFAULTS, "head_dim": 128}, qwen3),
)
