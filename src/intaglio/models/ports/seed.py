"""Seed-OSS: as Llama, with separate switches for the biases of q, k and v, of o_proj, and of the MLP."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, sizes, uniform_layers
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 524288, "rope_theta": 10000.0,
    "num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True,
    "tie_word_embeddings": False,
}  # fmt: skip


def seed_oss(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Seed-OSS for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("layer_types", "sliding_window", why="Seed-OSS has full attention in every layer")
    s = sizes(c)
    s |= {"qkv_bias": c.flag("attention_bias"), "o_bias": c.flag("attention_out_bias")}
    return Decoder(**s, **uniform_layers(c, s, context), norms=PRE, mlp_bias=c.flag("mlp_bias"))


FAMILIES = (Family("SeedOssForCausalLM", "Seed-OSS-36B", DEFAULTS, seed_oss, model_types=("seed_oss",)),)
