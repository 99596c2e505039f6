"""Apertus: a Llama whose MLP has no gate and the activation xIELU, with norms of each head of queries and keys."""

from __future__ import annotations

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import Decoder, sizes, uniform_layers
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "xielu", "rms_norm_eps": 1e-5, "max_position_embeddings": 65536, "vocab_size": 131072,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "tie_word_embeddings": False, "rope_theta": 12000000.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 12000000.0, "factor": 8.0, "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip


def apertus(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Apertus for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    if c.get("hidden_act") != "xielu":
        raise PortError(f"config.json: hidden_act={c.get('hidden_act')!r} is not ported; wanted xielu")
    if c.get("rope_parameters") is None and c.get("rope_scaling") is None:
        c.table["rope_parameters"] = LLAMA3
    c.table["hidden_act"] = "relu"  # sizes() knows functions of the op map
    s, bias = sizes(c) | {"activation": "xielu"}, c.flag("attention_bias")
    norms = {"attn.norm": "attention_layernorm", "mlp.norm": "feedforward_layernorm"}
    return Decoder(
        **s, **uniform_layers(c, s, context), norms=norms, qk_norm="head", gated=False, qkv_bias=bias, o_bias=bias
    )


def apertus1p5(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Apertus 1.5 (text) for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("output_vocab_size", why="a head with fewer rows than the embedding is not ported")
    return apertus(c, context)


FAMILIES = (
    Family(
        "Apertus1p5TextForCausalLM", "Apertus 1.5 (text)", {**DEFAULTS, "vocab_size": 266752}, apertus1p5,
        model_types=("apertus1p5_text",), ignored=("*.act_fn.beta", "*.act_fn.eps"),
        tops=("embed_tokens", "norm", "layers.0.attention_layernorm"),
    ),
    Family(
        "ApertusForCausalLM", "Apertus 8B, 70B", DEFAULTS, apertus, model_types=("apertus",),
        ignored=("*.act_fn.beta", "*.act_fn.eps"),  # constants: 1/2, and -1e-6, which bounds e^u - 1 from above
        tops=("embed_tokens", "norm", "layers.0.attention_layernorm"),
    ),
)  # fmt: skip
