"""gpt-oss: sliding window in every other layer, attention sinks, biases everywhere, experts with a clamped gate."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, Mixture, sizes, sparse, uniform_layers
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 150000.0,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
    "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
    "attention_bias": True, "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
# gate and up alternate, column by column
SOURCES = ("experts.gate_up_proj|T|r0:1/2", "experts.gate_up_proj|T|r1:2/2", "experts.down_proj|T")
BIASES = ("experts.gate_up_proj_bias|c0:1/2", "experts.gate_up_proj_bias|c1:2/2", "experts.down_proj_bias")


def gpt_oss(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of gpt-oss for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    c.table["layer_types"] = c.layer_types(every=2)
    s, bias = sizes(c), c.flag("attention_bias")
    c.need_silu("gpt-oss has silu, and transformers no other")
    m = Mixture(
        count=c.whole("num_local_experts"), top=c.whole("num_experts_per_tok"), width=s["intermediate"],
        router="router", router_bias=True, sources=SOURCES, biases=BIASES, route={"score": "chosen"},
        glu={"alpha": c.real("swiglu_alpha"), "limit": c.real("swiglu_limit"), "shift": 1.0},
    )  # fmt: skip
    d = Decoder(**s, **uniform_layers(c, s, context), norms=PRE, qkv_bias=bias, o_bias=bias, sinks=True, mixture=m)
    return sparse(d)


FAMILIES = (Family("GptOssForCausalLM", "gpt-oss-20b, gpt-oss-120b", DEFAULTS, gpt_oss, model_types=("gpt_oss",)),)
