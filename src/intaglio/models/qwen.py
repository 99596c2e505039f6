"""Qwen2 and 2.5 (biases on q, k and v) and Qwen3 (norm on each head of q and k). Windows only where switched on."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, alike, sizes
from intaglio.models.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 10000.0,
    "sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip


def windowed(c: Config) -> None:
    """Layers from max_window_layers on slide, if use_sliding_window; else a stored sliding_window means nothing."""
    n = c.whole("num_hidden_layers")
    first = int(c.get("max_window_layers")) if c.flag("use_sliding_window") else n
    if not c.get("layer_types"):
        c.table["layer_types"] = ["sliding_attention" if i >= first else "full_attention" for i in range(n)]


def qwen2(c: Config, context: int) -> Decoder:
    windowed(c)
    s = sizes(c)
    return Decoder(**s, **alike(c, s, context), norms=PRE, qkv_bias=True)


def qwen3(c: Config, context: int) -> Decoder:
    windowed(c)
    s, bias = sizes(c), c.flag("attention_bias")
    return Decoder(**s, **alike(c, s, context), norms=PRE, qk_norm="head", qkv_bias=bias, o_bias=bias)


FAMILIES = (
    Family("Qwen2ForCausalLM", "Qwen2, Qwen2.5", DEFAULTS, qwen2),
    Family("Qwen3ForCausalLM", "Qwen3 dense", {**DEFAULTS, "head_dim": 128}, qwen3),
)
