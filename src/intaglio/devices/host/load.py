"""Loads a Program into a native executable.

Declares its tensors, packs its weights or maps those packed on disk, and creates its ops.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np

from intaglio import _native, formats
from intaglio.devices.device import DeviceError, StateSpec, Weights
from intaglio.devices.host import image
from intaglio.devices.host.kernels import NativeKernel, kernel_of
from intaglio.devices.host.layout import Home, HostLayout, buffer_key, columns_of
from intaglio.devices.weights import assemble, check_slots, zeroed_state
from intaglio.formats import Quantised
from intaglio.ops import AllReduce, Map, Op, Tensor, Value
from intaglio.ops.op import dim_size
from intaglio.program import Program
from intaglio.program.source import strips


def fill_codes(weight: _native.Weight, rows: Quantised, first: int, threads: int) -> None:
    """Write the quantised rows `rows` into a native weight, beginning at the weight's row number `first`.

    The rows' codes, scales, and zero points or minima are written. Returns None.
    """
    own = {name: np.ascontiguousarray(x, np.float32) for name, x in rows.arrays.items() if name != "codes"}
    codes, lows = np.ascontiguousarray(rows.codes).view(np.uint8), own.get("zeros", own.get("minima"))
    weight.fill_codes(codes, own["scales"], lows, own.get("units"), own.get("low_units"), first, threads)


def _source_name(array: np.ndarray, name: str) -> str:
    """Return the name of the number format of an unquantised array: "f32", "f16" or "bf16".

    `name` is the weight's name, for the error message. Raises DeviceError if the array has another type.
    """
    for known in ("f32", "f16", "bf16"):
        if array.dtype == formats.get(known).dtype:
            return known
    raise DeviceError(f"weight {name} is stored as {array.dtype}; the host reads f32, f16 and bf16")


@dataclass(frozen=True)
class Loaded:
    """The result of load(): what was put into a native executable.

    Attributes:
        ids: {name of a tensor: its number in the native executable}.
        matrices: packed weights: {name of the packed matrix: native Weight}.
        arrays: weights, constants and state for Python kernels: {name of the tensor: value}.
        image: the file on disk with the packed weights, or None.
    """

    ids: Mapping[str, int]
    matrices: Mapping[str, _native.Weight]
    arrays: dict[str, Value]
    image: image.Image | None


def load(
    native: _native.Executable, program: Program, layout: HostLayout, weights: Weights, state: StateSpec, threads: int,
    cache: str | Path | None, image_file: int | None = None,
) -> Loaded:  # fmt: skip
    """Declare tensors, pack weights and create ops in an empty native executable. Returns a Loaded.

    The Loaded says what was put into the executable. Raises DeviceError for weights of the wrong shape or type, and for
    ops that the kernels cannot run.

    Args:
        native: the empty executable.
        program: the Program whose ops are created.
        layout: which weights are packed together, and where native code stops.
        weights: the source of the weights.
        state: sizes of the K/V cache and of recurrent state.
        threads: number of threads that pack weights.
        cache: folder in which packed weights are kept. "auto": the usual folder, but only for at least image.WORTH
            bytes of packed weights. None: no file on disk.
        image_file: descriptor of a memory file for packed weights that are not kept on disk; None: no such file.
    """
    matrices = {name: matrix.make() for name, matrix in layout.matrices.items()}
    image.gather(matrices)
    kept = _image(program, layout, matrices, weights, cache, image_file)
    with kept or nullcontext():
        loader = _Loader(native, program, layout, weights, state, threads, matrices, kept is not None and kept.ready)
        ids = {t.name: loader.declare(t) for t in program.tensors.values() if loader.is_native(t)}
    sums = {i: more for i, more in added_sums(program).items() if i not in layout.stopped}
    for i, op in enumerate(program.ops):
        if i in layout.stopped:
            native.stop()
        elif i - 1 in sums:
            native.op("done", {}, {})
        else:
            add_op(native, op, ids, sums.get(i, {}))
    return Loaded(
        ids, matrices, _arrays(program, layout, weights, state), kept if isinstance(kept, image.Image) else None
    )


def pack_again(
    native: _native.Executable, layout: HostLayout, weights: Weights, state: StateSpec, program: Program,
    names: Sequence[str],
) -> tuple[dict[str, _native.Weight], dict[str, np.ndarray]]:  # fmt: skip
    """Read weights of a loaded Program again and pack them into new memory, with one thread.

    Returns a tuple ({name of a packed matrix: native Weight}, {name of a vector: f32 array}). It is used to give a rank
    other experts.

    Args:
        native: the executable in which the Program is loaded.
        layout: the layout of that executable.
        weights: source of checkpoint tensors.
        state: size of the K/V cache and recurrent state.
        program: the loaded Program, or a copy of it whose weights name other checkpoint tensors, such as other experts.
        names: the weights to read. Native ops must use all of them.

    Raises DeviceError for checkpoint tensors that do not fit.
    """
    homes = {name: layout.homes[name] for name in names if name in layout.homes}
    matrices = {home.matrix: layout.matrices[home.matrix].make() for home in homes.values()}
    loader = _Loader(native, program, layout, weights, state, 1, matrices, False)
    for name in homes:
        loader.fill(program.tensors[name])
    vectors = [name for name in names if name not in homes and name not in layout.joined.values()]
    return matrices, {name: loader.vector(program.tensors[name]) for name in vectors}


def added_sums(program: Program) -> dict[int, dict[str, str]]:
    """Find the all_reduce ops that the host can run as one op with the residual addition after them.

    Returns {number of the all_reduce op: {"residual": name of the residual, "total": name of the addition's result}}.
    The addition must be the next op, and no other op may read the result of the all_reduce, because the host does not
    store it.
    """
    reads = Counter(program.base(name) for op in program.ops for name in op.inputs)
    found = {}
    for i, (op, after) in enumerate(pairwise(program.ops)):
        if isinstance(op, AllReduce) and isinstance(after, Map) and reads[op.out] == 1:
            residual = after.other_of_sum(op.out) if program.tensors[op.out].role == "temp" else None
            if residual and program.tensors[residual].shape == program.tensors[op.out].shape:
                found[i] = {"residual": residual, "total": after.out}
    return found


def add_op(
    native: _native.Executable, op: Op, ids: Mapping[str, int], more: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Append one op to the native executable. Returns None.

    Raises DeviceError if the native kernel cannot run the op.

    Args:
        native: the executable.
        op: the op. Its NativeKernel says in which form the op's attributes are passed.
        ids: {name of a tensor: its number in the native executable}.
        more: further operands, which the op itself does not have: {operand's name in the kernel: tensor's name}. For
            example, the residual that an all_reduce adds.
    """
    kernel = kernel_of(op)
    assert isinstance(kernel, NativeKernel)
    named = {**{name: getattr(op, name) for name in op.named("operand", "optional", "result")}, **more}
    try:
        native.op(op.kind, {name: ids[t] for name, t in named.items() if t in ids}, kernel.attributes(op))
    except ValueError as e:
        raise DeviceError(f"{op.site}: {e}") from None


def _image(
    program: Program, layout: HostLayout, matrices: Mapping[str, _native.Weight], weights: Weights,
    cache: str | Path | None, file: int | None,
) -> image.Image | image.MemoryImage | None:  # fmt: skip
    """Return the file in which packed matrices are kept for the next start: an Image, a MemoryImage, or None.

    It is an Image (a file on disk) if `cache` is a folder, or if `cache` is "auto" and the matrices have at least
    image.WORTH bytes. Otherwise it is a MemoryImage if `file` is given, or else None. It is also None if
    weights.identity() is None, because a later process could not tell whether it has the same weights.

    `cache` and `file` are the arguments `cache` and `image_file` of load().
    """
    on_disk = cache is not None and (cache != "auto" or sum(w.nbytes for w in matrices.values()) >= image.WORTH)
    if not on_disk and file is None:
        return None
    identity = weights.identity()
    if identity is None:
        return None
    facts = []
    for name, home in layout.homes.items():
        t, packing = program.tensors[name], layout.matrices[home.matrix].packing
        kept_as = [packing.family, packing.group, packing.glu]
        facts.append([name, t.type, t.source, kept_as, image.packing_hash(packing.family, packing.group, packing.glu)])
    key = hashlib.sha256(json.dumps([identity, facts]).encode()).hexdigest()
    if not on_disk:
        assert file is not None
        return image.MemoryImage(file, key, matrices)
    folder = image.default_folder() if cache in ("auto", None) else Path(cache)
    return image.Image(folder, program.name, key, matrices)


def _arrays(program: Program, layout: HostLayout, weights: Weights, state: StateSpec) -> dict[str, Value]:
    """Return the tensors that ops with Python kernels read: {name of a weight, constant or state: value}.

    State is filled with zeros. Raises DeviceError if a weight does not fit its tensor's shape or format.
    """
    found: dict[str, Value] = {}
    for t in (program.tensors[name] for name in sorted(layout.arrays)):
        if t.role == "weight":
            found[t.name] = assemble(t, weights)
        else:
            found[t.name] = np.array(t.values, np.float32) if t.role == "const" else zeroed_state(t, state, program)
    return found


@dataclass
class _Loader:
    """Declares tensors to a native executable and packs weights.

    If `packed` is True, the matrices have their values already, for example from a cached file, and only vectors are
    read.
    """

    native: _native.Executable
    program: Program
    layout: HostLayout
    weights: Weights
    state: StateSpec
    threads: int
    matrices: Mapping[str, _native.Weight]
    packed: bool  # the matrices already hold their values
    buffers: dict[str | int, int] = field(default_factory=dict)

    def is_native(self, t: Tensor) -> bool:
        """True if ops of the native executable use the tensor `t`, so that it must be declared."""
        return t.role in ("temp", "output") or t.name in self.layout.native

    def declare(self, t: Tensor) -> int:
        """Declare a tensor to the native executable. Returns the number that the native executable gives it.

        Raises DeviceError for state for which the StateSpec has no slots or pages, and for weights that do not fit.
        """
        if t.role == "const":
            return self.native.vector(np.array(t.values, np.float32))
        if t.role == "state" and t.shape[0] == "N":
            check_slots(t, self.state)
            return self.native.states(self.state.slots, math.prod(int(d) for d in t.shape[1:]))
        if t.role == "state":
            *_, heads, head_dim = t.shape
            rows = dim_size(t.shape[1], {"B": self.state.page_tokens})
            family = formats.get(t.format).family
            pages = self.state.pages_of(self.program, t.name)
            windowed = bool(self.state.window_pages) and t.name in self.program.windows
            keys = t.name in self.layout.keys
            return self.native.cache(pages, int(heads), int(head_dim), family, keys, windowed, rows)
        if t.role == "weight":
            return self._matrix(t) if t.name in self.layout.homes else self._vector(t)
        base = self.program.tensors[t.view[0]] if t.view else t
        column = t.view[1] if t.view else 0
        return self.native.columns(self._buffer(base), columns_of(t), columns_of(base), column)

    def _buffer(self, t: Tensor) -> int:
        """Return the number of the native buffer that holds the intermediate result `t`.

        The buffer is declared to the native executable at its first use.
        """
        key = buffer_key(t)
        if key not in self.buffers:
            b = self.layout.buffers[key]
            self.buffers[key] = self.native.buffer(b.columns * 4, b.sampled, b.share, b.shares)
        return self.buffers[key]

    def _vector(self, t: Tensor) -> int:
        """Declare a vector, or a stack of vectors, to the native executable. Returns the vector's number there."""
        return self.native.vector(self.vector(t))

    def vector(self, t: Tensor) -> np.ndarray:
        """Return the values of a vector, or of a stack of vectors joined into one, as an f32 array of one dimension.

        If gate and up matrices are packed together, their biases are concatenated: for each expert, the gate's bias and
        then the up projection's.
        """
        joined = self.layout.joined
        parts = [t, *([self.program.tensors[joined[t.name]]] if t.name in joined else [])]
        values = [np.asarray(assemble(part, self.weights), np.float32) for part in parts]
        return np.concatenate(values, axis=-1).reshape(-1)

    def _matrix(self, t: Tensor) -> int:
        """Declare a matrix to the native executable, and pack its values unless they are packed already.

        Returns the number that the native executable gives the matrix. Raises DeviceError if the checkpoint's tensors
        do not fit the matrix's shape.
        """
        if not self.packed:
            self.fill(t)
        return self.native.weight(self.matrices[self.layout.homes[t.name].matrix], [int(d) for d in t.shape])

    def fill(self, t: Tensor) -> None:
        """Read a matrix from the checkpoint and pack its values into its native weight. Returns None.

        Raises DeviceError if the values in the checkpoint do not fit the shape or format of `t`.
        """
        home, k, at = self.layout.homes[t.name], int(t.shape[-1]), 0
        for source in t.source:
            for name, x in strips(source, self.weights.read, self.weights.strips):
                at = self._fill(t, home, name, x, at)
                self.weights.release(name)
        wanted = int(np.prod([int(d) for d in t.shape[:-1]]))
        if at != wanted:
            raise DeviceError(f"weight {t.name} is {t.type} but {' + '.join(t.source)} holds {at} rows of {k}")

    def _fill(self, t: Tensor, home: Home, name: str, x: Value, at: int) -> int:
        """Pack the values `x` of the checkpoint tensor `name` into the rows of weight `t`, beginning at its row `at`.

        Returns the number of the row after the last one packed. `home` says in which packed matrix, which may hold
        several weights, and in which of its rows the weight is. Raises DeviceError if the values do not fit the
        weight's shape or format.
        """
        held, total = list(x.shape), math.prod(x.shape[:-1])
        if len(held) < 2 or held[-1] != t.shape[-1] or at + total > math.prod(map(int, t.shape[:-1])):
            raise DeviceError(f"weight {t.name} is {t.type} but its source {name} is {held}")
        coded = isinstance(x, Quantised) and x.format == t.format
        if not coded and formats.get(t.format).published:
            had = f"{x.format} in other blocks" if isinstance(x, Quantised) and x.format else "plain values"
            raise DeviceError(
                f"weight {t.name} is {t.type}, a format that cannot be quantised to, but {name} is {had}; use weights "
                "int8 or int4, which quantise it again"
            )
        plain = x if isinstance(x, np.ndarray) else x.rows(slice(None))
        rows = x if coded else np.ascontiguousarray(plain).reshape(-1, held[-1])
        if isinstance(rows, Quantised):
            rows = rows.each(lambda part: part.reshape(-1, part.shape[-1]))
        step = home.rows if home.step > home.rows else total
        for first in range(0, total, step):
            matrix, row = divmod(at + first, home.rows)
            to = home.first + matrix * home.step + row
            self._pack(self.matrices[home.matrix], rows, first, min(step, total - first), to, name)
        return at + total

    def _pack(self, weight: _native.Weight, rows: Value, first: int, count: int, to: int, name: str) -> None:
        """Pack some rows of the matrix `rows` into a native weight. Returns None.

        Raises DeviceError if the host cannot read the matrix's type.

        Args:
            weight: the native weight.
            rows: the matrix.
            first: number of the matrix's first row to pack.
            count: number of rows to pack.
            to: number of the native weight's row in which the first of them is stored.
            name: name of the checkpoint tensor, for errors.
        """
        if isinstance(rows, Quantised):
            fill_codes(weight, rows.each(lambda x: x[first : first + count]), to, self.threads)
        else:
            bytes = rows[first : first + count].reshape(-1).view(np.uint8)
            weight.fill(bytes, _source_name(rows, name), to, count, self.threads)
