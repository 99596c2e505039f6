"""Hybrids of state-space blocks and attention: Bamba, Granite 4, Falcon-H1, Jamba and Nemotron-H."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import NAMED, PRE, UNGATED, Decoder, Layer, Mixture, ScanMixer, SsmMixer, sizes, sparse
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family
from intaglio.models.ports.granite import STACKS
from intaglio.models.ports.mamba import check_groups, limits, rank_of
from intaglio.program.source import parts_of

SILU = "Mamba blocks are ported with silu"
NORMS = {"attn.norm": "input_layernorm", "mlp.norm": "pre_ff_layernorm"}
KINDS = {
    "mamba": "linear_attention", "linear_attention": "linear_attention", "attention": "full_attention",
    "full_attention": "full_attention", "mlp": "mlp", "moe": "moe",
}  # fmt: skip


def kinds(c: Config, found: Sequence[str]) -> list[str]:
    """Returns a list with the type of each layer, one of the values of KINDS.

    Older names of the types are replaced by these. Raises PortError for an unknown type, or if `found` does not have
    num_hidden_layers items.

    c: the config. found: the types that the config lists, which may have older names.
    """
    n = c.whole("num_hidden_layers", len(found))
    if len(found) != n or (unknown := {*found} - KINDS.keys()):
        what = f"{len(found)} layers, num_hidden_layers={n}" if len(found) != n else f"{sorted(unknown)}"
        raise PortError(f"config.json: the types of layers are not ported: {what}; known are {', '.join(KINDS)}")
    return [KINDS[kind] for kind in found]


def ssm(c: Config, inner: int, **more: Any) -> SsmMixer:
    """Returns the SsmMixer (description of the Mamba-2 block) of Bamba, Granite 4 and Falcon-H1, from config.json.

    Args:
        c: the config.
        inner: inner width of the block: all heads' columns together.
        more: arguments of SsmMixer that override the values from the config.

    Raises PortError in three cases: the heads do not add up to `inner` columns; the number of heads is not a multiple
    of the number of groups; or the activation is not silu.
    """
    c.need_silu(SILU)
    heads = c.whole("mamba_n_heads")
    if inner % heads or c.get("mamba_d_head") not in (None, "auto", inner // heads):
        raise PortError(
            f"config.json: mamba_n_heads={heads} of mamba_d_head={c.get('mamba_d_head')} are not {inner} columns"
        )
    check_groups(c, "mamba_n_heads", "mamba_n_groups")
    own = {
        "heads": heads, "head_dim": inner // heads, "groups": c.whole("mamba_n_groups"),
        "state": c.whole("mamba_d_state"), "taps": c.whole("mamba_d_conv"), "eps": c.real("rms_norm_eps"),
        "bias": c.flag("mamba_proj_bias"), "out_bias": c.flag("mamba_proj_bias"),
        "conv_bias": c.flag("mamba_conv_bias"), **limits(c),
    }  # fmt: skip
    return SsmMixer(**{**own, **more})


def bamba(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Bamba for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = sizes(c)
    full = c.get("attn_layer_indices") or []
    usual = ["full_attention" if i in full else "linear_attention" for i in range(c.whole("num_hidden_layers"))]
    found = kinds(c, c.get("layers_block_type") or c.get("layer_types") or usual)
    mixer = ssm(c, int(c.real("mamba_expand") * s["hidden"]))
    layers = tuple(Layer(mixer=mixer if kind == "linear_attention" else None) for kind in found)
    bias = c.flag("attention_bias")
    s |= {"qkv_bias": bias, "o_bias": bias, "mlp_bias": c.flag("mlp_bias")}
    ropes = {"rope": table(c, parameters(c), s["head_dim"], context, partial=True)}
    return Decoder(**s, layers=layers, ropes=ropes, norms=NORMS, block="feed_forward", final_norm="final_layernorm")


def granite_hybrid(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Granite 4 for up to `context` positions, from config.json.

    A layer has Mamba-2 or attention, then an MLP. If num_local_experts is above 0, it also has experts, whose result is
    added to the MLP's. Raises PortError for missing or wrong settings.
    """
    width, count = c.whole("shared_intermediate_size"), int(c.get("num_local_experts", 0))
    s = sizes(c)
    s |= {"scale": c.real("attention_multiplier"), "embed_scale": c.real("embedding_multiplier")}
    s |= {"residual_scale": c.real("residual_multiplier"), "logit_scale": 1 / c.real("logits_scaling")}
    found = kinds(c, c.get("layer_types") or c.get("layers_block_type") or ["mamba"] * c.whole("num_hidden_layers"))
    mixer, rope = ssm(c, int(c.real("mamba_expand") * s["hidden"])), c.get("position_embedding_type") == "rope"
    layers = tuple(Layer("rope" if rope else "", mixer=mixer if kind == "linear_attention" else None) for kind in found)
    bias, ropes = c.flag("attention_bias"), {"rope": table(c, parameters(c), s["head_dim"], context)} if rope else {}
    s |= {"qkv_bias": bias, "o_bias": bias, "ropes": ropes}
    gate, up = parts_of("shared_mlp.input_linear.weight", (width, width))
    sources = {
        "shared_mlp.gate_proj.weight": gate, "shared_mlp.up_proj.weight": up,
        "shared_mlp.down_proj": "shared_mlp.output_linear",
    }  # fmt: skip
    if not count:
        s["intermediate"] = width
        return Decoder(**s, layers=layers, norms=PRE, block="shared_mlp", sources=sources)
    beside = {f"{block}.{n}": source for block in ("block_sparse_moe", "mlp") for n, source in sources.items()}
    m = Mixture(
        count=count, top=c.whole("num_experts_per_tok"), width=c.whole("intermediate_size"), block="block_sparse_moe",
        router="router.layer", sources=STACKS, route={"score": "chosen"}, shared=width, shared_source="shared_mlp",
    )  # fmt: skip
    return sparse(Decoder(**s, layers=layers, norms=PRE, mixture=m, sources=beside))


