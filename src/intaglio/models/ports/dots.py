"""dots.llm1: norms on each head of q and k, windows by layer, experts routed as DeepSeek-V3's."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, sizes, sparse, uniform_layers
from intaglio.models.ports.deepseek import experts
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "num_key_value_heads": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "sliding_window": 4096,
    "max_window_layers": 62, "moe_intermediate_size": 1408, "routed_scaling_factor": 1.0, "tie_word_embeddings": False,
}  # fmt: skip


def dots1(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of dots.llm1 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    n, first = c.whole("num_hidden_layers"), c.count("max_window_layers")
    if not c.get("layer_types"):
        slides = bool(c.get("sliding_window"))
        c.table["layer_types"] = ["sliding_attention" if slides and i >= first else "full_attention" for i in range(n)]
    s, bias = sizes(c), c.flag("attention_bias")
    m = experts(c, score="sigmoid", group_best=2, normalise=c.flag("norm_topk_prob"))
    d = Decoder(**s, **uniform_layers(c, s, context), norms=PRE, qk_norm="head", qkv_bias=bias, o_bias=bias, mixture=m)
    return sparse(d, lambda i: i >= int(c.get("first_k_dense_replace", 0)))


FAMILIES = (
    Family(
        "Dots1ForCausalLM", "dots.llm1", DEFAULTS, dots1, model_types=("dots1",),
        fixed={"scoring_func": ("sigmoid", "noaux_tc"), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    ),
)  # fmt: skip
