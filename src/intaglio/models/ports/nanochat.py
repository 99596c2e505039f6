"""NanoChat: RMS norms without weights, also of the embeddings; squared ReLU; rope rotates in the opposite direction."""

from __future__ import annotations

from dataclasses import replace

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, Layer, sizes
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "relu2", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "num_attention_heads": 6, "num_key_value_heads": 6, "final_logit_softcapping": 15.0, "tie_word_embeddings": False,
}  # fmt: skip


def nanochat(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of NanoChat for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("layer_types", "sliding_window", why="NanoChat has full attention in every layer")
    s, bias = sizes(c), c.flag("attention_bias")
    forward = table(c, parameters(c), s["head_dim"], context)
    s["ropes"] = {"rope": replace(forward, frequencies=tuple(-f for f in forward.frequencies))}
    s |= {"layers": (Layer(),) * c.whole("num_hidden_layers"), "qk_norm": "unit", "norm_weight": False}
    s |= {"qkv_bias": bias, "o_bias": bias, "final_softcap": float(c.get("final_logit_softcapping") or 0)}
    sources = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
    return Decoder(**s, norms=PRE, embed_norm="norm", gated=False, sources=sources)


FAMILIES = (Family("NanoChatForCausalLM", "nanochat d20, d32", DEFAULTS, nanochat, model_types=("nanochat",)),)
