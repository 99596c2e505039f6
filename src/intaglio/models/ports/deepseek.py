"""DeepSeek-V2, V3 and V3.2, Kimi-K2, which is a V3, and GLM-5: latent attention, dense layers, then routed experts.

V2 routes by softmax, V3 by sigmoid with a bias that only affects the choice; both may restrict the choice to the best
groups of experts. In V3.2 and GLM-5 an indexer chooses the positions that a query attends to. MiniCPM3
and Youtu-LLM have the latent attention without experts; A.X K1 is a V3 with one more norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import NAMED, PRE, Decoder, Indexer, Latent, Layer, Mixture, sizes, sparse
from intaglio.models.decoder.rope import mscale, parameters, table
from intaglio.models.ports.family import Family

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
    """Returns a dict of arguments for Decoder, for latent attention: sizes, rope table and attention scale.

    With yarn, the attention scale is multiplied by the square of mscale. The keys num_key_value_heads and head_dim of
    `c` are set to None, since latent attention has no separate K/V heads.

    Args:
        c: the config.
        context: context length in tokens.
        style: how rope pairs columns, "half" or "interleaved".

    Raises PortError for missing or wrong settings.
    """
    c.table |= {"head_dim": None, "num_key_value_heads": None}  # heads have no separate keys
    s, rope = sizes(c), parameters(c)
    m = latent_sizes(c)
    scale = (m.nope + m.rope) ** -0.5
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
        if not rope.get("factor"):
            raise PortError(f"config.json: rope factor={rope.get('factor')!r}; with mscale_all_dim, wanted above 0")
        scale *= mscale(float(rope["factor"]), rope["mscale_all_dim"]) ** 2
    return s | {
        "ropes": {"rope": table(c, rope, m.rope, context, style=style)}, "norms": PRE, "latent": m, "scale": scale,
        "o_bias": c.flag("attention_bias"), "layers": (Layer(),) * c.whole("num_hidden_layers"),
    }  # fmt: skip


def latent_sizes(c: Config) -> Latent:
    """Returns the sizes of latent attention as a Latent: ranks of the query and K/V latents, and widths of a head.

    They are read from config.json. Without the key q_lora_rank, the rank of queries is 0. Raises PortError if another
    size is missing or wrong.
    """
    ranks = int(c.get("q_lora_rank", 0)), c.whole("kv_lora_rank")
    return Latent(*ranks, c.whole("qk_nope_head_dim"), c.whole("qk_rope_head_dim"), c.whole("v_head_dim"))


def experts(c: Config, **route: Any) -> Mixture:
    """Returns the Mixture (description of the experts) of DeepSeek-V2 and V3, from config.json.

    All shared experts together are described as one wide MLP. Raises PortError for missing or wrong settings.

    c: the config. route: attributes of the op Route, which chooses experts.
    """
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
    """Returns the Decoder (model description) of DeepSeek-V2 for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("norm_topk_prob", why="transformers' DeepSeek-V2 does not divide the weights by their sum")
    c.refuse("mlp_bias", why="the port's MLPs have no bias")
    if (method := c.get("topk_method")) not in (known := (None, "greedy", "group_limited_greedy")):
        raise PortError(f"config.json: topk_method={method!r} is not ported; known are {', '.join(known[1:])}")
    if method == "greedy":
        c.table["n_group"] = None
    d = Decoder(**latent(c, context, "interleaved"), mixture=experts(c))
    return sparse(d, lambda i: i >= int(c.get("first_k_dense_replace", 0)))


