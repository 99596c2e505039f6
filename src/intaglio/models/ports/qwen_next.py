"""Qwen3-Next and Qwen3.5 (text): gated delta nets, and attention with a gated result in each fourth layer."""

from __future__ import annotations

from typing import Any

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import NAMED, PRE, Decoder, DeltaMixer, Layer, Mixture, sizes, sparse
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family
from intaglio.models.ports.qwen import place_experts
from intaglio.program.source import parts_of


def delta_heads(c: Config, usual: int | None = None) -> tuple[int, int]:
    """Returns (number of key heads, number of value heads) of a gated delta net, from config.json.

    Raises PortError if the number of value heads is not a multiple of the number of key heads.

    c: the config. usual: number used for a key that the config does not have; None: both keys are required.
    """
    keys, values = c.whole("linear_num_key_heads", usual), c.whole("linear_num_value_heads", usual)
    if values % keys:
        raise PortError(f"config.json: linear_num_value_heads={values} is not a multiple of {keys} key heads")
    return keys, values


def mixer(c: Config, fused: bool) -> DeltaMixer:
    """Returns the DeltaMixer (description of the gated delta net) of Qwen3-Next and Qwen3.5, from config.json.

    Args:
        c: the config.
        fused: True if the checkpoint has the weights in_proj_qkvz and in_proj_ba (Qwen3-Next); False if it has
            in_proj_qkv, in_proj_z, in_proj_b and in_proj_a (Qwen3.5).

    Raises PortError if the number of value heads is not a multiple of the number of key heads.
    """
    keys, values = delta_heads(c)
    return DeltaMixer(
        key_heads=keys, heads=values, keys=c.whole("linear_key_head_dim"), values=c.whole("linear_value_head_dim"),
        taps=c.whole("linear_conv_kernel_dim"), eps=c.real("rms_norm_eps"), stored="fused" if fused else "parts",
    )  # fmt: skip


def describe(c: Config, context: int, fused: bool, **more: Any) -> Decoder:
    """Returns the Decoder (model description) of Qwen3-Next or Qwen3.5, from config.json.

    Args:
        c: the config.
        context: the largest number of positions.
        fused: True if the checkpoint has the weights in_proj_qkvz and in_proj_ba (Qwen3-Next); False if it has
            in_proj_qkv, in_proj_z, in_proj_b and in_proj_a (Qwen3.5).
        more: further arguments of Decoder. Without `mixture` the model has no experts.

    Raises PortError for settings that are not ported.
    """
    c.need_silu("gated delta nets are ported with silu")
    c.refuse("attention_bias", why="gated attention is ported without biases")
    s, net = sizes(c), mixer(c, fused)
    every, n = int(c.get("full_attention_interval", 4)), c.whole("num_hidden_layers")
    usual = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(n)]
    kinds = c.layer_types(usual=usual, known=("linear_attention", "full_attention"))
    layers = tuple(Layer(mixer=net if kind == "linear_attention" else None) for kind in kinds)
    dim = s["head_dim"]
    queries, gate = parts_of("self_attn.q_proj.weight", (dim, dim))
    sources = {"self_attn.gate.weight": gate, "self_attn.q_proj.weight": queries}
    return Decoder(
        **s, layers=layers, ropes={"rope": table(c, parameters(c), dim, context, partial=True)}, norms=PRE,
        norm_offset=1.0, qk_norm="head", attn_gate="gate", sources=sources, **more,
    )  # fmt: skip


def experts(c: Config) -> Mixture:
    """Returns the Mixture (description of the experts) of Qwen3-Next and Qwen3.5, from config.json.

    It has a shared expert with a gate. Raises PortError for missing or wrong settings.
    """
    return Mixture(
        count=c.whole(c.either("num_local_experts", "num_experts")), top=c.whole("num_experts_per_tok"),
        width=c.whole("moe_intermediate_size"), sources=NAMED,
        route={"normalise": c.get("norm_topk_prob") is not False},
        shared=c.whole("shared_expert_intermediate_size"), shared_source="shared_expert",
        shared_gate="shared_expert_gate",
    )  # fmt: skip


def qwen3_next(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Qwen3-Next for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    fused = not c.flag("separate_projections")  # as the reader of GGUF files has them
    return place_experts(c, describe(c, context, fused=fused, mixture=experts(c)))


def qwen3_5(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Qwen3.5 dense for up to `context` positions, from config.json.

    Only text is ported, for which rope has one position per token. Raises PortError for missing or wrong settings.
    """
    return describe(c, context, fused=False)


def qwen3_5_moe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Qwen3.5 with experts for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    c.table.setdefault("intermediate_size", c.whole("moe_intermediate_size"))  # no layer is dense
    return sparse(describe(c, context, fused=False, mixture=experts(c)))


LINEAR = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
    "head_dim": 256, "num_attention_heads": 16, "tie_word_embeddings": False, "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
}  # fmt: skip
NEXT = {
    **LINEAR, "num_key_value_heads": 2, "decoder_sparse_step": 1, "moe_intermediate_size": 512,
    "intermediate_size": 5632, "shared_expert_intermediate_size": 512, "num_experts_per_tok": 10, "num_experts": 512,
    "norm_topk_prob": True,
}  # fmt: skip
DENSE = {**LINEAR, "num_key_value_heads": 4}
MOE = {
    **LINEAR, "num_key_value_heads": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8, "num_experts": 256,
}  # fmt: skip
TEXT: dict[str, Any] = {"prefixes": ("model.language_model.", "model."), "ignored": ("model.visual.", "mtp.")}
FAMILIES = (
    Family(
        "Qwen3NextForCausalLM", "Qwen3-Next-80B-A3B", NEXT, qwen3_next, model_types=("qwen3_next",), ignored=("mtp.",)
    ),
    Family("Qwen3_5ForCausalLM", "Qwen3.5 dense (text)", DENSE, qwen3_5, model_types=("qwen3_5_text",), **TEXT),
    Family(
        "Qwen3_5ForConditionalGeneration", "Qwen3.5 dense (text)", DENSE, qwen3_5, model_types=("qwen3_5",), **TEXT
    ),
    Family(
        "Qwen3_5MoeForCausalLM", "Qwen3.5 with experts (text)", MOE, qwen3_5_moe, model_types=("qwen3_5_moe_text",),
        **TEXT,
    ),
    Family(
        "Qwen3_5MoeForConditionalGeneration", "Qwen3.5 with experts (text)", MOE, qwen3_5_moe,
        model_types=("qwen3_5_moe",), **TEXT,
    ),
)  # fmt: skip
