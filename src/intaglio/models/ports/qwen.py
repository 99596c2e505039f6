"""Qwen2 and 2.5 (biases on q, k and v) and Qwen3 (norms on each head of q and k). Windows only where switched on.

Qwen2-MoE adds a gated shared expert to the routed ones; Qwen3-MoE has none. Both may have dense layers between.
Mellum 2 and Flint are Qwen3 with experts and windows, Flint also with attention sinks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from intaglio.models.config import Config
from intaglio.models.decoder import NAMED, PRE, Decoder, Layer, Mixture, sizes, sparse, uniform_layers, window
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 10000.0,
    "sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip


def windowed(c: Config) -> None:
    """Set `layer_types` of the config if it is missing. Changes `c` in place and returns nothing.

    Layers from number max_window_layers on get sliding windows, the others full attention. Without use_sliding_window
    all layers get full attention. Raises PortError for a wrong value.
    """
    n = c.whole("num_hidden_layers")
    first = c.count("max_window_layers") if c.flag("use_sliding_window") else n
    if not c.get("layer_types"):
        c.table["layer_types"] = ["sliding_attention" if i >= first else "full_attention" for i in range(n)]


def qwen2(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Qwen2 and Qwen2.5 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    windowed(c)
    s = sizes(c)
    return Decoder(**s, **uniform_layers(c, s, context), norms=PRE, qkv_bias=True)


def qwen3(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Qwen3 dense for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    windowed(c)
    s, bias = sizes(c), c.flag("attention_bias")
    return Decoder(**s, **uniform_layers(c, s, context), norms=PRE, qk_norm="head", qkv_bias=bias, o_bias=bias)


def mixture(c: Config, **shared: Any) -> Mixture:
    """Returns the Mixture (description of the experts) of Qwen2-MoE and Qwen3-MoE, from config.json.

    Raises PortError for missing or wrong settings.

    c: the config. shared: arguments of Mixture for a shared expert.
    """
    return Mixture(
        count=c.whole(c.either("num_local_experts", "num_experts")),  # transformers writes either name
        top=c.whole("num_experts_per_tok"), width=c.whole("moe_intermediate_size"),
        sources=NAMED, route={"normalise": c.flag("norm_topk_prob")}, **shared,
    )  # fmt: skip


def place_experts(c: Config, d: Decoder) -> Decoder:
    """Returns a copy of the Decoder with experts in every `decoder_sparse_step`-th layer, except mlp_only_layers.

    Raises PortError for missing or wrong settings.

    c: the config, which has both keys. d: the Decoder (model description).
    """
    step, dense = c.whole("decoder_sparse_step"), c.get("mlp_only_layers", [])
    return sparse(d, lambda i: (i + 1) % step == 0 and i not in dense)


def qwen2_moe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Qwen2-MoE for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    windowed(c)
    s = sizes(c)
    m = mixture(
        c, shared=c.whole("shared_expert_intermediate_size"), shared_source="shared_expert",
        shared_gate="shared_expert_gate",
    )  # fmt: skip
    return place_experts(
        c, Decoder(**s, **uniform_layers(c, s, context), norms=PRE, qkv_bias=c.flag("qkv_bias"), mixture=m)
    )


def qwen3_moe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Qwen3-MoE for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("use_sliding_window", why="Qwen3-MoE is ported with full attention")
    c.table["sliding_window"] = None
    s, bias = sizes(c), c.flag("attention_bias")
    d = Decoder(
        **s, **uniform_layers(c, s, context), norms=PRE, qk_norm="head", qkv_bias=bias, o_bias=bias, mixture=mixture(c)
    )  # fmt: skip
    return place_experts(c, d)


QWEN2_MOE = {
    **DEFAULTS, "num_key_value_heads": 16, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True,
}  # fmt: skip
QWEN3_MOE = {
    **DEFAULTS, "num_key_value_heads": 4, "decoder_sparse_step": 1, "moe_intermediate_size": 768,
    "num_experts_per_tok": 8, "num_experts": 128,
}  # fmt: skip


def mellum(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Mellum 2 for up to `context` positions, from config.json.

    Layers with full attention and layers with a sliding window have different rope tables. Raises PortError for missing
    or wrong settings.
    """
    n = c.whole("num_hidden_layers")
    sparse_layers = c.get("mlp_layer_types") or ["sparse"] * n
    s, bias = sizes(c), c.flag("attention_bias")
    kinds = c.layer_types()
    names = {"full_attention": "rope.full", "sliding_attention": "rope.local"}
    ropes = {
        names[kind]: table(c, parameters(c, kind), s["head_dim"], context, partial=True)
        for kind in dict.fromkeys(kinds)
    }
    layers = tuple(Layer(names[kind], window(c, kind)) for kind in kinds)
    s |= {"layers": layers, "ropes": ropes, "qk_norm": "head", "qkv_bias": bias, "o_bias": bias}
    return sparse(Decoder(**s, norms=PRE, mixture=mixture(c)), lambda i: sparse_layers[i] == "sparse")


