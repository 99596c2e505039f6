"""MiMo-V2-Flash: windowed layers with sinks and twice the K/V heads, values narrower than keys, experts as GLM-4.5."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import NAMED, PRE, Decoder, Layer, Mixture, sizes, sparse, window
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "vocab_size": 152576,
    "head_dim": 192, "v_head_dim": 128, "num_attention_heads": 64, "num_key_value_heads": 4, "sliding_window": 129,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "attention_value_scale": 0.707, "intermediate_size": 16384, "tie_word_embeddings": False,
}  # fmt: skip
ROPE = {"rope_type": "default", "partial_rotary_factor": 0.334}
ROPES = {"full_attention": {**ROPE, "rope_theta": 5e6}, "sliding_attention": {**ROPE, "rope_theta": 1e4}}


def mimo(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of MiMo-V2-Flash for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    n = c.whole("num_hidden_layers")
    if c.get("rope_parameters") is None:
        c.table["rope_parameters"] = ROPES
    if c.get("layer_types") is None:
        every = range(n)
        kinds = ["full_attention" if i == 0 or not (i + 1) % 6 else "sliding_attention" for i in every]
        c.table["layer_types"] = kinds
    if c.get("sliding_window_size"):
        c.table["sliding_window"] = c.whole("sliding_window_size") + 1
    s, bias = sizes(c), c.flag("attention_bias")
    ropes, layers = {}, []
    for kind in c.layer_types():
        name = "rope.local" if kind == "sliding_attention" else "rope.full"
        if name not in ropes:
            ropes[name] = table(c, parameters(c, kind), s["head_dim"], context, partial=True)
        local = kind == "sliding_attention"
        layers.append(Layer(name, window(c, kind), kv_heads=s["kv_heads"] * (1 + local), sinks=local))
    groups = int(c.get("n_group", 1))
    route = {"groups": groups, "kept_groups": c.whole("topk_group"), "group_best": 2} if groups > 1 else {}
    m = Mixture(
        count=c.whole("n_routed_experts"), top=c.whole("num_experts_per_tok"), width=c.whole("moe_intermediate_size"),
        sources=NAMED, correction="gate.e_score_correction_bias",
        route={"score": "sigmoid", "normalise": c.flag("norm_topk_prob"), "scale": c.real("routed_scaling_factor", 1.0),
               **route},
    )  # fmt: skip
    mlps = c.get("mlp_layer_types") or ["dense"] + ["sparse"] * (n - 1)
    d = Decoder(
        **s, ropes=ropes, layers=tuple(layers), norms=PRE, sinks=True, value_dim=c.whole("v_head_dim"),
        value_scale=float(c.get("attention_value_scale", 1.0)), qkv_bias=bias, mixture=m,
        sources={"self_attn.sinks": "self_attn.attention_sink_bias"},
    )  # fmt: skip
    return sparse(d, lambda i: mlps[i] == "sparse")


FAMILIES = (
    Family(
        "MiMoV2FlashForCausalLM", "MiMo-V2-Flash", DEFAULTS, mimo, model_types=("mimo_v2_flash",),
        fixed={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}, ignored=("model.mtp.",),
    ),
)  # fmt: skip
