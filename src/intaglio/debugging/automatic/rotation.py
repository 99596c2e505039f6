"""What a position embedding does to keys or queries: which columns turn, in which pairs, by which angles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intaglio.debugging.automatic.trace import same


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding as observed.

    Attributes:
        dim: columns of a head that turn, the first ones; 0: none.
        style: half or interleaved, as in rope tables.
        factor: scale of the turned columns.
        angles: radians per position of each pair.
    """

    dim: int = 0
    style: str = "half"
    factor: float = 1.0
    angles: tuple[float, ...] = ()


def observe_rotation(before: np.ndarray, after: np.ndarray) -> Rotation | None:
    """The rotation that takes `before` to `after` [heads, tokens, head_dim]; None if it is no rotation by position.

    Pairs that are interleaved in `before` may lie by halves in `after`: scores do not depend on the order of columns.
    """
    if same(before, after):
        return Rotation()
    kept = np.array([same(before[..., c], after[..., c]) for c in range(before.shape[-1])])
    first = int(np.flatnonzero(~kept)[-1]) + 1
    for dim in dict.fromkeys((first + first % 2, before.shape[-1])):
        for style in ("half", "interleaved", "sorted"):
            if (found := _turned(before[..., :dim], after[..., :dim], style)) is not None:
                return Rotation(dim, "interleaved" if style == "sorted" else style, *found)
    return None


def _pairs(x: np.ndarray, style: str) -> np.ndarray:
    """The pairs of columns as complex numbers."""
    wide = x.astype(np.float64)
    half = wide.shape[-1] // 2
    if style == "half":
        return np.asarray(wide[..., :half] + 1j * wide[..., half:])
    return np.asarray(wide[..., 0::2] + 1j * wide[..., 1::2])


def _turned(before: np.ndarray, after: np.ndarray, style: str) -> tuple[float, tuple[float, ...]] | None:
    """(factor, angle of each pair) if `after` is `before` turned by an angle proportional to the position."""
    if before.shape[-1] % 2:
        return None
    a, b = _pairs(before, style), _pairs(after, "half" if style == "sorted" else style)
    ratio = (b * a.conj()).sum(axis=0) / (np.abs(a) ** 2).sum(axis=0)  # [tokens, pairs]
    angles = np.angle(ratio[1] / ratio[0])
    factor = float(np.abs(ratio).mean())
    for step in range(2, len(ratio)):  # more digits from later positions
        guess = angles * step
        angles = (guess + np.angle(ratio[step] / ratio[0] * np.exp(-1j * guess))) / step
    made = a * factor * np.exp(1j * angles * np.arange(before.shape[1])[:, None])
    fits = same(made.real, b.real, 1e-4) and same(made.imag, b.imag, 1e-4)
    return (1.0 if abs(factor - 1) < 1e-5 else factor, tuple(angles)) if fits else None