def falcon_h1(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Falcon-H1 for up to `context` positions, from config.json.

    Each layer has attention and Mamba-2 in parallel. Many intermediate results are scaled by constant multipliers.
    Raises PortError for settings that are not ported.
    """
    s = sizes(c)
    c.refuse("attention_bias", why="its projections are scaled, which is not ported with biases")
    inner = c.get("mamba_d_ssm") or int(c.real("mamba_expand") * s["hidden"])
    into, scales = c.real("ssm_in_multiplier"), c.numbers("ssm_multipliers", [1.0] * 5)
    if c.flag("mamba_proj_bias") and into != 1:
        raise PortError("config.json: mamba_proj_bias with ssm_in_multiplier is not ported")
    norm = ("first" if c.flag("mamba_norm_before_gate") else "gated") if c.flag("mamba_rms_norm") else ""
    scales = tuple(x * into for x in scales)
    scales = scales if any(x != 1 for x in scales) else ()
    mixer = ssm(c, inner, norm=norm, out_bias=c.flag("projectors_bias"), scales=scales)
    attn, mlp = c.real("attention_in_multiplier"), c.numbers("mlp_multipliers", [1.0, 1.0])
    s["scale"] *= c.real("key_multiplier") * attn * attn
    s |= {"attn_scale": attn * c.real("attention_out_multiplier"), "mixer_scale": c.real("ssm_out_multiplier")}
    s |= {"gate_scale": mlp[0], "mlp_scale": mlp[1], "mlp_bias": c.flag("mlp_bias")}
    s |= {"embed_scale": c.real("embedding_multiplier"), "logit_scale": c.real("lm_head_multiplier")}
    layers = tuple(Layer(mixer=mixer, beside=True) for _ in range(c.whole("num_hidden_layers")))
    ropes = {"rope": table(c, parameters(c), s["head_dim"], context)}
    return Decoder(**s, layers=layers, ropes=ropes, norms=NORMS, block="feed_forward", final_norm="final_layernorm")


def jamba(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Jamba for up to `context` positions, from config.json.

    Layers have a Mamba block, or attention without rope. Some layers have experts. Raises PortError for missing or
    wrong settings.
    """
    s, n = sizes(c), c.whole("num_hidden_layers")
    c.need_silu(SILU)
    mixer = ScanMixer(
        inner=int(c.real("mamba_expand") * s["hidden"]), state=c.whole("mamba_d_state"),
        rank=rank_of(c, "mamba_dt_rank"), taps=c.whole("mamba_d_conv"), eps=s["eps"],
        weights=True, bias=c.flag("mamba_proj_bias"), conv_bias=c.flag("mamba_conv_bias"), block="mamba",
    )  # fmt: skip
    period, offset = c.whole("attn_layer_period"), int(c.get("attn_layer_offset", 0))
    layers = tuple(Layer("", mixer=None if i % period == offset else mixer) for i in range(n))
    m = Mixture(
        count=c.whole(c.either("num_local_experts", "num_experts")), top=c.whole("num_experts_per_tok"),
        width=s["intermediate"], sources=NAMED, block="feed_forward", router="router", route={"normalise": False},
    )  # fmt: skip
    d = Decoder(
        **s, layers=layers, ropes={}, norms=NORMS, block="feed_forward", final_norm="final_layernorm",
        mixture=m if m.count > 1 else None,
    )  # fmt: skip
    every, first = c.whole("expert_layer_period"), int(c.get("expert_layer_offset", 0))
    return sparse(d, lambda i: i % every == first and m.count > 1)


def nemotron_h(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Nemotron-H for up to `context` positions, from config.json.

    A layer is one of four: a Mamba-2 block, attention without rope, an MLP, or experts. Raises PortError for settings
    that are not ported.
    """
    pattern = c.get("hybrid_override_pattern")
    letters = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    found = c.get("layers_block_type") or c.get("layer_types") or [letters.get(x, x) for x in pattern or "ME*-"]
    c.table["num_hidden_layers"] = len(found)
    c.table["rms_norm_eps"], c.table["hidden_act"] = c.real("layer_norm_epsilon"), c.get("mlp_hidden_act")
    c.named["hidden_act"] = "mlp_hidden_act"
    types = kinds(c, found)
    s = sizes(c)
    c.need_silu(SILU, "mamba_hidden_act")
    heads, dim = c.whole("mamba_num_heads"), c.whole("mamba_head_dim")
    check_groups(c, "mamba_num_heads", "n_groups")
    c.replaced |= {
        "time_step_limit": "transformers limits steps by time_step_min alone",
        "expand": "mamba_num_heads and mamba_head_dim say how wide blocks are",
        "n_shared_experts": "there is one, as wide as moe_shared_expert_intermediate_size",
    }
    mixer = SsmMixer(
        heads=heads, head_dim=dim, groups=c.whole("n_groups"), state=c.whole("ssm_state_size"),
        taps=c.whole("conv_kernel"), eps=s["eps"], bias=c.flag("use_bias"), out_bias=c.flag("use_bias"),
        conv_bias=c.flag("use_conv_bias"), block="mixer",
        low=float(c.get("time_step_min", 0.0)),
    )  # fmt: skip
    layers = tuple(
        Layer(
            "", mixer=mixer if kind == "linear_attention" else None, attention=kind not in ("mlp", "moe"),
            mlp=kind in ("mlp", "moe"), sparse=kind == "moe",
        )
        for kind in types
    )  # fmt: skip
    bias = c.flag("attention_bias")
    s |= {"qkv_bias": bias, "o_bias": bias, "mlp_bias": c.flag("mlp_bias"), "block": "mixer", "gated": False}
    return Decoder(
        **s, layers=layers, ropes={}, norms={"attn.norm": "norm", "mlp.norm": "norm"}, final_norm="norm_f",
        head="lm_head", sources={"self_attn": "mixer", "embed_tokens": "embeddings"},
        mixture=nemotron_experts(c) if "moe" in types else None,
    )  # fmt: skip


def nemotron_experts(c: Config) -> Mixture:
    """Returns the Mixture (description of the experts) of Nemotron-H, from config.json.

    The experts have no gate. There is a shared expert. Raises PortError for missing or wrong settings.
    """
    route = {"score": "sigmoid", "normalise": c.flag("norm_topk_prob"), "scale": c.real("routed_scaling_factor")}
    if (groups := c.whole("n_group")) > 1:
        route |= {"groups": groups, "kept_groups": c.whole("topk_group"), "group_best": 2}
    bias = c.flag("mlp_bias")
    return Mixture(
        count=c.whole("n_routed_experts"), top=c.whole("num_experts_per_tok"),
        width=c.whole("moe_intermediate_size"), sources=UNGATED, block="mixer",
        correction="gate.e_score_correction_bias", route=route, shared=c.whole("moe_shared_expert_intermediate_size"),
        shared_bias=bias, latent=int(c.get("moe_latent_size") or 0), latent_bias=bias,
    )  # fmt: skip


SSM = {
    "mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False, "hidden_act": "silu",
    "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip
BAMBA = {
    **SSM, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_position_embeddings": 262144,
    "intermediate_size": 14336, "partial_rotary_factor": 0.5,
}  # fmt: skip
GRANITE = {
    **SSM, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
    "residual_multiplier": 1.0, "attention_multiplier": 1.0, "num_local_experts": 8, "num_experts_per_tok": 2,
    "shared_intermediate_size": 1024,
}  # fmt: skip
FALCON = {
    **SSM, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_position_embeddings": 8192, "mamba_d_ssm": 1024,
    "mamba_norm_before_gate": True, "lm_head_multiplier": 1.0, "embedding_multiplier": 1.0, "key_multiplier": 1.0,
    "attention_out_multiplier": 1.0, "attention_in_multiplier": 1.0, "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
}  # fmt: skip
JAMBA = {
    "rms_norm_eps": 1e-6, "num_key_value_heads": 8, "max_position_embeddings": 262144, "hidden_act": "silu",
    "num_experts_per_tok": 2, "num_experts": 16, "expert_layer_period": 2, "expert_layer_offset": 1,
    "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_dt_rank": "auto", "mamba_conv_bias": True, "tie_word_embeddings": False,
}  # fmt: skip
NEMOTRON = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096,
    "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "time_step_min": 0.001,
    "ssm_state_size": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8,
    "conv_kernel": 4, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
    "intermediate_size": 21504, "hidden_size": 4096, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688,
    "norm_topk_prob": True, "routed_scaling_factor": 1.0,
}  # fmt: skip
TOPS = ("embed_tokens", "final_layernorm", "layers.0.input_layernorm")
FAMILIES = (
    Family("BambaForCausalLM", "Bamba-9B", BAMBA, bamba, model_types=("bamba",), tops=TOPS),
    Family(
        "GraniteMoeHybridForCausalLM", "Granite 4.0: micro, tiny, small", GRANITE, granite_hybrid,
        model_types=("granitemoehybrid",),
    ),
    Family("FalconH1ForCausalLM", "Falcon-H1 0.5B to 34B", FALCON, falcon_h1, model_types=("falcon_h1",), tops=TOPS),
    Family("JambaForCausalLM", "Jamba 1.5, 1.6, 1.7", JAMBA, jamba, model_types=("jamba",), tops=TOPS),
    Family(
        "NemotronHForCausalLM", "Nemotron-H 8B, 47B, 56B, Nemotron Nano 9B v2, Nemotron 3 Nano, Super", NEMOTRON,
        nemotron_h,
        model_types=("nemotron_h",), prefixes=("model.", "backbone."), tops=("embeddings", "norm_f", "layers.0.norm"),
        aliases={
            "n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv", "use_conv_bias": "mamba_conv_bias",
            "time_step_min": "mamba_dt_min", "n_routed_experts": "num_local_experts",
        },
    ),
)  # fmt: skip
