"""EXAONE 4 and K-EXAONE. EXAONE 4: norms on the outputs of attention and MLP, and on each head of q and k.

Three layers of four have a sliding window; the full layers of such a model have no rope. K-EXAONE has the same
attention, norms before attention and MLP, and experts routed as in DeepSeek-V3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from intaglio.models.config import Config
from intaglio.models.decoder import POST, PRE, Decoder, Layer, sizes, sparse, window
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.deepseek import experts
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {
    **DEFAULTS, "first_k_dense_replace": 1, "moe_intermediate_size": 1024, "n_routed_experts": 64,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip


def common(c: Config, context: int) -> dict[str, Any]:
    """Returns a dict of arguments for Decoder that EXAONE 4 and K-EXAONE share, from config.json.

    Raises PortError for missing or wrong settings. context: the largest number of positions.
    """
    s = sizes(c)
    slides = bool(c.get("sliding_window"))
    kinds = c.layer_types(c.whole("sliding_window_pattern") if slides else 0)
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context)}
    s["layers"] = tuple(Layer("rope" if k == "sliding_attention" or not slides else "", window(c, k)) for k in kinds)
    return s | {"qk_norm": "head"}


def exaone4(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of EXAONE 4 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    return Decoder(**common(c, context), norms=POST)


def exaone_moe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of K-EXAONE for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    kinds, n = c.get("mlp_layer_types"), c.whole("num_hidden_layers")
    first = int(c.get("first_k_dense_replace", 0))
    kinds = kinds or ["dense" if i < first else "sparse" for i in range(n)]
    m = experts(c, score="sigmoid", group_best=2, normalise=c.flag("norm_topk_prob"))
    m = replace(m, correction="e_score_correction_bias")
    return sparse(Decoder(**common(c, context), norms=PRE, mixture=m), lambda i: kinds[i] == "sparse")


FAMILIES = (
    Family("Exaone4ForCausalLM", "EXAONE 4.0 1.2B, 32B", DEFAULTS, exaone4, model_types=("exaone4",)),
    Family(
        "ExaoneMoeForCausalLM",
        "K-EXAONE-236B-A23B",
        MOE,
        exaone_moe,
        model_types=("exaone_moe",),
        aliases={"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"},
    ),
)
