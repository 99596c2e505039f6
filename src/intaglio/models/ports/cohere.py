"""Cohere 2 (Command R7B, Command A): parallel attention and MLP, LayerNorm without bias.

Sliding-window layers have interleaved rope, full layers none. Cohere 1 (Command R, Aya) has interleaved rope and full
attention in every layer. Also here: a mixture of experts of Cohere 2, and the text model of its vision models.
"""

from __future__ import annotations

from dataclasses import replace

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import NAMED, ONE, Decoder, Layer, Mixture, sizes, window
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "layer_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 10000.0,
    "logit_scale": 0.0625, "sliding_window": 4096, "sliding_window_pattern": 4, "tie_word_embeddings": True,
}  # fmt: skip


def cohere2(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Cohere 2 for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("use_qk_norm", why="transformers' Cohere2 has no q and k norms")
    s, bias = sizes(c, eps="layer_norm_eps"), c.flag("attention_bias")
    ropes = {"rope": table(c, parameters(c), s["head_dim"], context, style="interleaved")}
    layers = tuple(
        Layer("rope" if kind == "sliding_attention" else "", window(c, kind))
        for kind in c.layer_types(c.whole("sliding_window_pattern"))
    )
    s |= {"norm": "layer", "norms": ONE, "parallel": True, "logit_scale": c.real("logit_scale")}
    return Decoder(**s, layers=layers, ropes=ropes, qkv_bias=bias, o_bias=bias)


def cohere(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Cohere 1 for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("use_qk_norm", why="a LayerNorm with weights of each head is not ported")
    c.refuse("layer_types", "sliding_window", why="CohereForCausalLM has full attention in every layer")
    c.table["layer_types"] = ["full_attention"] * c.whole("num_hidden_layers")
    d = cohere2(c, context)
    return replace(d, layers=(Layer(),) * len(d.layers))


def cohere2_moe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Cohere 2 with a mixture of experts, from config.json.

    The first layers have a dense MLP, the others have experts. Layers with a window have rope; layers with full
    attention have none. If the config's prefix_dense_sliding_window_pattern is 1, the layers with a dense MLP have rope
    as well. Raises PortError for settings that are not ported. context: the largest number of positions.
    """
    n, dense = c.whole("num_hidden_layers"), int(c.get("first_k_dense_replace", 0))
    prefix, every = c.whole("prefix_dense_sliding_window_pattern"), c.whole("sliding_window_pattern")
    if c.get("layer_types") is None:
        periods = [(i, prefix) for i in range(dense)] + [(i, every) for i in range(n - dense)]
        c.table["layer_types"] = ["sliding_attention" if (i + 1) % p else "full_attention" for i, p in periods]
    mlps = c.get("mlp_layer_types") or ["dense" if i < dense else "sparse" for i in range(n)]
    rms = c.get("rms_norm_eps") is not None
    c.table["norm_eps"] = c.real("rms_norm_eps" if rms else "layer_norm_eps")
    s, bias = sizes(c, eps="norm_eps"), c.flag("attention_bias")
    ropes = {"rope": table(c, parameters(c), s["head_dim"], context, style="interleaved")}
    layers = tuple(
        Layer(
            "rope" if kind == "sliding_attention" or (mlp == "dense" and prefix == 1) else "", window(c, kind),
            sparse=mlp == "sparse", width=c.whole("prefix_dense_intermediate_size") if mlp == "dense" else 0,
        )
        for kind, mlp in zip(c.layer_types(), mlps, strict=True)
    )  # fmt: skip
    chosen, joins = c.get("expert_selection_fn"), {"sum": "a + b", "average": "(a + b) * 0.5"}
    if chosen not in ("softmax", "sigmoid") or c.get("shared_expert_combination_strategy") not in joins:
        raise PortError(
            f"config.json: expert_selection_fn={chosen!r}, shared_expert_combination_strategy="
            f"{c.get('shared_expert_combination_strategy')!r}; wanted softmax or sigmoid, and sum or average"
        )
    sigmoid = {"score": "sigmoid", "normalise": c.flag("norm_topk_prob")}
    m = Mixture(
        count=c.whole("num_experts"), top=c.whole("num_experts_per_tok"), width=s["intermediate"], sources=NAMED,
        shared=s["intermediate"] * int(c.get("num_shared_experts", 0)),
        route=sigmoid if chosen == "sigmoid" else {"score": "chosen"},
        join=joins[c.get("shared_expert_combination_strategy")],
    )  # fmt: skip
    s |= {"norm": "rms" if rms else "layer", "norms": ONE, "parallel": True, "logit_scale": c.real("logit_scale")}
    return Decoder(**s, layers=layers, ropes=ropes, qkv_bias=bias, o_bias=bias, mixture=m)


def compass(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of the text model of Cohere's vision models, from config.json.

    If rope_parameters of an attention type are null, layers of this type have no rope. Raises PortError for missing or
    wrong settings. context: the largest number of positions.
    """
    if c.get("layer_types") is None:
        c.table["layer_types"] = ["full_attention"] * c.whole("num_hidden_layers")
    c.table["head_dim"] = None
    s, bias, given = sizes(c, eps="layer_norm_eps"), c.flag("attention_bias"), c.get("rope_parameters", {})
    ropes, layers = {}, []
    for kind in c.layer_types():
        roped = given.get(kind, given) is not None
        if roped and kind not in ropes:
            ropes[kind] = table(c, parameters(c, kind), s["head_dim"], context)
        layers.append(Layer(kind if roped else "", window(c, kind)))
    s |= {"norm": "layer", "norms": ONE, "parallel": True, "logit_scale": c.real("logit_scale", 1.0)}
    return Decoder(**s, layers=tuple(layers), ropes=ropes, qkv_bias=bias, o_bias=bias)


MOE = {
    **DEFAULTS, "head_dim": 128, "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 0,
    "shared_expert_combination_strategy": "average", "expert_selection_fn": "softmax", "norm_topk_prob": True,
    "prefix_dense_sliding_window_pattern": 1,
}  # fmt: skip
COHERE = {**DEFAULTS, "rope_theta": 500000.0, "sliding_window": None}
FAMILIES = (
    Family("CohereForCausalLM", "Command R, Aya 23, Aya Expanse", COHERE, cohere, model_types=("cohere",)),
    Family("Cohere2MoeForCausalLM", "Command A MoE", MOE, cohere2_moe, model_types=("cohere2_moe",)),
    Family(
        "CohereCompassForCausalLM",
        "North Micro Vision (text)",
        {**DEFAULTS, "logit_scale": None},
        compass,
        model_types=("cohere_compass_text",),
    ),
    Family("Cohere2ForCausalLM", "Command R7B, Command A", DEFAULTS, cohere2, model_types=("cohere2",)),
)
