"""OLMo 2 and 3: norms on the branches' outputs only, and one norm over the whole width of q and of k.

OLMo 3 slides three layers in four; its rope scaling holds for the full layers only.
"""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import POST, Decoder, Layer, alike, sizes, window
from intaglio.models.family import Family
from intaglio.models.rope import parameters, table

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def olmo2(c: Config, context: int) -> Decoder:
    s, bias = sizes(c), c.flag("attention_bias")
    return Decoder(**s, **alike(c, s, context), norms=POST, qk_norm="flat", qkv_bias=bias, o_bias=bias)


def olmo3(c: Config, context: int) -> Decoder:
    s, bias = sizes(c), c.flag("attention_bias")
    full, local = parameters(c, "full_attention"), parameters(c, "sliding_attention", scaled=False)
    ropes = {"rope.full": table(c, full, s["head_dim"], context), "rope.local": table(c, local, s["head_dim"], context)}
    layers = tuple(
        Layer("rope.local" if kind == "sliding_attention" else "rope.full", window(c, kind))
        for kind in c.layer_types(every=4)
    )
    return Decoder(**s, layers=layers, ropes=ropes, norms=POST, qk_norm="flat", qkv_bias=bias, o_bias=bias)


FAMILIES = (
    Family("Olmo2ForCausalLM", "OLMo 2", DEFAULTS, olmo2),
    Family("Olmo3ForCausalLM", "OLMo 3", {**DEFAULTS, "rope_theta": 500000.0, "sliding_window": 4096}, olmo3),
)
