"""Cohere 2 (Command R7B, Command A): attention and MLP beside each other, LayerNorm without bias, interleaved rope on
the sliding layers and none on the full ones."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import ONE, Decoder, Layer, sizes, window
from intaglio.models.family import Family
from intaglio.models.rope import parameters, table

DEFAULTS = {
    "hidden_act": "silu", "layer_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 10000.0,
    "logit_scale": 0.0625, "sliding_window": 4096, "sliding_window_pattern": 4, "tie_word_embeddings": True,
}  # fmt: skip


def cohere2(c: Config, context: int) -> Decoder:
    c.refuse("use_qk_norm", why="transformers' Cohere2 has no q and k norms")
    s, bias = sizes(c, eps="layer_norm_eps"), c.flag("attention_bias")
    ropes = {"rope": table(c, parameters(c), s["head_dim"], context, style="interleaved")}
    layers = tuple(
        Layer("rope" if kind == "sliding_attention" else "", window(c, kind))
        for kind in c.layer_types(c.whole("sliding_window_pattern"))
    )
    s |= {"norm": "layer", "norms": ONE, "parallel": True, "logit_scale": c.real("logit_scale")}
    return Decoder(**s, layers=layers, ropes=ropes, qkv_bias=bias, o_bias=bias)


FAMILIES = (Family("Cohere2ForCausalLM", "Command R7B, Command A", DEFAULTS, cohere2),)