def flint(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Flint for up to `context` positions, from config.json.

    It has attention sinks. Only layers with a window have rope. Experts are scored by a sigmoid. Raises PortError for
    missing or wrong settings.
    """
    n = c.whole("num_hidden_layers")
    if not c.get("layer_types"):
        full = [i < 2 or i % 4 == 1 or i == n - 1 for i in range(n)]
        c.table["layer_types"] = ["full_attention" if f else "sliding_attention" for f in full]
    s, bias = sizes(c), c.flag("attention_bias")
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context)}
    s["layers"] = tuple(Layer("rope" if k == "sliding_attention" else "", window(c, k)) for k in c.layer_types())
    s |= {"qk_norm": "head", "sinks": True, "qkv_bias": bias, "o_bias": bias}
    m = mixture(c, shared=c.whole("shared_expert_intermediate_size"), shared_source="shared_expert")
    m = replace(m, route={"score": "sigmoid", "normalise": c.flag("norm_topk_prob")})
    return place_experts(c, Decoder(**s, norms=PRE, mixture=m, sources={"self_attn.sinks": "self_attn.softmax_offset"}))


MELLUM = {
    **QWEN3_MOE, "head_dim": 128, "max_position_embeddings": 131072, "sliding_window": 1024, "num_experts": 64,
    "moe_intermediate_size": 896, "norm_topk_prob": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
FLINT = {
    **DEFAULTS, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 262144,
    "sliding_window": 513, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 1024,
    "num_experts_per_tok": 6, "num_experts": 256, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [0, 1],
}  # fmt: skip
FAMILIES = (
    Family("MellumForCausalLM", "Mellum 2 12B-A2.5B", MELLUM, mellum, model_types=("mellum",)),
    Family("FlintForCausalLM", "Flint", FLINT, flint, model_types=("flint",)),
    Family("Qwen2MoeForCausalLM", "Qwen1.5-MoE, Qwen2-57B-A14B", QWEN2_MOE, qwen2_moe, model_types=("qwen2_moe",)),
    Family(
        "Qwen3MoeForCausalLM",
        "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
        QWEN3_MOE,
        qwen3_moe,
        model_types=("qwen3_moe",),
    ),
    Family("Qwen2ForCausalLM", "Qwen2, Qwen2.5", DEFAULTS, qwen2, model_types=("qwen2",)),
    Family(
        "GotOcr2ForConditionalGeneration",
        "GOT-OCR 2 (text; images are not ported)",
        {**DEFAULTS, "tie_word_embeddings": True},
        qwen2,
        model_types=("got_ocr2",),
        prefixes=("model.language_model.", "language_model.model."),
        ignored=("model.vision_tower.", "model.multi_modal_projector.", "vision_tower.", "multi_modal_projector."),
    ),
    Family("Qwen3ForCausalLM", "Qwen3 dense", {**DEFAULTS, "head_dim": 128}, qwen3, model_types=("qwen3",)),
    Family(
        "Qwen3VLForConditionalGeneration",
        "Qwen3-VL dense (text: its rope then has one position per token)",
        {**DEFAULTS, "head_dim": 128, "max_position_embeddings": 128000, "rope_theta": 500000.0},
        qwen3,
        prefixes=("model.language_model.",),
        ignored=("model.visual.",),
        model_types=("qwen3_vl",),
    ),
)
