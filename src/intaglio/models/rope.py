"""Tables of rotary frequencies, as transformers computes them: default, linear, llama3, yarn and longrope.

Both spellings of config.json are read: `rope_theta` with `rope_scaling`, and `rope_parameters`, flat or per layer type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.models.config import Config, PortError

TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Table:
    """Frequencies float32 [rotary_dim / 2], the factor on cos and sin, and how a head's columns pair."""

    frequencies: tuple[float, ...]
    factor: float = 1.0
    style: str = "half"


def parameters(c: Config, kind: str = "", theta: str = "rope_theta", scaled: bool = True) -> dict[str, Any]:
    """The rope settings of layers of this `kind` in the newer spelling; `theta` is the older spelling's key for the
    base, and `scaled` whether its rope_scaling holds for these layers."""
    flat = c.get("rope_parameters", {})
    nested = any(isinstance(v, Mapping) for v in flat.values())
    given = flat.get(kind) if nested else flat
    if nested and given is None:
        raise PortError(f"config.json: rope_parameters has {', '.join(flat)} but nothing for {kind or 'all layers'}")
    out = {**(c.get("rope_scaling", {}) if scaled and not given else {}), **given}
    if "rope_theta" not in out:
        out["rope_theta"] = c.real(theta)
    out.setdefault("rope_type", out.get("type", "default"))
    out.setdefault("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    pretrained = c.get("original_max_position_embeddings")
    if pretrained:  # transformers gives the outer key priority (Phi-3)
        out["original_max_position_embeddings"] = pretrained
    out.setdefault("original_max_position_embeddings", c.whole("max_position_embeddings"))
    return out


def table(
    c: Config, p: Mapping[str, Any], head_dim: int, context: int, style: str = "half", partial: bool = False
) -> Table:
    """The table for settings `p`; `partial` if the family may turn a part of each head.

    LongRoPE's long factors are chosen when `context`, the length the Program is made for, exceeds the pretrained
    length. transformers chooses by the longest sequence at hand: then a sequence's logits would depend on its company,
    and its keys already written would be turned by other frequencies than those that follow.
    """
    kind = p["rope_type"]
    if kind not in TYPES:
        raise PortError(f"config.json: rope type {kind!r} is not ported; known are {', '.join(TYPES)}")
    if p["partial_rotary_factor"] != 1 and not partial:
        raise PortError(
            f"config.json: partial_rotary_factor={p['partial_rotary_factor']}, but this family turns whole heads"
        )
    dim = int(head_dim * p["partial_rotary_factor"])
    if dim < 2 or dim > head_dim or dim % 2:
        raise PortError(
            f"config.json: rope turns {dim} columns of head_dim={head_dim} (partial_rotary_factor="
            f"{p['partial_rotary_factor']}); wanted an even number from 2 to {head_dim}"
        )
    try:
        frequencies, factor = _BUILD[kind](c, p, dim, context)
    except KeyError as e:
        raise PortError(f"config.json: rope type {kind!r} needs {e.args[0]!r}, which is missing") from None
    return Table(tuple(float(f) for f in frequencies.astype(np.float32)), float(factor), style)


def powers(p: Mapping[str, Any], dim: int) -> np.ndarray:
    """theta^(2i / dim) float32: the power correctly rounded, which is torch's float32 within 1 ulp."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (float(p["rope_theta"]) ** exponents.astype(np.float64)).astype(np.float32)


def _default(c: Config, p: Mapping[str, Any], dim: int, context: int) -> tuple[np.ndarray, float]:
    return np.float32(1) / powers(p, dim), 1.0


def _linear(c: Config, p: Mapping[str, Any], dim: int, context: int) -> tuple[np.ndarray, float]:
    return np.float32(1) / powers(p, dim) / np.float32(p["factor"]), 1.0


def _llama3(c: Config, p: Mapping[str, Any], dim: int, context: int) -> tuple[np.ndarray, float]:
    """Long waves are divided by factor, short ones kept, those between blended."""
    plain = np.float32(1) / powers(p, dim)
    factor, low, high = (np.float32(p[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    pretrained = p["original_max_position_embeddings"]
    wave = np.float32(2 * math.pi) / plain
    smooth = (np.float32(pretrained) / wave - low) / (high - low)
    blended = (np.float32(1) - smooth) * plain / factor + smooth * plain
    long, short = wave > pretrained / float(low), wave < pretrained / float(high)
    return np.where(long, plain / factor, np.where(short, plain, blended)), 1.0


def mscale(factor: float, by: float = 1.0) -> float:
    """How much yarn heats attention for a context `factor` times as long."""
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(c: Config, p: Mapping[str, Any], dim: int, context: int) -> tuple[np.ndarray, float]:
    """Peng et al. 2023: interpolate slow pairs, keep fast ones, ramp between by the turns made in the pretrained
    length (beta_fast 32, beta_slow 1)."""
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
    """Ding et al. 2024: a divisor for each pair; attention factor sqrt(1 + ln(factor) / ln(pretrained length))."""
    pretrained = p["original_max_position_embeddings"]
    key = "long_factor" if context > pretrained else "short_factor"
    divisors = p[key]
    if len(divisors) != dim // 2:
        raise PortError(f"config.json: rope {key} has {len(divisors)} values; wanted {dim // 2}, one a rotated pair")
    factor = p.get("factor") or c.whole("max_position_embeddings") / pretrained
    usual = math.sqrt(1 + math.log(factor) / math.log(pretrained)) if factor > 1 else 1.0
    given = p.get("attention_factor")
    frequencies = np.float32(1) / (np.array(divisors, np.float32) * powers(p, dim))
    return frequencies, usual if given is None else given


_BUILD = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