def deepseek_v3(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of DeepSeek-V3 and Kimi-K2, from config.json.

    Raises PortError for missing or wrong settings. context: the largest number of positions.
    """
    style = "interleaved" if c.flag("rope_interleave") else "half"
    m = experts(c, score="sigmoid", group_best=2, normalise=c.flag("norm_topk_prob"))
    return sparse(
        Decoder(**latent(c, context, style), mixture=m), lambda i: i >= int(c.get("first_k_dense_replace", 0))
    )


def indexed(c: Config, context: int, style: str, shared: Sequence[bool]) -> Decoder:
    """Returns the Decoder (model description) of a DeepSeek-V3 with sparse attention, from config.json.

    An indexer chooses the positions that each token attends to.

    Args:
        c: the config.
        context: the largest number of positions.
        style: how the indexer's rope pairs columns, "half" or "interleaved".
        shared: for each layer, True if the layer uses the indexer of an earlier layer. The first must be False.

    Raises PortError for settings that are not ported.
    """
    c.whole("q_lora_rank")  # the indexer reads the queries of this rank
    d, n = deepseek_v3(c, context), c.whole("num_hidden_layers")
    if unknown := {*(c.get("layer_types") or ())} - {"indexed_attention"}:
        raise PortError(f"config.json: layer_types {sorted(unknown)} are not ported: known is indexed_attention")
    dense = min(n, int(c.get("first_k_dense_replace", 0)))
    kinds = c.get("mlp_layer_types") or ["dense"] * dense + ["sparse"] * (n - dense)
    if len(shared) != n or len(kinds) != n or shared[0]:
        raise PortError(
            f"config.json: the indexer is given for {len(shared)} layers and mlp_layer_types for {len(kinds)} of {n}, "
            "and layer 0 needs an indexer of its own"
        )
    top = min(c.whole("index_topk"), context)
    index = Indexer(c.whole("index_n_heads"), c.whole("index_head_dim"), top, style)
    layers = tuple(
        Layer(sparse=kind == "sparse", shares_index=share) for kind, share in zip(kinds, shared, strict=True)
    )
    assert d.latent
    return replace(d, layers=layers, latent=replace(d.latent, indexer=index))


def deepseek_v32(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of DeepSeek-V3.2 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    return indexed(c, context, "half", [False] * c.whole("num_hidden_layers"))


def glm_dsa(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of GLM-5 for up to `context` positions, from config.json.

    It has the sparse attention of DeepSeek-V3.2, but some layers use the indexer of an earlier layer. Raises PortError
    for settings that are not ported.
    """
    found = c.get("indexer_types") or c.get("index_topk_pattern")
    if found is None:
        every, first = max(int(c.get("index_topk_freq", 1)), 1), int(c.get("index_skip_topk_offset", 2))
        found = ["SF"[max(i - first + 1, 0) % every == 0] for i in range(c.whole("num_hidden_layers"))]
    if unknown := set(found) - {"full", "shared", "F", "S"}:
        raise PortError(f"config.json: indexer types {sorted(unknown)} are not ported: known are full and shared")
    return indexed(c, context, "interleaved", [kind in ("shared", "S") for kind in found])


def youtu(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Youtu-LLM for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    style = "interleaved" if c.flag("rope_interleave") else "half"
    return Decoder(**latent(c, context, style))


def minicpm3(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of MiniCPM3 for up to `context` positions, from config.json.

    It has latent attention. Factors scale the embeddings, the logits, and the results of attention and MLP. Raises
    PortError for missing or wrong settings.
    """
    if c.get("v_head_dim") is None:
        c.table["v_head_dim"] = c.whole("hidden_size") // c.whole("num_attention_heads")
    s = latent(c, context, "half") | {"scale": (c.whole("qk_nope_head_dim") + c.whole("qk_rope_head_dim")) ** -0.5}
    s["mlp_bias"] = c.flag("mlp_bias")
    depth, base = c.get("scale_depth"), c.whole("dim_model_base", s["hidden"])
    return Decoder(
        **s, embed_scale=c.real("scale_emb"), residual_scale=float(depth) / len(s["layers"]) ** 0.5 if depth else 1.0,
        logit_scale=base / s["hidden"],
    )  # fmt: skip


def axk1(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of A.X K1 for up to `context` positions, from config.json.

    It is DeepSeek-V3 with a norm after each mixture of experts. Raises PortError for missing or wrong settings.
    """
    n, first, every = c.whole("num_hidden_layers"), int(c.get("first_k_dense_replace", 1)), c.get("moe_layer_freq", 1)
    kinds = c.get("mlp_layer_types") or ["sparse" if i >= first and i % every == 0 else "dense" for i in range(n)]
    d = deepseek_v3(c, context)
    layers = tuple(
        replace(layer, sparse=kind == "sparse", without=() if kind == "sparse" else ("mlp.post_norm",))
        for layer, kind in zip(d.layers, kinds, strict=True)
    )
    assert d.mixture
    return replace(
        d, layers=layers, norms={**PRE, "mlp.post_norm": "post_mlp_layernorm"},
        mixture=replace(d.mixture, correction_optional=True),
    )  # fmt: skip


MINICPM3 = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "rope_theta": 10000.0,
    "kv_lora_rank": 256, "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "scale_emb": 12,
    "scale_depth": 1.4, "dim_model_base": 256, "num_attention_heads": 40, "hidden_size": 2560,
    "tie_word_embeddings": True,
}  # fmt: skip
V32 = {
    **V3, "max_position_embeddings": 163840, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64,
}  # fmt: skip
GLM_DSA = {
    **V32, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 2048, "qk_nope_head_dim": 192, "v_head_dim": 256, "index_n_heads": 32,
}  # fmt: skip
CHOICE = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)}
YOUTU = {
    **V2, "max_position_embeddings": 131072, "rope_theta": 10000.0, "rope_interleave": True, "tie_word_embeddings": True
}  # fmt: skip
FAMILIES = (
    Family("MiniCPM3ForCausalLM", "MiniCPM3-4B", MINICPM3, minicpm3, model_types=("minicpm3",)),
    Family(
        "AXK1ForCausalLM",
        "A.X K1",
        {**V3, "max_position_embeddings": 32768, "n_routed_experts": 192, "first_k_dense_replace": 1},
        axk1,
        model_types=("axk1",),
        fixed={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc", "none")},
        ignored=("*.post_mlp_layernorm.",),
    ),
    Family("YoutuForCausalLM", "Youtu-LLM-2B", YOUTU, youtu, model_types=("youtu",)),
    Family(
        "DeepseekV2ForCausalLM",
        "DeepSeek-V2, V2-Lite, V2.5",
        V2,
        deepseek_v2,
        model_types=("deepseek_v2",),
        fixed={"scoring_func": ("softmax",), "moe_layer_freq": (1,)},
    ),
    Family(
        "DeepseekV3ForCausalLM",
        "DeepSeek-V3, R1, V3.1, Kimi-K2",
        V3,
        deepseek_v3,
        model_types=("deepseek_v3",),
        fixed={
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
            "moe_layer_freq": (1,),
            "rope_interleave": (True, False),
        },
    ),
    Family("DeepseekV32ForCausalLM", "DeepSeek-V3.2", V32, deepseek_v32, model_types=("deepseek_v32",), fixed=CHOICE),
    Family("GlmMoeDsaForCausalLM", "GLM-5", GLM_DSA, glm_dsa, model_types=("glm_moe_dsa",), fixed=CHOICE),
)
