"""Tables of rotary frequencies, as in transformers: default, linear, dynamic NTK, llama3, yarn and longrope.

Reads both forms of config.json: `rope_theta` with `rope_scaling`, and `rope_parameters`, flat or per layer type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.models.config import Config, PortError, Settings

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
NEEDS = ("linear", "dynamic", "llama3")  # types without defaults for NEEDED; the others have them
NEEDED = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
OPTIONAL = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
LISTS = ("short_factor", "long_factor")  # of LongRoPE


@dataclass(frozen=True)
class Table:
    """The frequencies of rotary position embedding (rope), and how they are applied.

    Attributes:
        frequencies: one float, rounded to float32, for each pair of columns that is rotated.
        factor: number by which cos and sin are multiplied.
        style: which two columns of a head form a pair: "half" (i and i + d/2, with d rotated columns) or "interleaved"
            (2i and 2i + 1).
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    style: str = "half"


def parameters(c: Config, kind: str = "", theta: str = "rope_theta", scaled: bool = True) -> Settings:
    """The rope settings for the layers of one attention type, as a Settings with the keys of `rope_parameters`.

    New files have all settings in the object rope_parameters. Older files have the base of the frequencies in a key of
    its own, and other settings in the object rope_scaling. A file with both objects is read as in transformers 5:

    - If rope_parameters is one object for all layers, rope_scaling replaces the whole object.
    - If rope_parameters has an object per attention type, the keys of rope_scaling override those in the object for
      `kind`.

    Args:
        c: the config.
        kind: the attention type, such as sliding_attention; "" if the config has the same settings for all layers.
        theta: the key under which older files have the base of the frequencies.
        scaled: False if rope_scaling does not apply to these layers.

    Raises PortError for settings that are missing or wrong.
    """
    flat, nested = c.get("rope_parameters", {}), ""
    if not isinstance(flat, Mapping):
        raise PortError(f"config.json: rope_parameters={flat!r}; wanted an object {{...}}")
    if any(isinstance(v, Mapping) for v in flat.values()):
        nested = kind
        if flat.get(kind) is None:
            raise PortError(
                f"config.json: rope_parameters has {', '.join(flat)} but nothing for {kind or 'all layers'}"
            )
    out, old = c.settings("rope_parameters", nested), Settings({})
    scaling = c.settings("rope_scaling")
    if scaling and nested and scaled:
        _lay_over(c, out, scaling)
    elif scaling and scaled and not nested:
        old, out = out, scaling
    if "rope_theta" not in out:
        out["rope_theta"] = c.real(theta)
    out.setdefault("rope_type", out.get("type", "default"))
    out.setdefault("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    pretrained = c.get("original_max_position_embeddings")
    if pretrained:  # transformers gives the outer key priority (Phi-3)
        out["original_max_position_embeddings"] = pretrained
    elif out.get("original_max_position_embeddings") is None:
        out["original_max_position_embeddings"] = c.whole("max_position_embeddings")
    if old:
        lost = {k: v for k, v in old.items() if k not in ("rope_type", "type") and dict(out).get(k, 1.0) != v}
        c.replaced["rope_parameters"] = "rope_scaling takes its place, as in transformers 5" + (
            f", and so {lost!r} has no effect; to keep a value, write it into rope_scaling" if lost else ""
        )
    return out


def _lay_over(c: Config, out: Settings, scaling: Settings) -> None:
    """Copy the keys of `scaling`, the config's rope_scaling, into the rope settings `out`. Changes `out`."""
    for key in scaling:
        out[key] = scaling[key]
    if "type" in scaling and "rope_type" not in scaling:
        out["rope_type"] = scaling["type"]


def lengths(c: Config) -> tuple[int, int, bool]:
    """Context lengths of a model: (default in tokens, longest in tokens, True if a longer context changes rope).

    If the third item is True, a Program for more than the default context has other rope frequencies, so its results
    differ even for short sequences. The three items depend on the type of rope scaling; n is max_position_embeddings:

    - YaRN: default and longest are the larger of n and factor * original length; the third item is False.
    - LongRoPE: the default is the original length, the longest is n. The third item is True if n is larger than the
      original length, because longer contexts use the long factors instead of the short ones.
    - Dynamic NTK: the default is n, the longest is factor * n. The third item is True if the longest is larger than n.
    - Linear: the default is n, the longest is factor * n; the third item is False.
    - No scaling, other types, and dynamic or linear scaling that is given per layer type: (n, n, False).

    Invalid numbers count as no scaling here; table() raises an error for them.
    """
    n = c.whole("max_position_embeddings")
    scaling = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        return n, n, False
    nested = scaling.get("full_attention")
    p = nested if isinstance(nested, Mapping) else scaling
    kind, factor = p.get("rope_type", p.get("type", "default")), p.get("factor") or 1.0
    pretrained = c.get("original_max_position_embeddings") or p.get("original_max_position_embeddings") or n
    if not all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf for x in (factor, pretrained)
    ):
        return n, n, False
    if "short_factor" in p:
        return int(min(n, pretrained)), n, pretrained < n
    if kind == "yarn":
        n = max(n, int(factor * pretrained))
        return n, n, False
    longer = max(n, int(factor * n)) if kind in ("dynamic", "linear") and p is scaling else n
    return n, longer, kind == "dynamic" and longer > n


