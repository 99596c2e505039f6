"""Mistral (one window, or none, for all layers) and Ministral (a window by layer): as Llama without biases."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, alike, sizes
from intaglio.models.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "rope_theta": 10000.0,
    "num_key_value_heads": 8, "sliding_window": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def mistral(c: Config, context: int) -> Decoder:
    c.refuse(
        "layer_types", why="MistralForCausalLM has one window for all layers; MinistralForCausalLM has layer_types"
    )
    return ministral(c, context)


def ministral(c: Config, context: int) -> Decoder:
    if c.get("sliding_window") and not c.get("layer_types"):
        c.table["layer_types"] = ["sliding_attention"] * c.whole("num_hidden_layers")
    s = sizes(c)
    return Decoder(**s, **alike(c, s, context), norms=PRE)


FAMILIES = (
    Family("MistralForCausalLM", "Mistral 7B, Nemo, Small, Large", DEFAULTS, mistral),
    Family("MinistralForCausalLM", "Ministral 8B", DEFAULTS, ministral),
)
