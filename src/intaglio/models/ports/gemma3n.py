"""Gemma 3n (text): residual streams by AltUp, LAuReL, per-layer embeddings, late layers that read earlier K/V caches.

The gate of the first layers' MLPs is cut to its largest values (gaussian top-k). Images and sound are not ported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import SANDWICH, AltUp, Decoder, Layer, sizes, window
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "vocab_size": 262400, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 35,
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "head_dim": 256, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 32768, "sliding_window": 512, "tie_word_embeddings": True,
    "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256, "altup_active_idx": 0,
    "altup_correct_scale": True, "altup_num_inputs": 4, "num_kv_shared_layers": 15, "laurel_rank": 64,
}  # fmt: skip


def gemma3n(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Gemma 3n for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings, and for settings that are not ported.
    """
    c.refuse("use_bidirectional_attention", why="attention is causal here")
    n, kinds = c.whole("num_hidden_layers"), c.layer_types(5)
    widths = _listed(c, "intermediate_size", n)
    sparse = _listed(c, "activation_sparsity_pattern", n, [0.95] * 10 * (n > 10) + [0.0] * (n - 10 * (n > 10)))
    for name, values, ok, wanted in (
        ("intermediate_size", widths, [type(x) is int and x > 0 for x in widths], "integers of 1 or more"),
        (
            "activation_sparsity_pattern",
            sparse,
            [type(x) in (int, float) and 0 <= x < 1 for x in sparse],
            "numbers from 0 to below 1",
        ),
    ):
        if not all(ok):
            raise PortError(f"config.json: {name}={values!r}; wanted {wanted}, one for each layer")
    c.table["intermediate_size"] = max(widths)
    s, bias = sizes(c, act="hidden_activation"), c.flag("attention_bias")
    local = parameters(c, "sliding_attention", theta="rope_local_base_freq", scaled=False)
    ropes = {
        "full_attention": table(c, parameters(c, "full_attention"), s["head_dim"], context),
        "sliding_attention": table(c, local, s["head_dim"], context),
    }
    layers = tuple(
        Layer(kind, window(c, kind), width=width, cache_of=owner, sparsity=float(share))
        for kind, width, owner, share in zip(kinds, widths, cache_owners(c, kinds), sparse, strict=True)
    )
    return Decoder(
        **s | {"scale": 1.0}, ropes={k: v for k, v in ropes.items() if k in kinds}, layers=layers, norms=SANDWICH,
        qk_norm="head", value_norm=True, qkv_bias=bias, o_bias=bias, root_scaled=True,
        final_softcap=float(c.get("final_logit_softcapping") or 0), per_layer=c.whole("hidden_size_per_layer_input"),
        per_layer_rows=c.whole("vocab_size_per_layer_input"), altup=_altup(c), laurel=c.whole("laurel_rank"),
    )  # fmt: skip


def _altup(c: Config) -> AltUp:
    """Returns the AltUp (sizes of the parallel residual streams) of the config.

    Raises PortError if the index of the active stream is not below the number of streams.
    """
    streams, active = c.whole("altup_num_inputs"), c.get("altup_active_idx", 0)
    if active not in range(streams):
        raise PortError(f"config.json: altup_active_idx={active!r}; wanted 0 to {streams - 1} (altup_num_inputs - 1)")
    if not (scaled := c.flag("altup_correct_scale")):
        c.ignored["*.altup.correct_output_scale"] = "altup_correct_scale is false"
    return AltUp(streams, active, scaled)


def _listed(c: Config, key: str, n: int, usual: Any = None) -> list[Any]:
    """Returns a list with the value of a config key for each layer.

    In config.json the key has one value for all layers, or a list with a value for each layer.

    Args:
        c: the config.
        key: the key.
        n: number of layers.
        usual: one value or a list, used if the key has no value.

    Raises PortError for a list whose length is not the config's number of layers.
    """
    value = c.get(key, usual)
    values = list(value) if isinstance(value, list | tuple) else [value] * n
    c.check_length(key, values)
    return values


def cache_owners(c: Config, kinds: Sequence[str]) -> list[int | None]:
    """Returns a list with one entry for each layer: the layer whose K/V cache it reads.

    - The index of an earlier layer: the cache of that layer.
    - None: the layer's own cache.

    The last num_kv_shared_layers layers have no K/V cache of their own. Each reads the cache of the last layer before
    them with the same attention type. If such a layer has tensors for keys and values, these tensors are ignored, as in
    transformers; released checkpoints have them. Raises PortError if there is no layer to read from.

    c: the config. kinds: the attention type of each layer.
    """
    n, shared = len(kinds), c.get("num_kv_shared_layers", 0)
    if shared not in range(n):
        raise PortError(f"config.json: num_kv_shared_layers={shared!r}; wanted 0 to {n - 1} (num_hidden_layers - 1)")
    own = kinds[: n - shared]
    if shared and (lost := sorted(set(kinds) - set(own))):
        raise PortError(
            f"config.json: num_kv_shared_layers={shared} leaves no layer of type {lost[0]} with a K/V cache of its "
            "own; wanted at least one layer of each type in layer_types before those that share"
        )
    last = {kind: max(i for i, k in enumerate(own) if k == kind) for kind in own}
    owners = [None if i < len(own) else last[kind] for i, kind in enumerate(kinds)]
    for i, owner in enumerate(owners):
        if owner is not None:
            why = f"this layer reads the keys and values of layer {owner}"
            c.ignored |= {f"*layers.{i}.self_attn.{x}.": why for x in ("k_proj", "v_proj", "k_norm", "v_norm")}
    return owners


FAMILIES = (
    Family("Gemma3nForCausalLM", "Gemma 3n E2B, E4B (text)", DEFAULTS, gemma3n, model_types=("gemma3n_text",)),
    Family(
        "Gemma3nForConditionalGeneration", "Gemma 3n E2B, E4B (text; images and sound are not ported)", DEFAULTS,
        gemma3n, model_types=("gemma3n",), prefixes=("model.language_model.", "language_model.model."),
        ignored=(
            "model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio.", "vision_tower.",
            "embed_vision.", "audio_tower.", "embed_audio.",
        ),
    ),
)  # fmt: skip
