"""LFM2, LFM2-MoE and LFM3 (Liquid AI): gated short convolutions, and attention with norms on heads in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from intaglio.models.config import Config
from intaglio.models.decoder import NUMBERED, ConvMixer, Decoder, Layer, Mixture, sizes, sparse, window
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

NORMS = {"attn.norm": "operator_norm", "mlp.norm": "ffn_norm"}
SOURCES = {
    "self_attn.q_norm": "self_attn.q_layernorm", "self_attn.k_norm": "self_attn.k_layernorm",
    "self_attn.o_proj": "self_attn.out_proj", "feed_forward.gate_proj": "feed_forward.w1",
    "feed_forward.up_proj": "feed_forward.w3", "feed_forward.down_proj": "feed_forward.w2",
}  # fmt: skip


SANDWICHED = {"attn.post_norm": "post_operator_norm", "mlp.post_norm": "post_ffn_norm"}
MLP = {name: own for name, own in SOURCES.items() if name.startswith("feed_forward")}


def kinds(c: Config) -> list[str]:
    """Returns a list with the type of each layer, "conv" (short convolution) or "full_attention".

    Raises PortError for another type, or if the config's list of types does not have num_hidden_layers items.
    """
    n, full = c.whole("num_hidden_layers"), c.get("full_attn_idxs")
    usual = ["full_attention" if full is None or i in full else "conv" for i in range(n)]
    return c.layer_types(usual=usual, known=("conv", "full_attention"))


def lfm2(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of LFM2 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    if c.get("tie_embedding") is not None:
        c.table["tie_word_embeddings"] = c.flag("tie_embedding")
    c.table["hidden_act"] = "silu"
    s = sizes(c, eps="norm_eps")
    if c.flag("block_auto_adjust_ff_dim"):
        of, unit = int(2 * c.whole("intermediate_size") / 3), c.whole("block_multiple_of")
        if c.get("block_ffn_dim_multiplier") is not None:
            of = -(-int(c.real("block_ffn_dim_multiplier") * of) // unit) * unit
        s["intermediate"] = of
    mixer = ConvMixer(c.whole("conv_L_cache"), c.flag("conv_bias"))
    layers = tuple(Layer(mixer=mixer if kind == "conv" else None) for kind in kinds(c))
    ropes = {"rope": table(c, parameters(c), s["head_dim"], context)}
    return Decoder(
        **s, layers=layers, ropes=ropes, norms=NORMS, qk_norm="head", block="feed_forward", final_norm="embedding_norm",
        sources=SOURCES,
    )  # fmt: skip


def lfm2_moe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of LFM2-MoE for up to `context` positions, from config.json.

    Layers from num_dense_layers on have experts. Raises PortError for missing or wrong settings.
    """
    d = lfm2(c, context)
    m = Mixture(
        count=c.whole("num_experts"), top=c.whole("num_experts_per_tok"), width=c.whole("moe_intermediate_size"),
        sources=NUMBERED, block="feed_forward", correction="expert_bias" if c.flag("use_expert_bias") else "",
        route={
            "score": "sigmoid", "normalise": c.flag("norm_topk_prob"), "scale": c.real("routed_scaling_factor"),
        },
    )  # fmt: skip
    first = c.count("num_dense_layers")
    return sparse(Decoder(**{**vars(d), "mixture": m}), lambda i: i >= first)


def lfm3(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of LFM3 for up to `context` positions, from config.json.

    It is LFM2 with attention windows. If the config asks for them, it also has norms after attention and MLP, and a
    gate for each attention head. Raises PortError for missing or wrong settings.
    """
    c.table["hidden_act"] = "silu"
    s, n = sizes(c, eps="norm_eps"), c.whole("num_hidden_layers")
    by_four = ("sliding_attention", "conv", "full_attention", "conv")
    usual = [by_four[i % 4] if i else "conv" for i in range(n)]
    kinds = c.layer_types(usual=usual, known=("conv", "full_attention", "sliding_attention"))
    names = {"full_attention": "rope.full", "sliding_attention": "rope.local"}
    ropes = {
        name: table(c, parameters(c, kind), s["head_dim"], context) for kind, name in names.items() if kind in kinds
    }
    mixer = ConvMixer(c.whole("conv_L_cache"), c.flag("conv_bias"))
    layers = tuple(Layer(mixer=mixer) if kind == "conv" else Layer(names[kind], window(c, kind)) for kind in kinds)
    bias, post = c.flag("attention_bias"), SANDWICHED if c.flag("use_sandwich_norm") else {}
    return Decoder(
        **s, layers=layers, ropes=ropes, norms={**NORMS, **post}, qk_norm="head", qkv_bias=bias, o_bias=bias,
        block="feed_forward", final_norm="embedding_norm", sources=MLP, attn_gate_by_head=True,
        attn_gate="gate_proj" if c.flag("use_attention_gate") else "",
    )  # fmt: skip


def adapt(d: Decoder, shapes: Mapping[str, tuple[int, ...]]) -> Decoder:
    """Returns a copy of the Decoder `d` with the name g_proj for the attention gate, if the checkpoint uses this name.

    Returns `d` itself if the checkpoint uses another name, or if the model has no attention gate.

    d: the Decoder (model description) from the config. shapes: {name of a tensor in the checkpoint: its shape}.
    """
    named = any(name.endswith(".self_attn.g_proj.weight") for name in shapes)
    return replace(d, attn_gate="g_proj") if d.attn_gate and named else d


ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
}
LFM3 = {
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 7680,
    "max_position_embeddings": 128000, "norm_eps": 1e-5, "tie_word_embeddings": True, "conv_L_cache": 7,
    "sliding_window": 256, "use_sandwich_norm": True, "use_attention_gate": True, "rope_parameters": ROPES,
}  # fmt: skip
DEFAULTS = {
    "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 128000,
    "norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 1000000.0, "conv_L_cache": 3,
    "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
}  # fmt: skip
MOE = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 128000, "norm_eps": 1e-5,
    "tie_word_embeddings": True, "rope_theta": 1000000.0, "conv_L_cache": 3, "intermediate_size": 7168,
    "moe_intermediate_size": 1792, "num_dense_layers": 2, "num_experts_per_tok": 4, "num_experts": 32,
    "use_expert_bias": True, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
}  # fmt: skip
TOPS = ("embed_tokens", "embedding_norm", "layers.0.operator_norm")
FAMILIES = (
    Family(
        "Lfm2ForCausalLM", "LFM2 350M to 2.6B", DEFAULTS, lfm2, model_types=("lfm2",),
        tops=TOPS,
    ),
    Family(
        "Lfm3ForCausalLM", "LFM3-1.7B", LFM3, lfm3, model_types=("lfm3",), tops=TOPS, adapt=adapt,
    ),
    Family(
        "Lfm2MoeForCausalLM", "LFM2-8B-A1B, LFM2-24B-A2B", MOE, lfm2_moe, model_types=("lfm2_moe",), tops=TOPS,
    ),
)  # fmt: skip
