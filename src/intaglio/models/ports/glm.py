"""GLM-4 and GLM-4.5.

GLM-4: norms before and after each branch, half of each head rotated by interleaved rope. GLM-4.5: norms before the
branches only, half of each head rotated by rope of style rotate_half, experts routed as in DeepSeek-V3.
GLM-4-9B of 2024 has norms before the branches only. Solar Open has the experts of GLM-4.5, GLM-4.7-Flash also has
latent attention.
"""

from __future__ import annotations

from dataclasses import replace

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import GLM, PRE, Decoder, Layer, sizes, sparse
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.deepseek import experts, latent
from intaglio.models.ports.family import Family

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
    """Returns the Decoder (model description) of GLM-4 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = sizes(c)
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context, style="interleaved", partial=True)}
    s["layers"] = (Layer(),) * c.whole("num_hidden_layers")
    return Decoder(**s, norms=GLM, qkv_bias=c.flag("attention_bias"), fused=("gate_up_proj",))


def glm4_moe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of GLM-4.5 and 4.6 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = sizes(c)
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context, partial=True)}
    s["layers"] = (Layer(),) * c.whole("num_hidden_layers")
    s |= {"qk_norm": "head" if c.flag("use_qk_norm") else "", "qkv_bias": c.flag("attention_bias")}
    m = experts(c, score="sigmoid", group_best=2, normalise=c.flag("norm_topk_prob"))
    return sparse(Decoder(**s, norms=PRE, mixture=m), lambda i: i >= int(c.get("first_k_dense_replace", 0)))


def glm(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of GLM-4-9B of 2024 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    return replace(glm4(c, context), norms=PRE)


def solar_open(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Solar Open for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    c.table["intermediate_size"] = c.whole("moe_intermediate_size")  # no layer is dense
    s, bias = sizes(c), c.flag("attention_bias")
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context, partial=True)}
    s["layers"] = (Layer(),) * c.whole("num_hidden_layers")
    m = experts(c, score="sigmoid", group_best=2, normalise=c.flag("norm_topk_prob"))
    return sparse(Decoder(**s, norms=PRE, qkv_bias=bias, mixture=m))


def glm4_moe_lite(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of GLM-4.7-Flash for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    if (part := parameters(c)["partial_rotary_factor"]) != 1:
        raise PortError(
            f"config.json: partial_rotary_factor={part}; wanted 1, since qk_rope_head_dim is the turned part"
        )
    n = c.whole("num_hidden_layers")
    kinds = c.get("mlp_layer_types") or ["dense"] + ["sparse"] * (n - 1)
    style = "interleaved" if c.flag("rope_interleave") else "half"
    m = experts(c, score="sigmoid", group_best=2, normalise=c.flag("norm_topk_prob"))
    return sparse(Decoder(**latent(c, context, style), mixture=m), lambda i: kinds[i] == "sparse")


SOLAR = {
    **GLM4_MOE, "max_position_embeddings": 131072, "rope_theta": 1000000.0, "partial_rotary_factor": 1.0,
    "moe_intermediate_size": 1280, "head_dim": 128, "num_attention_heads": 64,
}  # fmt: skip
LITE = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 202752, "rope_theta": 10000.0,
    "moe_intermediate_size": 1536, "n_shared_experts": 1, "n_routed_experts": 64, "routed_scaling_factor": 1.8,
    "kv_lora_rank": 512, "q_lora_rank": 768, "qk_rope_head_dim": 64, "v_head_dim": 256, "qk_nope_head_dim": 192,
    "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4, "norm_topk_prob": True, "rope_interleave": True,
    "num_attention_heads": 20, "tie_word_embeddings": False,
}  # fmt: skip
ROUTING = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)}
FAMILIES = (
    Family(
        "GlmForCausalLM", "GLM-4-9B (2024), GLM-Edge", {**GLM4, "rms_norm_eps": 1.5625e-7}, glm, model_types=("glm",)
    ),
    Family("SolarOpenForCausalLM", "Solar-Open-100B", SOLAR, solar_open, model_types=("solar_open",), fixed=ROUTING),
    Family(
        "Glm4MoeLiteForCausalLM", "GLM-4.7-Flash", LITE, glm4_moe_lite, model_types=("glm4_moe_lite",), fixed=ROUTING
    ),
    Family("Glm4ForCausalLM", "GLM-4-0414 9B, 32B", GLM4, glm4, model_types=("glm4",)),
    Family(
        "Glm4MoeForCausalLM",
        "GLM-4.5, GLM-4.5-Air, GLM-4.6",
        GLM4_MOE,
        glm4_moe,
        model_types=("glm4_moe",),
        fixed=ROUTING,
    ),
)
