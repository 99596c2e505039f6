"""SmolLM3: as Llama, with no rope in every fourth layer."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, Layer, sizes, window
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 2000000.0,
    "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": 2048, "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}  # fmt: skip


def smollm3(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of SmolLM3 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s, bias, n = sizes(c), c.flag("attention_bias"), c.whole("num_hidden_layers")
    every = c.whole("no_rope_layer_interval")
    turned = c.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(n)]
    if not c.get("layer_types"):
        slides = c.flag("use_sliding_window")
        c.table["layer_types"] = ["sliding_attention" if slides and not t else "full_attention" for t in turned]
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context)}
    s["layers"] = tuple(Layer("rope" if t else "", window(c, k)) for t, k in zip(turned, c.layer_types(), strict=True))
    return Decoder(**s, norms=PRE, qkv_bias=bias, o_bias=bias, mlp_bias=c.flag("mlp_bias"))


FAMILIES = (Family("SmolLM3ForCausalLM", "SmolLM3-3B", DEFAULTS, smollm3, model_types=("smollm3",)),)
