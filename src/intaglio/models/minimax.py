"""MiniMax-M2: one norm over the whole width of q and of k, half of each head turned, sigmoid routing with a bias."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, Layer, sizes, sparse
from intaglio.models.family import Family
from intaglio.models.mixture import NUMBERED, Mixture
from intaglio.models.rope import parameters, table

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 196608, "rope_theta": 5000000.0,
    "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 256, "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}  # fmt: skip


def minimax_m2(c: Config, context: int) -> Decoder:
    s, rope = sizes(c), parameters(c)
    turned = c.get("rotary_dim")  # released configs give the width; transformers reads the share of the head
    if turned and "partial_rotary_factor" not in c.get("rope_parameters", {}):
        rope["partial_rotary_factor"] = int(turned) / s["head_dim"]
    s["ropes"] = {"rope": table(c, rope, s["head_dim"], context, partial=True)}
    s["layers"] = (Layer(),) * c.whole("num_hidden_layers")
    m = Mixture(
        count=c.whole("num_local_experts"), top=c.whole("num_experts_per_tok"), width=s["intermediate"],
        block="block_sparse_moe", sources=NUMBERED, correction="e_score_correction_bias",
        route={"score": "sigmoid", "normalise": True},
    )  # fmt: skip
    return sparse(Decoder(**s, norms=PRE, qk_norm="flat", mixture=m))


FAMILIES = (Family("MiniMaxM2ForCausalLM", "MiniMax-M2, M2.1", DEFAULTS, minimax_m2),)
