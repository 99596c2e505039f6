"""Phi-3, Phi-3.5 and Phi-4: as Llama, with q, k, v in one tensor, gate and up in one, longrope and partial rotation."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, Layer, sizes
from intaglio.models.family import Family
from intaglio.models.rope import parameters, table

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def phi3(c: Config, context: int) -> Decoder:
    s, rope = sizes(c), parameters(c)
    if rope["rope_type"] in ("su", "yarn"):  # names early checkpoints gave longrope
        rope["rope_type"] = "longrope"
    slide = c.whole("sliding_window") if c.get("sliding_window") else 0
    layers = (Layer(window=slide),) * c.whole("num_hidden_layers")
    ropes = {"rope": table(c, rope, s["head_dim"], context, partial=True)}
    return Decoder(**s, layers=layers, ropes=ropes, norms=PRE, fused=True)


FAMILIES = (Family("Phi3ForCausalLM", "Phi-3, Phi-3.5, Phi-4, Phi-4-mini", DEFAULTS, phi3),)