def table(c: Config, p: Settings, head_dim: int, context: int, style: str = "half", partial: bool = False) -> Table:
    """The rope Table (frequencies and attention factor) for sequences of up to `context` tokens.

    For LongRoPE and dynamic NTK the table depends on `context`, not on the length of a sequence. LongRoPE uses its long
    factors if `context` exceeds the pretrained length. Dynamic NTK uses the base that it has for `context` tokens.
    transformers uses the length of the longest sequence in the batch in place of `context`. There, a sequence's logits
    depend on the other sequences, and its earlier keys have other frequencies than its later keys.

    Args:
        c: the config.
        p: rope settings that parameters() returned.
        head_dim: columns of a head.
        context: maximum tokens of a sequence.
        style: how rope pairs columns, "half" or "interleaved".
        partial: True if the model family may rotate only part of each head.

    Raises PortError for settings that are missing, wrong or not supported.
    """
    kind, part = p["rope_type"], p["partial_rotary_factor"]
    if not isinstance(kind, str) or kind not in TYPES:
        raise PortError(f"config.json: rope_type={kind!r} is not ported; known are {', '.join(TYPES)}")
    _check_numbers(kind, p)
    if part != 1 and not partial and kind == "default":
        why = "this family turns whole heads with rope of type 'default', here and in transformers, so it has no effect"
        p.ignored["partial_rotary_factor"] = c.replaced["partial_rotary_factor"] = why
        part = 1.0
    elif part != 1 and not partial and kind != "proportional":
        raise PortError(
            f"config.json: partial_rotary_factor={part} with rope_type={kind!r}, but this family rotates whole heads"
        )
    dim = head_dim if kind == "proportional" else int(head_dim * part)
    if dim < 2 or dim > head_dim or dim % 2:
        raise PortError(
            f"config.json: rope rotates {dim} columns of head_dim={head_dim} (partial_rotary_factor="
            f"{part}); wanted an even number from 2 to {head_dim}"
        )
    try:
        frequencies, factor = _BUILD[kind](c, p, dim, context)
    except KeyError as e:
        raise PortError(f"config.json: rope type {kind!r} needs {e.args[0]!r}, which is missing") from None
    return Table(tuple(float(f) for f in frequencies.astype(np.float32)), float(factor), style)


def _check_numbers(kind: str, p: Settings) -> None:
    """Raise PortError unless each rope setting is a finite number above 0, or a list of such numbers.

    Only `short_factor` and `long_factor` are lists. A missing key is accepted. So is null or 0 for a number that the
    rope type does not need; transformers accepts them too. kind: the rope type, such as yarn. p: the rope settings.
    """
    needed = {"rope_theta", "partial_rotary_factor", *(NEEDED if kind in NEEDS else ())}
    for key in (key for key in ("rope_theta", "partial_rotary_factor", *NEEDED, *OPTIONAL, *LISTS) if key in p):
        value = p[key]
        if key in LISTS:
            values, what = value if isinstance(value, list | tuple) else [None], "a list of numbers above 0"
        elif not value and key not in needed and not isinstance(value, list | str | Mapping):
            continue
        else:
            values, what = [value], "a number above 0"
        if any(isinstance(v, bool) or not isinstance(v, int | float) or not 0 < v < math.inf for v in values):
            raise PortError(f"config.json: rope {key}={value!r}; wanted {what}")


