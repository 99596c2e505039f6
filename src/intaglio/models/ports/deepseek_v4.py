"""DeepSeek-V4: attention to a window and to pooled entries, streams mixed by hyper-connections, experts by token id.

Layers of type sliding_attention attend to a window only. Those of type heavily_compressed_attention also attend to
entries pooled from runs of 128 tokens, those of type compressed_sparse_attention to the entries of runs of 4 that an
indexer chooses. The layers of multi-token prediction (mtp) are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import NUMBERED, Compressed, Decoder, Hyper, Indexer, Layer, Mixture, sizes
from intaglio.models.decoder.rope import Table, table
from intaglio.models.ports.family import Family

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
RATES = {SLIDING: 0, SPARSE: 4, HEAVY: 128}
SCORES = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid"}
DEFAULTS = {
    "vocab_size": 129280, "hidden_size": 4096, "num_hidden_layers": 43,
    "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512, "q_lora_rank": 1024,
    "num_experts_per_tok": 6, "n_shared_experts": 1, "scoring_func": "sqrtsoftplus",
    "routed_scaling_factor": 1.5, "max_position_embeddings": 1048576, "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "swiglu_limit": 10.0,
    "sliding_window": 128, "o_groups": 8, "o_lora_rank": 1024, "index_n_heads": 64, "index_head_dim": 128,
    "index_topk": 512, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def deepseek_v4(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of DeepSeek-V4 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings, and for settings that are not ported.
    """
    c.refuse("attention_bias", "mlp_bias", why="the port's projections have no bias")
    width = c.whole(c.either("moe_intermediate_size", "intermediate_size"), 2048)  # two names of one key
    c.table["intermediate_size"] = width
    s, limit = sizes(c), c.real("swiglu_limit")
    groups, heads, window = c.whole("o_groups"), s["heads"], c.whole("sliding_window")
    if s["kv_heads"] != 1 or heads % groups:
        raise PortError(
            f"config.json: num_key_value_heads={s['kv_heads']} and o_groups={groups} for {heads} heads; wanted 1 and "
            "a divisor of the heads"
        )
    if (score := c.get("scoring_func")) not in SCORES:
        raise PortError(f"config.json: scoring_func={score!r} is not ported; known are {', '.join(SCORES)}")
    if c.get("norm_topk_prob") is False:
        raise PortError("config.json: norm_topk_prob=False; DeepSeek-V4 divides the weights by their sum, always")
    kinds, mlps, rates = layer_types(c), mlp_types(c), compress_rates(c)
    ropes = {"main": rope(c, "main", context), "compress": rope(c, "compress", context)}
    layers = tuple(
        Layer(
            "main" if kind == SLIDING else "compress", window, sparse=True, pooled=rates[kind], indexed=kind == SPARSE,
            hashed=mlp == "hash_moe",
        )
        for kind, mlp in zip(kinds, mlps, strict=True)
    )  # fmt: skip
    index = None
    if SPARSE in kinds:
        top = min(c.whole("index_topk"), max(1, context // rates[SPARSE]))
        index = Indexer(c.whole("index_n_heads"), c.whole("index_head_dim"), top, "interleaved")
        if index.head_dim < 2 * len(ropes["compress"].frequencies):
            raise PortError(
                f"config.json: index_head_dim={index.head_dim}; wanted at least the "
                f"{2 * len(ropes['compress'].frequencies)} columns that rope turns"
            )
    mixture = Mixture(
        count=c.whole(c.either("n_routed_experts", "num_local_experts"), 256), top=c.whole("num_experts_per_tok"),
        width=width, sources=NUMBERED, block="ffn", correction="gate.bias", table="gate.tid2eid", shared=width,
        route={"score": SCORES[score], "normalise": True, "scale": c.real("routed_scaling_factor")},
        glu={"limit": limit, "alpha": 1.0, "shift": 0.0},
    )  # fmt: skip
    return Decoder(
        **s, ropes={name: t for name, t in ropes.items() if name in {layer.rope for layer in layers}}, layers=layers,
        norms={"attn.norm": "attn_norm", "mlp.norm": "ffn_norm"}, mixture=mixture, glu_limit=limit, head="head",
        compressed=Compressed(c.whole("q_lora_rank"), groups, c.whole("o_lora_rank"), index),
        hyper=Hyper(c.whole("hc_mult"), c.whole("hc_sinkhorn_iters"), c.real("hc_eps")),
        sources={f"shared_experts.{ours}_proj": f"shared_experts.{theirs}"
                 for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))},
    )  # fmt: skip


def layer_types(c: Config) -> list[str]:
    """Returns a list with the attention type of each layer of DeepSeek-V4, from config.json.

    They are the value of the config's key layer_types. Older files have the key compress_ratios instead, with a number
    for each layer. If the config has neither key, the first two layers are heavily compressed, and in the other layers
    the two types of compression alternate. Raises PortError for an unknown type or number, and for a list whose length
    is not num_hidden_layers.
    """
    n, ratios = c.whole("num_hidden_layers"), c.get("compress_ratios")
    usual = [HEAVY] * min(n, 2) + [SPARSE if i % 2 else HEAVY for i in range(n - 2)]
    if ratios is not None and c.get("layer_types") is None:
        known = {rate: kind for kind, rate in RATES.items()}
        if not isinstance(ratios, list | tuple) or any(type(x) is not int or x not in known for x in ratios):
            raise PortError(
                f"config.json: compress_ratios={ratios!r}; wanted a list of 0, 4 and 128, one for each layer"
            )
        usual = [known[ratio] for ratio in ratios][:n]  # those that follow are of layers of multi-token prediction
        c.check_length("compress_ratios", usual)
    return c.layer_types(usual=usual, known=tuple(RATES))


