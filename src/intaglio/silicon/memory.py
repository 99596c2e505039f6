"""Memory of the machine: bytes in HBM, SRAM and accumulators, and regions of them.

Every byte remembers whether it was ever written; reading one that was not is an error, as hardware would return noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

SPACES = ("hbm", "sram", "acc")
FORMATS: dict[str, tuple[int, np.dtype]] = {  # name -> bits, NumPy type of a value once read
    "f32": (32, np.dtype(np.float32)),
    "bf16": (16, np.dtype(ml_dtypes.bfloat16)),
    "f16": (16, np.dtype(np.float16)),
    "e4m3": (8, np.dtype(ml_dtypes.float8_e4m3fn)),
    "int8": (8, np.dtype(np.int8)),
    "int4": (4, np.dtype(np.int8)),
    "i32": (32, np.dtype(np.int32)),
}


class MachineError(RuntimeError):
    """Something hardware would refuse, or get wrong in silence."""


@dataclass(frozen=True)
class Region:
    """A [rows, cols] matrix in a space: the first byte, and the bytes from one row to the next. Rows of 4-bit values
    hold two to a byte, the first in the low half; a row starts at a byte."""

    space: str
    address: int
    rows: int
    cols: int
    stride: int
    format: str

    @property
    def row_bytes(self) -> int:
        return -(-self.cols * FORMATS[self.format][0] // 8)

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def span(self) -> tuple[int, int]:
        """First byte, and the one after the last."""
        return self.address, self.address + (
            self.rows - 1
        ) * self.stride + self.row_bytes if self.rows else self.address

    def part(self, rows: slice = slice(None), cols: slice = slice(None)) -> Region:
        """Rows and columns of it, as slices without a step."""
        r0, r1, _ = rows.indices(self.rows)
        c0, c1, _ = cols.indices(self.cols)
        bits = FORMATS[self.format][0]
        start = self.address + r0 * self.stride + c0 * bits // 8
        return Region(self.space, start, max(0, r1 - r0), max(0, c1 - c0), self.stride, self.format)

    def shaped(self, rows: int, cols: int) -> Region:
        """The same bytes, of a region whose rows follow each other, as another matrix."""
        return dense(self.space, self.address, rows, cols, self.format)

    def __str__(self) -> str:
        return f"{self.format}[{self.rows}, {self.cols}] at {self.space}:{self.address:#x}"


def dense(space: str, address: int, rows: int, cols: int, format: str) -> Region:
    """A region whose rows follow each other."""
    return Region(space, address, rows, cols, -(-cols * FORMATS[format][0] // 8), format)


class Memory:
    """The bytes of one space. `size` may be None: it grows as it is written (HBM of a simulation)."""

    def __init__(self, space: str, size: int | None) -> None:
        self.space, self.size = space, size
        self.bytes = np.zeros(size if size is not None else 1 << 16, np.uint8)
        self.written = np.zeros(len(self.bytes), bool)

    def _where(self, r: Region) -> np.ndarray:
        """Byte indices [rows, row bytes]. Raises MachineError outside the space."""
        low, high = r.span
        if self.size is not None and (low < 0 or high > self.size):
            raise MachineError(f"{r} ends at byte {high}; {self.space} has {self.size}")
        while high > len(self.bytes):
            self.bytes = np.concatenate([self.bytes, np.zeros_like(self.bytes)])
            self.written = np.concatenate([self.written, np.zeros_like(self.written)])
        return r.address + np.arange(r.rows)[:, None] * r.stride + np.arange(r.row_bytes)[None, :]

    def read(self, r: Region) -> np.ndarray:
        """Values [rows, cols]. Raises MachineError if a byte of it was never written."""
        at = self._where(r)
        if not self.written[at].all():
            row, byte = np.argwhere(~self.written[at])[0]
            raise MachineError(f"reads {r}, of which row {row} byte {byte} was never written")
        raw = np.ascontiguousarray(self.bytes[at])
        bits, dtype = FORMATS[r.format]
        if bits == 4:
            pair = np.stack([raw & 15, raw >> 4], axis=-1).reshape(r.rows, -1)[:, : r.cols]
            return (pair.astype(np.int8) ^ 8) - np.int8(8)  # sign of four bits
        return raw.view(dtype)

    def write(self, r: Region, values: np.ndarray) -> None:
        """Store `values` [rows, cols], rounded to the region's format (to nearest, ties to even)."""
        at = self._where(r)
        bits, dtype = FORMATS[r.format]
        if bits == 4:
            low = np.pad(values.astype(np.int8).astype(np.uint8) & 15, ((0, 0), (0, values.shape[1] % 2)))
            raw = low[:, ::2] | (low[:, 1::2] << 4)
        else:
            raw = np.ascontiguousarray(values.astype(dtype)).view(np.uint8)
        self.bytes[at] = raw.reshape(at.shape)
        self.written[at] = True


class Spaces:
    """What one core sees: HBM, which all share, and its own SRAM and accumulators."""

    def __init__(self, hbm: Memory, sram_bytes: int, acc_bytes: int) -> None:
        self.of = {"hbm": hbm, "sram": Memory("sram", sram_bytes), "acc": Memory("acc", acc_bytes)}

    def read(self, r: Region) -> np.ndarray:
        return self.of[r.space].read(r)

    def write(self, r: Region, values: np.ndarray) -> None:
        self.of[r.space].write(r, values)
