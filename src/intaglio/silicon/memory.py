"""Memory of the chip simulator: the bytes of HBM, SRAM and accumulators, and Region, a matrix in one of them.

Each byte has a written flag; reading a byte that was never written raises MachineError, since hardware would return
arbitrary data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from intaglio import formats

SPACES = ("hbm", "sram", "acc")
FORMATS = ("f32", "bf16", "f16", "e4m3", "int8", "int4", "i32")  # of formats.ELEMENTS, those that a Region may have


class MachineError(RuntimeError):
    """Raised for an instruction that hardware would refuse or execute wrongly: overflow, race, deadlock, bad index."""


@dataclass(frozen=True)
class Region:
    """The location and format of a [rows, cols] matrix in a memory space. It holds no values.

    Attributes:
        space: "hbm", "sram" or "acc" (accumulators).
        address: address of the first byte.
        rows, cols: size of the matrix.
        stride: bytes from the start of a row to the start of the next.
        format: number format of the values. Two 4-bit values share a byte, the first in the low half; each row starts
            at a whole byte.
    """

    space: str
    address: int
    rows: int
    cols: int
    stride: int
    format: str

    @property
    def row_bytes(self) -> int:
        """Number of bytes of one row, without the gap to the next."""
        return -(-self.cols * formats.bits(self.format) // 8)

    @property
    def nbytes(self) -> int:
        """Number of bytes of all rows, without gaps."""
        return self.rows * self.row_bytes

    @property
    def span(self) -> tuple[int, int]:
        """The pair (address of the region's first byte, address after its last byte). Without rows they are equal."""
        return self.address, self.address + (
            self.rows - 1
        ) * self.stride + self.row_bytes if self.rows else self.address

    def overlaps(self, other: Region) -> bool:
        """True if this region and the region `other` share at least one byte."""
        if self.space != other.space or not (self.nbytes and other.nbytes):
            return False
        a, b = (self, other) if self.rows <= other.rows else (other, self)
        (a_low, a_high), (b_low, b_high) = a.span, b.span
        if a_low >= b_high or b_low >= a_high:
            return False
        if b.rows == 1 or b.row_bytes >= b.stride:  # both are without gaps, or b is
            low = a_low + np.arange(a.rows) * a.stride
            return bool(((low < b_high) & (low + a.row_bytes > b_low)).any())
        low = a_low + np.arange(a.rows) * a.stride
        first = np.maximum(0, -(-(low - b.row_bytes + 1 - b_low) // b.stride))  # first row of b that ends after `low`
        return bool(((first < b.rows) & (b_low + first * b.stride < low + a.row_bytes)).any())

    def part(self, rows: slice = slice(None), cols: slice = slice(None)) -> Region:
        """Returns a Region for a part of this region's rows and columns. Nothing is copied.

        The slices must have step 1. A slice that reaches beyond the region is cut at its end. For a 4-bit format,
        `cols` must start at an even column; this is not checked.
        """
        r0, r1, _ = rows.indices(self.rows)
        c0, c1, _ = cols.indices(self.cols)
        bits = formats.bits(self.format)
        start = self.address + r0 * self.stride + c0 * bits // 8
        return Region(self.space, start, max(0, r1 - r0), max(0, c1 - c0), self.stride, self.format)

    def shaped(self, rows: int, cols: int) -> Region:
        """Returns a Region [rows, cols] with the same address and format as this one, and no gaps between rows.

        The result may be smaller than this region, or have a different number of columns. Nothing checks that it lies
        within this region.
        """
        return dense(self.space, self.address, rows, cols, self.format)

    def __str__(self) -> str:
        return f"{self.format}[{self.rows}, {self.cols}] at {self.space}:{self.address:#x}"


def dense(space: str, address: int, rows: int, cols: int, format: str) -> Region:
    """Returns a Region [rows, cols] that starts at `address` and has no gaps between rows."""
    return Region(space, address, rows, cols, -(-cols * formats.bits(format) // 8), format)


class Memory:
    """The contents of one memory space: its bytes, and which of them have been written.

    space: name of the memory space, for error messages. size: number of bytes; None: the memory grows when it is
    accessed, as the simulated HBM does.
    """

    def __init__(self, space: str, size: int | None) -> None:
        self.space, self.size = space, size
        self.bytes = np.zeros(size if size is not None else 1 << 16, np.uint8)
        self.written = np.zeros(len(self.bytes), bool)

    def byte_indices(self, r: Region) -> np.ndarray:
        """Returns the indices of a region's bytes in the memory space, as an int array [rows, row_bytes].

        Raises MachineError if the region ends outside the memory.
        """
        low, high = r.span
        if self.size is not None and (low < 0 or high > self.size):
            raise MachineError(f"{r} ends at byte {high}; {self.space} has {self.size}")
        while high > len(self.bytes):
            self.bytes = np.concatenate([self.bytes, np.zeros_like(self.bytes)])
            self.written = np.concatenate([self.written, np.zeros_like(self.written)])
        return r.address + np.arange(r.rows)[:, None] * r.stride + np.arange(r.row_bytes)[None, :]

    def read(self, r: Region) -> np.ndarray:
        """Returns the values of a region, an array [rows, cols] in the dtype of the region's format (int8 for 4 bits).

        Raises MachineError if a byte of the region was never written, or lies outside the memory.
        """
        indices = self.byte_indices(r)
        if not self.written[indices].all():
            row, byte = np.argwhere(~self.written[indices])[0]
            raise MachineError(f"reads {r}, of which row {row} byte {byte} was never written")
        raw = np.ascontiguousarray(self.bytes[indices])
        bits, dtype = formats.ELEMENTS[r.format]
        if bits == 4:
            pair = np.stack([raw & 15, raw >> 4], axis=-1).reshape(r.rows, -1)[:, : r.cols]
            return (pair.astype(np.int8) ^ 8) - np.int8(8)  # sign-extend four bits
        return raw.view(dtype)

    def write(self, r: Region, values: np.ndarray) -> None:
        """Store the array `values` [rows, cols] in the region `r`, in the region's number format. Returns nothing.

        Values for a float format are rounded to nearest, ties to even. Values for an integer format must be whole
        numbers in the format's range; this is not checked. Raises MachineError if the region lies outside the memory.
        """
        indices = self.byte_indices(r)
        bits, dtype = formats.ELEMENTS[r.format]
        if bits == 4:
            low = np.pad(values.astype(np.int8).astype(np.uint8) & 15, ((0, 0), (0, values.shape[1] % 2)))
            raw = low[:, ::2] | (low[:, 1::2] << 4)
        else:
            raw = np.ascontiguousarray(values.astype(dtype)).view(np.uint8)
        self.bytes[indices] = raw.reshape(indices.shape)
        self.written[indices] = True


class CoreMemory:
    """The memories that one core can access: the chip's HBM, and the core's own SRAM and accumulators.

    watch: function called before each access to HBM, as watch(region, byte indices, True for a write). It raises
    MachineError if the core must not access the region.
    """

    def __init__(
        self, hbm: Memory, sram_bytes: int, acc_bytes: int,
        watch: Callable[[Region, np.ndarray, bool], None] | None = None,
    ) -> None:  # fmt: skip
        self.watch = watch
        self.spaces = {"hbm": hbm, "sram": Memory("sram", sram_bytes), "acc": Memory("acc", acc_bytes)}

    def read(self, r: Region) -> np.ndarray:
        """Returns the values [rows, cols] of a region. The dtype is that of the region's format, see Memory.read()."""
        self._watch(r, False)
        return self.spaces[r.space].read(r)

    def read32(self, r: Region) -> np.ndarray:
        """Returns the values [rows, cols] of a region, converted to float32."""
        return self.read(r).astype(np.float32)

    def read64(self, r: Region) -> np.ndarray:
        """Returns the values [rows, cols] of a region, converted to float64."""
        return self.read(r).astype(np.float64)

    def write(self, r: Region, values: np.ndarray) -> None:
        """Store the array `values` [rows, cols] in the region `r`. See Memory.write() for rounding and errors."""
        self._watch(r, True)
        self.spaces[r.space].write(r, values)

    def _watch(self, r: Region, writes: bool) -> None:
        if self.watch is not None and r.space == "hbm":
            self.watch(r, self.spaces["hbm"].byte_indices(r), writes)
