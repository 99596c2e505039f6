"""StableLM 2, StarCoder 2 and Persimmon: LayerNorms with biases around Llama's or Phi's parts."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import ONE, PRE, Decoder, Layer, sizes
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family
from intaglio.models.ports.gpt import split

STABLELM = {
    "hidden_act": "silu", "layer_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "tie_word_embeddings": False,
}  # fmt: skip
STARCODER2 = {
    "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True,
}  # fmt: skip
PERSIMMON = {
    "hidden_act": "relu2", "layer_norm_eps": 1e-5, "max_position_embeddings": 16384, "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5, "qk_layernorm": True, "tie_word_embeddings": False,
}  # fmt: skip


def stablelm(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of StableLM for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("qk_layernorm", why="a LayerNorm with weights of each head is not ported")
    c.table["head_dim"] = None
    s, parallel = sizes(c, eps="layer_norm_eps"), c.flag("use_parallel_residual")
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context, partial=True)}
    s |= {"layers": (Layer(),) * c.whole("num_hidden_layers"), "norm": "layer", "norm_bias": True}
    return Decoder(**s, norms=ONE if parallel else PRE, parallel=parallel, qkv_bias=c.flag("use_qkv_bias"))


def starcoder2(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of StarCoder 2 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s, bias = sizes(c, eps="norm_epsilon"), c.flag("use_bias")
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context)}
    slide = c.whole_or_none("sliding_window") or 0
    s |= {"layers": (Layer(window=slide),) * c.whole("num_hidden_layers"), "norm": "layer", "norm_bias": True}
    s |= {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bias}
    sources = {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
    return Decoder(**s, norms=PRE, gated=False, sources=sources)


def persimmon(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Persimmon for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    c.table |= {"head_dim": None, "num_key_value_heads": None}
    s = sizes(c, eps="layer_norm_eps")
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context, partial=True)}
    s |= {"layers": (Layer(),) * c.whole("num_hidden_layers"), "norm": "layer", "norm_bias": True}
    s |= {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": "head" if c.flag("qk_layernorm") else ""}
    each = s["head_dim"]
    sources = {
        **split((("q_proj", each), ("k_proj", each), ("v_proj", each)), "self_attn.query_key_value"),
        "self_attn.o_proj": "self_attn.dense", "norm": "final_layernorm", "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm", "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }  # fmt: skip
    return Decoder(**s, norms=PRE, gated=False, sources=sources)


FAMILIES = (
    Family(
        "StableLmForCausalLM", "StableLM 3B, StableLM 2 1.6B (not 12B: norms with weights of each head)", STABLELM,
        stablelm, model_types=("stablelm",),
    ),
    Family("Starcoder2ForCausalLM", "StarCoder 2 3B, 7B, 15B", STARCODER2, starcoder2, model_types=("starcoder2",)),
    Family(
        "FuyuForCausalLM", "Fuyu 8B (text; image patches are not ported)",
        {**PERSIMMON, "max_position_embeddings": 16384, "partial_rotary_factor": 0.5}, persimmon,
        model_types=("fuyu",), prefixes=("model.language_model.", "language_model.model."),
        ignored=("model.vision_embed_tokens.", "vision_embed_tokens."),
    ),
    Family("PersimmonForCausalLM", "Persimmon 8B", PERSIMMON, persimmon, model_types=("persimmon",)),
)  # fmt: skip
