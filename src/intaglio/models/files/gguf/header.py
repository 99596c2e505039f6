"""The header of a GGUF file (ggml/docs/gguf.md): metadata, and the place of each tensor. Reads no tensor values.

The gguf library has a reader too; it makes an array of each string, which takes 10 seconds where a vocabulary has
150,000 tokens and as many merges, instead of half a second.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
MAX_DIMENSIONS = 4
NUMBERS = {  # the types of metadata but string (8) and array (9), as NumPy has them
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
STRING, ARRAY = 8, 9
KINDS = {  # ggml_type: name, values and bytes a block
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip


class HeaderError(ValueError):
    """Raised if the header of a GGUF file cannot be parsed. The message says what is wrong and at which byte."""


@dataclass(frozen=True)
class Tensor:
    """Name, type and place of a tensor in a GGUF file.

    Attributes:
        name: the tensor's name in the file, which is llama.cpp's name.
        kind: name of the GGUF type, such as Q4_K. A type that is not known is named "type NUMBER".
        shape: sizes of the dimensions, with the number of columns last. A GGUF file stores them in reverse order.
        start: offset of the tensor's first byte in the file.
        stop: offset after the tensor's last byte; equal to `start` if the type is not known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _Cursor:
    """Reads values of a memory-mapped GGUF file one after another.

    Raises HeaderError if the file ends within a value.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        at, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise HeaderError(f"it ends at {len(self.data)}, within what should lie at {at}..{self.at}")
        return self.data[at : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            own, count = self.number("<I"), self.number("<Q")
            if own in NUMBERS:
                dtype = np.dtype(NUMBERS[own])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            self._check(count)
            read: Callable[[], Any] = self.text if own == STRING else lambda: self.value(own)
            return [read() for _ in range(count)]
        if kind not in NUMBERS:
            raise HeaderError(f"a value at {self.at} has type {kind}; known are 0 to 12")
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def _check(self, count: int) -> None:
        if count > len(self.data):
            raise HeaderError(f"an array at {self.at} claims {count} values, more than the file has bytes")


def read_header(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    """Returns the metadata and the tensors that the header of one GGUF file lists.

    The result is ({key: metadata value}, list of Tensors in the order of the header). Raises HeaderError if the header
    is damaged.
    """
    size = path.stat().st_size
    if size < 24:
        raise HeaderError(f"it has {size} bytes; a header has 24 at least")
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        c = _Cursor(data)
        if c.take(4) != MAGIC:
            raise HeaderError(f"it does not begin with {MAGIC!r}")
        version = c.number("<I")
        if version not in (2, 3):
            why = (
                "it has another byte order than this machine" if version & 0xFFFF == 0 else "versions 2 and 3 are read"
            )
            raise HeaderError(f"its version is {version}; {why}")
        tensors, pairs = c.number("<Q"), c.number("<Q")
        fields: dict[str, Any] = {}
        for _ in range(pairs):
            key = c.text()
            fields[key] = c.value(c.number("<I"))
        infos = []
        for _ in range(tensors):
            name, count = c.text(), c.number("<I")
            if not 1 <= count <= MAX_DIMENSIONS:
                raise HeaderError(f"tensor {name} has {count} dimensions; 1 to {MAX_DIMENSIONS} are read")
            shape = tuple(c.number("<Q") for _ in range(count))[::-1]
            infos.append((name, shape, c.number("<I"), c.number("<Q")))
        step = int(fields.get("general.alignment", ALIGNMENT))
        base = -(-c.at // step) * step
    return fields, [_tensor(name, shape, kind, base + offset, size) for name, shape, kind, offset in infos]


def _tensor(name: str, shape: tuple[int, ...], number: int, start: int, size: int) -> Tensor:
    kind, values, bytes = KINDS.get(number, (f"type {number}", 1, 0))
    if shape[-1] % values:
        raise HeaderError(f"tensor {name} is {kind} of {shape[-1]} columns; wanted a multiple of {values}")
    stop = start + prod(shape) // values * bytes
    if stop > size:
        raise HeaderError(f"tensor {name} should lie at {start}..{stop}, but the file ends at {size}")
    return Tensor(name, kind, shape, start, stop)
