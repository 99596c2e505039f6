"""Phi-3, Phi-3.5 and Phi-4: as Llama, with q, k, v in one tensor, gate and up in one, longrope and partial rotation.

Phi-3.5-MoE: LayerNorm, biases everywhere, and two experts of sixteen chosen by SparseMixer."""

from __future__ import annotations

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import PRE, Decoder, Layer, sizes
from intaglio.models.family import Family
from intaglio.models.mixture import NUMBERED, Mixture
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
    return Decoder(**s, layers=layers, ropes=ropes, norms=PRE, fused=("qkv_proj", "gate_up_proj"))


def phimoe(c: Config, context: int) -> Decoder:
    s, bias, rope = sizes(c), c.flag("attention_bias"), parameters(c)
    if c.whole("num_experts_per_tok") != 2:
        raise PortError(f"config.json: num_experts_per_tok={c.get('num_experts_per_tok')}; SparseMixer chooses 2")
    if rope["rope_type"] == "longrope":  # cos and sin are times the mscale of the factors in use
        key = "long_mscale" if context > rope["original_max_position_embeddings"] else "short_mscale"
        rope["attention_factor"] = rope[key]
    ropes = {"rope": table(c, rope, s["head_dim"], context)}
    slide = c.whole("sliding_window") if c.get("sliding_window") else 0
    m = Mixture(
        count=c.whole("num_local_experts"), top=2, width=s["intermediate"], block="block_sparse_moe", sources=NUMBERED,
        route={"score": "sparsemixer", "jitter": c.real("router_jitter_noise")},
    )  # fmt: skip
    s |= {"norm": "layer", "norm_bias": True, "qkv_bias": bias, "o_bias": bias, "head_bias": c.flag("lm_head_bias")}
    layers = (Layer(window=slide, sparse=True),) * c.whole("num_hidden_layers")
    return Decoder(**s, layers=layers, ropes=ropes, norms=PRE, mixture=m)


MOE = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
    "num_experts_per_tok": 2, "num_local_experts": 16, "router_jitter_noise": 0.01, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = (
    Family("Phi3ForCausalLM", "Phi-3, Phi-3.5, Phi-4, Phi-4-mini", DEFAULTS, phi3),
    Family("PhimoeForCausalLM", "Phi-3.5-MoE", MOE, phimoe),
    Family("PhiMoEForCausalLM", "Phi-3.5-MoE", MOE, phimoe),
)
