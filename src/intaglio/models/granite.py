"""Granite 3: as Llama, with multipliers on embeddings, attention scores, residual branches and logits; dense, or with
experts weighted by a softmax over the chosen."""

from __future__ import annotations

from dataclasses import replace

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, alike, sizes, sparse
from intaglio.models.family import Family
from intaglio.models.mixture import Mixture

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0,
    "tie_word_embeddings": False,
}  # fmt: skip


STACKS = ("input_linear.weight|r0:{i}/{2i}", "input_linear.weight|r{i}:{2i}/{2i}", "output_linear.weight")


def granite(c: Config, context: int) -> Decoder:
    s, bias = sizes(c), c.flag("attention_bias")
    s["scale"] = c.real("attention_multiplier")
    s |= {"embed_scale": c.real("embedding_multiplier"), "residual_scale": c.real("residual_multiplier")}
    s |= {"logit_scale": 1 / c.real("logits_scaling"), "mlp_bias": c.flag("mlp_bias")}
    return Decoder(**s, **alike(c, s, context), norms=PRE, qkv_bias=bias, o_bias=bias)


def granitemoe(c: Config, context: int) -> Decoder:
    m = Mixture(
        count=c.whole("num_local_experts"), top=c.whole("num_experts_per_tok"), width=c.whole("intermediate_size"),
        block="block_sparse_moe", router="router.layer", sources=STACKS, route={"score": "chosen"},
    )  # fmt: skip
    return sparse(replace(granite(c, context), mixture=m))


MOE = {**DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2}
FAMILIES = (
    Family("GraniteForCausalLM", "Granite 3.0, 3.1, 3.2, 3.3 dense", DEFAULTS, granite),
    Family("GraniteMoeForCausalLM", "Granite 3.0, 3.1 1B-A400M, 3B-A800M", MOE, granitemoe),
)
