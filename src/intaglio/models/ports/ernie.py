"""ERNIE 4.5: as Llama, with interleaved rope and one switch for all biases.

Dense, or with experts chosen by their softmax plus a bias, beside shared experts.
"""

from __future__ import annotations

from typing import Any

from intaglio.models.config import Config
from intaglio.models.decoder import NAMED, PRE, Decoder, Layer, Mixture, sizes, sparse
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "use_bias": False,
    "tie_word_embeddings": True,
}  # fmt: skip
MOE = {
    **DEFAULTS, "num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": None, "moe_intermediate_size": 1536,
    "num_experts_per_tok": 6, "num_experts": 64, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
    "moe_layer_end_index": -1, "moe_layer_interval": 1,
}  # fmt: skip


def common(c: Config, context: int) -> dict[str, Any]:
    """Returns a dict of arguments for Decoder that ERNIE 4.5's dense and MoE models share, from config.json.

    Raises PortError for settings that are not ported. context: the largest number of positions.
    """
    c.refuse("layer_types", "sliding_window", why="ERNIE 4.5 has full attention in every layer")
    s, bias = sizes(c), c.flag("use_bias")
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context, style="interleaved")}
    s["layers"] = (Layer(),) * c.whole("num_hidden_layers")
    return s | {"norms": PRE, "qkv_bias": bias, "o_bias": bias, "mlp_bias": bias}


def ernie4_5(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of ERNIE 4.5 dense for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    return Decoder(**common(c, context))


def ernie4_5_moe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of ERNIE 4.5 with experts, from config.json.

    Raises PortError for missing or wrong settings. context: the largest number of positions.
    """
    width = c.whole("moe_intermediate_size")
    m = Mixture(
        count=c.whole("num_experts"), top=c.whole("num_experts_per_tok"), width=width, sources=NAMED,
        correction="moe_statics.e_score_correction_bias|v", route={"normalise": True},
        shared=width * int(c.get("moe_num_shared_experts", 0)), shared_bias=c.flag("use_bias"),
    )  # fmt: skip
    n, first, every = (
        c.whole("num_hidden_layers"),
        int(c.get("moe_layer_start_index", 0)),
        c.whole("moe_layer_interval"),
    )
    last = int(c.get("moe_layer_end_index", -1))
    last = n - 1 if last == -1 else last
    d = Decoder(**common(c, context), mixture=m, head_bias=c.flag("use_bias"))
    return sparse(d, lambda i: (i + 1) % every == 0 and first <= i <= last)


FAMILIES = (
    Family("Ernie4_5ForCausalLM", "ERNIE 4.5 0.3B", DEFAULTS, ernie4_5, model_types=("ernie4_5",)),
    Family(
        "Ernie4_5_MoeForCausalLM",
        "ERNIE 4.5 21B-A3B, 300B-A47B",
        MOE,
        ernie4_5_moe,
        model_types=("ernie4_5_moe",),
        fixed={"moe_norm_min": (1e-12,)},
        aliases={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    ),
)
