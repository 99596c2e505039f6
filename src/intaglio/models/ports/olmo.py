"""OLMo 1, 2 and 3, OLMoE and FlexOlmo. OLMo 2: norms only on the outputs of attention and MLP, and on all of q and k.

OLMo 3 has a sliding window in three of four layers; its rope scaling applies to the full layers only. OLMoE has norms
on the inputs of attention and MLP, and eight of 64 experts per token. OLMo 1 has LayerNorms without weights. FlexOlmo
is OLMoE with the norms of OLMo 2.
"""

from __future__ import annotations

from dataclasses import replace

from intaglio.models.config import Config
from intaglio.models.decoder import NAMED, POST, PRE, Decoder, Layer, Mixture, sizes, sparse, uniform_layers, window
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def olmo2(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of OLMo 2 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s, bias = sizes(c), c.flag("attention_bias")
    return Decoder(**s, **uniform_layers(c, s, context), norms=POST, qk_norm="flat", qkv_bias=bias, o_bias=bias)


def olmo3(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of OLMo 3 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s, bias = sizes(c), c.flag("attention_bias")
    full, local = parameters(c, "full_attention"), parameters(c, "sliding_attention", scaled=False)
    ropes = {"rope.full": table(c, full, s["head_dim"], context), "rope.local": table(c, local, s["head_dim"], context)}
    layers = tuple(
        Layer("rope.local" if kind == "sliding_attention" else "rope.full", window(c, kind))
        for kind in c.layer_types(every=4)
    )
    return Decoder(**s, layers=layers, ropes=ropes, norms=POST, qk_norm="flat", qkv_bias=bias, o_bias=bias)


def olmoe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of OLMoE for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("clip_qkv", why="clipped queries, keys and values are not ported")
    s, bias = sizes(c), c.flag("attention_bias")
    m = Mixture(
        count=c.whole("num_experts"), top=c.whole("num_experts_per_tok"), width=s["intermediate"], sources=NAMED,
        route={"normalise": c.flag("norm_topk_prob")},
    )  # fmt: skip
    d = Decoder(**s, **uniform_layers(c, s, context), norms=PRE, qk_norm="flat", qkv_bias=bias, o_bias=bias, mixture=m)
    return sparse(d)


OLMOE = {**DEFAULTS, "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8}


def olmo(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of OLMo 1 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    c.table["rms_norm_eps"] = 1e-5  # what OlmoLayerNorm computes with
    s, bias = sizes(c), c.flag("attention_bias")
    s |= {
        "norm": "layer",
        "norm_weight": False,
        "clip_qkv": c.real("clip_qkv") if c.get("clip_qkv") is not None else 0.0,
    }
    return Decoder(**s, **uniform_layers(c, s, context), norms=PRE, qkv_bias=bias, o_bias=bias)


def flex_olmo(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of FlexOlmo for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    return replace(olmoe(c, context), norms=POST)


FLEX = {
    **DEFAULTS, "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "max_position_embeddings": 4096, "num_experts": 7,
    "num_experts_per_tok": 5,
}  # fmt: skip
FAMILIES = (
    Family("OlmoForCausalLM", "OLMo 1B, 7B (2024)", DEFAULTS, olmo, model_types=("olmo",)),
    Family("FlexOlmoForCausalLM", "FlexOlmo-7x7B-1T", FLEX, flex_olmo, model_types=("flex_olmo",)),
    Family("OlmoeForCausalLM", "OLMoE-1B-7B", OLMOE, olmoe, model_types=("olmoe",)),
    Family("Olmo2ForCausalLM", "OLMo 2", DEFAULTS, olmo2, model_types=("olmo2",)),
    Family(
        "Olmo3ForCausalLM",
        "OLMo 3",
        {**DEFAULTS, "rope_theta": 500000.0, "sliding_window": 4096},
        olmo3,
        model_types=("olmo3",),
    ),
)
