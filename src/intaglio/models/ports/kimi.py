"""Kimi Linear and Ling 3: Kimi delta attention, and latent attention in some layers; routed experts.

Kimi delta attention is a gated delta net with a decay of each key column. Kimi Linear's latent attention has no rope,
Ling 3's has rope and a gate of each head. (Kimi-K2 is a DeepSeek-V3.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import NUMBERED, PRE, Decoder, DeltaMixer, Layer, Mixture, sizes
from intaglio.models.ports.deepseek import experts, latent, latent_sizes
from intaglio.models.ports.family import Family

KINDS = ("linear_attention", "full_attention")


def kimi_linear(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Kimi Linear, from config.json.

    It has no rope, so `context` changes nothing. Raises PortError for missing or wrong settings.
    """
    c.need_silu("gated delta nets are ported with silu")
    c.table |= {"head_dim": None, "num_key_value_heads": None}  # heads have no separate keys
    c.replaced |= dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters"), "the model has no rope")
    s, dense = sizes(c), int(c.get("first_k_dense_replace", 1))
    net = c.settings("linear_attn_config")
    heads, dim = net.get("num_heads") or c.whole("linear_num_heads"), net.get("head_dim") or c.whole("linear_head_dim")
    taps = net.get("short_conv_kernel_size") or c.whole("linear_conv_kernel_dim")
    mixer = DeltaMixer(
        key_heads=heads, heads=heads, keys=dim, values=dim, taps=taps, eps=s["eps"], stored="separate", gate="sigmoid",
        by_key=True, rank=dim, block="self_attn",
    )  # fmt: skip
    layers, m = hybrid(c, Layer(""), mixer, kinds(net, c.whole("num_hidden_layers")), dense), latent_sizes(c)
    return Decoder(
        **s | {"scale": (m.nope + m.rope) ** -0.5}, layers=layers, ropes={}, norms=PRE, latent=m,
        o_bias=c.flag("attention_bias"), mixture=replace(routed(c), sources=NUMBERED, block="block_sparse_moe"),
    )  # fmt: skip


def bailing_hybrid(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Ling 3 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    c.need_silu("gated delta nets are ported with silu")
    n, dense, every = c.whole("num_hidden_layers"), c.count("first_k_dense_replace"), c.whole("layer_group_size")
    dim = c.whole("linear_head_dim", c.whole("head_dim"))
    heads = c.whole("linear_num_heads", c.whole("num_attention_heads"))
    taps = c.whole("linear_conv_kernel_dim", c.whole("short_conv_kernel_size"))
    safe, least = c.flag("kda_safe_gate"), c.get("kda_lower_bound")
    floor = least if safe else 0.0
    if not isinstance(floor, int | float) or floor > 0:
        raise PortError(f"config.json: kda_lower_bound={floor!r}; wanted a number of 0 or less")
    if c.get("rope_parameters") is not None:
        c.replaced["rope_theta"] = "rope_parameters takes its place"
    s = latent(c, context, "interleaved")
    mixer = DeltaMixer(
        key_heads=heads, heads=heads, keys=dim, values=dim, taps=taps, eps=s["eps"], stored="separate", gate="sigmoid",
        by_key=True, floor=float(floor), block="self_attn",
    )  # fmt: skip
    usual = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(n)]
    layers = hybrid(c, Layer(), mixer, usual, dense)
    return Decoder(
        **s | {"layers": layers}, mixture=replace(routed(c), correction="gate.expert_bias"), attn_gate="g_proj",
        attn_gate_by_head=True, sources=LING_NAMES,
    )  # fmt: skip


def hybrid(c: Config, layer: Layer, mixer: DeltaMixer, usual: Sequence[str], dense: int) -> tuple[Layer, ...]:
    """Returns a tuple with the Layer (description) of each layer of a model with Kimi delta attention.

    Args:
        c: the config. Its layer_types and mlp_layer_types say what each layer has.
        layer: a layer with latent attention and a dense MLP; the others are made from it.
        mixer: the block that layers of type linear_attention have in place of attention.
        usual: the attention type of each layer, for a config without layer_types.
        dense: number of first layers with a dense MLP, for a config without mlp_layer_types. Later layers have experts.

    Raises PortError for wrong types of layers.
    """
    mlps = c.get("mlp_layer_types") or ["dense" if i < dense else "sparse" for i in range(len(usual))]
    return tuple(
        replace(layer, mixer=mixer if kind == "linear_attention" else None, sparse=mlp == "sparse")
        for kind, mlp in zip(c.layer_types(usual=usual, known=KINDS), mlps, strict=True)
    )


