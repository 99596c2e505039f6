"""The first GPT, GPT-2, GPT-BigCode (StarCoder 1), GPT-Neo, GPT-J, CodeGen, GPT-NeoX (Pythia) and its Japanese kin.

LayerNorms with biases and MLPs without a gate. GPT-2, BigCode and Neo add learned positions to the embeddings; GPT-J,
CodeGen and NeoX rotate a part of each head and add attention and MLP to the same residual.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import PRE, Decoder, Layer, sizes
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family
from intaglio.program.source import parts_of

ALIASES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "hidden_act": "activation_function",
}  # fmt: skip
GPT2 = {
    "hidden_act": "gelu_new", "layer_norm_epsilon": 1e-5, "max_position_embeddings": 1024, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "scale_attn_weights": True, "tie_word_embeddings": True,
}  # fmt: skip
GPTJ = {**GPT2, "max_position_embeddings": 2048, "rotary_dim": 64, "rope_theta": 10000.0, "tie_word_embeddings": False}
NEOX = {
    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25, "use_parallel_residual": True, "attention_bias": True, "tie_word_embeddings": False,
}  # fmt: skip
NAMES = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f", "layers": "h"}
NORMS = {"attn.norm": "ln_1", "mlp.norm": "ln_2"}


def split(parts: tuple[tuple[str, int], ...], source: str, transposed: bool = False) -> dict[str, str]:
    """Returns a dict of entries for Decoder.sources: the places of q, k and v in one joined tensor.

    The dict is {weight or bias in Llama's names, such as self_attn.q_proj.weight: text}. The text names the stored
    tensor and its rows to take, in the notation of program/source.py.

    Args:
        parts: (name of the projection, its number of rows), in the order of the tensor's rows. If the tensor has more
            rows, the same order repeats, such as once for each head.
        source: name of the module that holds the joined tensor, without .weight.
        transposed: True if the weight is stored as [columns, rows].
    """
    widths = [width for _, width in parts]
    weights = parts_of(f"{source}.weight{'|T' if transposed else ''}", widths)
    biases = parts_of(f"{source}.bias", widths, "c")
    out: dict[str, str] = {}
    for (name, _), weight, bias in zip(parts, weights, biases, strict=True):
        out |= {f"self_attn.{name}.weight": weight, f"self_attn.{name}.bias": bias}
    return out


def common(c: Config) -> dict[str, Any]:
    """Returns a dict of arguments for Decoder that all models with GPT-2's config keys share.

    Raises PortError for settings that are not ported.
    """
    c.refuse("add_cross_attention", why="a decoder alone attends to no encoder")
    c.table["intermediate_size"] = c.get("n_inner") or 4 * c.whole("hidden_size")
    c.table["num_key_value_heads"] = None
    s = sizes(c, eps="layer_norm_epsilon") | {"norm": "layer", "norm_bias": True, "norms": NORMS, "gated": False}
    return s | {"mlp_bias": True, "head": "lm_head", "layers": (Layer(""),) * c.whole("num_hidden_layers")}


def gpt2(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of GPT-2 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = common(c) | {"ropes": {}, "qkv_bias": True, "o_bias": True}
    if not c.flag("scale_attn_weights"):
        s["scale"] = 1.0
    if c.flag("scale_attn_by_inverse_layer_idx"):
        s["layers"] = tuple(Layer("", scale=1 / (i + 1)) for i in range(c.whole("num_hidden_layers")))
    width = s["hidden"]
    sources = {**NAMES, **split((("q_proj", width), ("k_proj", width), ("v_proj", width)), "attn.c_attn", True)}
    for usual, own in (
        ("self_attn.o_proj", "attn.c_proj"),
        ("mlp.up_proj", "mlp.c_fc"),
        ("mlp.down_proj", "mlp.c_proj"),
    ):
        sources |= {f"{usual}.weight": f"{own}.weight|T", f"{usual}.bias": f"{own}.bias"}  # stored as [inputs, outputs]
    return Decoder(**s, positions=s["context"], sources=sources)


def gpt_bigcode(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of GPT-BigCode for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = common(c) | {"ropes": {}, "qkv_bias": True, "o_bias": True}
    if not c.flag("scale_attn_weights"):
        s["scale"] = 1.0
    each = s["head_dim"]
    if c.flag("multi_query"):
        s["kv_heads"] = 1
        parts = (("q_proj", s["hidden"]), ("k_proj", each), ("v_proj", each))
    else:
        parts = (("q_proj", each), ("k_proj", each), ("v_proj", each))
    sources = {
        **NAMES, **split(parts, "attn.c_attn"), "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    }  # fmt: skip
    return Decoder(**s, positions=s["context"], sources=sources)


def gpt_neo(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of GPT-Neo for up to `context` positions, from config.json.

    By default every second layer has a window. Attention scores are not divided by the root of the head's width. Raises
    PortError for settings that are not ported.
    """
    blocks = c.get("attention_types", [])
    if not all(isinstance(b, list | tuple) and len(b) == 2 and isinstance(b[1], int) for b in blocks):
        raise PortError(f"config.json: attention_types={blocks!r}; wanted a list of [[kind, ...], times]")
    kinds = c.get("attention_layers") or [kind for block, times in blocks for kind in list(block) * times]
    c.table["n_inner"], c.named["n_inner"] = c.get("intermediate_size"), "intermediate_size"
    s = common(c) | {"ropes": {}, "o_bias": True, "scale": 1.0}
    n, window = len(s["layers"]), c.whole("window_size")
    if len(kinds) != n or not set(kinds) <= {"global", "local"}:
        raise PortError(
            f"config.json: attention_types gives {len(kinds)} layers, {set(kinds)}; wanted {n}, global or local"
        )
    s["layers"] = tuple(Layer("", window if kind == "local" else 0) for kind in kinds)
    sources = {
        **NAMES, "self_attn.o_proj": "attn.attention.out_proj", "self_attn": "attn.attention",
        "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
    }  # fmt: skip
    return Decoder(**s, positions=s["context"], sources=sources)


def rotary(c: Config, s: dict[str, Any], context: int) -> dict[str, Any]:
    """Returns a dict of further arguments for Decoder: GPT-J's rope, layers and norms.

    Rope rotates the first rotary_dim columns of each head, in interleaved pairs. Raises PortError for missing or wrong
    settings.

    Args:
        c: the config.
        s: arguments that are known already; only head_dim is read. They are not in the result.
        context: the largest number of positions.
    """
    rope, turned = parameters(c), c.whole("rotary_dim")
    rope["partial_rotary_factor"] = (turned + 0.5) / s["head_dim"]  # table() rounds down to rotary_dim
    n = c.whole("num_hidden_layers")
    return {
        "ropes": {"rope": table(c, rope, s["head_dim"], context, style="interleaved", partial=True)},
        "layers": (Layer(),) * n, "norms": {"attn.norm": "ln_1"}, "parallel": True, "head_bias": True,
    }  # fmt: skip


MLP = {"mlp.up_proj": "mlp.fc_in", "mlp.down_proj": "mlp.fc_out"}


def gptj(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of GPT-J for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s = common(c)
    sources = {**NAMES, "self_attn.o_proj": "attn.out_proj", "self_attn": "attn", **MLP}
    return Decoder(**s | rotary(c, s, context), sources=sources)


def codegen(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of CodeGen for up to `context` positions, from config.json.

    The checkpoint has q, v and k of all heads in one tensor, in four groups of heads. Raises PortError for settings
    that are not ported.
    """
    s = common(c)
    if s["heads"] % 4:
        raise PortError(f"config.json: n_head={s['heads']}; CodeGen keeps q, v and k in four equal groups of heads")
    part = s["hidden"] // 4
    fused = split((("q_proj", part), ("v_proj", part), ("k_proj", part)), "attn.qkv_proj")
    return Decoder(**s | rotary(c, s, context), sources={**NAMES, **fused, "self_attn.o_proj": "attn.out_proj", **MLP})


def gpt_neox(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of GPT-NeoX for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    c.table["num_key_value_heads"] = None
    s, bias = sizes(c, eps="layer_norm_eps"), c.flag("attention_bias")
    s["ropes"] = {"rope": table(c, parameters(c), s["head_dim"], context, partial=True)}
    s |= {"norm": "layer", "norm_bias": True, "norms": PRE, "gated": False, "mlp_bias": True, "parallel": False}
    s |= {"qkv_bias": bias, "o_bias": bias, "parallel": c.flag("use_parallel_residual")}
    each = s["head_dim"]
    sources = {
        "embed_tokens": "embed_in", "norm": "final_layer_norm", "self_attn.o_proj": "attention.dense",
        **split((("q_proj", each), ("k_proj", each), ("v_proj", each)), "attention.query_key_value"),
        "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
    }  # fmt: skip
    layers = (Layer(),) * c.whole("num_hidden_layers")
    return Decoder(**s, layers=layers, head="embed_out", sources=sources)


def gpt_neox_japanese(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of GPT-NeoX-Japanese for up to `context` positions, from config.json.

    Its linears have no biases, except the output projection of attention in the last layer. Raises PortError for
    missing or wrong settings.
    """
    c.table["intermediate_size"] = int(c.whole("hidden_size") * c.real("intermediate_multiple_size"))
    d = gpt_neox(c, context)
    last = replace(d.layers[-1], o_bias=True)
    sources = {"self_attn.o_proj.bias": "attention.dense_bias", **d.sources}
    return replace(
        d, parallel=False, qkv_bias=False, o_bias=False, mlp_bias=False, layers=(*d.layers[:-1], last), sources=sources
    )


def openai_gpt(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of the first GPT for up to `context` positions, from config.json.

    Norms come after each addition, and there is none after the last layer. Raises PortError for missing or wrong
    settings.
    """
    if c.get("hidden_act") == "gelu":
        c.table["hidden_act"] = "gelu_new"  # as transformers reads it here
    d = gpt2(c, context)
    sources = {**d.sources, "embed_tokens": "tokens_embed", "embed_positions": "positions_embed"}
    norms = {"attn.add_norm": "ln_1", "mlp.add_norm": "ln_2"}
    return replace(d, norms=norms, final_norm="", sources=sources)


WTE: dict[str, Any] = {"prefixes": ("transformer.", ""), "tops": ("wte",)}
FAMILIES = (
    Family("GPT2LMHeadModel", "GPT-2, DistilGPT-2", GPT2, gpt2, model_types=("gpt2",), aliases=ALIASES, **WTE),
    Family(
        "GPTBigCodeForCausalLM", "StarCoder 1, SantaCoder",
        {**GPT2, "hidden_act": "gelu_pytorch_tanh", "multi_query": True},
        gpt_bigcode, model_types=("gpt_bigcode",), aliases=ALIASES, **WTE,
    ),
    Family(
        "GPTNeoForCausalLM", "GPT-Neo 125M, 1.3B, 2.7B",
        {**GPT2, "max_position_embeddings": 2048, "window_size": 256, "attention_types": [[["global", "local"], 12]]},
        gpt_neo, model_types=("gpt_neo",),
        aliases={**ALIASES, "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}, **WTE,
    ),
    Family("GPTJForCausalLM", "GPT-J 6B", GPTJ, gptj, model_types=("gptj",), aliases=ALIASES, **WTE),
    Family("CodeGenForCausalLM", "CodeGen 1, 2", GPTJ, codegen, model_types=("codegen",), aliases=ALIASES, **WTE),
    Family(
        "GPTNeoXForCausalLM", "GPT-NeoX 20B, Pythia, Dolly 2, RedPajama-INCITE", NEOX, gpt_neox,
        model_types=("gpt_neox",), prefixes=("gpt_neox.",), tops=("embed_in",),
        aliases={"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
    ),
    Family(
        "GPTNeoXJapaneseForCausalLM", "GPT-NeoX-Japanese 2.7B",
        {**NEOX, "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "partial_rotary_factor": 1.0,
         "intermediate_multiple_size": 4, "vocab_size": 32000, "tie_word_embeddings": True},
        gpt_neox_japanese, model_types=("gpt_neox_japanese",), prefixes=("gpt_neox_japanese.",), tops=("embed_in",),
        aliases={"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
    ),
    Family(
        "OpenAIGPTLMHeadModel", "GPT (2018)",
        {**GPT2, "max_position_embeddings": 512, "vocab_size": 40478, "hidden_act": "gelu"}, openai_gpt,
        model_types=("openai-gpt",), prefixes=("transformer.", ""), tops=("tokens_embed",),
        aliases={**ALIASES, "hidden_act": "afn"},
    ),
)  # fmt: skip
