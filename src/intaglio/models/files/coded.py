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
    """How one stored tensor (codes, scales or zeros) maps to the rows of a matrix.

    Attributes:
        axis: the tensor's axis along which the index of the matrix's row grows; None: any rows need the whole tensor.
        each: number of matrix rows that one index of `axis` stands for, such as 8 if each word has the codes of 8 rows.
    """

    axis: int | None = 0
    each: int = 1

    def cut(self, x: np.ndarray, rows: slice) -> np.ndarray:
        """A view of the part of a stored tensor from which some rows of the matrix can be decoded.

        An index of the tensor's axis `self.axis` stands for `self.each` rows of the matrix. If self.axis is None, all
        rows need the whole tensor, and `x` itself is returned.

        Args:
            x: the stored tensor.
            rows: the matrix rows. Start and stop must be multiples of self.each; stop may also be the number of rows.
        """
        if self.axis is None:
            return x
        return x[(slice(None),) * self.axis + (slice(rows.start // self.each, -(-rows.stop // self.each)),)]


@dataclass(frozen=True)
class Coded:
    """A matrix that is decoded from several stored tensors (codes, scales, zeros).

    Attributes:
        format: number format of the decoded matrix.
        shape: shape of the decoded matrix.
        parts: the stored tensors by name, and how each maps to the rows.
        decode: function that returns some rows, decoded. Its argument is a function from the name of a part to the
            part's values for these rows.
        turned: True if the arrays stand for the transposed matrix, as in formats.Quantised.
        whole: number of rows that can only be decoded together.
        order: name of the act-order permutation of the columns (g_idx); "": none.
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
        """A number of rows: a partial read must start and stop at multiples of this number, or at the matrix's end."""
        return lcm(self.whole, *(part.each for part in self.parts.values()))

    def read(self, reader: Reader, rows: slice | None = None) -> Value:
        """Read and decode the matrix or some of its rows. Returns a Quantised; an array if the format is plain (bf16).

        Args:
            reader: function from a stored tensor's name to its values.
            rows: the rows to decode; None: all. Start and stop must be multiples of self.step; stop may also be the
                number of rows.
        """
        run = rows or slice(0, self.shape[0])
        value = self.decode(lambda name: self.parts[name].cut(reader(name), run))
        return replace(value, format=self.format, turned=self.turned) if isinstance(value, Quantised) else value


@dataclass(frozen=True)
class Stored:
    """Contents of a checkpoint's files.

    Attributes:
        dtypes: the dtype of each tensor, as safetensors calls it, by the tensor's name.
        shapes: the shape of each tensor by its name.
        read: function from a tensor's name to its values as stored.
    """

    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    read: Reader


def bases(stored: Stored, suffix: str) -> list[str]:
    """A list of the tensor names that end in `suffix`, with the suffix removed."""
    return [n.removesuffix(suffix) for n in stored.dtypes if n.endswith(suffix)]


def spread_rows(scales: np.ndarray, shape: tuple[int, ...], format: str) -> tuple[np.ndarray, int]:
    """(scales broadcast to [..., N, groups], number of values in a group) for a format with one scale per row.

    Args:
        scales: one per row, or one for the whole matrix.
        shape: shape of the matrix, [..., N, K].
        format: name of the format.
    """
    group = formats.get(format).group_of(shape[-1])
    by_row = (
        scales.astype(np.float32).reshape(*shape[:-1], 1) if scales.size > 1 else scales.astype(np.float32).reshape(1)
    )
    return np.broadcast_to(by_row, (*shape[:-1], -(-shape[-1] // group))).copy(), group


def with_row_scales(codes: np.ndarray, scales: np.ndarray, format: str) -> Quantised:
    """A Quantised matrix of a format with one scale per row: its codes [N, K] as they are, and a scale for each row.

    scales: one per row, or a single one, which every row gets.
    """
    return Quantised(codes, *spread_rows(scales, codes.shape, format))


def as_scales(x: np.ndarray) -> np.ndarray:
    """Convert stored scales to float32. Bytes are E8M0: the value is 2 ** (byte - 127), and NaN for the byte 255."""
    return (x.view(ml_dtypes.float8_e8m0fnu) if x.dtype == np.uint8 else x).astype(np.float32)


def e2m1(bytes: np.ndarray, exponents: np.ndarray) -> Quantised:
    """The MXFP4 matrix (Quantised) of E2M1 codes, two in each byte [.., N, K / 2], and E8M0 scales [.., N, K / 32].

    A Quantised holds whole numbers, so its codes are twice the E2M1 values, and its scales half the stored ones.

    Args:
        bytes: the codes.
        exponents: the scales, powers of two stored as exponents (uint8).
    """
    return Quantised(TWICE_E2M1[nibbles(bytes)], as_scales(exponents) * np.float32(0.5), 32)


def e2m1_factored(bytes: np.ndarray, scales: np.ndarray, factor: np.ndarray) -> Quantised:
    """The NVFP4 matrix (Quantised) of E2M1 codes, two in each byte [.., N, K / 2], with E4M3 scales [.., N, K / 16].

    A value is E2M1 value * scale * factor. A Quantised holds whole numbers, so its codes are twice the E2M1 values;
    half of `factor` is multiplied into its scales in return.

    Args:
        bytes: the codes.
        scales: the scales.
        factor: one float32 number that multiplies all scales.
    """
    half = np.float32(0.5) * factor.astype(np.float32).reshape(-1)[0]
    units = np.full((*scales.shape[:-1], 1), half, np.float32)
    return Quantised(TWICE_E2M1[nibbles(bytes)], scales.astype(np.float32) * half, 16, units=units)


def nibbles(x: np.ndarray) -> np.ndarray:
    """The 4-bit codes in bytes or words [.., n], as uint8 [.., n * codes per item], lowest bits first."""
    bytes = np.ascontiguousarray(x).view(np.uint8)
    return np.stack([bytes & 15, bytes >> 4], axis=-1).reshape(*bytes.shape[:-1], -1)


def fields(x: np.ndarray, bits: int, count: int | None = None) -> np.ndarray:
    """The codes of 1 to 8 bits in 32-bit words or in bytes [.., n], as uint8 [.., count], lowest bits first.

    Codes of 3, 5, 6 or 7 bits are packed in one of two ways: (a) without gaps, so that some codes cross from one word
    to the next; (b) with only whole codes in each word. The number of words tells which: way (b) is assumed if `count`
    codes fill n words in way (b) but not in way (a). In all other cases, also if `count` is None, way (a) is assumed.

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
    """Numbers of 32-bit words that hold `count` codes of `bits` bits, as a tuple of two ints.

    The first is for codes packed without gaps, the second for words that hold only whole codes. The two are equal if 32
    is a multiple of `bits`.
    """
    return -(-count * bits // 32), -(-count // (32 // bits))


def scaled_format(kind: str, group: int, dtype: str) -> str:
    """Name of an integer format, such as int4g32f16 for kind int4, group 32 and scales in F16.

    Args:
        kind: name of the codes' format, such as int4 or uint8.
        group: columns that share a scale; -1: the whole row.
        dtype: stored type of the scales.
    """
    run = "row" if group == ROW else f"g{group}"
    return kind + run + {"BF16": "", "F16": "f16"}.get(dtype, "f32")


def run_within(columns: int, block: int) -> int:
    """Length of groups of columns such that all values of a group have the same scale, an int; 0 if there is none.

    In the stored matrix [N, columns], flattened, each `block` consecutive values share a scale, so a block may begin
    within a row. The result is the largest multiple of 32, at most 1024 (CHUNK), that divides both `columns` and
    `block`. `block` is 0 if the values that share a scale are not consecutive; the result is then 0.
    """
    both = gcd(columns, block) if block else 0
    return next((run for run in range(formats.CHUNK, 0, -32) if both and both % run == 0), 0)


def in_rows(values: np.ndarray, block: int, group: int, shape: tuple[int, ...]) -> np.ndarray:
    """Convert scales of blocks to scales of groups of columns, by repeating them. Returns an array [N, K / group].

    Args:
        values: a scale (or zero) for each block of `block` consecutive values of the flattened matrix, in order.
        block: values of a block.
        group: values of a group, a divisor of `block` and of K (see run_within()).
        shape: (N, K).
    """
    count = shape[0] * shape[1] // group
    return np.repeat(values.reshape(-1), block // group)[:count].reshape(shape[0], -1)


def by_group(groups: np.ndarray) -> np.ndarray:
    """Column numbers sorted by group, int32 [K]; columns of one group keep their order.

    groups: group of each column.
    """
    return np.argsort(groups, kind="stable").astype(np.int32)


def find_order(
    stored: Stored, index: str, name: str, group: int, known: dict[bytes, str], out: dict[str, Coded]
) -> str:
    """Name of the tensor with the permutation that sorts a matrix's columns by group (GPTQ's act-order), a str.

    Returns "" if the columns are sorted, or if there is no tensor `index`. Matrices that multiply the same input have
    equal permutations. So if an equal one was found before, the result is its name instead of `name`, and a port
    permutes their input only once. Whenever there is a tensor `index`, the permutation is added to `out` under `name`
    as well: stacks of experts' matrices need one for each matrix. Raises PortError if groups are not all of size
    `group`.

    Args:
        stored: contents of the checkpoint's files.
        index: name of the stored tensor with each column's group (g_idx).
        name: name of this matrix's permutation.
        group: columns of a group.
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
