"""Tensors of a GGUF file under transformers' names.

Tensors of plain values are views of the file (Raw); block-quantised and reordered ones are decoded when read (Coded).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.formats import Quantised
from intaglio.models.config import PortError
from intaglio.models.files.coded import Coded, Part, Reader
from intaglio.models.files.gguf.blocks import BF16, BLOCKS, PLAIN, as_float, decode_rows, known_types
from intaglio.models.files.gguf.header import Tensor
from intaglio.ops import Value

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
TERNARY = {  # types of ternary weights that are not read, and why
    **dict.fromkeys(("TQ1_0", "TQ2_0"), " (ternary weights have no kernel here; use a Q4_K_M or Q8_0 file)"),
    "type 36": " (I2_S of bitnet.cpp, whose layout depends on the machine that wrote the file; use an F16 file)",
}


@dataclass(frozen=True)
class Raw:
    """Where a tensor's bytes lie in a file (start .. stop - 1), and the dtype and shape to read them as.

    Blocks are read as U8 [rows, bytes per row].
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """Where consecutive rows of a tensor are: file, offset of the first byte (`start`), GGUF type (`kind`), shape."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        if self.kind in PLAIN:
            return self.shape[-1] * WIDTHS[self.kind]
        return self.shape[-1] // BLOCKS[self.kind].values * BLOCKS[self.kind].bytes

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape[:-1]) * self.row_bytes

    def cut(self, first: int, shape: tuple[int, ...]) -> Place:
        """A Place (file, offset, type, shape) of the part of this tensor with the given shape, from row `first` on.

        The caller sees to it that the part lies inside the tensor; this is not checked.
        """
        return Place(self.file, self.kind, shape, self.start + first * self.row_bytes)


def place_of(path: Path, file: Path, t: Tensor) -> Place:
    """The Place of a tensor: the file that holds it, its type, shape and first byte.

    path: the checkpoint, for the error. file: the part of the checkpoint that holds the tensor. Raises PortError if the
    tensor's type is not supported.
    """
    kind = t.kind
    if kind not in PLAIN and kind not in BLOCKS:
        why = TERNARY.get(kind, "")
        raise PortError(f"{path}: tensor {t.name} is {kind}, which is not read{why}; known are {known_types()}")
    return Place(file, kind, t.shape, t.start)


@dataclass
class Tables:
    """The tensors of a GGUF file, by their names in transformers.

    Attributes:
        raw: tensors whose bytes are used as they are stored; also the bytes from which tensors of `coded` are made,
            under names that begin with "blocks of ".
        coded: tensors that are computed from stored bytes when they are read, such as quantised matrices.
    """

    raw: dict[str, Raw] = field(default_factory=dict)
    coded: dict[str, Coded] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        return {n for n in self.raw if not n.startswith("blocks of ")} | set(self.coded)

    @property
    def taken(self) -> set[str]:
        return {n for n in self.raw if n.startswith("blocks of ")}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.coded[name].shape if name in self.coded else self.raw[name].shape

    def add(self, name: str, p: Place, heads: int = 0, shift: float = 0.0) -> None:
        """Add one tensor of the file under its name in transformers. It is read from the file later.

        Args:
            name: the name in transformers.
            p: where the file has the tensor.
            heads: number of heads if its rows are in interleaved rope order, which is changed to half order; else 0.
            shift: number subtracted from its values (norms of Gemma, to which converters add 1).
        """
        if p.kind in PLAIN and not heads and not shift:
            self.raw[name] = Raw(p.file, p.kind, p.shape, p.start, p.stop)
            return
        at = self._blocks(name, p)
        head = p.shape[0] // heads if heads else 1

        def decode(read: Reader) -> Value:
            x = _values(read(at), p)
            if heads:
                x = x.each(lambda part: in_order(part, head)) if isinstance(x, Quantised) else in_order(x, head)
            return x if not shift or isinstance(x, Quantised) else (x.astype(np.float32) - np.float32(shift))

        format = "f32" if shift else format_of(p)
        self.coded[name] = Coded(format, p.shape, {at: Part()}, decode, whole=head)

    def add_joined(self, name: str, places: Sequence[Place], shape: tuple[int, ...], join: Any) -> None:
        """Add a matrix that is made from several tensors of plain values. It is joined when it is read.

        Args:
            name: the matrix's name in transformers.
            places: where the file has the tensors.
            shape: shape of the matrix.
            join: function from a list of the tensors' values, float32, to the matrix, float32.
        """
        at = [self._blocks(f"{name} {i}", p) for i, p in enumerate(places)]
        formats = {format_of(p) for p in places}
        format = next(iter(formats)) if formats in ({"f32"}, {"f16"}) else "bf16"
        dtype = {"f32": np.float32, "f16": np.float16}.get(format)

        def decode(read: Reader) -> Value:
            x = join([as_float(_values(read(n), p)).reshape(p.shape) for n, p in zip(at, places, strict=True)])
            return x.astype(dtype or BF16)

        self.coded[name] = Coded(format, shape, {n: Part(None) for n in at}, decode, whole=shape[0])

    def add_rows(self, name: str, p: Place, rows: np.ndarray) -> None:
        """Add a matrix whose row i is row rows[i] of a tensor in the file. Quantised rows keep their codes.

        Args:
            name: the matrix's name in transformers.
            p: where the file has the tensor.
            rows: row numbers, an int array.
        """
        at = self._blocks(name, p)
        shape = (len(rows), *p.shape[1:])

        def decode(read: Reader) -> Value:
            return _values(np.ascontiguousarray(read(at)[rows]), p)

        self.coded[name] = Coded(format_of(p), shape, {at: Part(None)}, decode, whole=shape[0])

    def add_columns(self, name: str, p: Place, order: np.ndarray) -> None:
        """Add a matrix whose columns are in another order in the file.

        Column i of the file is the matrix's column order[i]. Plain values are moved to their columns when they are
        read. Quantised columns stay in the file's order. For them an int32 tensor NAME.order with `order` is added, and
        a port reorders the columns of the matrix's input by it, as for act-order.

        Args:
            name: the matrix's name in transformers.
            p: where the file has it.
            order: for each column in the file, its number in the matrix, an int array.
        """
        at = self._blocks(name, p)
        plain, back, own = p.kind in PLAIN, np.argsort(order), name.removesuffix(".weight") + ".order"

        def decode(read: Reader) -> Value:
            x = _values(read(at), p)
            return np.ascontiguousarray(x[:, back]) if plain and isinstance(x, np.ndarray) else x

        self.coded[name] = Coded(format_of(p), p.shape, {at: Part()}, decode, order="" if plain else own)
        if not plain:
            self.add_constant(own, order.astype(np.int32))

    def add_constant(self, name: str, values: np.ndarray) -> None:
        """Add a tensor of values that follow from the metadata: float32, or int32 for an order of columns."""
        format = "i32" if values.dtype == np.int32 else "f32"
        self.coded[name] = Coded(format, values.shape, {}, lambda read: values)

    def _blocks(self, name: str, p: Place) -> str:
        at = f"blocks of {name}"
        shape = p.shape if p.kind in PLAIN else (prod(p.shape[:-1]), p.row_bytes)
        self.raw[at] = Raw(p.file, p.kind if p.kind in PLAIN else "U8", shape, p.start, p.stop)
        return at


def format_of(p: Place) -> str:
    """The name of the number format that a tensor has after reading."""
    return PLAIN[p.kind] if p.kind in PLAIN else BLOCKS[p.kind].format


def _values(x: np.ndarray, p: Place) -> Value:
    return x if p.kind in PLAIN else decode_rows(p.kind, x)


def in_order(x: np.ndarray, head: int) -> np.ndarray:
    """Reorder the rows of Q or K from interleaved to half rope order. Returns a new array of the same shape.

    x: the rows of all heads, in an array of any number of dimensions. head: number of rows of a head.
    """
    return np.ascontiguousarray(x.reshape(-1, head // 2, 2, *x.shape[1:]).swapaxes(1, 2)).reshape(x.shape)


def summed(types: Mapping[str, int]) -> tuple[int, int]:
    """Sum the bytes of the values that are converted to bf16 on reading. Returns (bytes in the file, bytes in memory).

    types: {GGUF type: number of values}. Types that are not converted to bf16 are not counted; (0, 0) if none is.
    """
    own = {kind: n for kind, n in types.items() if kind in BLOCKS and BLOCKS[kind].format == "bf16"}
    return sum(n // BLOCKS[k].values * BLOCKS[k].bytes for k, n in own.items()), 2 * sum(own.values())
