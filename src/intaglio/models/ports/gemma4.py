"""Gemma 4 (text): norms before and after each branch, wider heads in full layers, per-layer embeddings.

E2B and E4B: the last layers read the K/V caches of layers before them. 26B-A4B: experts beside the dense MLP.
"""

from __future__ import annotations

from dataclasses import replace

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import SANDWICH, STACKED, Decoder, Layer, Mixture, sizes, sparse, window
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family
from intaglio.models.ports.gemma3n import cache_owners

DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "head_dim": 256, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 131072, "sliding_window": 512, "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256, "global_head_dim": 512,
    "attention_k_eq_v": False, "tie_word_embeddings": True, "rope_theta": 10000.0, "num_kv_shared_layers": 0,
    "enable_moe_block": False, "use_double_wide_mlp": False,
}  # fmt: skip
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}  # fmt: skip
BESIDE = {
    "mlp.dense_post_norm": "post_feedforward_layernorm_1", "mlp.experts_norm": "pre_feedforward_layernorm_2",
    "mlp.experts_post_norm": "post_feedforward_layernorm_2",
}  # fmt: skip


def gemma4(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Gemma 4 for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    if c.get("use_bidirectional_attention") not in (None, "vision"):  # text is causal there
        c.refuse("use_bidirectional_attention", why="attention is causal here")
    n = c.whole("num_hidden_layers")
    kinds = c.layer_types(6)
    kinds[-1] = "full_attention"  # as transformers forces it
    if c.get("rope_parameters") is None:
        c.table["rope_parameters"] = ROPES
    own = c.get("per_layer_config", {})  # by layer, as transformers 5 writes it
    s, bias, same = sizes(c, act="hidden_activation"), c.flag("attention_bias"), c.flag("attention_k_eq_v")
    ropes, layers, owners = {}, list[Layer](), cache_owners(c, kinds)
    wide = 2 * s["intermediate"] if c.flag("use_double_wide_mlp") else 0  # of the layers that read another one's cache
    for i, (kind, owner) in enumerate(zip(kinds, owners, strict=True)):
        full = kind == "full_attention"
        said = c.settings("per_layer_config", str(i))
        width = int(said.get("head_dim") or (c.whole("global_head_dim") if full and not own else s["head_dim"]))
        heads = said.get("num_key_value_heads") or (c.get("num_global_key_value_heads") if full and same else 0) or 0
        if kind not in ropes:
            ropes[kind] = table(c, parameters(c, kind), width, context)
        layer = Layer(kind, window(c, kind), kv_heads=int(heads), head_dim=width, values_are_keys=full and same)
        if owner is not None:
            read = layers[owner]
            if (read.head_dim, read.kv_heads) != (width, int(heads)):
                raise PortError(
                    f"config.json: layer {i} has head_dim={width}, num_key_value_heads={heads or s['kv_heads']}; "
                    f"wanted {read.head_dim} and {read.kv_heads or s['kv_heads']} as in layer {owner}, whose keys and "
                    "values it reads"
                )
            layer = replace(layer, values_are_keys=False, cache_of=owner, width=wide)
        layers.append(layer)
    per_layer = int(c.get("hidden_size_per_layer_input", 0))
    assert len(layers) == n
    d = Decoder(
        **s | {"scale": 1.0}, ropes=ropes, layers=tuple(layers), norms=SANDWICH, qk_norm="head", value_norm=True,
        qkv_bias=bias, o_bias=bias, root_scaled=True, final_softcap=float(c.get("final_logit_softcapping") or 0),
        per_layer=per_layer, per_layer_rows=c.whole("vocab_size_per_layer_input") if per_layer else 0,
        layer_scalar=True,
    )  # fmt: skip
    return with_experts(c, d) if c.flag("enable_moe_block") else d


def with_experts(c: Config, d: Decoder) -> Decoder:
    """Returns a copy of the Decoder `d` with experts added to each layer, for Gemma 4.

    A Decoder is a model description. The layers keep their dense MLP. Raises PortError for missing or wrong settings of
    the experts in the config `c`.
    """
    m = Mixture(
        count=c.whole("num_experts"), top=c.whole("top_k_experts"), width=c.whole("moe_intermediate_size"),
        sources=STACKED, block="moe", router="router.proj", route={"normalise": True},
        factors="router.per_expert_scale", beside=True, router_scale="router.scale",
    )  # fmt: skip
    sources = {"moe.experts": "experts", "moe.router": "router"}
    return sparse(replace(d, mixture=m, norms={**SANDWICH, **BESIDE}, sources=sources))


UNIFIED = {
    **DEFAULTS, "hidden_size_per_layer_input": 0, "sliding_window": 1024, "max_position_embeddings": 262144,
}  # fmt: skip
WRAPPED: dict[str, tuple[str, ...]] = {
    "prefixes": ("model.language_model.", "language_model.model."),
    "ignored": (
        "model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio.",
        "model.multi_modal_projector.", "model.vision_embedder.", "model.vision_model.",
    ),
}  # fmt: skip
FAMILIES = (
    Family(
        "Gemma4UnifiedForCausalLM", "Gemma 4 12B (text)", UNIFIED, gemma4, model_types=("gemma4_unified_text",)
    ),
    Family(
        "Gemma4UnifiedForConditionalGeneration", "Gemma 4 12B (text; images and sound are not ported)", UNIFIED, gemma4,
        model_types=("gemma4_unified",), prefixes=WRAPPED["prefixes"], ignored=WRAPPED["ignored"],
    ),
    Family(
        "Gemma4ForCausalLM", "Gemma 4 E2B, E4B, 26B-A4B, 31B (text)", DEFAULTS, gemma4, model_types=("gemma4_text",)
    ),
    Family(
        "Gemma4ForConditionalGeneration",
        "Gemma 4 E2B, E4B, 26B-A4B, 31B (text; images and sound are not ported)", DEFAULTS, gemma4,
        model_types=("gemma4",), prefixes=WRAPPED["prefixes"], ignored=WRAPPED["ignored"],
    ),
)  # fmt: skip
