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
    """Place of a stored tensor in a file, with the dtype and shape that its bytes are read as.

    A tensor of quantised blocks is read as U8 [rows, bytes per row].

    Attributes:
        file: the file.
        dtype: name of the dtype, such as BF16 or U8.
        shape: shape of the array that is read.
        start: offset of the first byte.
        stop: offset after the last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """Place, type and shape of a tensor in a GGUF file, or of consecutive rows of a tensor.

    Attributes:
        file: the file.
        kind: name of the GGUF type, such as Q4_K.
        shape: the shape, with the number of columns last.
        start: offset of the first byte in the file.
    """

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
        """Returns the Place of a part of this tensor. The part starts at row `first` and has the shape `shape`.

        It is not checked that the part lies inside the tensor.
        """
        return Place(self.file, self.kind, shape, self.start + first * self.row_bytes)


def place_of(path: Path, file: Path, t: Tensor) -> Place:
    """Returns the Place of a tensor: its file, type, shape and the offset of its first byte.

    Raises PortError if the tensor's type is not supported.

    Args:
        path: the checkpoint, for the error.
        file: the file of the checkpoint that holds the tensor.
        t: the tensor, as the header of `file` lists it.
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
        raw: tensors that are used as they are stored. Also the stored bytes from which tensors of `coded` are computed,
            under names that begin with "blocks of ".
        coded: tensors that are computed when they are read, such as quantised matrices.
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
        """Add one tensor of the file under its name in transformers. Returns nothing; the values are read later.

        Args:
            name: the name in transformers.
            p: where the file has the tensor.
            heads: number of heads if the file has the rows in interleaved rope order; they are then read in half order.
                0 for any other tensor.
            shift: number subtracted from each value. It is 1 for norms of Gemma, since converters to GGUF add 1.
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
        """Add a matrix that is computed from several tensors of the file when it is read. Returns nothing.

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
        """Add a matrix whose row i is row rows[i] of a tensor in the file. Quantised rows are not quantised anew.

        Returns nothing.

        Args:
            name: the matrix's name in transformers.
            p: where the file has the tensor.
            rows: an int array with the number of a stored row for each row of the matrix.
        """
        at = self._blocks(name, p)
        shape = (len(rows), *p.shape[1:])

        def decode(read: Reader) -> Value:
            return _values(np.ascontiguousarray(read(at)[rows]), p)

        self.coded[name] = Coded(format_of(p), shape, {at: Part(None)}, decode, whole=shape[0])

    def add_columns(self, name: str, p: Place, order: np.ndarray) -> None:
        """Add a matrix whose columns the file stores in another order. Returns nothing.

        Column i in the file is column order[i] of the matrix. Plain values are reordered when they are read. Quantised
        columns stay in the file's order, and an int32 tensor NAME.order with the values of `order` is added. A port
        then reorders the input of the matrix by this tensor, as it does for GPTQ's act-order.

        Args:
            name: the matrix's name in transformers.
            p: where the file has the matrix.
            order: an int array with the column number in the matrix for each column in the file.
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
        """Add a tensor whose values are given, not read from the file. Returns nothing.

        Args:
            name: the tensor's name.
            values: int32 for an order of columns, or float32.
        """
        format = "i32" if values.dtype == np.int32 else "f32"
        self.coded[name] = Coded(format, values.shape, {}, lambda read: values)

    def _blocks(self, name: str, p: Place) -> str:
        at = f"blocks of {name}"
        shape = p.shape if p.kind in PLAIN else (prod(p.shape[:-1]), p.row_bytes)
        self.raw[at] = Raw(p.file, p.kind if p.kind in PLAIN else "U8", shape, p.start, p.stop)
        return at


def format_of(p: Place) -> str:
    """Returns the name of the number format, such as bf16, that a tensor of a GGUF file has in memory after reading."""
    return PLAIN[p.kind] if p.kind in PLAIN else BLOCKS[p.kind].format


def _values(x: np.ndarray, p: Place) -> Value:
    return x if p.kind in PLAIN else decode_rows(p.kind, x)


def in_order(x: np.ndarray, head: int) -> np.ndarray:
    """Returns an array of the shape of `x` with the rows of each head of Q or K in half rope order.

    In `x` they are in interleaved order, where rows 2i and 2i + 1 form a pair. In half order, rows i and i + head / 2
    form a pair.

    x: the rows of all heads, in an array of any number of dimensions. head: number of rows per head.
    """
    return np.ascontiguousarray(x.reshape(-1, head // 2, 2, *x.shape[1:]).swapaxes(1, 2)).reshape(x.shape)


def summed(types: Mapping[str, int]) -> tuple[int, int]:
    """Returns the total size of the tensors that become bf16 when read: two numbers of bytes.

    The first number is their size in the file, the second their size in memory. Tensors of other types are not counted.
    Both numbers are 0 if no tensor becomes bf16. types: {GGUF type: number of values}.
    """
    own = {kind: n for kind, n in types.items() if kind in BLOCKS and BLOCKS[kind].format == "bf16"}
    return sum(n // BLOCKS[k].values * BLOCKS[k].bytes for k, n in own.items()), 2 * sum(own.values())
