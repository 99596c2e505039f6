"""OLMo 2 and 3: norms on the branches' outputs only, and one norm over the whole width of q and of k.

OLMo 3 slides three layers in four; its rope scaling holds for the full layers only. OLMoE, from before them, has norms
on the branches' inputs, and eight of 64 experts for each token.
"""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import POST, PRE, Decoder, Layer, alike, sizes, sparse, window
from intaglio.models.family import Family
from intaglio.models.mixture import NAMED, Mixture
from intaglio.models.rope import parameters, table

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def olmo2(c: Config, context: int) -> Decoder:
    s, bias = sizes(c), c.flag("attention_bias")
    return Decoder(**s, **alike(c, s, context), norms=POST, qk_norm="flat", qkv_bias=bias, o_bias=bias)


def olmo3(c: Config, context: int) -> Decoder:
    s, bias = sizes(c), c.flag("attention_bias")
    full, local = parameters(c, "full_attention"), parameters(c, "sliding_attention", scaled=False)
    ropes = {"rope.full": table(c, full, s["head_dim"], context), "rope.local": table(c, local, s["head_dim"], context)}
    layers = tuple(
        Layer("rope.local" if kind == "sliding_attention" else "rope.full", window(c, kind))
        for kind in c.layer_types(every=4)
    )
    return Decoder(**s, layers=layers, ropes=ropes, norms=POST, qk_norm="flat", qkv_bias=bias, o_bias=bias)


def olmoe(c: Config, context: int) -> Decoder:
    c.refuse("clip_qkv", why="clipped queries, keys and values are not ported")
    s, bias = sizes(c), c.flag("attention_bias")
    m = Mixture(
        count=c.whole("num_experts"), top=c.whole("num_experts_per_tok"), width=s["intermediate"], sources=NAMED,
        route={"normalise": c.flag("norm_topk_prob")},
    )  # fmt: skip
    d = Decoder(**s, **alike(c, s, context), norms=PRE, qk_norm="flat", qkv_bias=bias, o_bias=bias, mixture=m)
    return sparse(d)


OLMOE = {**DEFAULTS, "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8}
FAMILIES = (
    Family("OlmoeForCausalLM", "OLMoE-1B-7B", OLMOE, olmoe),
    Family("Olmo2ForCausalLM", "OLMo 2", DEFAULTS, olmo2),
    Family("Olmo3ForCausalLM", "OLMo 3", {**DEFAULTS, "rope_theta": 500000.0, "sliding_window": 4096}, olmo3),
)
