"""Zamba and Zamba2: Mamba or Mamba-2 blocks; before some of them a transformer block that several layers share."""

from __future__ import annotations

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import Decoder, Layer, ScanMixer, Shared, SsmMixer, sizes
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family
from intaglio.models.ports.mamba import rank_of

KINDS = {"mamba": "linear_attention", "linear_attention": "linear_attention", "hybrid": "hybrid"}


def prepare(c: Config) -> None:
    """Add to the config `c` three settings that transformers derives from other settings. Returns nothing.

    They are head_dim; intermediate_size, if config.json has none; and, with use_long_context, the number of positions.
    Raises PortError for missing or wrong settings.
    """
    hidden, heads = c.whole("hidden_size"), c.whole("num_attention_heads")
    if 2 * hidden % heads:
        raise PortError(f"config.json: num_attention_heads={heads} does not divide twice hidden_size={hidden}")
    c.table |= {"head_dim": 2 * hidden // heads, "intermediate_size": c.whole("intermediate_size", 4 * hidden)}
    derived = "transformers computes it from hidden_size and the number of heads"
    keys = ("attention_head_dim", "attention_hidden_size", "mamba_headdim", "kv_channels", "num_query_groups")
    c.replaced |= dict.fromkeys(keys, derived)
    c.replaced["use_conv_bias"] = "the convolution always has a bias, as in transformers"
    if c.flag("use_long_context"):
        c.table["max_position_embeddings"] = 16384


def zamba2(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Zamba2 for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s, bias, adapters = sizes(c), c.flag("add_bias_linear"), c.whole("adapter_rank")
    if c.flag("use_shared_attention_adapter") and s["kv_heads"] != s["heads"]:
        raise PortError(
            f"config.json: num_key_value_heads={s['kv_heads']}; with use_shared_attention_adapter as many as "
            f"num_attention_heads={s['heads']} are wanted, for the adapters are of that width"
        )
    inner, heads = int(c.real("mamba_expand") * s["hidden"]), c.whole("n_mamba_heads")
    if inner % heads:
        raise PortError(f"config.json: n_mamba_heads={heads} does not divide mamba_expand * hidden_size = {inner}")
    low = c.get("time_step_min", 0.0)
    mixer = SsmMixer(
        heads=heads, head_dim=inner // heads, groups=c.whole("mamba_ngroups"), state=c.whole("mamba_d_state"),
        taps=c.whole("mamba_d_conv"), eps=1e-5, bias=bias, out_bias=bias, low=float(low),
    )  # fmt: skip
    rope = c.flag("use_mem_rope")
    tail = ["mamba"] * 4 + ["hybrid"] + ["mamba"] * 3 + ["hybrid"] + ["mamba"] * 2
    kinds = block_kinds(c, ["mamba", *(["mamba"] * 5 + ["hybrid"]) * 7, *tail])
    hybrid = [i for i, kind in enumerate(kinds) if kind == "hybrid"]
    blocks = c.whole("num_mem_blocks")
    if not s["tied"]:
        blocks = len(hybrid)  # transformers ties the blocks only if it ties the embedding
    for i in hybrid[blocks:]:
        c.ignored[f"*layers.{i}.shared_transformer."] = "a copy of an earlier layer's block (tie_word_embeddings)"
    if not s["tied"]:
        for i, other in ((i, j) for i in hybrid for j, layer in enumerate(hybrid) if layer != i):
            c.ignored[f"*layers.{i}.shared_transformer.*_adapter_list.{other}."] = "an adapter of another layer"
    layers = tuple(
        Layer("rope" if rope and kind == "hybrid" else "", mixer=mixer, mlp=False, shared=use_of(i, hybrid, blocks))
        for i, kind in enumerate(kinds)
    )
    shared = Shared(
        block="shared_transformer", rank=adapters, bias=bias,
        qkv_rank=adapters if c.flag("use_shared_attention_adapter") else 0,
    )  # fmt: skip
    return Decoder(
        **s | {"scale": (s["head_dim"] / 2) ** -0.5}, layers=layers, shared=shared,
        norms={"attn.norm": "input_layernorm"}, final_norm="final_layernorm", sources=names(hybrid),
        ropes={"rope": table(c, parameters(c), s["head_dim"], context)} if rope else {},
    )  # fmt: skip


def prepare_first(c: Config) -> None:
    """Set head_dim in the config `c` of a Zamba model. Its config.json has the key attention_head_dim instead.

    Returns nothing. Raises PortError for missing or wrong settings.
    """
    hidden, heads = c.whole("hidden_size"), c.whole("num_attention_heads")
    width = c.whole("attention_hidden_size", 2 * hidden)
    if width != 2 * hidden:
        raise PortError(f"config.json: attention_hidden_size={width}; wanted twice hidden_size, {2 * hidden}")
    c.table["head_dim"] = c.whole("attention_head_dim", 2 * hidden // heads)


def zamba(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Zamba for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    c.refuse("mamba_proj_bias", why="the heads of a Mamba block are ported without biases")
    s, n = sizes(c), c.whole("num_hidden_layers")
    inner, heads = int(c.real("mamba_expand") * s["hidden"]), c.whole("n_mamba_heads")
    if inner % heads:
        raise PortError(f"config.json: n_mamba_heads={heads} does not divide mamba_expand * hidden_size = {inner}")
    mixer = ScanMixer(
        inner=inner, state=c.whole("mamba_d_state"), rank=rank_of(c, "mamba_dt_rank"), taps=c.whole("mamba_d_conv"),
        conv_bias=c.flag("mamba_conv_bias"), heads=heads, block="mamba",
    )  # fmt: skip
    period, offset = c.whole("attn_layer_period"), c.get("attn_layer_offset", 4)
    usual = ["hybrid" if i % period == offset else "mamba" for i in range(n - 3)]
    kinds = block_kinds(c, ["mamba", "mamba", "hybrid", *usual])
    hybrid = [i for i, kind in enumerate(kinds) if kind == "hybrid"]
    blocks = 1 if s["tied"] else len(hybrid)  # transformers ties the blocks only if it ties the embedding
    for i in hybrid[blocks:]:
        c.ignored[f"*layers.{i}.shared_transf."] = "a copy of an earlier layer's block (tie_word_embeddings)"
    layers = tuple(Layer("", mixer=mixer, mlp=False, shared=use_of(i, hybrid, blocks)) for i in range(n))
    return Decoder(
        **s | {"scale": (s["head_dim"] / 2) ** -0.5}, layers=layers, ropes={},
        shared=Shared(block="shared_transf", fused=False), norms={"attn.norm": "input_layernorm"},
        final_norm="final_layernorm", sources=names(hybrid),
    )  # fmt: skip


def block_kinds(c: Config, usual: list[str]) -> list[str]:
    """Returns a list with the type of each layer: "linear_attention" or "hybrid".

    - linear_attention: the layer is a Mamba block.
    - hybrid: the layer has a Mamba block and also runs a shared block.

    Raises PortError for another type, or if the list does not have num_hidden_layers items.

    c: the config. usual: the types if config.json lists none.
    """
    n = c.whole("num_hidden_layers")
    found = c.get("layers_block_type") or c.get("layer_types") or usual
    if len(found) != n:
        raise PortError(f"config.json: layers_block_type lists {len(found)} layers but num_hidden_layers={n}")
    if unknown := sorted({str(kind) for kind in found} - KINDS.keys()):
        raise PortError(f"config.json: layers_block_type has {unknown[0]!r}; known are {', '.join(KINDS)}")
    return [KINDS[kind] for kind in found]


def use_of(i: int, hybrid: list[int], blocks: int) -> tuple[int, int] | None:
    """Returns the attribute `shared` of layer `i` (a Layer): a tuple, or None if the layer runs no shared block.

    The tuple is (index of the first layer that runs the same block, number of earlier layers that run any shared
    block).

    Args:
        i: number of the layer.
        hybrid: numbers of the layers that run a shared block, ascending.
        blocks: number of different blocks. The layers in `hybrid` use the blocks in turn.
    """
    if i not in hybrid:
        return None
    use = hybrid.index(i)
    return hybrid[use % blocks], use


def names(hybrid: list[int]) -> dict[str, str]:
    """Returns entries for Decoder.sources, as a dict {part of Llama's tensor name: the checkpoint's name}.

    In the checkpoint, a layer with a shared block has its Mamba block and its input norm inside a module mamba_decoder.
    For each of these layers the dict has two entries: one for the Mamba block and one for the input norm.

    hybrid: numbers of the layers with a shared block.
    """
    rules = {}
    for i in hybrid:
        for part in ("mamba", "input_layernorm"):
            rules[f"layers.{i}.{part}"] = f"layers.{i}.mamba_decoder.{part}"
    return rules


DEFAULTS = {
    "hidden_act": "gelu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "hidden_size": 2560, "num_attention_heads": 32, "num_hidden_layers": 54,
    "mamba_d_state": 64, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_ngroups": 1, "n_mamba_heads": 8,
    "time_step_min": 0.001, "num_mem_blocks": 1, "adapter_rank": 128,
}  # fmt: skip
FIRST = {
    "hidden_act": "gelu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    "hidden_size": 3712, "intermediate_size": 14848, "num_hidden_layers": 76, "num_attention_heads": 16,
    "num_key_value_heads": 16, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "n_mamba_heads": 2,
    "mamba_conv_bias": True, "attn_layer_period": 6, "attn_layer_offset": 4,
}  # fmt: skip
FAMILIES = (
    Family(
        "ZambaForCausalLM", "Zamba 7B", FIRST, zamba, model_types=("zamba",), prepare=prepare_first,
        tops=("embed_tokens", "final_layernorm"), fixed={"hidden_mamba_act": ("silu",)},
    ),
    Family(
        "Zamba2ForCausalLM", "Zamba2 1.2B, 2.7B, 7B", DEFAULTS, zamba2, model_types=("zamba2",), prepare=prepare,
        tops=("embed_tokens", "final_layernorm"),
    ),
)  # fmt: skip