def mlp_types(c: Config) -> list[str]:
    """Returns a list with the MLP type of each layer: "hash_moe" or "moe".

    - hash_moe: a token's id chooses its experts.
    - moe: scores choose the experts.

    The config's key mlp_layer_types has this list. Older files have num_hash_layers, 3 by default: the number of first
    layers with "hash_moe". Raises PortError for another type, and for a list whose length is not num_hidden_layers.
    """
    c.mlp_types = ("hash_moe", "moe")
    n, hashed, kinds = c.whole("num_hidden_layers"), c.get("num_hash_layers", 3), c.get("mlp_layer_types")
    if kinds is None:
        kinds = ["hash_moe"] * min(n, hashed) + ["moe"] * (n - min(n, hashed))
    return list(kinds)


def compress_rates(c: Config) -> dict[str, int]:
    """Returns {attention type: the number of consecutive tokens that are compressed to one entry}.

    The type sliding_attention compresses nothing and has the number 0. The other numbers are from the key
    compress_rates, or from compress_rate_csa and compress_rate_hca. Raises PortError if one of them is below 2.
    """
    given = c.settings("compress_rates")
    rates = {kind: given.get(kind, RATES[kind]) for kind in (SPARSE, HEAVY)}
    for kind, key in ((SPARSE, "compress_rate_csa"), (HEAVY, "compress_rate_hca")):
        rates[kind] = rates[kind] if c.get(key) is None else c.get(key)
    if any(type(rate) is not int or rate < 2 for rate in rates.values()):
        raise PortError(f"config.json: compress_rates={rates!r}; wanted runs of 2 tokens or more")
    return {SLIDING: 0, **rates}


def rope(c: Config, which: str, context: int) -> Table:
    """Returns one of the two rope tables of DeepSeek-V4, from config.json.

    Layers with only a sliding window use the table "main". All other layers, and the compressed entries, use
    "compress". The last columns of a head are rotated: a fraction partial_rotary_factor of the columns, or
    qk_rope_head_dim columns in older files. Only "compress" is scaled to longer contexts; cos and sin get a factor only
    if the config gives one.

    Args:
        c: the config.
        which: "main" or "compress".
        context: the largest number of positions.

    Raises PortError for settings that are missing or wrong.
    """
    head_dim, given = c.whole("head_dim"), c.settings("rope_parameters")
    nested = isinstance(given.get("main"), Mapping) and isinstance(given.get("compress"), Mapping)
    if nested:
        p = c.settings("rope_parameters", which)
    else:
        p = (c.settings("rope_scaling") or given) if which == "compress" else c.settings("rope_parameters", "none")
    bases = {name: c.real(key) for name, key in (("main", "rope_theta"), ("compress", "compress_rope_theta"))}
    part, columns = c.get("partial_rotary_factor"), c.whole("qk_rope_head_dim", max(2, head_dim // 8))
    if part is None:
        part = columns / head_dim
    if not nested:
        p["rope_theta"], p["partial_rotary_factor"] = bases[which], part
    p.setdefault("partial_rotary_factor", 1.0)
    p.setdefault("rope_type", p.get("type", "default"))
    if p["rope_type"] == "yarn" and not nested:
        p.setdefault("attention_factor", 1.0)
    p.setdefault("original_max_position_embeddings", c.whole("max_position_embeddings"))
    return table(c, p, head_dim, context, style="interleaved", partial=True)


def released_names(d: Decoder, shapes: Mapping[str, tuple[int, ...]]) -> Decoder:
    """Returns the Decoder with the tensor names that a checkpoint has outside the layers.

    The embedding, the output head and the weights that join the residual streams have two possible names each. For
    example, the embedding is embed.weight in released checkpoints, and embed_tokens.weight in checkpoints saved by
    transformers. If all names in `d` are the checkpoint's, the result is `d` itself, otherwise a changed copy.

    d: the Decoder (model description). shapes: {name of a tensor in the checkpoint: its shape}.
    """
    assert d.hyper
    if f"{d.prefix}hc_head.hc_fn" in shapes:
        d = replace(d, hyper=replace(d.hyper, head="hc_head.hc"))
    if f"{d.prefix}embed.weight" in shapes:
        d = replace(d, table=d.prefix + "embed")
    return d if "head.weight" in shapes else replace(d, head="lm_head")


FAMILIES = (
    Family(
        "DeepseekV4ForCausalLM",
        "DeepSeek-V4 Flash, Pro",
        DEFAULTS,
        deepseek_v4,
        prefixes=("model.", ""),
        ignored=("mtp.", "model.mtp."),
        model_types=("deepseek_v4",),
        fixed={"n_shared_experts": (1,)},
        adapt=released_names,
    ),
)
