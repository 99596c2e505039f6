"""HunYuan dense and MoE (V1): as Llama, with a norm on each head of q and k after rope.

The MoE adds one shared MLP to the chosen experts. Hy3 norms before rope, and routes experts by sigmoid with a bias.
"""

from __future__ import annotations

from typing import Any

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import NAMED, PRE, Decoder, Layer, Mixture, sizes, sparse
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip
SOURCES = {
    "self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm",
}  # fmt: skip


def common(c: Config, context: int) -> dict[str, Any]:
    """Returns a dict of arguments for Decoder that HunYuan's dense and MoE models share, from config.json.

    Raises PortError for missing or wrong settings. context: the largest number of positions.
    """
    s, rope, bias = sizes(c), parameters(c), c.flag("attention_bias")
    if rope["rope_type"] == "dynamic" and rope.get("alpha") and rope["rope_theta"]:  # a larger base for all lengths
        d = s["head_dim"]
        rope["rope_type"], rope["rope_theta"] = "default", float(rope["rope_theta"]) * rope["alpha"] ** (d / (d - 2))
    s["ropes"] = {"rope": table(c, rope, s["head_dim"], context)}
    s["layers"] = (Layer(),) * c.whole("num_hidden_layers")
    return s | {"norms": PRE, "qk_norm": "late", "qkv_bias": bias, "o_bias": bias, "sources": SOURCES}


def dense(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of HunYuan dense for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    return Decoder(**common(c, context))


def same(c: Config, key: str) -> int:
    """Returns the value of a config key, one integer for all layers.

    The config may have a list instead, with one integer for each layer. Then the list in `c` is replaced by the single
    value. Raises PortError if the values of the list differ.
    """
    value = c.get(key)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise PortError(f"config.json: {key}={value!r} differs between layers; the port takes one value for all")
        c.table[key] = value[0]
    return c.whole(key)


def moe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of HunYuan MoE for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = common(c, context)
    m = Mixture(
        count=same(c, "num_experts"), top=same(c, "num_experts_per_tok"), width=s["intermediate"], sources=NAMED,
        router="gate.wg", route={"normalise": True}, shared=s["intermediate"], shared_source="shared_mlp",
    )  # fmt: skip
    return sparse(Decoder(**s, mixture=m))


def hy_v3(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Hy3 for up to `context` positions, from config.json.

    Each head of q and k is normed before rope. Experts are scored by a sigmoid; a bias per expert is added to the score
    for the choice only. Raises PortError for missing or wrong settings.
    """
    n, bias, width = c.whole("num_hidden_layers"), c.flag("attention_bias"), c.whole("moe_intermediate_size")
    kinds = c.get("mlp_layer_types") or ["dense"] + ["sparse"] * (n - 1)
    s = sizes(c)
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context)}
    s |= {"layers": (Layer(),) * n, "norms": PRE, "qk_norm": "head", "qkv_bias": bias, "o_bias": bias}
    m = Mixture(
        count=c.whole("num_experts"), top=c.whole("num_experts_per_tok"), width=width, sources=NAMED,
        router="router.gate", correction="expert_bias", shared=width * c.whole("num_shared_experts"),
        shared_source="shared_mlp", shared_bias=c.flag("mlp_bias"),
        route={"score": "sigmoid", "normalise": True, "scale": c.real("router_scaling_factor")},
    )  # fmt: skip
    return sparse(Decoder(**s, mixture=m, mlp_bias=c.flag("mlp_bias")), lambda i: kinds[i] == "sparse")


HY3 = {
    **DEFAULTS, "max_position_embeddings": 131072, "rope_theta": 11158840.0, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "num_experts": 192, "num_experts_per_tok": 8, "num_shared_experts": 1,
    "moe_intermediate_size": 1536, "router_scaling_factor": 2.826,
}  # fmt: skip
FAMILIES = (
    Family("HYV3ForCausalLM", "Hy3", HY3, hy_v3, model_types=("hy_v3",)),
    Family(
        "HunYuanDenseV1ForCausalLM", "Hunyuan 0.5B, 1.8B, 4B, 7B", DEFAULTS, dense, model_types=("hunyuan_v1_dense",)
    ),
    Family(
        "HunYuanMoEV1ForCausalLM",
        "Hunyuan-A13B",
        {**DEFAULTS, "num_experts": 1, "num_experts_per_tok": 1},
        moe,
        model_types=("hunyuan_v1_moe",),
        aliases={"num_experts_per_tok": "moe_topk"},
    ),
)
