"""Helium 1: as Llama, with interleaved rope."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, Layer, sizes
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-8, "max_position_embeddings": 4096, "rope_theta": 100000.0,
    "num_attention_heads": 20, "num_key_value_heads": 20, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip


def helium(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Helium 1 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = sizes(c)
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context, style="interleaved")}
    s["layers"] = (Layer(),) * c.whole("num_hidden_layers")
    return Decoder(**s, norms=PRE, qkv_bias=c.flag("attention_bias"), mlp_bias=c.flag("mlp_bias"))


FAMILIES = (Family("HeliumForCausalLM", "Helium 1 2B", DEFAULTS, helium, model_types=("helium",)),)
