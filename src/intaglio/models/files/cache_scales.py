"""The K/V cache that a quantised checkpoint asks for: its format, and the scale of each layer's keys and values.

As published for vLLM: an E4M3 cache holds key / k_scale and value / v_scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from intaglio.models.config import CheckpointError, Settings

SCALE = re.compile(
    r"(?:layers|h|blocks)\.(\d+)\.(?:.*(?:attn|attention|mixer)\.(?:.*\.)?)?"
    r"(?:(k|v|kv)_(?:cache_)?scale|(k|v)_proj\.output_scale)$"
)
KEYS = ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_group", "kv_cache_quant_config")


@dataclass
class CacheScales:
    """The scales by which keys and values of an E4M3 K/V cache are multiplied, for each layer.

    Attributes:
        asked_by: the key of the quantisation settings that asks for an E4M3 cache; "" if no key does.
        layers: {number of a layer: (scales of keys, scales of values)}; both are tuples of one scale, or of one per K/V
            head.
        sources: {name of a tensor that scales were read from: number of its layer}.
    """

    asked_by: str = ""
    layers: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)


def read_cache_scales(
    names: Iterable[str], read: Callable[[str], np.ndarray], q: Settings, prefix: str, coded: bool
) -> CacheScales:
    """Read the scales that a checkpoint has for an E4M3 K/V cache. Returns CacheScales, without layers if it has none.

    If a layer has a scale only for keys or only for values, this scale is used for both. A scale of 0 or less counts as
    1. vLLM does the same. CacheScales.asked_by is "" if the checkpoint has neither scales nor quantised matrices,
    because the setting then has no effect. Raises CheckpointError for a scale that is not finite.

    Args:
        names: names of the checkpoint's tensors.
        read: function that returns a tensor of the checkpoint by name.
        q: the quantisation settings.
        prefix: prefix of the names of the decoder's tensors.
        coded: True if the checkpoint has quantised matrices.
    """
    found: dict[int, dict[str, tuple[float, ...]]] = {}
    out = CacheScales()
    for name in sorted(names):
        match = SCALE.match(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match is None or (match[3] and not _of_cache(q)):
            continue
        values = np.asarray(read(name), np.float32).reshape(-1)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{name} is {values[~np.isfinite(values)][0]}: a scale of the K/V cache is a finite number"
            )
        scales = tuple(float(x) if x > 0 else 1.0 for x in values)
        out.sources[name] = int(match[1])
        found.setdefault(int(match[1]), {})[match[2] or match[3]] = scales
    for layer, own in found.items():
        k, v, both = own.get("k"), own.get("v"), own.get("kv")
        out.layers[layer] = (k or both or v or (1.0,), v or both or k or (1.0,))
    if coded or found:
        out.asked_by = _of_cache(q)
    return out


def _of_cache(q: Settings) -> str:
    """The key of the quantisation settings `q` that asks for an E4M3 K/V cache; "" if no key does."""
    scheme, algo = q.get("kv_cache_scheme"), q.get("kv_cache_quant_algo")
    if isinstance(scheme, Mapping):
        if scheme.get("type", "float") == "float" and scheme.get("num_bits", 8) == 8:
            return "kv_cache_scheme"
    elif isinstance(scheme, str) and scheme.lower() in ("static", "fp8", "fp8_e4m3"):  # AutoFP8
        return "kv_cache_scheme"
    if isinstance(algo, str) and algo.lower() in ("fp8", "fp8_e4m3"):
        return "kv_cache_quant_algo"
    export = q.get("export")  # Quark
    group = export.get("kv_cache_group") if isinstance(export, Mapping) else q.get("kv_cache_group")
    own = q.get("kv_cache_quant_config")
    if group and isinstance(own, Mapping) and own:
        outputs = [c.get("output_tensors") for c in own.values() if isinstance(c, Mapping)]
        if outputs and all(isinstance(o, Mapping) and o.get("dtype") == "fp8_e4m3" for o in outputs):
            return "kv_cache_quant_config"
    return ""
