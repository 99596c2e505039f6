"""DeepSeek-V2 and V3, and Kimi-K2, which is a V3: latent attention, dense first layers, then experts with shared ones.

V2 routes by softmax, V3 by sigmoid with a bias that only chooses; both may open only the best groups of experts.
"""

from __future__ import annotations

from typing import Any

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, Layer, sizes, sparse
from intaglio.models.family import Family
from intaglio.models.latent import Latent
from intaglio.models.mixture import NAMED, Mixture
from intaglio.models.rope import mscale, parameters, table

V2 = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, "topk_method": "greedy",
    "routed_scaling_factor": 1.0, "tie_word_embeddings": False,
}  # fmt: skip
V3 = {
    **V2, "max_position_embeddings": 4096, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "first_k_dense_replace": 3, "rope_interleave": True,
}  # fmt: skip
del V3["topk_method"]


def latent(c: Config, context: int, style: str) -> dict[str, Any]:
    """The fields of latent attention: widths, the rope of its narrow part, and the scale, which yarn changes."""
    c.table |= {"head_dim": None, "num_key_value_heads": None}  # heads have no keys of their own
    s, rope = sizes(c), parameters(c)
    ranks = int(c.get("q_lora_rank", 0)), c.whole("kv_lora_rank")
    m = Latent(*ranks, c.whole("qk_nope_head_dim"), c.whole("qk_rope_head_dim"), c.whole("v_head_dim"))
    scale = (m.nope + m.rope) ** -0.5
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
        scale *= mscale(float(rope["factor"]), rope["mscale_all_dim"]) ** 2
    return s | {
        "ropes": {"rope": table(c, rope, m.rope, context, style=style)}, "norms": PRE, "latent": m, "scale": scale,
        "o_bias": c.flag("attention_bias"), "layers": (Layer(),) * c.whole("num_hidden_layers"),
    }  # fmt: skip


def experts(c: Config, **route: Any) -> Mixture:
    """What V2 and V3 share: the shared experts are one wide MLP."""
    width, groups = c.whole("moe_intermediate_size"), int(c.get("n_group", 0))
    if groups > 1:
        route |= {"groups": groups, "kept_groups": c.whole("topk_group")}
    else:
        route.pop("group_best", None)
    return Mixture(
        count=c.whole("n_routed_experts"), top=c.whole("num_experts_per_tok"), width=width, sources=NAMED,
        shared=width * c.whole("n_shared_experts"), route={"scale": c.real("routed_scaling_factor"), **route},
        correction="gate.e_score_correction_bias" if route.get("score") == "sigmoid" else "",
    )  # fmt: skip


def deepseek_v2(c: Config, context: int) -> Decoder:
    c.refuse("norm_topk_prob", why="transformers' DeepSeek-V2 does not divide the weights by their sum")
    c.refuse("mlp_bias", why="the port's MLPs have no bias")
    if c.get("topk_method") == "greedy":
        c.table["n_group"] = None
    d = Decoder(**latent(c, context, "interleaved"), mixture=experts(c))
    return sparse(d, lambda i: i >= int(c.get("first_k_dense_replace", 0)))


def deepseek_v3(c: Config, context: int) -> Decoder:
    style = "interleaved" if c.flag("rope_interleave") else "half"
    m = experts(c, score="sigmoid", group_best=2, normalise=c.flag("norm_topk_prob"))
    return sparse(
        Decoder(**latent(c, context, style), mixture=m), lambda i: i >= int(c.get("first_k_dense_replace", 0))
    )


FAMILIES = (
    Family("DeepseekV2ForCausalLM", "DeepSeek-V2, V2-Lite, V2.5", V2, deepseek_v2),
    Family("DeepseekV3ForCausalLM", "DeepSeek-V3, R1, V3.1, Kimi-K2", V3, deepseek_v3),
)
