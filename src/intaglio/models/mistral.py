"""Mistral (one window, or none, for all layers) and Ministral (a window by layer): as Llama without biases.

Mixtral: eight experts in each layer, two of them for a token, weighted by a softmax over the two.
"""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, alike, sizes, sparse
from intaglio.models.family import Family
from intaglio.models.mixture import NUMBERED, Mixture

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


def mixtral(c: Config, context: int) -> Decoder:
    if c.get("sliding_window"):
        c.table["layer_types"] = ["sliding_attention"] * c.whole("num_hidden_layers")
    s = sizes(c)
    m = Mixture(
        count=c.whole("num_local_experts"), top=c.whole("num_experts_per_tok"), width=s["intermediate"],
        block="block_sparse_moe", sources=NUMBERED, route={"normalise": True},
    )  # fmt: skip
    return sparse(Decoder(**s, **alike(c, s, context), norms=PRE, mixture=m))


MIXTRAL = {
    **DEFAULTS, "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
    "rope_theta": 1000000.0,
}  # fmt: skip
FAMILIES = (
    Family("MixtralForCausalLM", "Mixtral 8x7B, 8x22B", MIXTRAL, mixtral),
    Family("MistralForCausalLM", "Mistral 7B, Nemo, Small, Large", DEFAULTS, mistral),
    Family("MinistralForCausalLM", "Ministral 8B", DEFAULTS, ministral),
)
