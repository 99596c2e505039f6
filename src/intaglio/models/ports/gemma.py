"""Gemma 2 and Gemma 3 (text): norms before and after each branch, GeGLU, embeddings multiplied by sqrt(hidden).

Checkpoints store norm weights minus 1. Gemma 2 caps scores and logits; Gemma 3 norms each head of q and k and has two
rope tables. Gemma 1 and VaultGemma have norms before the branches only.
"""

from __future__ import annotations

from typing import Any

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, SANDWICH, Decoder, Layer, sizes, uniform_layers, window
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

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
    """Returns a dict of arguments for Decoder that Gemma 2 and 3 share, from config.json.

    Also sets the key layer_types of the config. Raises PortError for settings that are not ported.

    c: the config. every: used only if the config does not have the key layer_types. With 6, layers 5, 11, 17, ... have
    full attention and the other layers have sliding-window attention.
    """
    c.refuse("use_bidirectional_attention", why="attention is causal here")
    c.table["layer_types"] = c.layer_types(every)
    s, bias = sizes(c, act="hidden_activation"), c.flag("attention_bias")
    s |= {"norms": SANDWICH, "norm_offset": 1.0, "root_scaled": True, "qkv_bias": bias, "o_bias": bias}
    cap = c.get("final_logit_softcapping")
    return s | {"scale": c.real("query_pre_attn_scalar") ** -0.5, "final_softcap": float(cap or 0)}


def gemma2(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Gemma 2 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = gemma(c, every=2)
    return Decoder(**s, **uniform_layers(c, s, context), attn_softcap=float(c.get("attn_logit_softcapping") or 0))


def gemma3(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Gemma 3 for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("attn_logit_softcapping", why="Gemma3Attention in transformers reads the key but does not apply it")
    s = gemma(c, every=c.whole("sliding_window_pattern"))
    full = parameters(c, "full_attention")
    local = parameters(c, "sliding_attention", theta="rope_local_base_freq", scaled=False)
    ropes = {"rope.full": table(c, full, s["head_dim"], context), "rope.local": table(c, local, s["head_dim"], context)}
    layers = tuple(
        Layer("rope.local" if kind == "sliding_attention" else "rope.full", window(c, kind)) for kind in c.layer_types()
    )
    return Decoder(**s, layers=layers, ropes=ropes, qk_norm="head")


def gemma1(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Gemma 1 for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("use_bidirectional_attention", why="attention is causal here")
    c.refuse("layer_types", "sliding_window", why="Gemma 1 has full attention in every layer")
    if (
        c.get("hidden_activation") or c.get("hidden_act") == "gelu"
    ):  # written for the tanh form, as transformers reads it
        c.table["hidden_act"] = "gelu_pytorch_tanh"
    s, bias = sizes(c), c.flag("attention_bias")
    s |= {"norms": PRE, "norm_offset": 1.0, "root_scaled": True, "qkv_bias": bias, "o_bias": bias}
    return Decoder(**s, **uniform_layers(c, s, context))


def vaultgemma(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of VaultGemma for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = gemma(c, every=2) | {"norms": {"attn.norm": "input_layernorm", "mlp.norm": "pre_feedforward_layernorm"}}
    return Decoder(**s, **uniform_layers(c, s, context), attn_softcap=float(c.get("attn_logit_softcapping") or 0))


GEMMA1 = {
    "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "head_dim": 256, "num_attention_heads": 16,
    "num_key_value_heads": 16, "max_position_embeddings": 8192, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES = (
    Family("GemmaForCausalLM", "Gemma 2B, 7B, 1.1, CodeGemma", GEMMA1, gemma1, model_types=("gemma",)),
    Family("VaultGemmaForCausalLM", "VaultGemma 1B", GEMMA2, vaultgemma, model_types=("vaultgemma",)),
    Family("Gemma2ForCausalLM", "Gemma 2", GEMMA2, gemma2, model_types=("gemma2",)),
    Family("Gemma3ForCausalLM", "Gemma 3 270M, 1B", GEMMA3, gemma3, model_types=("gemma3_text",)),
    Family(
        "Gemma3ForConditionalGeneration", "Gemma 3 4B, 12B, 27B (text; the vision tower is not ported)", GEMMA3, gemma3,
        prefixes=("language_model.model.", "model.language_model."),
        ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
        model_types=("gemma3",)),
)  # fmt: skip
