"""BitNet b1.58 with unpacked weights: a Llama with norms inside attention and MLP, before their last projections."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, sizes, uniform_layers
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 500000.0,
    "vocab_size": 128256, "num_key_value_heads": 5, "tie_word_embeddings": False,
}  # fmt: skip
NORMS = {**PRE, "attn.inner_norm": "attn_sub_norm", "mlp.inner_norm": "ffn_sub_norm"}


def bitnet(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of BitNet for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s, bias = sizes(c), c.flag("attention_bias")
    return Decoder(**s, **uniform_layers(c, s, context), norms=NORMS, qkv_bias=bias, o_bias=bias)


FAMILIES = (Family("BitNetForCausalLM", "BitNet b1.58 2B4T (bf16)", DEFAULTS, bitnet, model_types=("bitnet",)),)
