"""Granite 3: as Llama, with multipliers on embeddings, attention scores, residual branches and logits.

Dense, or with experts weighted by a softmax over the chosen ones. HyperCLOVA X adds norms on the branches' outputs,
Granite Swash attention sinks and windows.
"""

from __future__ import annotations

from dataclasses import replace

from intaglio.models.config import Config
from intaglio.models.decoder import PRE, Decoder, Mixture, sizes, sparse, uniform_layers, window
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0,
    "tie_word_embeddings": False,
}  # fmt: skip


STACKS = ("input_linear.weight|r0:{i}/{2i}", "input_linear.weight|r{i}:{2i}/{2i}", "output_linear.weight")


def granite(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Granite 3 dense for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    s, bias = sizes(c), c.flag("attention_bias")
    s["scale"] = c.real("attention_multiplier")
    s |= {"embed_scale": c.real("embedding_multiplier"), "residual_scale": c.real("residual_multiplier")}
    s |= {"logit_scale": 1 / c.real("logits_scaling"), "mlp_bias": c.flag("mlp_bias")}
    return Decoder(**s, **uniform_layers(c, s, context), norms=PRE, qkv_bias=bias, o_bias=bias)


def granitemoe(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Granite 3 MoE for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    m = Mixture(
        count=c.whole("num_local_experts"), top=c.whole("num_experts_per_tok"), width=c.whole("intermediate_size"),
        block="block_sparse_moe", router="router.layer", sources=STACKS, route={"score": "chosen"},
    )  # fmt: skip
    return sparse(replace(granite(c, context), mixture=m))


def hyperclovax(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of HyperCLOVA X for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    if c.get("attention_multiplier") is None:
        c.table["attention_multiplier"] = sizes(c)["head_dim"] ** -0.5
    d = replace(granite(c, context), logit_scale=c.real("logits_scaling"))  # here a factor, in Granite a divisor
    post = {"attn.post_norm": "post_norm1", "mlp.post_norm": "post_norm2"} if c.flag("use_post_norm") else {}
    return replace(d, norms={**PRE, **post})


def granitemoeshared(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Granite MoE with a shared expert, from config.json.

    Raises PortError for missing or wrong settings. context: the largest number of positions.
    """
    d, width = granitemoe(c, context), int(c.get("shared_intermediate_size", 0))
    assert d.mixture
    both, of = "shared_mlp.input_linear.weight", 2 * width
    sources = {
        "block_sparse_moe.shared_mlp.gate_proj.weight": f"{both}|r0:{width}/{of}",
        "block_sparse_moe.shared_mlp.up_proj.weight": f"{both}|r{width}:{of}/{of}",
        "block_sparse_moe.shared_mlp.down_proj": "shared_mlp.output_linear",
    }
    # transformers 5 may hold the experts in a module of another name; the shared MLP stands beside it either way
    sources |= {old.replace("block_sparse_moe", "mlp"): new for old, new in sources.items()}
    return replace(d, mixture=replace(d.mixture, shared=width, shared_source="shared_mlp"), sources=sources)


def swash(c: Config, d: Decoder, context: int) -> Decoder:
    """Returns a copy of a Granite Decoder with attention sinks, and with a window and a rope base for each layer.

    A layer whose rope base is 0 has no rope. Raises PortError for missing or wrong settings.

    c: the config. d: the Decoder (model description). context: the largest number of positions.
    """
    n = c.whole("num_hidden_layers")
    kinds = c.layer_types(usual=["sliding_attention" if i % 4 else "full_attention" for i in range(n)])
    rope = parameters(c)
    bases = c.get("layer_rope_theta") or [rope["rope_theta"]] * n
    ropes = {}
    for base in sorted({b for b in bases if b}):
        own = parameters(c)
        own["rope_theta"] = base
        ropes[f"rope.{base:g}"] = table(c, own, d.head_dim, context)
    layers = tuple(
        replace(layer, rope=f"rope.{base:g}" if base else "", window=window(c, kind))
        for layer, base, kind in zip(d.layers, bases, kinds, strict=True)
    )
    return replace(d, layers=layers, ropes=ropes, sinks=True)


def granite_swa(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of the dense model Granite Swash, from config.json.

    It has sliding-window attention. Raises PortError for missing or wrong settings. context: the largest number of
    positions.
    """
    kinds = c.table.pop("layer_types", None)
    d = granite(c, context)
    c.table["layer_types"] = kinds
    return swash(c, d, context)


def granitemoe_swa(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of the Granite Swash models with experts, from config.json.

    They have sliding-window attention. Raises PortError for missing or wrong settings. context: the largest number of
    positions.
    """
    kinds = c.table.pop("layer_types", None)
    d = granitemoeshared(c, context)
    c.table["layer_types"] = kinds
    return swash(c, d, context)


SWASH = {
    **DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "num_attention_heads": 20,
    "num_key_value_heads": 4, "sliding_window": 128, "tie_word_embeddings": True,
}  # fmt: skip
CLOVAX = {**DEFAULTS, "attention_multiplier": None, "use_post_norm": True}
MOE = {**DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2}
FAMILIES = (
    Family("GraniteSWAForCausalLM", "Granite Swash 2B", SWASH, granite_swa, model_types=("granite_swa",)),
    Family(
        "GraniteMoeSWAForCausalLM",
        "Granite Swash 3B-A600M",
        {**MOE, "sliding_window": 128},
        granitemoe_swa,
        model_types=("granitemoe_swa",),
    ),
    Family("HyperCLOVAXForCausalLM", "HyperCLOVA X SEED Think 14B", CLOVAX, hyperclovax, model_types=("hyperclovax",)),
    Family(
        "GraniteMoeSharedForCausalLM",
        "Granite MoE with a shared expert",
        MOE,
        granitemoeshared,
        model_types=("granitemoeshared",),
    ),
    Family("GraniteForCausalLM", "Granite 3.0, 3.1, 3.2, 3.3 dense", DEFAULTS, granite, model_types=("granite",)),
    Family(
        "GraniteMoeForCausalLM", "Granite 3.0, 3.1 1B-A400M, 3B-A800M", MOE, granitemoe, model_types=("granitemoe",)
    ),
)
