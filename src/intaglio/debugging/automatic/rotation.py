"""How a rotary embedding rotates keys or queries (columns, pairs and angles), found from traced values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intaglio.debugging.automatic.trace import same


@dataclass(frozen=True)
class Rotation:
    """A rotary position embedding (RoPE), as observed in a trace.

    Attributes:
        dim: number of columns of a head that are rotated, counted from the first; 0 if none are rotated.
        style: which two columns are rotated together: "half" (columns i and i + dim / 2) or "interleaved" (columns 2i
            and 2i + 1).
        factor: factor by which the rotated columns are scaled.
        angles: for each pair of columns, its rotation in radians per position.
    """

    dim: int = 0
    style: str = "half"
    factor: float = 1.0
    angles: tuple[float, ...] = ()


def observe_rotation(before: np.ndarray, after: np.ndarray) -> Rotation | None:
    """Return the Rotation that turns `before` into `after`, two arrays [heads, tokens, head_dim]; None if none does.

    A Rotation is also found if the columns of a pair are neighbours in `before` and half a head apart in `after`.
    Attention scores are the same in both orders of columns.
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
    """Return the pairs of columns of `x` [..., n] as complex numbers [..., n / 2].

    With `style` "half", the columns of a pair are n / 2 apart. With any other `style` they are neighbours.
    """
    wide = x.astype(np.float64)
    half = wide.shape[-1] // 2
    if style == "half":
        return np.asarray(wide[..., :half] + 1j * wide[..., half:])
    return np.asarray(wide[..., 0::2] + 1j * wide[..., 1::2])


def _turned(before: np.ndarray, after: np.ndarray, style: str) -> tuple[float, tuple[float, ...]] | None:
    """Measure the rotation that turns `before` into `after`, two arrays [heads, tokens, dim].

    Returns a tuple (factor, angles). `factor` is the length of a vector after the rotation divided by its length
    before. `angles` has one value for each pair of dimensions: its rotation in radians per position. Returns None if
    `after` is not a rotation of `before` by angles proportional to the position.

    Args:
        before: the vectors before the rotation.
        after: the vectors after the rotation.
        style: which dimensions form a pair: "half" (half of `dim` apart), "interleaved" (neighbours), or "sorted"
            (neighbours in `before`, half of `dim` apart in `after`).
    """
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
