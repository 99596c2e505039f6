"""Phi-3, Phi-3.5 and Phi-4: as Llama, with q, k, v in one tensor, gate and up in one, longrope and partial rotation.

Phi-3.5-MoE: LayerNorm, biases everywhere, and two experts of sixteen chosen by SparseMixer.
Phi-1 and 2: parallel attention and MLP without a gate, LayerNorm, a part of each head rotated.
"""

from __future__ import annotations

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import NUMBERED, ONE, PRE, Decoder, Layer, Mixture, sizes
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def phi3(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Phi-3, Phi-3.5 and Phi-4, from config.json.

    Raises PortError for missing or wrong settings. context: the largest number of positions.
    """
    s, rope = sizes(c), parameters(c)
    if rope["rope_type"] in ("su", "yarn"):  # names early checkpoints gave longrope
        rope["rope_type"] = "longrope"
    slide = c.whole_or_none("sliding_window") or 0
    layers = (Layer(window=slide),) * c.whole("num_hidden_layers")
    ropes = {"rope": table(c, rope, s["head_dim"], context, partial=True)}
    return Decoder(**s, layers=layers, ropes=ropes, norms=PRE, fused=("qkv_proj", "gate_up_proj"))


def phimoe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Phi-3.5-MoE for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    s, bias, rope = sizes(c), c.flag("attention_bias"), parameters(c)
    if c.whole("num_experts_per_tok") != 2:
        raise PortError(f"config.json: num_experts_per_tok={c.get('num_experts_per_tok')}; SparseMixer chooses 2")
    if rope["rope_type"] == "longrope":  # cos and sin are multiplied by the mscale of the factors in use
        short, long = rope["short_mscale"], rope["long_mscale"]
        rope["attention_factor"] = long if context > rope["original_max_position_embeddings"] else short
    ropes = {"rope": table(c, rope, s["head_dim"], context)}
    slide = c.whole_or_none("sliding_window") or 0
    m = Mixture(
        count=c.whole("num_local_experts"), top=2, width=s["intermediate"], block="block_sparse_moe", sources=NUMBERED,
        route={"score": "sparsemixer", "jitter": c.real("router_jitter_noise")},
    )  # fmt: skip
    s |= {"norm": "layer", "norm_bias": True, "qkv_bias": bias, "o_bias": bias, "head_bias": c.flag("lm_head_bias")}
    layers = (Layer(window=slide, sparse=True),) * c.whole("num_hidden_layers")
    return Decoder(**s, layers=layers, ropes=ropes, norms=PRE, mixture=m)


def phi(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Phi-1, 1.5 and 2 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = sizes(c, eps="layer_norm_eps")
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context, partial=True)}
    s |= {"layers": (Layer(),) * c.whole("num_hidden_layers"), "norm": "layer", "norm_bias": True, "head_bias": True}
    s |= {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": "head" if c.flag("qk_layernorm") else ""}
    sources = {
        "self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2",
        "norm": "final_layernorm", "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm",
    }  # fmt: skip
    return Decoder(**s, norms=ONE, parallel=True, gated=False, sources=sources)


PHI = {
    "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
    "num_experts_per_tok": 2, "num_local_experts": 16, "router_jitter_noise": 0.01, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = (
    Family("PhiForCausalLM", "Phi-1, Phi-1.5, Phi-2", PHI, phi, model_types=("phi",)),
    Family("Phi3ForCausalLM", "Phi-3, Phi-3.5, Phi-4, Phi-4-mini", DEFAULTS, phi3, model_types=("phi3",)),
    Family("PhimoeForCausalLM", "Phi-3.5-MoE", MOE, phimoe, model_types=("phimoe",)),
    Family("PhiMoEForCausalLM", "Phi-3.5-MoE", MOE, phimoe),
)
