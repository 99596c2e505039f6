"""GLM-4 (norms before and after each branch, half of each head turned in neighbouring pairs) and GLM-4.5 (experts
routed as in DeepSeek-V3, half of each head turned by halves, norms before the branches only)."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import GLM, PRE, Decoder, Layer, sizes, sparse
from intaglio.models.deepseek import experts
from intaglio.models.family import Family
from intaglio.models.rope import parameters, table

DEFAULTS = {
    "hidden_act": "silu", "max_position_embeddings": 131072, "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
}  # fmt: skip
GLM4 = {
    **DEFAULTS, "rms_norm_eps": 1.5625e-7, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True,
}  # fmt: skip
GLM4_MOE = {
    **DEFAULTS, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "moe_intermediate_size": 1408, "n_routed_experts": 128,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0, "norm_topk_prob": True,
}  # fmt: skip


def glm4(c: Config, context: int) -> Decoder:
    s = sizes(c)
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context, style="interleaved", partial=True)}
    s["layers"] = (Layer(),) * c.whole("num_hidden_layers")
    return Decoder(**s, norms=GLM, qkv_bias=c.flag("attention_bias"), fused=("gate_up_proj",))


def glm4_moe(c: Config, context: int) -> Decoder:
    s = sizes(c)
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context, partial=True)}
    s["layers"] = (Layer(),) * c.whole("num_hidden_layers")
    s |= {"qk_norm": "head" if c.flag("use_qk_norm") else "", "qkv_bias": c.flag("attention_bias")}
    m = experts(c, score="sigmoid", group_best=2, normalise=c.flag("norm_topk_prob"))
    return sparse(Decoder(**s, norms=PRE, mixture=m), lambda i: i >= int(c.get("first_k_dense_replace", 0)))


FAMILIES = (
    Family("Glm4ForCausalLM", "GLM-4-0414 9B, 32B", GLM4, glm4),
    Family("Glm4MoeForCausalLM", "GLM-4.5, GLM-4.5-Air, GLM-4.6", GLM4_MOE, glm4_moe),
)
