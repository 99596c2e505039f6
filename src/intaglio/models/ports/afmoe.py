"""AFMoE (Trinity): sandwich norms, gated attention, rope in layers with a window only, experts routed by sigmoid."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import NAMED, Decoder, Layer, Mixture, sizes, sparse, window
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 16384, "rope_theta": 10000.0,
    "num_attention_heads": 16, "head_dim": 128, "moe_intermediate_size": 1408, "num_experts": 64,
    "num_experts_per_tok": 6, "num_shared_experts": 2, "num_dense_layers": 1, "route_scale": 1.0,
    "global_attn_every_n_layers": 4, "sliding_window": 1024, "mup_enabled": False, "tie_word_embeddings": False,
}  # fmt: skip
NORMS = {
    "attn.norm": "input_layernorm", "attn.post_norm": "post_attention_layernorm", "mlp.norm": "pre_mlp_layernorm",
    "mlp.post_norm": "post_mlp_layernorm",
}  # fmt: skip


def afmoe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of AFMoE for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s, bias, width = sizes(c), c.flag("attention_bias"), c.whole("moe_intermediate_size")
    kinds = c.layer_types(c.whole("global_attn_every_n_layers"))
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context)}
    s["layers"] = tuple(Layer("rope" if kind == "sliding_attention" else "", window(c, kind)) for kind in kinds)
    s |= {"qk_norm": "head", "qkv_bias": bias, "o_bias": bias, "attn_gate": "gate_proj"}
    if c.flag("mup_enabled"):
        s["embed_scale"] = s["hidden"] ** 0.5
    m = Mixture(
        count=c.whole("num_experts"), top=c.whole("num_experts_per_tok"), width=width, sources=NAMED,
        router="router.gate", correction="expert_bias", shared=width * int(c.get("num_shared_experts", 0)),
        route={"score": "sigmoid", "normalise": True, "scale": c.real("route_scale")},
    )  # fmt: skip
    return sparse(Decoder(**s, norms=NORMS, mixture=m), lambda i: i >= int(c.get("num_dense_layers", 0)))


FAMILIES = (
    Family(
        "AfmoeForCausalLM", "Trinity Nano, Mini, Large", DEFAULTS, afmoe, model_types=("afmoe",),
        fixed={"score_func": ("sigmoid",), "route_norm": (True,), "n_group": (1,), "topk_group": (1,)},
    ),
)  # fmt: skip
