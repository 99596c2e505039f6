"""Falcon: q, k and v in one tensor; attention and MLP in parallel, but one after the other in Falcon-RW."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import ONE, PRE, Decoder, Layer, sizes
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.bloom import slopes
from intaglio.models.ports.family import Family
from intaglio.models.ports.gpt import split

DEFAULTS = {
    "activation": "gelu", "layer_norm_epsilon": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "multi_query": True, "parallel_attn": True,
    "vocab_size": 65024, "tie_word_embeddings": True,
}  # fmt: skip


def falcon(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Falcon for up to `context` positions, from config.json.

    config.json says whether the model has ALiBi or rope, and whether attention is multi-query, grouped-query or
    multi-head. Raises PortError for missing or wrong settings.
    """
    new, bias = c.flag("new_decoder_architecture"), c.flag("bias")
    one = c.flag("multi_query") and not new
    own = c.get("num_kv_heads")
    c.named["num_key_value_heads"] = "num_kv_heads"
    c.table |= {"head_dim": None, "num_key_value_heads": 1 if one else own if new else None}
    c.table["intermediate_size"] = c.get("ffn_hidden_size") or 4 * c.whole("hidden_size")
    s = sizes(c, act="activation", eps="layer_norm_epsilon")
    if c.flag("alibi"):  # scaled with the scores; transformers rounds each bias to bf16, which is not done here
        s |= {"ropes": {}, "alibi": tuple(slope * s["scale"] for slope in slopes(s["heads"]))}
    else:
        s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context)}
    s |= {
        "layers": (Layer("rope" if s["ropes"] else ""),) * c.whole("num_hidden_layers"),
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
    }
    s |= {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bias, "parallel": new or c.flag("parallel_attn"), "norms": PRE}
    norms = c.whole("num_ln_in_parallel_attn", 2 if new else 1)
    if s["parallel"]:
        s["norms"] = {"attn.norm": "ln_attn", "mlp.norm": "ln_mlp"} if new and norms == 2 else ONE
    each, shared = s["head_dim"], s["heads"] // s["kv_heads"]
    sources = {
        **split((("q_proj", shared * each), ("k_proj", each), ("v_proj", each)), "self_attention.query_key_value"),
        "self_attn.o_proj": "self_attention.dense", "embed_tokens": "word_embeddings", "norm": "ln_f", "layers": "h",
        "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
    }  # fmt: skip
    return Decoder(**s, head="lm_head", sources=sources)


FAMILIES = (
    Family(
        "FalconForCausalLM", "Falcon 7B, 40B, 180B, Falcon 2 11B, Falcon-RW", DEFAULTS, falcon, model_types=("falcon",),
        prefixes=("transformer.",), tops=("word_embeddings",),
    ),
)  # fmt: skip
