"""RecurrentGemma (Griffin, De et al. 2024): two recurrent blocks, then one of attention with a window."""

from __future__ import annotations

import numpy as np

from intaglio import formats
from intaglio.models.config import Config, PortError
from intaglio.models.decoder import Decoder, Layer, LruMixer, sizes
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

NORMS = {"attn.norm": "temporal_pre_norm", "mlp.norm": "channel_pre_norm"}


def recurrent_gemma(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of RecurrentGemma for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    s, n = sizes(c, act="hidden_activation"), c.whole("num_hidden_layers")
    width = c.whole("lru_width", s["hidden"])
    if width % s["heads"]:
        raise PortError(f"config.json: lru_width={width} is not a multiple of num_attention_heads={s['heads']}")
    mixer = LruMixer(width=width, heads=s["heads"], taps=c.whole("conv1d_width"))
    cycle = c.get("block_types", ["recurrent", "recurrent", "attention"])
    if not cycle or not {*cycle} <= {"recurrent", "attention"}:
        raise PortError(f"config.json: block_types={cycle}; wanted recurrent and attention")
    window = c.whole("attention_window_size")
    layers = tuple(
        Layer(mixer=mixer) if cycle[i % len(cycle)] == "recurrent" else Layer(window=window) for i in range(n)
    )
    s |= {"intermediate": s["intermediate"] // 2, "qkv_bias": c.flag("attention_bias"), "o_bias": True}
    s |= {"ropes": {"rope": table(c, parameters(c), s["head_dim"], context, partial=True)}, "layers": layers}
    root = float(formats.round_to(np.array(s["hidden"] ** 0.5, np.float32), "bf16"))
    return Decoder(
        **s, norms=NORMS, norm_offset=1.0, mlp_bias=True, block="mlp_block", final_norm="final_norm",
        embed_scale=root, final_softcap=c.real("logits_soft_cap"), sources={"self_attn": "temporal_block"},
    )  # fmt: skip


DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "num_attention_heads": 10, "conv1d_width": 4,
    "attention_window_size": 2048, "logits_soft_cap": 30.0, "tie_word_embeddings": True, "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5, "max_position_embeddings": 8192,
}  # fmt: skip
FAMILIES = (
    Family(
        "RecurrentGemmaForCausalLM", "RecurrentGemma 2B, 9B", DEFAULTS, recurrent_gemma,
        model_types=("recurrent_gemma",), tops=("embed_tokens", "final_norm", "layers.0.temporal_pre_norm"),
    ),
)  # fmt: skip
