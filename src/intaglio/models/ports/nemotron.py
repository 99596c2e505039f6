"""Llama's attention with an MLP that has no gate: Nemotron 3 and 4, Minitron, Arcee, Jais 2.

All use squared ReLU by default. Nemotron has LayerNorm with weights stored minus 1, and rotates half of each head;
Arcee has RMS norms; Jais 2 has LayerNorm.
"""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, Layer, sizes, uniform_layers
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "relu2", "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def nemotron(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Nemotron for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s, bias = sizes(c, eps="norm_eps"), c.flag("attention_bias")
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context, partial=True)}
    s["layers"] = (Layer(),) * c.whole("num_hidden_layers")
    s |= {"norm": "layer", "norm_bias": True, "norm_offset": 1.0, "norms": PRE, "qkv_bias": bias, "o_bias": bias}
    return Decoder(**s, gated=False, mlp_bias=c.flag("mlp_bias"))


def arcee(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Arcee for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("layer_types", "sliding_window", why="ArceeForCausalLM has full attention in every layer")
    s, bias = sizes(c), c.flag("attention_bias")
    s |= {**uniform_layers(c, s, context), "qkv_bias": bias, "o_bias": bias, "mlp_bias": c.flag("mlp_bias")}
    return Decoder(**s, norms=PRE, gated=False)


def jais2(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Jais 2 for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("layer_types", "sliding_window", why="Jais2ForCausalLM has full attention in every layer")
    s, bias = sizes(c, eps="layer_norm_eps"), c.flag("attention_bias")
    s |= {**uniform_layers(c, s, context), "qkv_bias": bias, "o_bias": bias, "mlp_bias": c.flag("mlp_bias")}
    return Decoder(**s, norms=PRE, norm="layer", norm_bias=True, gated=False)


JAIS2 = {
    **DEFAULTS, "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True,
}  # fmt: skip
FAMILIES = (
    Family(
        "NemotronForCausalLM",
        "Nemotron-3 8B, Nemotron-4 15B, 340B, Minitron",
        {**DEFAULTS, "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        nemotron,
        model_types=("nemotron",),
    ),
    Family("ArceeForCausalLM", "AFM-4.5B", {**DEFAULTS, "rms_norm_eps": 1e-5}, arcee, model_types=("arcee",)),
    Family("Jais2ForCausalLM", "Jais 2 8B, 70B", JAIS2, jais2, model_types=("jais2",)),
)
