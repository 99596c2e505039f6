"""Mistral (one window, or none, for all layers) and Ministral (a window per layer): as Llama without biases.

Mixtral: eight experts per layer, two of them per token, weighted by a softmax over the two. Ministral 3 scales
queries by a temperature that grows with the position.
"""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import NUMBERED, PRE, Decoder, Mixture, sizes, sparse, uniform_layers
from intaglio.models.decoder.rope import parameters
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "rope_theta": 10000.0,
    "num_key_value_heads": 8, "sliding_window": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def mistral(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Mistral for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse(
        "layer_types", why="MistralForCausalLM has one window for all layers; MinistralForCausalLM has layer_types"
    )
    return ministral(c, context)


def ministral(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Ministral for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    if c.get("sliding_window") is not None and not c.get("layer_types"):
        c.table["layer_types"] = ["sliding_attention"] * c.whole("num_hidden_layers")
    s = sizes(c)
    return Decoder(**s, **uniform_layers(c, s, context), norms=PRE)


def ministral3(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Ministral 3 for up to `context` positions, from config.json.

    Attention scores are scaled by a temperature that grows with the query's position. Raises PortError for missing or
    wrong settings.
    """
    if c.get("rope_parameters") is None and c.get("rope_scaling") is None:
        c.table["rope_parameters"] = YARN
    if c.get("sliding_window") is not None:
        c.table["layer_types"] = ["sliding_attention"] * c.whole("num_hidden_layers")
    s, rope = sizes(c), parameters(c)
    return Decoder(
        **s, **uniform_layers(c, s, context), norms=PRE, temper=float(rope.get("llama_4_scaling_beta") or 0.0),
        temper_every=int(rope["original_max_position_embeddings"]), temper_from=0, temper_all=True,
    )  # fmt: skip


def mixtral(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Mixtral for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    if c.get("sliding_window") is not None:
        c.table["layer_types"] = ["sliding_attention"] * c.whole("num_hidden_layers")
    s = sizes(c)
    m = Mixture(
        count=c.whole("num_local_experts"), top=c.whole("num_experts_per_tok"), width=s["intermediate"],
        block="block_sparse_moe", sources=NUMBERED, route={"normalise": True},
    )  # fmt: skip
    return sparse(Decoder(**s, **uniform_layers(c, s, context), norms=PRE, mixture=m))


MIXTRAL = {
    **DEFAULTS, "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
    "rope_theta": 1000000.0,
}  # fmt: skip
MINISTRAL3 = {
    **DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "rope_theta": 1000000.0, "head_dim": 128,
    "sliding_window": None,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
FAMILIES = (
    Family("MixtralForCausalLM", "Mixtral 8x7B, 8x22B", MIXTRAL, mixtral, model_types=("mixtral",)),
    Family("MistralForCausalLM", "Mistral 7B, Nemo, Small, Large", DEFAULTS, mistral, model_types=("mistral",)),
    Family("Ministral3ForCausalLM", "Ministral 3 3B, 8B, 14B", MINISTRAL3, ministral3, model_types=("ministral3",)),
    Family("MinistralForCausalLM", "Ministral 8B", DEFAULTS, ministral, model_types=("ministral",)),
)
