"""Gemma 2 and Gemma 3 (text): norms before and after each branch with weight - 1 stored, GeGLU, embeddings times
sqrt(hidden). Gemma 2 caps scores and logits; Gemma 3 norms each head of q and k and has two ropes."""

from __future__ import annotations

from typing import Any

from intaglio.models.config import Config
from intaglio.models.decoder import SANDWICH, Decoder, Layer, alike, sizes, window
from intaglio.models.family import Family
from intaglio.models.rope import parameters, table

DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "head_dim": 256, "query_pre_attn_scalar": 256,
    "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA2 = {
    **DEFAULTS, "max_position_embeddings": 8192, "rope_theta": 10000.0, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
GEMMA3 = {
    **DEFAULTS, "max_position_embeddings": 131072, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    "vocab_size": 262208, "sliding_window_pattern": 6,
}  # fmt: skip


def gemma(c: Config, every: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; each `every`-th layer is full."""
    c.refuse("use_bidirectional_attention", why="attention is causal here")
    c.table["layer_types"] = c.layer_types(every)
    s, bias = sizes(c, act="hidden_activation"), c.flag("attention_bias")
    s |= {"norms": SANDWICH, "norm_offset": 1.0, "root_scaled": True, "qkv_bias": bias, "o_bias": bias}
    cap = c.get("final_logit_softcapping")
    return s | {"scale": c.real("query_pre_attn_scalar") ** -0.5, "final_softcap": float(cap or 0)}


def gemma2(c: Config, context: int) -> Decoder:
    s = gemma(c, every=2)
    return Decoder(**s, **alike(c, s, context), attn_softcap=float(c.get("attn_logit_softcapping") or 0))


def gemma3(c: Config, context: int) -> Decoder:
    c.refuse("attn_logit_softcapping", why="Gemma3Attention in transformers reads the key but does not apply it")
    s = gemma(c, every=c.whole("sliding_window_pattern"))
    full = parameters(c, "full_attention")
    local = parameters(c, "sliding_attention", theta="rope_local_base_freq", scaled=False)
    ropes = {"rope.full": table(c, full, s["head_dim"], context), "rope.local": table(c, local, s["head_dim"], context)}
    layers = tuple(
        Layer("rope.local" if kind == "sliding_attention" else "rope.full", window(c, kind)) for kind in c.layer_types()
    )
    return Decoder(**s, layers=layers, ropes=ropes, qk_norm="head")


FAMILIES = (
    Family("Gemma2ForCausalLM", "Gemma 2", GEMMA2, gemma2),
    Family("Gemma3ForCausalLM", "Gemma 3 270M, 1B", GEMMA3, gemma3),
    Family(
        "Gemma3ForConditionalGeneration", "Gemma 3 4B, 12B, 27B (text; the vision tower is not ported)", GEMMA3, gemma3,
        prefixes=("language_model.model.", "model.language_model."),
        ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    ),
)  # fmt: skip
