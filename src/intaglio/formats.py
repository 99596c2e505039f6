"""Number formats: the only truth about bits.

What each format can represent, how wide a value is, and how a weight matrix becomes codes and scales.
Knows nothing of tensors, ops or devices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
PLAIN = {
    "f32": np.dtype(np.float32),
    "bf16": BF16,
    "f16": np.dtype(np.float16),
    "i32": np.dtype(np.int32),
}
GROUPED = "int8gN / int4gN with N in 32..1024 a multiple of 32"
SPAN = 128  # activations that share a scale, at least: the error is the weights' anyway, and sums stay integers longer
SCALE_BITS = 16  # group scales are stored as bf16: full float32 range, and codes are chosen against the rounded scale


TINY = np.float32(2.0**-120)  # groups whose largest value is below this become zeros: 1 / scale would overflow


class FormatError(ValueError):
    """A format name nobody knows, or a value it cannot hold."""


@dataclass(frozen=True)
class Format:
    """One number format. `group` is 0 for plain formats, else the run of values along a row that shares a scale."""

    name: str
    bits: int
    group: int = 0

    @property
    def grouped(self) -> bool:
        return self.group > 0

    @property
    def dtype(self) -> np.dtype:
        """NumPy type of a plain format's values, or of a grouped format's codes (one code a byte)."""
        return np.dtype(np.int8) if self.grouped else PLAIN[self.name]

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes a [rows, cols] matrix takes in this format, scales included."""
        scales = -(-cols // self.group) * SCALE_BITS if self.grouped else 0
        return -(-rows * (cols * self.bits + scales) // 8)


@cache
def get(name: str) -> Format:
    """The format called `name`: f32, bf16, f16, i32, or int8/int4 in groups, written int8g128, int4g32 and so on."""
    if name in PLAIN:
        return Format(name, PLAIN[name].itemsize * 8)
    match = re.fullmatch(r"int(4|8)g(\d+)", name)
    if match and int(match[2]) % 32 == 0 and 32 <= int(match[2]) <= 1024:
        return Format(name, int(match[1]), int(match[2]))
    raise FormatError(f"unknown number format {name!r}: use one of {', '.join(PLAIN)}, or {GROUPED}")


def round_to(x: np.ndarray, name: str) -> np.ndarray:
    """`x` rounded (to nearest, ties to even) to the plain format `name`, returned as float32 of the same shape."""
    return x.astype(get(name).dtype).astype(np.float32)


@dataclass(frozen=True)
class Quantised:
    """A matrix as codes int8 [N, K] and scales float32 [N, ceil(K / group)] (bf16-valued): value = code * scale."""

    codes: np.ndarray
    scales: np.ndarray
    group: int

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """The named rows as float32 [n, K]."""
        spread = np.repeat(self.scales[ids], self.group, axis=1)[:, : self.codes.shape[1]]
        return self.codes[ids].astype(np.float32) * spread


def in_groups(x: np.ndarray, group: int) -> np.ndarray:
    """[N, K] as [N, ceil(K / group), group], zero padded."""
    n, k = x.shape
    padded = np.zeros((n, -(-k // group) * group), np.float32)
    padded[:, :k] = x
    return padded.reshape(n, -1, group)


def quantise(x: np.ndarray, name: str) -> Quantised:
    """Weights [N, K] to a grouped format, symmetric, one bf16 scale a group.

    int8: scale = max|w| / 127, codes -127..127. int4: the value of largest magnitude maps to -8, so that all sixteen
    codes are used (the choice of llama.cpp's Q4_0); codes -8..7.
    """
    fmt = get(name)
    if not fmt.grouped:
        raise FormatError(f"{name} is a plain format; quantise() takes int8gN or int4gN, round_to() the others")
    groups = in_groups(np.asarray(x, np.float32), fmt.group)
    low, high = groups.min(axis=2), groups.max(axis=2)
    if fmt.bits == 8:
        raw = np.maximum(-low, high) / np.float32(127)
        floor, ceil = -127, 127
    else:
        raw = np.where(-low >= high, low, high) / np.float32(-8)
        floor, ceil = -8, 7
    scales = round_to(np.where(np.maximum(-low, high) < TINY, np.float32(0), raw), "bf16")
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.clip(np.rint(groups * inverse[:, :, None]), floor, ceil).astype(np.int8)
    return Quantised(codes.reshape(len(x), -1)[:, : x.shape[1]].copy(), scales, fmt.group)


def quantise_rows(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations [T, K] to int8 on the fly: codes int8 [T, G, group] and scales float32 [T, G], G = ceil(K / group).

    Scales are shared by as many groups as make SPAN values: max|x| / 127 kept in float32; codes = rint(x * (127 /
    max|x|)), ties to even; zeros where max|x| < TINY.
    """
    groups = in_groups(np.asarray(x, np.float32), group)
    parts = -(-SPAN // group)
    peak = np.abs(groups).max(axis=2)
    peak = np.maximum.reduceat(peak, range(0, peak.shape[1], parts), axis=1).repeat(parts, axis=1)[:, : peak.shape[1]]
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak >= TINY)
    codes = np.rint(groups * inverse[:, :, None]).astype(np.int8)
    return codes, peak / np.float32(127)
