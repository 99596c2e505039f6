"""MiniMax-01: lightning attention, and softmax attention in some layers; residuals are taken after the norms.

MiniMax-M2: q and k normed over their whole width, half of each head rotated, sigmoid routing with a bias.
"""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import NUMBERED, PRE, Decoder, Layer, LightningMixer, Mixture, sizes, sparse
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 196608, "rope_theta": 5000000.0,
    "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 256, "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}  # fmt: skip


def minimax_m2(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of MiniMax-M2 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
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


def minimax(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of MiniMax-01 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s, n = sizes(c), c.whole("num_hidden_layers")
    heads = s["heads"]

    def lightning(i: int) -> LightningMixer:
        """Returns the LightningMixer (description of lightning attention) of layer `i`.

        The log decay of each head is its negative ALiBi slope times a factor that falls with the number of the layer.
        """
        factor = 1 - i / (n - 1 + 1e-5) + 1e-5
        rates = tuple(-(2 ** (-8 * (h + 1) / heads)) * factor for h in range(heads))
        return LightningMixer(heads=heads, head_dim=s["head_dim"], rates=rates)

    def mix(kind: str) -> tuple[float, float]:
        """Returns two floats from config.json: (factor on the residual, factor on the result of attention or MLP).

        The scaled residual and the scaled result are added. Raises PortError if one of the two keys is missing.

        kind: linear_attn, full_attn or mlp, the beginning of the keys.
        """
        return c.real(f"{kind}_alpha_factor"), c.real(f"{kind}_beta_factor")

    known = ("linear_attention", "full_attention")
    listed = [known[k] for k in c.get("attn_type_list", ())]
    kinds = c.layer_types(usual=listed or [known[(i + 1) % 2] for i in range(n)], known=known)
    window = int(c.get("sliding_window", 0))
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context)}
    s["layers"] = tuple(
        Layer(mixer=lightning(i), mix=mix("linear_attn")) if kind == "linear_attention"
        else Layer(window=window, mix=mix("full_attn"))
        for i, kind in enumerate(kinds)
    )  # fmt: skip
    m = Mixture(
        count=c.whole("num_local_experts"), top=c.whole("num_experts_per_tok"), width=s["intermediate"],
        block="block_sparse_moe", sources=NUMBERED, route={"normalise": True},
    )  # fmt: skip
    return sparse(Decoder(**s, norms=PRE, mixture=m, mlp_mix=mix("mlp"), normed_residual=True))


MINIMAX = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "tie_word_embeddings": False, "intermediate_size": 14336,
    **{f"{kind}_{which}_factor": 1.0 for kind in ("full_attn", "linear_attn", "mlp") for which in ("alpha", "beta")},
}  # fmt: skip
FAMILIES = (
    Family("MiniMaxForCausalLM", "MiniMax-Text-01, MiniMax-M1", MINIMAX, minimax, model_types=("minimax",)),
    Family(
        "MiniMaxM2ForCausalLM",
        "MiniMax-M2, M2.1",
        DEFAULTS,
        minimax_m2,
        model_types=("minimax_m2",),
        fixed={
            "scoring_func": ("sigmoid",),
            "use_routing_bias": (True,),
            "use_qk_norm": (True,),
            "qk_norm_type": ("per_layer",),
        },
    ),
)
