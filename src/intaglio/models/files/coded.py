"""Quantised matrices stored as several tensors (Coded), and the decoding that the published formats share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import gcd, lcm

import ml_dtypes
import numpy as np

from intaglio import formats
from intaglio.formats import ROW, Quantised
from intaglio.models.config import PortError
from intaglio.ops import Value

Reader = Callable[[str], np.ndarray]
RUN = 1 << 20  # values that are dequantised to bf16 at a time
TWICE_E2M1 = (np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32) * 2).astype(np.int8)


@dataclass(frozen=True)
class Part:
    """Rule that says which part of a stored tensor is needed to decode given rows of a matrix.

    The stored tensor holds the codes, scales or zeros of the matrix.

    Attributes:
        axis: the axis of the tensor that corresponds to the rows of the matrix; None: any rows need the whole tensor.
        each: number of rows of the matrix per index along `axis`, such as 8 if each word has the codes of 8 rows.
    """

    axis: int | None = 0
    each: int = 1

    def cut(self, x: np.ndarray, rows: slice) -> np.ndarray:
        """The part of the stored tensor `x` that is needed to decode some rows of the matrix, as a view.

        If self.axis is None, the result is `x` itself.

        Args:
            x: the stored tensor.
            rows: the rows of the matrix. Start and stop must be multiples of self.each; stop may also be the number of
                rows.
        """
        if self.axis is None:
            return x
        return x[(slice(None),) * self.axis + (slice(rows.start // self.each, -(-rows.stop // self.each)),)]


@dataclass(frozen=True)
class Coded:
    """Describes how a matrix is decoded from several stored tensors (codes, scales, zeros).

    Attributes:
        format: number format of the decoded matrix.
        shape: shape of the decoded matrix.
        parts: {name of a stored tensor: rule for the part of the tensor from which given rows are decoded}.
        decode: function that returns some decoded rows of the matrix. Its argument is a function: called with the name
            of a stored tensor, it returns the part of that tensor from which these rows are decoded.
        turned: True if the arrays store the transposed matrix, see formats.Quantised.
        whole: number of consecutive rows that must be decoded together; 1 if each row can be decoded alone.
        order: name of the act-order permutation of the columns (g_idx); "" if the columns are not reordered.
    """

    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    decode: Callable[[Reader], Value]
    turned: bool = False
    whole: int = 1
    order: str = ""

    @property
    def step(self) -> int:
        """The granularity of partial reads, as a number of rows.

        Start and stop of a read must be multiples of this number; stop may also be the number of rows.
        """
        return lcm(self.whole, *(part.each for part in self.parts.values()))

    def read(self, reader: Reader, rows: slice | None = None) -> Value:
        """Read and decode the matrix or some of its rows. Returns a Quantised, or an array for a plain format (bf16).

        Args:
            reader: function that returns the values of a stored tensor by name.
            rows: the rows to decode; None: all. Start and stop must be multiples of self.step; stop may also be the
                number of rows.
        """
        run = rows or slice(0, self.shape[0])
        value = self.decode(lambda name: self.parts[name].cut(reader(name), run))
        return replace(value, format=self.format, turned=self.turned) if isinstance(value, Quantised) else value


@dataclass(frozen=True)
class Stored:
    """Types and shapes of the tensors in a checkpoint's files, and a function that reads the tensors.

    Attributes:
        dtypes: {name of a tensor: its type, as safetensors calls it}.
        shapes: {name of a tensor: its shape}.
        read: function that returns the stored values of a tensor by name.
    """

    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    read: Reader


def bases(stored: Stored, suffix: str) -> list[str]:
    """The names of all tensors that end in `suffix`, with the suffix removed, as a list."""
    return [n.removesuffix(suffix) for n in stored.dtypes if n.endswith(suffix)]


def spread_rows(scales: np.ndarray, shape: tuple[int, ...], format: str) -> tuple[np.ndarray, int]:
    """Makes one scale per group of columns from one scale per row. Returns (scales, number of columns in a group).

    The scales are float32 [..., N, groups]: the scale of a row is repeated for each group of the row.

    Args:
        scales: one scale per row, or one for the whole matrix.
        shape: shape of the matrix, [..., N, K].
        format: name of a format with one scale per row. The format decides how many columns a group has.
    """
    group = formats.get(format).group_of(shape[-1])
    by_row = (
        scales.astype(np.float32).reshape(*shape[:-1], 1) if scales.size > 1 else scales.astype(np.float32).reshape(1)
    )
    return np.broadcast_to(by_row, (*shape[:-1], -(-shape[-1] // group))).copy(), group


def with_row_scales(codes: np.ndarray, scales: np.ndarray, format: str) -> Quantised:
    """A Quantised made of the codes [N, K] of a matrix and one scale per row.

    codes: kept unchanged. scales: one scale per row, or one for the whole matrix. format: name of a format with one
    scale per row, such as int8row.
    """
    return Quantised(codes, *spread_rows(scales, codes.shape, format))


def as_scales(x: np.ndarray) -> np.ndarray:
    """Returns the scales `x`, as a checkpoint stores them, converted to float32.

    A uint8 array is read as E8M0: a byte stands for 2 ** (byte - 127), and 255 stands for NaN.
    """
    return (x.view(ml_dtypes.float8_e8m0fnu) if x.dtype == np.uint8 else x).astype(np.float32)


def e2m1(bytes: np.ndarray, exponents: np.ndarray) -> Quantised:
    """An MXFP4 matrix [..., N, K], as a Quantised.

    The codes of a Quantised are whole numbers, so they are twice the E2M1 values. Its scales are half the stored
    scales.

    Args:
        bytes: [..., N, K / 2], two E2M1 codes in each byte.
        exponents: uint8 [..., N, K / 32], the scales as exponents of 2 (E8M0).
    """
    return Quantised(TWICE_E2M1[nibbles(bytes)], as_scales(exponents) * np.float32(0.5), 32)


def e2m1_factored(bytes: np.ndarray, scales: np.ndarray, factor: np.ndarray) -> Quantised:
    """An NVFP4 matrix [..., N, K], as a Quantised.

    A value is E2M1 value * scale * factor. The codes of a Quantised are whole numbers, so they are twice the E2M1
    values. Its scales are scale * factor / 2.

    Args:
        bytes: [..., N, K / 2], two E2M1 codes in each byte.
        scales: E4M3 [..., N, K / 16].
        factor: one float32 number by which all scales are multiplied.
    """
    half = np.float32(0.5) * factor.astype(np.float32).reshape(-1)[0]
    units = np.full((*scales.shape[:-1], 1), half, np.float32)
    return Quantised(TWICE_E2M1[nibbles(bytes)], scales.astype(np.float32) * half, 16, units=units)


def nibbles(x: np.ndarray) -> np.ndarray:
    """The 4-bit codes in an array of bytes or words [..., n], as uint8 [..., n * codes per item].

    The codes of an item come in the order of its bits, lowest bits first.
    """
    bytes = np.ascontiguousarray(x).view(np.uint8)
    return np.stack([bytes & 15, bytes >> 4], axis=-1).reshape(*bytes.shape[:-1], -1)


def fields(x: np.ndarray, bits: int, count: int | None = None) -> np.ndarray:
    """The codes of `bits` bits (1 to 8) in an array of 32-bit words or bytes [..., n], as uint8 [..., count].

    The codes of an item come in the order of its bits, lowest bits first. Codes of 3, 5, 6 or 7 bits are packed in one
    of two ways: (a) without gaps, so that some codes begin in one word and end in the next; (b) with only whole codes
    in each word. Way (b) is assumed if `count` codes need n words in way (b) but not in way (a), otherwise way (a).

    count: number of codes to return; None: all.
    """
    if bits in (4, 8):
        codes = nibbles(x) if bits == 4 else np.ascontiguousarray(x).view(np.uint8)
        return codes[..., :count]
    words = x.shape[-1]
    streams = np.unpackbits(np.ascontiguousarray(x).view(np.uint8), axis=-1, bitorder="little")
    if count is not None and words == -(-count // (32 // bits)) and words != -(-count * bits // 32):
        each = 32 // bits * bits  # bits of a word that hold codes
        streams = streams.reshape(*x.shape[:-1], words, 32)[..., :each].reshape(*x.shape[:-1], -1)
    whole = streams.shape[-1] // bits
    parts = streams[..., : whole * bits].reshape(*x.shape[:-1], whole, bits)
    return (parts @ (1 << np.arange(bits, dtype=np.uint8)).astype(np.uint8))[..., :count]


def words_of(count: int, bits: int) -> tuple[int, ...]:
    """The number of 32-bit words that hold `count` codes of `bits` bits, as a pair for two packings.

    First number: codes are packed without gaps. Second number: each word has only whole codes. The numbers are equal if
    `bits` divides 32.
    """
    return -(-count * bits // 32), -(-count // (32 // bits))


def scaled_format(kind: str, group: int, dtype: str) -> str:
    """The name of an integer format, such as int4g32f16 for kind int4, group 32 and scales in F16.

    Args:
        kind: format of the codes, such as int4 or uint8.
        group: number of columns that share a scale; -1: the whole row.
        dtype: stored type of the scales, such as BF16.
    """
    run = "row" if group == ROW else f"g{group}"
    return kind + run + {"BF16": "", "F16": "f16"}.get(dtype, "f32")


def run_within(columns: int, block: int) -> int:
    """The largest group size for which all values of a group have the same scale; 0 if there is none.

    A group is some consecutive columns of a row. In the stored matrix [N, columns], flattened, each `block` consecutive
    values share a scale, so a block may begin in the middle of a row. The result is the largest multiple of 32, at most
    CHUNK (1024), that divides both `columns` and `block`. If `block` is 0, the result is 0.
    """
    both = gcd(columns, block) if block else 0
    return next((run for run in range(formats.CHUNK, 0, -32) if both and both % run == 0), 0)


def in_rows(values: np.ndarray, block: int, group: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the scales of a matrix [N, K] as an array [N, K / group]: for each row, one scale per group of columns.

    The file has one scale for each block of the flattened matrix. It is repeated for each group in the block.

    Args:
        values: the scales (or zeros) of the blocks, in order.
        block: number of consecutive values of the flattened matrix in a block.
        group: number of columns in a group; it must divide `block` and K, see run_within().
        shape: (N, K) of the matrix.
    """
    count = shape[0] * shape[1] // group
    return np.repeat(values.reshape(-1), block // group)[:count].reshape(shape[0], -1)


def by_group(groups: np.ndarray) -> np.ndarray:
    """The indices of the columns, sorted by group, as int32 [K]. Columns of one group keep their order.

    groups: the index of each column's group, [K].
    """
    return np.argsort(groups, kind="stable").astype(np.int32)


def find_order(
    stored: Stored, index: str, name: str, group: int, known: dict[bytes, str], out: dict[str, Coded]
) -> str:
    """Find the permutation that sorts a matrix's columns by group (GPTQ's act-order). Returns the permutation's name.

    Returns "" if the columns are already sorted, or if there is no tensor `index`. If an equal permutation was found
    before, the result is the name of that permutation, so that matrices that multiply the same input share one.

    If there is a tensor `index`, the permutation is also added to `out` under `name`, because stacks of experts'
    matrices need one for each matrix. Raises PortError if the columns are not sorted and a group does not have `group`
    columns.

    Args:
        stored: contents of the checkpoint's files.
        index: name of the stored tensor with the group of each column (g_idx).
        name: name for this matrix's permutation.
        group: number of columns in a group.
        known: {bytes of a tensor of groups: name of its permutation}; a new one is added.
        out: the checkpoint's decoded tensors by name.
    """
    if index not in stored.dtypes:
        return ""
    groups = stored.read(index)
    out[name] = Coded("i32", (len(groups),), {index: Part(None)}, lambda read: by_group(read(index)))
    if not (np.diff(groups) < 0).any():
        return ""
    if not np.array_equal(np.sort(groups), np.arange(len(groups)) // group):
        raise PortError(
            f"{index}: groups of other sizes than {group}, which is what its scales make them, are not read"
        )
    return known.setdefault(groups.tobytes(), name)
