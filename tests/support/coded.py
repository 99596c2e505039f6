"""Random matrices in read-only formats: codes, scales, zeros and minima as a checkpoint could have them."""

from __future__ import annotations

import numpy as np

from intaglio import formats
from intaglio.formats import Quantised


def halves(x: np.ndarray) -> np.ndarray:
    """Float32 values that f16 holds."""
    return x.astype(np.float16).astype(np.float32)


def random_codes(rng: np.random.Generator, name: str, *shape: int) -> Quantised:
    """Any codes, scales around 1 / sqrt(K); `shape` [..., N, K]."""
    fmt, k = formats.get(name), shape[-1]
    group = fmt.group_of(k)
    codes = rng.integers(fmt.lowest, fmt.lowest + (1 << fmt.bits), shape).astype(fmt.dtype)
    tables = (*shape[:-1], -(-k // group))
    size = rng.uniform(-1, 1, tables) / (1 << fmt.bits) / np.sqrt(k)
    if name in ("q4_k", "q5_k", "q6_k"):
        unit = halves(rng.uniform(0.5, 1, (*shape[:-1], k // formats.BLOCK)) / 4000 / np.sqrt(k))
        low_unit = halves(unit * 3)
        steps = rng.integers(0, 64, tables) if name != "q6_k" else rng.integers(-128, 128, tables)
        many = formats.BLOCK // group
        scales = (steps * np.repeat(unit, many, axis=-1)).astype(np.float32)
        if name == "q6_k":
            return Quantised(codes, scales, group, units=unit, format=name)
        minima = (rng.integers(0, 64, tables) * np.repeat(low_unit, many, axis=-1)).astype(np.float32)
        return Quantised(codes, scales, group, minima=minima, units=unit, low_units=low_unit, format=name)
    if name == "nvfp4":
        levels = np.array([0, 1, 2, 3, 4, 6, 8, 12, -1, -2, -3, -4, -6, -8, -12], np.int8)  # twice E2M1's
        units = rng.uniform(0.5, 1, (*shape[:-1], 1)).astype(np.float32) / np.float32(256 * 8 * np.sqrt(k))
        sizes = rng.uniform(0, 448, tables).astype(formats.E4M3).astype(np.float32)
        return Quantised(rng.choice(levels, shape), sizes * units, group, units=units, format=name)
    if fmt.levels:
        return Quantised(
            codes,
            rng.uniform(0, 1, tables).astype(np.float32) / np.float32(np.sqrt(k)),
            group,
            format=name,
            levels=fmt.levels,
        )
    kept = "f16" if name.endswith("f16") else "f32" if name.endswith("f32") else "bf16"
    scales = formats.round_to(size, kept)
    zeros = rng.integers(0, 1 << fmt.bits, tables).astype(np.float32) if name.startswith("uint") else None
    lows = formats.round_to(rng.normal(size=tables) / np.sqrt(k), kept) if name.startswith("affine") else None
    if fmt.group == formats.ROW:
        scales, zeros, lows = (
            x if x is None else np.repeat(x[..., :1], tables[-1], axis=-1) for x in (scales, zeros, lows)
        )
    return Quantised(codes, scales, group, zeros=zeros, minima=lows, format=name)
