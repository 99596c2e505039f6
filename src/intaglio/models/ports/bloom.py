"""BLOOM and MPT: no positions, but linear biases of attention by distance (ALiBi, Press et al. 2021)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import PRE, Decoder, Layer, sizes
from intaglio.models.ports.family import Family
from intaglio.models.ports.gpt import split

BLOOM = {
    "hidden_act": "gelu_new", "layer_norm_epsilon": 1e-5, "max_position_embeddings": 2048, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
MPT = {
    "hidden_act": "gelu", "layer_norm_epsilon": 1e-5, "max_position_embeddings": 2048, "hidden_size": 2048,
    "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50368, "tie_word_embeddings": True,
}  # fmt: skip


def slopes(heads: int) -> tuple[float, ...]:
    """Returns the ALiBi slope of each head as a tuple of floats, in the order of BLOOM and Falcon.

    If n = `heads` is a power of 2, slope number i (from 1) is 2 ** (-8 i / n). Otherwise m is the next lower power of
    2. The first m slopes are those of m heads. The other slopes are every second slope of 2 m heads, beginning with the
    first. Slopes are computed in float32, as in transformers.
    """
    whole = 2 ** math.floor(math.log2(heads))

    def series(of: int, powers: np.ndarray) -> np.ndarray:
        return np.float32(2 ** -(2 ** -(math.log2(of) - 3))) ** powers.astype(np.float32)

    rest = series(2 * whole, np.arange(1, 1 + 2 * (heads - whole), 2))
    return tuple(float(x) for x in [*series(whole, np.arange(1, 1 + whole)), *rest])


def fields(c: Config) -> dict[str, Any]:
    """Returns a dict of arguments for Decoder that BLOOM and MPT share, from config.json.

    Raises PortError for missing or wrong settings.
    """
    c.table |= {"num_key_value_heads": None, "head_dim": None, "intermediate_size": 4 * c.whole("hidden_size")}
    return sizes(c, eps="layer_norm_epsilon") | {
        "norm": "layer", "gated": False, "ropes": {}, "layers": (Layer(""),) * c.whole("num_hidden_layers"),
        "head": "lm_head",
    }  # fmt: skip


def bloom(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of BLOOM for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("apply_residual_connection_post_layernorm", why="the port adds to the residual before its norm")
    s = fields(c)
    each = s["head_dim"]
    sources = {
        **split((("q_proj", each), ("k_proj", each), ("v_proj", each)), "self_attention.query_key_value"),
        "self_attn.o_proj": "self_attention.dense", "embed_tokens": "word_embeddings", "norm": "ln_f", "layers": "h",
        "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
    }  # fmt: skip
    return Decoder(
        **s, norms=PRE, norm_bias=True, qkv_bias=True, o_bias=True, mlp_bias=True, alibi=slopes(s["heads"]),
        embed_norm="word_embeddings_layernorm", sources=sources,
    )  # fmt: skip


def mpt(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of MPT for up to `context` positions, from config.json.

    ALiBi slopes have another order than in BLOOM if the number of heads is not a power of 2. Raises PortError for
    settings that are not ported.
    """
    attention, s = c.settings("attn_config"), fields(c)
    for key, wanted in (("attn_type", "multihead_attention"), ("prefix_lm", False), ("qk_ln", False), ("alibi", True)):
        if (value := attention.get(key, wanted)) != wanted:
            raise PortError(f"config.json: attn_config.{key}={value!r} is not ported; wanted {wanted!r}")
    if attention.get("alibi_bias_max", 8) != 8:
        raise PortError(f"config.json: attn_config.alibi_bias_max={attention['alibi_bias_max']}; transformers takes 8")
    for key in ("attn_pdrop", "attn_impl", "attn_uses_sequence_id"):
        attention.get(key)  # of training, of other programs, of packed sequences
    heads, width = s["heads"], s["hidden"]
    more = 2 ** math.ceil(math.log2(heads))
    series = 1 / np.float32(2) ** (np.arange(1, 1 + more, dtype=np.float32) * np.float32(8 / more))
    ordered = series if more == heads else np.concatenate([series[1::2], series[::2]])[:heads]
    sources = {
        **split((("q_proj", width), ("k_proj", width), ("v_proj", width)), "attn.Wqkv"),
        "self_attn.o_proj": "attn.out_proj", "embed_tokens": "wte", "norm": "norm_f", "layers": "blocks",
        "mlp.up_proj": "ffn.up_proj", "mlp.down_proj": "ffn.down_proj",
    }  # fmt: skip
    return Decoder(
        **s | {"scale": attention.get("softmax_scale") or s["scale"]},
        norms={"attn.norm": "norm_1", "mlp.norm": "norm_2"},
        clip_qkv=float(attention.get("clip_qkv") or 0), alibi=tuple(map(float, ordered)), sources=sources,
    )  # fmt: skip


FAMILIES = (
    Family(
        "BloomForCausalLM", "BLOOM, BLOOMZ", BLOOM, bloom, model_types=("bloom",), prefixes=("transformer.", ""),
        tops=("word_embeddings",),
        aliases={
            "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "max_position_embeddings": "seq_length",
        },
    ),
    Family(
        "MptForCausalLM", "MPT 7B, 30B", MPT, mpt, model_types=("mpt",), prefixes=("transformer.",), tops=("wte",),
        fixed={"logit_scale": (None,), "no_bias": (True,), "expansion_ratio": (4,), "embedding_fraction": (1.0,),
               "norm_type": ("low_precision_layernorm", "layernorm"), "learned_pos_emb": (True, False)},
        aliases={
            "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
        },
    ),
)  # fmt: skip
