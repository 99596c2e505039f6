"""Granite 3 (dense): as Llama, with multipliers on embeddings, attention scores, residual branches and logits."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, alike, sizes
from intaglio.models.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def granite(c: Config, context: int) -> Decoder:
    s, bias = sizes(c), c.flag("attention_bias")
    s["scale"] = c.real("attention_multiplier")
    s |= {"embed_scale": c.real("embedding_multiplier"), "residual_scale": c.real("residual_multiplier")}
    s |= {"logit_scale": 1 / c.real("logits_scaling"), "mlp_bias": c.flag("mlp_bias")}
    return Decoder(**s, **alike(c, s, context), norms=PRE, qkv_bias=bias, o_bias=bias)


FAMILIES = (Family("GraniteForCausalLM", "Granite 3.0, 3.1, 3.2, 3.3 dense", DEFAULTS, granite),)
