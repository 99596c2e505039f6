"""ModernBERT as a decoder (Ettin): windows in two of three layers, two rope tables, a dense layer before the head."""

from __future__ import annotations

from intaglio.models.config import Config
from intaglio.models.decoder import Decoder, Layer, sizes
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family
from intaglio.program.source import parts_of

DEFAULTS = {
    "hidden_activation": "gelu", "norm_eps": 1e-5, "max_position_embeddings": 8192, "hidden_size": 768,
    "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12, "vocab_size": 50368,
    "local_attention": 128, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 1e4,
    "classifier_activation": "gelu", "decoder_bias": True, "tie_word_embeddings": True,
}  # fmt: skip


def modernbert(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of ModernBERT, run as a decoder, from config.json.

    The attention window is `sliding_window` tokens. Without this key it is half of `local_attention`, which counts
    tokens on both sides. Raises PortError for settings that are not ported. context: the largest number of positions.
    """
    n, every = c.whole("num_hidden_layers"), c.whole("global_attn_every_n_layers")
    if c.get("layer_types") is None:
        c.table["layer_types"] = ["sliding_attention" if i % every else "full_attention" for i in range(n)]
    c.refuse("classifier_bias", why="the dense layer before the head has no bias here")
    c.table["num_key_value_heads"] = None
    s, kinds = sizes(c, act="hidden_activation", eps="norm_eps"), c.layer_types()
    theta = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
    ropes = {kind: table(c, parameters(c, kind, theta[kind]), s["head_dim"], context) for kind in sorted(set(kinds))}
    half = c.whole("sliding_window", c.whole("local_attention") // 2)
    layers = tuple(
        Layer(kind, half if kind == "sliding_attention" else 0, without=() if i else ("attn.norm",))
        for i, kind in enumerate(kinds)
    )
    bias = c.flag("attention_bias")
    gate, up = parts_of("mlp.Wi.weight", (s["intermediate"], s["intermediate"]))
    sources = {
        "embed_tokens": "embeddings.tok_embeddings", "norm": "final_norm", "self_attn.o_proj": "attn.Wo",
        "self_attn": "attn", "mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj": "mlp.Wo",
        "head_dense": "lm_head.dense", "head_norm": "lm_head.norm", "embed_norm": "embeddings.norm",
    }  # fmt: skip
    c.refuse("mlp_bias", why="the port's MLPs have no bias")
    return Decoder(
        **s, ropes=ropes, layers=layers, norms={"attn.norm": "attn_norm", "mlp.norm": "mlp_norm"}, norm="layer",
        norm_bias=c.flag("norm_bias"), embed_norm="embed_norm", qkv_bias=bias, o_bias=bias, head="decoder",
        head_dense=s["hidden"], head_dense_bias=False, head_activation=c.activation("classifier_activation"),
        head_bias=c.flag("decoder_bias"), sources=sources,
    )  # fmt: skip


FAMILIES = (
    Family(
        "ModernBertDecoderForCausalLM", "Ettin decoders", DEFAULTS, modernbert, model_types=("modernbert-decoder",),
        tops=("embeddings.tok_embeddings",),
    ),
)  # fmt: skip