def routed(c: Config) -> Mixture:
    """Returns the Mixture (description of the experts) of Kimi Linear and Ling 3, from config.json.

    Their tensors have the names of DeepSeek-V3's tensors. Raises PortError for missing or wrong settings.
    """
    c.table["n_routed_experts"] = c.whole(c.either("num_experts", "num_local_experts"))
    return experts(c, score="sigmoid", group_best=2, normalise=c.flag("norm_topk_prob"))


def kinds(net: Mapping[str, object], n: int) -> list[str]:
    """Returns a list with the attention type of each layer: "full_attention" or "linear_attention".

    full_attn_layers and kda_layers of `net` list the layers of the two types, by numbers that count from 1. If either
    list is missing, layers 5, 9, 13 and so on have full attention and all others have linear attention, as in
    transformers. Raises PortError if the lists do not name each layer once.

    net: the table linear_attn_config of config.json. n: number of layers.
    """
    full, linear = net.get("full_attn_layers"), net.get("kda_layers")
    if not isinstance(full, list) or not isinstance(linear, list):
        return ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(n)]
    if sorted([*full, *linear], key=str) != sorted(range(1, n + 1), key=str):
        raise PortError(
            f"config.json: linear_attn_config.full_attn_layers={full} and kda_layers={linear}; wanted each of the "
            f"layers 1 to {n} in one of them"
        )
    return ["full_attention" if i + 1 in full else "linear_attention" for i in range(n)]


def adapt(d: Decoder, shapes: Mapping[str, tuple[int, ...]]) -> Decoder:
    """Returns the Decoder `d`, or a copy in which the module of dense MLPs is named block_sparse_moe.

    In files saved by transformers 5.24, this module has the same name as the experts' module. The result is the copy if
    the checkpoint has a tensor of that name in a dense layer.

    d: the Decoder (model description) from the config. shapes: {name of a tensor in the checkpoint: its shape}.
    """
    dense = next((i for i, layer in enumerate(d.layers) if not layer.sparse), None)
    saved = f"{d.prefix}layers.{dense}.block_sparse_moe.gate_proj.weight" in shapes
    return replace(d, block="block_sparse_moe") if saved else d


COMMON = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 1048576, "tie_word_embeddings": False,
    "num_attention_heads": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_local_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 1024,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "norm_topk_prob": True,
}  # fmt: skip
KIMI = {**COMMON, "linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4}
LING = {  # head_dim, num_attention_heads and short_conv_kernel_size say the sizes of the delta nets
    **COMMON, "rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "rope_theta": 6000000.0,
    "num_local_experts": 512, "moe_intermediate_size": 768, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "head_dim": 128, "short_conv_kernel_size": 4, "layer_group_size": 6, "kda_safe_gate": True, "kda_lower_bound": -5.0,
    "first_k_dense_replace": 2,
}  # fmt: skip
LING_NAMES = {"embed_tokens": "word_embeddings", "self_attn.o_proj": "attention.dense", "self_attn": "attention"}
ALIASES = {
    "max_position_embeddings": "model_max_length", "norm_topk_prob": "moe_renormalize", "n_group": "num_expert_group",
    "num_experts_per_tok": "num_experts_per_token", "n_shared_experts": "num_shared_experts",
}  # fmt: skip
FAMILIES = (
    Family(
        "KimiLinearForCausalLM", "Kimi-Linear-48B-A3B", KIMI, kimi_linear, model_types=("kimi_linear",),
        fixed={
            "moe_router_activation_func": ("sigmoid",), "mla_use_nope": (True,), "moe_layer_freq": (1,),
            "use_grouped_topk": (True, False), "pretraining_tp": (1,),
        },
        aliases=ALIASES, adapt=adapt,
    ),
    Family(
        "BailingHybridForCausalLM", "Ling 3.0 Flash", LING, bailing_hybrid, model_types=("bailing_hybrid",),
        fixed={"pretraining_tp": (1,)}, aliases=ALIASES, tops=("word_embeddings", "norm", "layers.0.input_layernorm"),
    ),
)  # fmt: skip
