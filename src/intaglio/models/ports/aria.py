"""Aria (text): a Llama with fine-grained experts, stored as [inputs, outputs], and shared ones."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, Mixture, sizes, sparse, uniform_layers
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
SOURCES = ("experts.fc1.weight|T|r0:{i}/{2i}", "experts.fc1.weight|T|r{i}:{2i}/{2i}", "experts.fc2.weight|T")


def aria_text(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Aria for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    s, bias = sizes(c), c.flag("attention_bias")
    c.need_silu("routed experts take silu alone")
    m = Mixture(
        count=c.whole("moe_num_experts"), top=c.whole("moe_topk"), width=s["intermediate"], router="router",
        sources=SOURCES, route={"score": "chosen"}, shared=s["intermediate"] * c.whole("moe_num_shared_experts"),
        shared_bias=c.flag("mlp_bias"),
    )  # fmt: skip
    return sparse(Decoder(**s, **uniform_layers(c, s, context), norms=PRE, qkv_bias=bias, o_bias=bias, mixture=m))


FAMILIES = (Family("AriaTextForCausalLM", "Aria (text)", DEFAULTS, aria_text, model_types=("aria_text",)),)
