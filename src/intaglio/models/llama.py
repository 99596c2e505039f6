"""Llama 2, 3, 3.1, 3.2 and 3.3: pre-norm RMS, half rope (llama3 or linear scaling), SwiGLU, optional biases.

Llama 4 (text): layers with rope see their own chunk only, every fourth has no rope, sees all and heats its scores with
the position; one expert a token, its input weighted by a sigmoid, beside a shared one.
"""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, Layer, alike, sizes, sparse
from intaglio.models.family import Family
from intaglio.models.mixture import TURNED, Mixture
from intaglio.models.rope import parameters, table

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def llama(c: Config, context: int) -> Decoder:
    s, bias = sizes(c), c.flag("attention_bias")
    # transformers' Llama reads no layer_types and no window; a config that has them wants another class
    c.refuse("layer_types", "sliding_window", why="LlamaForCausalLM has full attention in every layer")
    layers = alike(c, s, context)
    return Decoder(**s, **layers, norms=PRE, qkv_bias=bias, o_bias=bias, mlp_bias=c.flag("mlp_bias"))


def llama4(c: Config, context: int) -> Decoder:
    s, bias, n = sizes(c), c.flag("attention_bias"), c.whole("num_hidden_layers")
    width, step, every = s["intermediate"], c.whole("interleave_moe_layer_step"), c.whole("no_rope_layer_interval")
    turned = c.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(n)]
    kinds = c.get("layer_types") or ["chunked_attention" if t else "full_attention" for t in turned]
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
        router="router", sources=TURNED, route={"score": "sigmoid"}, glu={"scale_input": True}, shared=width,
        shared_source="shared_expert",
    )  # fmt: skip
    return sparse(Decoder(**s, norms=PRE, mixture=m), lambda i: i in where)


LLAMA4 = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "intermediate_size_mlp": 16384, "num_key_value_heads": 8, "head_dim": 128, "num_experts_per_tok": 1,
    "num_local_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True, "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
    "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = (
    Family("LlamaForCausalLM", "Llama 2, 3, 3.1, 3.2, 3.3", DEFAULTS, llama),
    Family("Llama4ForCausalLM", "Llama 4 (text)", LLAMA4, llama4),
    Family(
        "Llama4ForConditionalGeneration", "Llama 4 Scout, Maverick (text; the vision tower is not ported)",
        LLAMA4, llama4, prefixes=("language_model.model.",), ignored=("vision_model.", "multi_modal_projector."),
    ),
)  # fmt: skip
