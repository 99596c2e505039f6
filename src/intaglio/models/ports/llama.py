"""Llama 2, 3, 3.1, 3.2 and 3.3: pre-norm RMS, rotate_half rope (llama3 or linear scaling), SwiGLU, optional biases.

Llama 4 (text): layers with rope attend within their chunk only. Every fourth layer has no rope, attends to all
positions and scales its scores with the position. One routed expert per token, its input weighted by a sigmoid, beside
a shared one. CWM is a Llama with windows in three layers of four. Emu3 and Llama 3.2 Vision are Llamas for text.
DiffLlama has differential attention.
"""

from __future__ import annotations

from dataclasses import replace

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import PRE, TRANSPOSED, Decoder, Layer, Mixture, sizes, sparse, uniform_layers
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import OTHER_PART, Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def llama(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Llama 2 and 3 for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    s, bias = sizes(c), c.flag("attention_bias")
    # transformers' Llama reads no layer_types and no window; a config that has them wants another class
    c.refuse("layer_types", "sliding_window", why="LlamaForCausalLM has full attention in every layer")
    layers = uniform_layers(c, s, context)
    return Decoder(**s, **layers, norms=PRE, qkv_bias=bias, o_bias=bias, mlp_bias=c.flag("mlp_bias"))


def diffllama(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of DiffLlama for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    s, bias = sizes(c), c.flag("attention_bias")
    if s["heads"] % 2 or s["kv_heads"] % 2:
        raise PortError(
            f"config.json: num_attention_heads={s['heads']} and num_key_value_heads={s['kv_heads']}; wanted even "
            "numbers, for differential attention divides the heads into halves"
        )
    layers = uniform_layers(c, s, context)
    return Decoder(**s, **layers, norms=PRE, qkv_bias=bias, o_bias=bias, differential=True)


def llama4(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Llama 4 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s, bias, n = sizes(c), c.flag("attention_bias"), c.whole("num_hidden_layers")
    width, step, every = s["intermediate"], c.whole("interleave_moe_layer_step"), c.whole("no_rope_layer_interval")
    turned = c.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(n)]
    usual = ["chunked_attention" if t else "full_attention" for t in turned]
    kinds = c.layer_types(usual=usual, known=("chunked_attention", "full_attention"))
    where = c.get("moe_layers", list(range(step - 1, n, step)))
    chunk = int(c.get("attention_chunk_size", 0))
    s |= {
        "intermediate": c.whole("intermediate_size_mlp"), "block": "feed_forward", "qkv_bias": bias, "o_bias": bias,
        "ropes": {"rope": table(c, parameters(c), s["head_dim"], context, style="interleaved")},
        "qk_norm": "unit" if c.flag("use_qk_norm") else "",
        "temper": c.real("attn_scale") if c.flag("attn_temperature_tuning") else 0.0,
        "temper_every": int(c.real("floor_scale")),
        "layers": tuple(
            Layer("rope" if t else "", chunk=chunk if kind == "chunked_attention" else 0)
            for t, kind in zip(turned, kinds, strict=True)
        ),
    }  # fmt: skip
    m = Mixture(
        count=c.whole("num_local_experts"), top=c.whole("num_experts_per_tok"), width=width, block="feed_forward",
        router="router", sources=TRANSPOSED, route={"score": "sigmoid"}, glu={"scale_input": True}, shared=width,
        shared_source="shared_expert",
    )  # fmt: skip
    return sparse(Decoder(**s, norms=PRE, mixture=m), lambda i: i in where)


def cwm(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Code World Model for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    n = c.whole("num_hidden_layers")
    if not c.get("layer_types"):
        c.table["layer_types"] = ["sliding_attention" if i % 4 else "full_attention" for i in range(n)]
    s = sizes(c)
    return Decoder(**s, **uniform_layers(c, s, context), norms=PRE, mlp_bias=c.flag("mlp_bias"))


def mllama(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of the text model of Llama 3.2 Vision, from config.json.

    Layers that attend to an image are left out. The checkpoint's embedding has 8 more rows than the vocabulary, for
    image tokens; these rows are not read. Raises PortError for missing or wrong settings. context: the largest number
    of positions.
    """
    crossing, n = c.get("cross_attention_layers", [3, 8, 13, 18, 23, 28, 33, 38]), c.whole("num_hidden_layers")
    kept = [i for i in range(n) if i not in crossing]
    c.ignored |= {f"*layers.{i}.": OTHER_PART for i in crossing}
    s = sizes(c) | {"tied": False}
    d = Decoder(**s, **uniform_layers(c, s, context), norms=PRE)
    rows = s["vocabulary"]
    numbers = {f"layers.{at}": f"layers.{i}" for at, i in reversed(list(enumerate(kept))) if at != i}
    cut = {"embed_tokens.weight": f"embed_tokens.weight|r0:{rows}/{rows + 8}"}
    return replace(d, layers=d.layers[: len(kept)], sources={**numbers, **cut})


MLLAMA = {
    **DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0, "vocab_size": 128256,
    "num_key_value_heads": 8, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40,
    "num_attention_heads": 32,
}  # fmt: skip
CWM = {
    **DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_attention_heads": 48,
    "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 8192, "rope_theta": 1000000.0,
    "rope_parameters": {
        "rope_theta": 1000000.0, "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
LLAMA4 = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "intermediate_size_mlp": 16384, "num_key_value_heads": 8, "head_dim": 128, "num_experts_per_tok": 1,
    "num_local_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True, "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
    "tie_word_embeddings": False,
}  # fmt: skip
EMU3 = {
    **DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 9216, "rope_theta": 1000000.0,
    "num_key_value_heads": 8, "vocab_size": 184622,
}  # fmt: skip
FAMILIES = (
    Family("LlamaForCausalLM", "Llama 2, 3, 3.1, 3.2, 3.3", DEFAULTS, llama, model_types=("llama",)),
    Family(
        "Emu3ForCausalLM", "Emu3 (text; images are tokens here)", EMU3, llama, model_types=("emu3_text_model", "emu3"),
        prefixes=("model.", "model.text_model.", "text_model.model."), ignored=("model.vqmodel.", "vqmodel."),
    ),
    Family(
        "DiffLlamaForCausalLM", "DiffLlama 0.3B", {**DEFAULTS, "rms_norm_eps": 1e-5}, diffllama,
        model_types=("diffllama",),
    ),
    Family("CwmForCausalLM", "Code World Model 32B", CWM, cwm, model_types=("cwm",)),
    Family(
        "MllamaForCausalLM", "Llama 3.2 11B, 90B Vision (text; images are not ported)", MLLAMA, mllama,
        model_types=("mllama_text_model", "mllama"),
        prefixes=("model.", "language_model.model.", "model.language_model."),
        ignored=("vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector."),
    ),
    Family("Llama4ForCausalLM", "Llama 4 (text)", LLAMA4, llama4, model_types=("llama4_text",)),
    Family(
        "Llama4ForConditionalGeneration", "Llama 4 Scout, Maverick (text; the vision tower is not ported)",
        LLAMA4, llama4, prefixes=("language_model.model.",), ignored=("vision_model.", "multi_modal_projector."),
        model_types=("llama4",)),
)  # fmt: skip
