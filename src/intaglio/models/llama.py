"""Llama 2, 3, 3.1, 3.2 and 3.3: pre-norm RMS, half rope (llama3 or linear scaling), SwiGLU, optional biases."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, alike, sizes
from intaglio.models.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def llama(c: Config, context: int) -> Decoder:
    s, bias = sizes(c), c.flag("attention_bias")
    # transformers' Llama reads no layer_types and no window; a config that has them wants another class
    c.refuse("layer_types", "sliding_window", why="LlamaForCausalLM has full attention in every layer")
    layers = alike(c, s, context)
    return Decoder(**s, **layers, norms=PRE, qkv_bias=bias, o_bias=bias, mlp_bias=c.flag("mlp_bias"))


FAMILIES = (Family("LlamaForCausalLM", "Llama 2, 3, 3.1, 3.2, 3.3", DEFAULTS, llama),)
