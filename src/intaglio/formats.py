"""Number formats: the width of a value, the values a format can represent, quantisation to it and back.

Everything else asks this module about bits. Independent of tensors, ops and devices. Long because each quantisation
stands beside the formats that it quantises to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, reduce
from typing import Any

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
PLAIN = {
    "f32": np.dtype(np.float32),
    "bf16": BF16,
    "f16": np.dtype(np.float16),
    "i32": np.dtype(np.int32),
}
SCALED = "int8gN / int4gN / fp8gN with N in 32..1024 a multiple of 32, int8row, fp8row, mxfp4"
CHOSEN = f"{SCALED}, q4_k"  # what quantise() takes
SPAN = 128  # least number of activations that share a scale; weight error dominates, and sums stay integers for longer
ENDS = {"int8": (127.0, 0.5), "int4": (-8.0, 0.375)}  # code of the value farthest from 0, and step of the scale search
CHUNK = 1024  # the longest run of values whose products are summed before the scale is applied
BLOCK = 256  # values of a block of llama.cpp's q4_k, q5_k and q6_k; its groups' scales are whole multiples of one unit
ROW = -1  # `group` of formats with one scale per row

TINY = np.float32(2.0**-120)  # groups whose largest value is below this become zeros: 1 / scale would overflow
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
CACHED = "e4m3"  # a plain format that only K/V caches are stored in
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)

ELEMENTS = {  # formats of a single value, as memories hold them and matrix arrays multiply them: bits, NumPy type
    **{name: (dtype.itemsize * 8, dtype) for name, dtype in PLAIN.items()},
    "e4m3": (8, E4M3),
    "int8": (8, np.dtype(np.int8)),
    "int4": (4, np.dtype(np.int8)),  # one code per byte in NumPy
    "e2m1": (4, E2M1),
}
WIDER = {  # element format -> those that hold all its values, narrowest first
    "int4": ("int8", "bf16", "f32"),
    "e2m1": ("e4m3", "bf16", "f16", "f32"),
    "int8": ("bf16", "f16", "f32"),
    "e4m3": ("bf16", "f16", "f32"),
    "bf16": ("f32",),
    "f16": ("f32",),
    "f32": (),
}
LEVELS = {  # bitsandbytes' codebooks: the values of a family's codes, float32, before the scale
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(
        float(np.float32(sign * x) / np.float32(12)) for sign in (1, -1) for x in (0, 0.0625, 8, 12, 4, 6, 2, 3)
    ),
}  # fmt: skip
ELEMENT_OF = {"fp8": "e4m3", "fp8row": "e4m3", "int8row": "int8", "mxfp4": "e2m1"}  # family -> element


class FormatError(ValueError):
    """Raised for an unknown number format, and for an operation that a number format does not support."""


@dataclass(frozen=True)
class Format:
    """A number format of weights, activations or K/V caches, such as bf16 or int8g128.

    A plain format stores only values. A format with scales stores codes, and scales by which the codes are multiplied.

    Attributes:
        name: the format's name, such as bf16 or int8g128.
        bits: bits of one value or code, without scales.
        group: number of values along a row that share a scale; 0 for plain formats, ROW (-1) for one scale per row.
        scale_bits: bits of a group besides its codes: scale, zero and minimum together. In q4_k, q5_k and q6_k, each
            block of 256 values also stores f16 numbers; their bits are divided among the groups of the block.
        row_bits: bits of a factor that each row stores, by which all scales of the row are multiplied (nvfp4); 0: rows
            store no factor.
    """

    name: str
    bits: int
    group: int = 0
    scale_bits: int = 0
    row_bits: int = 0

    @property
    def grouped(self) -> bool:
        """True if values have scales, one for a group of values or for a whole row."""
        return self.group != 0

    @property
    def family(self) -> str:
        """The format's name without the group size: int8 for int8g128, fp8row for fp8row, bf16 for bf16."""
        return re.sub(r"(?<=\d)g\d+", "", self.name)

    @property
    def integer(self) -> bool:
        """True for formats with scales whose codes are whole numbers.

        The products of such codes with int8 activations are summed exactly, as integers.
        """
        return self.grouped and self.family not in ("fp8", "fp8row", *LEVELS)

    @property
    def levels(self) -> tuple[float, ...]:
        """The codebook of the format: the value of each code before the scale is applied.

        The values are in the order of the codes. () for formats without a codebook.
        """
        return LEVELS.get(self.family, ())

    @property
    def published(self) -> bool:
        """True if the format occurs only in checkpoints that others have quantised. quantise() does not produce it."""
        return self.family not in (*PLAIN, CACHED, "int8", "int4", "fp8", "int8row", "fp8row", "mxfp4", "q4_k")

    @property
    def dtype(self) -> np.dtype:
        """NumPy dtype of the array that holds the values of a plain format, or the codes of a format with scales.

        A code takes one byte in the array, even if it has only 4 bits.
        """
        if not self.grouped:
            return ELEMENTS[self.name][1]
        if self.integer or self.levels:
            return np.dtype(np.uint8 if self.levels or self.name.startswith(("uint8", "affine8")) else np.int8)
        return E4M3

    @property
    def element(self) -> str:
        """The name of the format of a single value, without its scale: int8 for int8g128, e4m3 for fp8row.

        If ELEMENTS has no such format, the result is the name of this format itself.
        """
        return ELEMENT_OF.get(self.family, self.family if self.family in ELEMENTS else self.name)

    @property
    def lowest(self) -> int:
        """The smallest code that this format allows in a checkpoint.

        0 if codes are unsigned, else -2^(bits - 1).
        """
        unsigned = self.name in ("q4_k", "q5_k") or self.levels or self.name.startswith(("uint", "affine"))
        return 0 if unsigned else -(1 << (self.bits - 1))

    @property
    def block(self) -> int:
        """The number of consecutive values of a row that must stay together on one rank.

        - 0: a plain format, whose rows may be divided anywhere.
        - ROW (-1): a row must stay whole.

        Values that share a scale stay together. In q4_k, q5_k and q6_k all scales of 256 values are multiples of one
        stored number, so those 256 values stay together.
        """
        return BLOCK if self.name in ("q4_k", "q5_k", "q6_k") else self.group

    def group_of(self, cols: int) -> int:
        """The number of consecutive values that share one stored scale in a row of `cols` values.

        0 for plain formats. A format with one scale per row (ROW) stores a long row as several groups of equal length,
        and stores the row's scale again for each group. The result is then a multiple of 32, at most CHUNK (1024).
        """
        return self.group if self.group != ROW else -(-cols // -(-cols // CHUNK) // 32) * 32

    def nbytes(self, rows: int, cols: int) -> int:
        """The number of bytes of a [rows, cols] matrix in this format, including scales, zeros and minima."""
        scales = -(-cols // self.group_of(cols)) * self.scale_bits if self.grouped else 0
        return -(-rows * (cols * self.bits + scales + self.row_bits) // 8)


@cache
def get(name: str) -> Format:
    """The Format called `name`. Raises FormatError if no format has this name.

    Plain formats: f32, bf16, f16, i32, and e4m3. Only K/V caches are stored in e4m3.

    Formats that quantise() produces:

    - int8g128, int4g32, fp8g128 and so on: one scale per group; the number after g is the group size. fp8 codes are
      E4M3.
    - int8row and fp8row: one scale per row.
    - mxfp4 (OCP): E2M1 codes in groups of 32; each scale is a power of two.
    - q4_k (llama.cpp): 4-bit codes in groups of 32, with a scale and a minimum per group.

    The scales of int8 and int4 are bf16, which has the full float32 range; codes are chosen for the rounded scale. The
    scales of fp8 are float32, as in published checkpoints.

    Formats that are only read from checkpoints:

    - int4g32f16, int8rowf32 and so on: int4 or int8 with scales in f16 or f32.
    - uint4g128, uint8g128f16, uint8row and so on: unsigned codes with one zero per group, stored in a byte.
    - affine4g64f16, affine8g64 and so on: one minimum per group, stored in the format of the scales.
    - nf4gN and fp4gN (bitsandbytes): indices of a codebook, with one float32 scale per group.
    - nvfp4 (NVIDIA): E2M1 in groups of 16. A scale is an E4M3 value times a float32 factor of the row.
    - q5_k and q6_k (llama.cpp).

    The 6-bit and 8-bit scales of q4_k, q5_k and q6_k are multiples of one f16 number per block of 256 values.
    """
    if name in PLAIN or name == CACHED:
        return Format(name, ELEMENTS[name][0])
    if name in ("mxfp4", "q4_k"):
        return Format(name, 4, 32, 16)
    if name == "nvfp4":
        return Format(name, 4, 16, 8, 32)
    if name == "q5_k":
        return Format(name, 5, 32, 16)
    if name == "q6_k":
        return Format(name, 6, 16, 9)
    match = re.fullmatch(r"(nf4|fp4)g(\d+)", name)
    if match and int(match[2]) in range(32, CHUNK + 1, 32):
        return Format(name, 4, int(match[2]), 32)
    match = re.fullmatch(r"((?:u?int|affine)[48]|fp8)(?:g(\d+)|row)(f16|f32)?", name)
    if match and not (match[1] == "fp8" and match[3]):
        kind, group = match[1], int(match[2]) if match[2] else ROW
        if group == ROW or (group % 32 == 0 and 32 <= group <= CHUNK):
            scale = 32 if kind == "fp8" or match[3] == "f32" else 16
            lows = 8 if kind.startswith("u") else scale if kind.startswith("affine") else 0
            return Format(name, 4 if kind.endswith("4") else 8, group, scale + lows)
    raise FormatError(f"unknown number format {name!r}: use one of {', '.join(PLAIN)}, {CHOSEN}")


def element(name: str) -> str:
    """The name of the format of a single value, without its scale: e4m3 for fp8row, int8 for int8g128, bf16 for bf16.

    Chips multiply values in this format. Some formats have codes that no simulated chip multiplies directly: formats
    with zeros or minima, and formats only read from checkpoints (uint4g32, q4_k, int8rowf32). For these formats the
    result is `name` itself. Raises FormatError for an unknown name.
    """
    return name if name in ELEMENTS else get(name).element


def bits(name: str) -> int:
    """The number of bits of one value, without scales, in the format `name`. Raises FormatError for an unknown name."""
    return ELEMENTS[name][0] if name in ELEMENTS else get(name).bits


def round_to(x: np.ndarray, name: str) -> np.ndarray:
    """The values of `x`, rounded to the plain format `name`: float32, in the shape of `x`. Ties go to even."""
    return x.astype(get(name).dtype).astype(np.float32)


def to_e4m3(x: np.ndarray, scale: float | np.ndarray = 1) -> np.ndarray:
    """The quotients `x` / `scale`, rounded to E4M3 (dtype ml_dtypes.float8_e4m3fn), in the shape of x / scale.

    Quotients are clipped to -448..448 first; ties go to even. The result is NaN where `x` is not finite.
    """
    y = np.asarray(x, np.float32) / np.asarray(scale, np.float32)
    return np.where(np.isfinite(x), np.clip(y, -448, 448), np.float32(np.nan)).astype(E4M3)


@dataclass(frozen=True)
class Quantised:
    """A quantised matrix [N, K]: codes, with one scale per group of values along a row.

    The value of a code is (code - zero) * scale - minimum; with `levels` it is levels[code] * scale. A Quantised can
    also be a stack of matrices; then all arrays have one more dimension in front.

    Attributes:
        codes: [N, K], whole numbers of one byte, or E4M3.
        scales: float32 [N, ceil(K / group)]; `units` are already multiplied into them.
        group: number of values along a row that share a scale.
        zeros: whole numbers, in the shape of `scales`; None if all are 0.
        minima: float32, in the shape of `scales`; None if all are 0. If a format adds a bias, its minimum is -bias.
        units: None for most formats. In q4_k, q5_k and q6_k float32 [N, K / 256]: each scale is a whole multiple of the
            unit of its 256 values. In nvfp4 float32 [N, 1]: each scale is an E4M3 multiple of the unit of its row.
        low_units: like `units`, for the minima: float32 [N, K / 256], or None. Each minimum is a whole multiple of the
            low unit of its 256 values.
        format: name of the format; "" if no name describes all arrays.
        turned: True if the matrix is [K, N] and the arrays store its transpose [N, K]. `shape` is then (K, N).
        levels: the codebook, see Format.levels; () if codes are numbers themselves.
    """

    codes: np.ndarray
    scales: np.ndarray
    group: int
    zeros: np.ndarray | None = None
    minima: np.ndarray | None = None
    units: np.ndarray | None = None
    low_units: np.ndarray | None = None
    format: str = ""
    turned: bool = False
    levels: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix: the shape of `codes`, with the last two sizes swapped if `turned` is True."""
        s = self.codes.shape
        return (*s[:-2], s[-1], s[-2]) if self.turned else s

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Dequantised rows of the stored arrays, as float32 [n, K].

        ids: numbers of the n rows, or a slice. If `turned` is True, a stored row is a column of the matrix.
        """
        codes = self.codes[ids]
        values = np.asarray(self.levels, np.float32)[codes] if self.levels else codes.astype(np.float32)
        if self.zeros is not None:
            values -= self.spread(self.zeros[ids])
        values *= self.spread(self.scales[ids])
        return values if self.minima is None else values - self.spread(self.minima[ids])

    def spread(self, x: np.ndarray) -> np.ndarray:
        """An array [..., K] that has in each column the value of the column's group.

        x: one value per group, [..., groups], such as `scales`.
        """
        return np.repeat(x, self.group, axis=-1)[..., : self.codes.shape[-1]]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of this matrix, as a dict {name of the attribute: array}, without attributes that are None.

        In each array, the first dimension is the row of the stored matrix; in a stack, it is the number of the matrix.
        """
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in named.items() if isinstance(x, np.ndarray)}

    def each(self, f: Callable[[np.ndarray], np.ndarray]) -> Quantised:
        """A Quantised in which every array is replaced by `f`(array). `f` may only select, move or reshape rows."""
        return self.holding({name: f(x) for name, x in self.arrays.items()})

    def holding(self, arrays: Mapping[str, np.ndarray]) -> Quantised:
        """A copy of this matrix with some arrays replaced. arrays: {name of the attribute: its new array}."""
        changes: dict[str, Any] = dict(arrays)
        return replace(self, **changes)

    def matrix(self, e: int) -> Quantised:
        """The matrix number `e` (from 0) of a stack of matrices, as a Quantised with arrays of one dimension less."""
        return self.each(lambda x: x[e])

    def stacked(self, shape: tuple[int, ...]) -> Quantised:
        """A Quantised that holds this matrix cut into a stack of E matrices of N rows each.

        shape: (E, N, K). This matrix must have E * N rows. Each array [E * N, ...] becomes [E, N, ...].
        """
        return self.each(lambda x: x.reshape(*shape[:-1], -1))


def in_groups(x: np.ndarray, group: int) -> np.ndarray:
    """The rows of `x` [N, K], each cut into groups: float32 [N, ceil(K / group), group].

    The last group of a row is padded with zeros.
    """
    n, k = x.shape
    padded = np.zeros((n, -(-k // group) * group), np.float32)
    padded[:, :k] = x
    return padded.reshape(n, -1, group)


def quantise(x: np.ndarray, name: str) -> Quantised:
    """Quantise weights `x` [N, K] to the format `name`. Returns a Quantised.

    Only q4_k has minima; in all other formats here a value is code * scale.

    - int8: the value of largest magnitude gets the code 127 or -127. Codes are -127..127.
    - int4: the value of largest magnitude gets the code -8, as in llama.cpp's Q4_0. Codes are -8..7.
    - int8 and int4 in groups: of this scale and four scales near it, the scale with the least squared error is taken.
    - fp8: the largest magnitude of a group maps to 448, the largest E4M3 value.
    - mxfp4: the scale is the power of two that brings the largest magnitude into 4..8 (OCP Microscaling Formats 1.0,
      6.3). Scaled values are rounded to E2M1, at most 6. Codes are twice the E2M1 values, so that they are whole
      numbers (-12..12). The stored scales are therefore half of that power of two.
    - q4_k: of several pairs of scale and minimum, the pair with the least squared error, see _q4_k(). K must be a
      multiple of 256.

    A group that holds NaN or infinity becomes NaN; in q4_k, so does a block of 256 values with a value above 2^20.
    Groups whose values are all below 2^-120 in magnitude become 0, except in q4_k.

    Raises FormatError for an unknown format, a plain format, a format that is only read from checkpoints, and for q4_k
    if K is no multiple of 256.
    """
    fmt = get(name)
    if not fmt.grouped or fmt.published:
        what = "only read from checkpoints" if fmt.published else "a plain format"
        raise FormatError(f"{name} is {what}; quantise() takes {CHOSEN}; round_to() the others")
    x = np.asarray(x, np.float32)
    if name == "q4_k":
        return _q4_k(x)
    group = fmt.group_of(x.shape[1])
    groups = in_groups(x, group)
    low, high = groups.min(axis=2), groups.max(axis=2)
    if fmt.group == ROW:
        low, high = (
            np.broadcast_to(v, groups.shape[:2]) for v in (low.min(1, keepdims=True), high.max(1, keepdims=True))
        )
    peak = np.maximum(-low, high)
    if fmt.family == "mxfp4":
        raw = np.exp2(np.floor(np.log2(np.maximum(peak, TINY), dtype=np.float64)) - 3).astype(np.float32)
    elif fmt.family == "int4":
        raw = np.where(-low >= high, low, high) / np.float32(-8)
    else:
        raw = peak / np.float32(127 if fmt.integer else 448)
    scales = np.where(peak < TINY, np.float32(0), np.where(np.isfinite(peak), raw, np.float32(np.nan)))
    if fmt.scale_bits == 16:
        scales = round_to(scales, "bf16")
    groups = np.where(np.isfinite(scales)[:, :, None], groups, 0)
    if fmt.family in ENDS and fmt.group != ROW:
        scales = _searched(groups, np.where(-low >= high, low, high), scales, fmt)
    codes = _nearest_codes(groups, scales, fmt)
    return Quantised(codes.reshape(len(x), -1)[:, : x.shape[1]].copy(), scales, group, format=name)


def _searched(groups: np.ndarray, farthest: np.ndarray, scales: np.ndarray, fmt: Format) -> np.ndarray:
    """The scale with the least squared error for each group, out of five candidates: float32 [n, G].

    Each candidate follows from a quotient, (the group's value farthest from 0) / scale, and is rounded to bf16. For
    int8 the magnitude of the quotient is 127 in the first candidate (`scales`), and 126, 126.5, 127.5 and 128 in the
    others. For int4 the quotient is -8 in the first candidate, and -8.75, -8.375, -7.625 and -7.25 in the others.
    csrc/pack/ computes the same scales, bit for bit.

    Args:
        groups: the values, [n, G, group].
        farthest: the value farthest from 0 in each group, [n, G].
        scales: the first candidates, [n, G]. A candidate that is 0, inf or NaN is returned without a search.
        fmt: the format, int8 or int4 in groups.
    """
    end, step = ENDS[fmt.family]
    reach = np.abs(farthest) if end > 0 else farthest
    sought = np.isfinite(scales) & (scales != 0)
    best, least = scales, _error(groups, scales, fmt)
    for i in (1, -1, 2, -2):
        own = np.where(sought, round_to(reach / np.float32(end + i * step), "bf16"), scales)
        error = _error(groups, own, fmt)
        better = error < least
        best, least = np.where(better, own, best), np.where(better, error, least)
    return best


def _error(groups: np.ndarray, scales: np.ndarray, fmt: Format) -> np.ndarray:
    """The sum of squared quantisation errors of each group, float32 [n, G].

    groups: the values, [n, G, group]. scales: the scale of each group, [n, G]. The order of the additions is that of
    SIMD code: 32 partial sums, which are then added pairwise.
    """
    off = groups - _nearest_codes(groups, scales, fmt) * scales[:, :, None]
    with np.errstate(over="ignore"):  # squares of values beyond 2^64 become infinity, which is never the least error
        parts = _sum((off * off).reshape(*scales.shape, -1, 32).transpose(2, 3, 0, 1))
        while len(parts) > 1:
            parts = parts[: len(parts) // 2] + parts[len(parts) // 2 :]
    return parts[0]


def _nearest_codes(groups: np.ndarray, scales: np.ndarray, fmt: Format) -> np.ndarray:
    """The code of the format `fmt` nearest to each value, as int8 or E4M3 [n, G, group].

    The code is 0 where the scale is 0 or NaN. groups: the values, [n, G, group]. scales: the scale of each group, [n,
    G].
    """
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    return _codes(groups * np.nan_to_num(inverse)[:, :, None], fmt)


def _codes(x: np.ndarray, fmt: Format) -> np.ndarray:
    """The code of the format `fmt` nearest to each value of `x`, as an array in the shape of `x`.

    The array is int8 or E4M3. Ties go to even. x: values already divided by their scale.
    """
    if fmt.family == "mxfp4":
        return (np.clip(x / 2, -6, 6).astype(E2M1).astype(np.float32) * 2).astype(np.int8)
    if not fmt.integer:
        return np.clip(x, -448, 448).astype(E4M3)
    floor, ceil = (-127, 127) if fmt.bits == 8 else (-8, 7)
    return np.clip(np.rint(x), floor, ceil).astype(np.int8)


def quantise_rows(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise activations `x` [T, K] to int8. Returns (codes int8 [T, G, group], scales float32 [T, G]).

    G is ceil(K / group). If `group` does not divide K, the last group is padded with zeros. If a group has fewer than
    SPAN (128) values, neighbouring groups that together have SPAN values get the same scale. A scale is max|x| / 127
    over the values that share it. Codes are rint(x * (127 / max|x|)), ties to even; they are 0 where max|x| is below
    TINY (2^-120).
    """
    groups = in_groups(np.asarray(x, np.float32), group)
    parts = -(-SPAN // group)
    peak = np.abs(groups).max(axis=2)
    peak = np.maximum.reduceat(peak, range(0, peak.shape[1], parts), axis=1).repeat(parts, axis=1)[:, : peak.shape[1]]
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak >= TINY)
    codes = np.rint(groups * inverse[:, :, None]).astype(np.int8)
    return codes, peak / np.float32(127)


# q4_k: lines through groups of 32, value = code * scale - minimum, drawn in blocks of 256

LARGEST = np.float32(2.0**20)  # the largest value allowed: the f16 units reach it with room to spare
STEPS = np.float32(15)  # steps between the lowest and the highest code
SIZES = np.float32(63)  # the largest scale and minimum, in units
MOVES = np.array([-1, -0.5, 0, 0.5], np.float32)  # steps by which either end of a range is moved inwards
NEAR = (-1, 0, 1)  # candidates beside the nearest scale and minimum, in units
ZERO = np.float32(0)


def _q4_k(x: np.ndarray) -> Quantised:
    """Quantise float32 `x` [N, K] to q4_k. Returns a Quantised.

    q4_k has 4-bit codes, and a scale and a minimum for each group of 32 values. In a block of 256 values, each scale is
    0 to 63 times an f16 number that the block stores, its unit. The minima have a second unit.

    1. For each group, try 16 ranges: the range from the group's smallest to its largest value, with each end moved
       inwards by -1, -0.5, 0 or 0.5 steps. Code the values within each range, and fit a line to the codes by least
       squares. The best line gives the group's scale and minimum.
    2. The units of a block are its largest scale / 63 and its largest minimum / 63, rounded up to f16.
    3. For each group, try the three multiples of the unit nearest to its scale. With each of them try the three
       multiples nearest to its minimum. Keep the pair with the least squared error.

    Blocks with NaN, infinity or a value above 2^20 become NaN. Raises FormatError if K is no multiple of 256.

    csrc/isa/scales.inl computes the same bits, in the same order. llama.cpp has a similar search (ggml-quants.c), but
    moves only one end, gives large values more weight, and has no third step.
    """
    n, k = x.shape
    if k % BLOCK:
        raise FormatError(f"q4_k needs rows of whole blocks of {BLOCK} values, not {k}; use int4g32 (as many bits)")
    x = np.ascontiguousarray(np.moveaxis(x.reshape(n, k // BLOCK, -1, 32), 3, 0))  # [32, n, blocks, groups]
    sound = (np.abs(x) <= LARGEST).all(axis=(0, 3))[:, :, None]
    x = np.where(sound, x, np.float32(0))
    scale, minimum, middle = _lines(x)
    units, low_units = _unit(scale), _unit(minimum)
    mean, nearest = _sum(x) / 32, _steps(scale, units)
    least = np.full(scale.shape, np.inf, np.float32)
    scales, minima = np.zeros_like(scale), np.zeros_like(scale)
    for i in NEAR:
        s = np.clip(nearest + np.float32(i), 0, SIZES) * units
        below = _steps(s * middle - mean, low_units)
        for j in NEAR:
            m = np.clip(below + np.float32(j), 0, SIZES) * low_units
            error = _sum(np.square(x + m - _nearest(x, s, m) * s))
            better = error < least
            least, scales, minima = (np.where(better, *pair) for pair in ((error, least), (s, scales), (m, minima)))
    codes = np.moveaxis(_nearest(x, scales, minima).astype(np.int8), 0, 3).reshape(n, k)
    units = np.where(sound, units, np.float32(np.nan))
    scales, minima, units, low_units = (
        a.reshape(n, -1) for a in (np.where(sound, scales, units), minima, units, low_units)
    )
    return Quantised(codes, scales, 32, minima=minima, units=units, low_units=low_units, format="q4_k")


def _lines(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit a line x ~ scale * code - offset to each group of 32 values, by least squares.

    To get codes, the values are rounded to the 16 levels of a range. The ends of the range are the group's smallest and
    largest value, each moved by one of four distances (MOVES). Of these 16 ranges, the range with the least error is
    kept.

    x: the values [32, groups...]; the first axis is the value within its group. Returns (scale >= 0, offset >= 0, mean
    of the group's 32 codes), each [groups...].
    """
    low, mean = np.minimum(x.min(axis=0), 0), _sum(x) / 32
    reach = x.max(axis=0) - low
    step, inverse = reach / STEPS, _quotient(np.full_like(reach, STEPS), reach, TINY)
    t = (x - low) * inverse
    total, zero = _sum(t), low * inverse
    raised = total + 32 * zero  # the same sum with x = 0 as origin
    best, slope, middle = np.full_like(reach, -np.inf), np.zeros_like(reach), np.zeros_like(reach)
    for a in MOVES:
        for b in MOVES:
            q = np.rint(np.clip((t - a) * (STEPS / (STEPS - a - b)), 0, STEPS))
            q1, q2, qt = _sum(q), _sum(q * q), _sum(q * t)
            shared = qt - q1 * total / 32
            free = _quotient(shared, q2 - q1 * q1 / 32)
            lifted = qt + zero * q1
            through = _quotient(lifted, q2)
            above = free * q1 < raised  # the minimum would be below 0: use the line through 0
            gain = np.where(above, lifted * through - raised * raised / 32, shared * free)  # of the squared error
            better = gain > best
            best, middle = np.where(better, gain, best), np.where(better, q1 / 32, middle)
            slope = np.where(better, np.where(above, through, free), slope)
    scale = slope * step
    return np.maximum(scale, 0), np.maximum(scale * middle - mean, 0), middle


def _sum(x: np.ndarray) -> np.ndarray:
    """The sum of an array [n, ...] over its first axis, as an array [...].

    The n parts are added one after the other, from index 0 on. The C++ code adds in the same order, so both round
    alike.
    """
    return reduce(np.add, x)


def _quotient(x: np.ndarray, y: np.ndarray, least: np.float32 = ZERO) -> np.ndarray:
    """The quotients x / y, element by element; 0 where `y` is `least` or less."""
    return np.divide(x, y, out=np.zeros_like(x), where=y > least)


def _unit(sizes: np.ndarray) -> np.ndarray:
    """The unit of each q4_k block, as float32 [..., 1].

    The unit is the smallest f16 number that is at least max(sizes) / 63. sizes: the 8 scales, or the 8 minima, of each
    block, [..., 8].
    """
    unit = sizes.max(axis=-1, keepdims=True) / SIZES
    half = unit.astype(np.float16)
    return np.where(half < unit, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)


def _steps(sizes: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """The quotients `sizes` / `unit` as whole numbers from 0 to 63, in float32.

    The quotients are rounded and clipped. sizes: the 8 scales, or the 8 minima, of each q4_k block, [..., 8]. unit: the
    unit of each block, [..., 1].
    """
    return np.rint(np.clip(_quotient(sizes, np.broadcast_to(unit, sizes.shape)), 0, SIZES))


def _nearest(x: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """The q4_k code (0 to 15) nearest to each value of `x`, as float32 in the shape of `x`.

    A code stands for the value code * scale - minimum. Where the scale is 0, the code is 0.

    x: [32, ...], groups of 32 values. scale, minimum: one number per group, [...].
    """
    return np.rint(np.clip((x + minimum) * _quotient(np.ones_like(scale), scale), 0, STEPS))