def powers(p: Mapping[str, Any], dim: int) -> np.ndarray:
    """The numbers theta^(2i / dim) for i = 0 ... dim / 2 - 1, correctly rounded: float32 [dim / 2].

    They are within 1 ulp of torch's float32 result. p: rope settings that parameters() returned; theta is their
    rope_theta.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (float(p["rope_theta"]) ** exponents.astype(np.float64)).astype(np.float32)


def _default(c: Config, p: Mapping[str, Any], dim: int, context: int) -> tuple[np.ndarray, float]:
    """The rope frequencies without scaling: theta^(-2i / dim), where theta is the setting rope_theta.

    Returns (frequencies float32 [dim / 2], attention factor 1.0). p: rope settings. `c` and `context` are not used; the
    functions for all rope types have the same arguments.
    """
    return np.float32(1) / powers(p, dim), 1.0


def _linear(c: Config, p: Mapping[str, Any], dim: int, context: int) -> tuple[np.ndarray, float]:
    """The rope frequencies with linear scaling: the unscaled frequencies divided by p["factor"].

    Returns (frequencies float32 [dim / 2], attention factor 1.0). p: rope settings. `c` and `context` are not used.
    """
    return np.float32(1) / powers(p, dim) / np.float32(p["factor"]), 1.0


def _dynamic(c: Config, p: Mapping[str, Any], dim: int, context: int) -> tuple[np.ndarray, float]:
    """The rope frequencies of dynamic NTK for sequences of `context` tokens.

    If `context` is above max_position_embeddings, the base is larger than the base in the config. Returns (frequencies
    float32 [dim / 2], attention factor 1.0). p: rope settings.
    """
    length, factor = c.whole("max_position_embeddings"), float(p["factor"])
    stretch = factor * max(context, length) / length - (factor - 1)
    return np.float32(1) / powers({"rope_theta": float(p["rope_theta"]) * stretch ** (dim / (dim - 2))}, dim), 1.0


def _llama3(c: Config, p: Mapping[str, Any], dim: int, context: int) -> tuple[np.ndarray, float]:
    """The rope frequencies of Llama 3's scaling.

    Low frequencies are divided by the scaling factor, high frequencies are kept, and frequencies in between are
    interpolated. Returns (frequencies float32 [dim / 2], attention factor 1.0). p: rope settings. `c` and `context` are
    not used.
    """
    plain = np.float32(1) / powers(p, dim)
    factor, low, high = (np.float32(p[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    pretrained = p["original_max_position_embeddings"]
    wave = np.float32(2 * math.pi) / plain
    smooth = (np.float32(pretrained) / wave - low) / (high - low)
    blended = (np.float32(1) - smooth) * plain / factor + smooth * plain
    long, short = wave > pretrained / float(low), wave < pretrained / float(high)
    return np.where(long, plain / factor, np.where(short, plain, blended)), 1.0


def mscale(factor: float, by: float = 1.0) -> float:
    """YaRN's attention scale for a context that is `factor` times as long as in pretraining.

    It is 0.1 * by * ln(factor) + 1, or 1 if `factor` is at most 1.
    """
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(c: Config, p: Mapping[str, Any], dim: int, context: int) -> tuple[np.ndarray, float]:
    """The rope frequencies and attention factor of YaRN (Peng et al. 2023).

    Low frequencies are divided by the scaling factor, high frequencies are kept, and frequencies between two limits are
    blended linearly. The limits are given as rotations within the pretrained length, by default 32 (beta_fast) and 1
    (beta_slow). Returns (frequencies float32 [dim / 2], attention factor). p: rope settings. `context` is not used.
    """
    pretrained, base = p["original_max_position_embeddings"], float(p["rope_theta"])
    factor = float(p["factor"] or c.whole("max_position_embeddings") / pretrained)

    def pair(turns: float) -> float:
        return dim * math.log(pretrained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(p.get("beta_fast") or 32), pair(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32((high - low) or 0.001)
    keep = np.float32(1) - np.clip(ramp, 0, 1).astype(np.float32)
    slow = np.float32(1) / (np.float32(factor) * powers(p, dim))
    frequencies = slow * (np.float32(1) - keep) + np.float32(1) / powers(p, dim) * keep

    both = p.get("mscale") and p.get("mscale_all_dim")
    usual = mscale(factor, p["mscale"]) / mscale(factor, p["mscale_all_dim"]) if both else mscale(factor)
    given = p.get("attention_factor")
    return frequencies, usual if given is None else given


def _longrope(c: Config, p: Mapping[str, Any], dim: int, context: int) -> tuple[np.ndarray, float]:
    """The rope frequencies and attention factor of LongRoPE (Ding et al. 2024).

    Each pair of columns has its own divisor for its frequency: from the setting long_factor if `context` exceeds the
    pretrained length, else from short_factor. The attention factor is a setting too; by default it is sqrt(1 +
    ln(factor) / ln(pretrained length)), or 1 if factor is at most 1. Returns (frequencies float32 [dim / 2], attention
    factor). p: rope settings. Raises PortError for a wrong number of divisors.
    """
    pretrained = p["original_max_position_embeddings"]
    short, long = p["short_factor"], p["long_factor"]
    divisors = long if context > pretrained else short
    for key, held in (("short_factor", short), ("long_factor", long)):
        if len(held) != dim // 2:
            raise PortError(f"config.json: rope {key} has {len(held)} values; wanted {dim // 2}, one per rotated pair")
    factor = p.get("factor") or c.whole("max_position_embeddings") / pretrained
    usual = math.sqrt(1 + math.log(factor) / math.log(pretrained)) if factor > 1 else 1.0
    given = p.get("attention_factor")
    frequencies = np.float32(1) / (np.array(divisors, np.float32) * powers(p, dim))
    return frequencies, usual if given is None else given


def _proportional(c: Config, p: Mapping[str, Any], dim: int, context: int) -> tuple[np.ndarray, float]:
    """The rope frequencies of Gemma 4.

    Pair i of columns has the frequency theta^(-2i / dim) divided by the setting `factor` (1 if missing). Only the first
    partial_rotary_factor * dim / 2 pairs rotate; the other pairs have frequency 0. Returns (frequencies float32 [dim /
    2], attention factor 1.0). p: rope settings. `c` and `context` are not used.
    """
    turned = int(p["partial_rotary_factor"] * dim // 2)
    frequencies = np.float32(1) / powers(p, dim) / np.float32(p.get("factor") or 1.0)
    return np.where(np.arange(dim // 2) < turned, frequencies, np.float32(0)), 1.0


_BUILD = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
