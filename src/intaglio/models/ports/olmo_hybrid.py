"""OLMo Hybrid: gated delta nets, and attention as in OLMo 3 in each fourth layer, mostly without rope.

Layers with a delta net have norms on the branches' inputs, layers with attention on their outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import Decoder, DeltaMixer, Layer, sizes
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family
from intaglio.models.ports.qwen_next import delta_heads

DELTA = {"attn.norm": "attention_layer_norm", "mlp.norm": "feedforward_layer_norm"}
ATTENTION = {"attn.post_norm": "post_attention_layernorm", "mlp.post_norm": "post_feedforward_layernorm"}


def olmo_hybrid(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of OLMo Hybrid for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    c.need_silu("gated delta nets are ported with silu")
    s, bias, n = sizes(c), c.flag("attention_bias"), c.whole("num_hidden_layers")
    usual = ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(n)]
    if "full_attention" not in usual:
        usual[-1] = "full_attention"
    kinds = c.layer_types(usual=usual, known=("linear_attention", "full_attention"))
    if len({*kinds}) < 2:
        raise PortError(f"config.json: layer_types has {kinds[0]} only; wanted linear_attention and full_attention")
    rope = c.settings("rope_parameters") or c.settings("rope_scaling") or c.table
    rope.get("rope_type")
    turned = rope.get("rope_theta", c.get("rope_theta")) is not None  # released models have no rope: null
    ropes = {"rope": table(c, parameters(c), s["head_dim"], context)} if turned else {}
    attention, net = Layer("rope" if turned else "", without=(*DELTA,)), Layer(mixer=mixer(c), without=(*ATTENTION,))
    layers = tuple(attention if k == "full_attention" else net for k in kinds)
    return Decoder(
        **s, layers=layers, ropes=ropes, norms={**DELTA, **ATTENTION}, qk_norm="flat", qkv_bias=bias, o_bias=bias
    )


def mixer(c: Config) -> DeltaMixer:
    """Returns the DeltaMixer (description of the gated delta net) of OLMo Hybrid, from config.json.

    Raises PortError if the number of value heads is not a multiple of the number of key heads.
    """
    keys, values = delta_heads(c, c.whole("num_attention_heads"))
    width = c.whole("linear_key_head_dim", int(0.75 * c.whole("hidden_size") / keys))
    return DeltaMixer(
        key_heads=keys, heads=values, keys=width, values=c.whole("linear_value_head_dim", 2 * width), stored="separate",
        taps=c.whole("linear_conv_kernel_dim"), eps=1e-5, beta=2.0 if c.flag("linear_allow_neg_eigval") else 1.0,
    )  # fmt: skip


def adapt(d: Decoder, shapes: Mapping[str, tuple[int, ...]]) -> Decoder:
    """Returns a copy of the Decoder that fits this checkpoint's names of norms and shapes of convolutions.

    Files saved by transformers 5.24 differ from others in two ways. The channels of the convolutions of q, k and v are
    stored in three equal parts, whatever their widths are. The norm after attention has another name.

    d: the Decoder (model description) from the config. shapes: {name of a tensor in the checkpoint: its shape}.
    """
    norms, layers = dict(d.norms), list(d.layers)
    net = next(i for i, layer in enumerate(layers) if layer.mixer)
    full = next(i for i, layer in enumerate(layers) if not layer.mixer)
    if f"{d.prefix}layers.{net}.input_layernorm.weight" in shapes:
        norms |= {"attn.norm": "input_layernorm", "mlp.norm": "post_attention_layernorm"}
    if f"{d.prefix}layers.{full}.feedforward_layer_norm.weight" in shapes:
        norms["attn.post_norm"] = "feedforward_layer_norm"
    names = [f"{d.prefix}layers.{net}.linear_attn.{n}_conv1d.weight" for n in "qkv"]
    rows = tuple(shapes[name][0] for name in names if name in shapes)
    for i, layer in enumerate(layers):
        if (m := layer.mixer) and isinstance(m, DeltaMixer):
            own = (m.key_heads * m.keys, m.key_heads * m.keys, m.heads * m.values)
            if len(rows) == 3 and rows != own and sum(rows) == sum(own):
                layers[i] = replace(layer, mixer=replace(m, conv_rows=rows))
    return replace(d, norms=norms, layers=tuple(layers))


DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 65536, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True,
    "num_attention_heads": 30,
}  # fmt: skip
FAMILIES = (
    Family(
        "OlmoHybridForCausalLM", "OLMo Hybrid 7B", DEFAULTS, olmo_hybrid, model_types=("olmo_hybrid",), adapt=adapt
    ),
)  # fmt: skip
