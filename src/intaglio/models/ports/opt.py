"""OPT and BioGPT: LayerNorms with biases, an MLP without a gate, learned positions from row 2 of a table."""

from __future__ import annotations

from typing import Any

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import Decoder, layer_norm_sizes
from intaglio.models.ports.family import Family
from intaglio.program.source import parts_of

OFFSET = 2  # rows of the table of positions before that of position 0
OPT = {
    "hidden_act": "relu", "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "do_layer_norm_before": True,
    "enable_bias": True, "layer_norm_elementwise_affine": True, "tie_word_embeddings": True,
}  # fmt: skip
BIOGPT = {
    "hidden_act": "gelu", "max_position_embeddings": 1024, "scale_embedding": True, "tie_word_embeddings": True,
}  # fmt: skip


def common(c: Config) -> dict[str, Any]:
    """Returns a dict of arguments for Decoder that OPT and BioGPT share, from config.json.

    Raises PortError for missing or wrong settings.
    """
    c.table["layer_norm_eps"] = 1e-5  # torch's default, not in the config
    s = layer_norm_sizes(c, "layer_norm_eps")
    sources = {
        "embed_positions.weight": parts_of("embed_positions.weight", (OFFSET, s["context"]))[1],
        "self_attn.o_proj": "self_attn.out_proj", "mlp.up_proj": "fc1", "mlp.down_proj": "fc2",
    }  # fmt: skip
    return s | {
        "norms": {"attn.norm": "self_attn_layer_norm", "mlp.norm": "final_layer_norm"},
        "positions": s["context"], "sources": sources,
    }  # fmt: skip


def opt(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of OPT for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    if not c.flag("do_layer_norm_before"):
        raise PortError("config.json: do_layer_norm_before=False is not ported: norms after each addition (OPT-350m)")
    c.refuse("_remove_final_layer_norm", why="the port has a final norm")
    s, bias = common(c), c.flag("enable_bias")
    width = c.get("word_embed_proj_dim", s["hidden"])
    if width != s["hidden"]:
        raise PortError(f"config.json: word_embed_proj_dim={width} is not ported; wanted hidden_size={s['hidden']}")
    s |= {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bias}
    if not c.flag("layer_norm_elementwise_affine"):
        s |= {"norm_weight": False, "norm_bias": False}
    return Decoder(**s | {"sources": {**s["sources"], "norm": "final_layer_norm"}})


def biogpt(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of BioGPT for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = common(c)
    s["head"] = "output_projection"
    if c.flag("scale_embedding"):
        s["embed_scale"] = s["hidden"] ** 0.5
    return Decoder(**s | {"sources": {**s["sources"], "norm": "layer_norm"}})


FAMILIES = (
    Family(
        "OPTForCausalLM", "OPT, Galactica", OPT, opt, model_types=("opt",), prefixes=("model.decoder.", "decoder."),
        aliases={"hidden_act": "activation_function", "intermediate_size": "ffn_dim"},
    ),
    Family("BioGptForCausalLM", "BioGPT", BIOGPT, biogpt, model_types=("biogpt",), prefixes=("biogpt.",)),
)  # fmt: skip
