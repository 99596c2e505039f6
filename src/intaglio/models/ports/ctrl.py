"""CTRL and XGLM: LayerNorms before the branches and at the end, an MLP without a gate, sinusoids for positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import BEFORE, PRE, Decoder, layer_norm_sizes
from intaglio.models.ports.bart import NAMES, sinusoid
from intaglio.models.ports.family import Family

CTRL = {
    "hidden_act": "relu", "layer_norm_epsilon": 1e-6, "max_position_embeddings": 256, "hidden_size": 1280,
    "num_hidden_layers": 48, "num_attention_heads": 16, "dff": 8192, "vocab_size": 246534, "tie_word_embeddings": True,
}  # fmt: skip
XGLM = {
    "hidden_act": "gelu", "max_position_embeddings": 2048, "hidden_size": 1024, "num_layers": 24, "attention_heads": 16,
    "ffn_dim": 4096, "vocab_size": 256008, "scale_embedding": True, "pad_token_id": 1, "tie_word_embeddings": True,
}  # fmt: skip


def fields(c: Config) -> dict[str, Any]:
    """Returns a dict of arguments for Decoder that CTRL and XGLM share, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("add_cross_attention", why="a decoder alone attends to no encoder")
    return layer_norm_sizes(c, "layer_norm_epsilon") | {"head": "lm_head"}


def ctrl(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of CTRL for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = fields(c)
    sources = {
        "embed_tokens": "w", "norm": "layernorm", "layers": "h", "input_layernorm": "layernorm1",
        "post_attention_layernorm": "layernorm2", "self_attn.q_proj": "multi_head_attention.Wq",
        "self_attn.k_proj": "multi_head_attention.Wk", "self_attn.v_proj": "multi_head_attention.Wv",
        "self_attn.o_proj": "multi_head_attention.dense", "mlp.up_proj": "ffn.0", "mlp.down_proj": "ffn.2",
    }  # fmt: skip
    return Decoder(
        **s, norms=PRE, sinusoid=sinusoid(s["hidden"]), embed_scale=s["hidden"] ** 0.5, head_bias=True, sources=sources
    )


def xglm(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of XGLM for up to `context` positions, from config.json.

    Positions are sinusoidal: position i gets the sines and cosines of i + 2. Raises PortError for settings that are not
    ported.
    """
    c.table["layer_norm_epsilon"] = 1e-5  # torch's default
    pad = int(c.get("pad_token_id", 0))
    if pad > 1:
        raise PortError(
            f"config.json: pad_token_id={pad} is not ported; wanted 0 or 1: transformers takes the sinusoids of "
            f"position {pad - 2} away"
        )
    s, half = fields(c), c.whole("hidden_size") // 2
    rates = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000) / (half - 1)))
    scale = s["hidden"] ** 0.5 if c.flag("scale_embedding") else 1.0
    return Decoder(
        **s, norms=BEFORE, embed_scale=scale,
        sinusoid=tuple(map(float, rates)), sinusoid_first=2, sources={**NAMES, "norm": "layer_norm"},
    )  # fmt: skip


FAMILIES = (
    Family(
        "CTRLLMHeadModel", "CTRL", CTRL, ctrl, model_types=("ctrl",), prefixes=("transformer.", ""), tops=("w",),
        fixed={"layer_norm_epsilon": (1e-6,)},
        aliases={
            "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions", "intermediate_size": "dff",
        },
    ),
    Family(
        "XGLMForCausalLM", "XGLM", XGLM, xglm, model_types=("xglm",), tops=("embed_tokens",),
        ignored=("*.encoder_attn.", "*.encoder_attn_layer_norm.", "model.embed_positions."),
        aliases={
            "hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "attention_heads",
            "intermediate_size": "ffn_dim", "hidden_act": "activation_function",
        },
    ),
)  # fmt: skip
