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
    """Write quantised rows (codes, scales, zeros or minima) into the rows of a native weight from number `first` on."""
    own = {name: np.ascontiguousarray(x, np.float32) for name, x in rows.arrays.items() if name != "codes"}
    codes, lows = np.ascontiguousarray(rows.codes).view(np.uint8), own.get("zeros", own.get("minima"))
    weight.fill_codes(codes, own["scales"], lows, own.get("units"), own.get("low_units"), first, threads)


def _source_name(array: np.ndarray, name: str) -> str:
    """Name of the format (f32, f16 or bf16) of an array that is not quantised.

    name: the weight's name, for the error. Raises DeviceError if the host cannot read the array's type.
    """
    for known in ("f32", "f16", "bf16"):
        if array.dtype == formats.get(known).dtype:
            return known
    raise DeviceError(f"weight {name} is stored as {array.dtype}; the host reads f32, f16 and bf16")


@dataclass(frozen=True)
class Loaded:
    """What load() has put into a native executable.

    Attributes:
        ids: the number by which the native executable knows a tensor, by the tensor's name.
        matrices: packed weights by name.
        arrays: weights, constants and state for Python kernels, by name.
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
    """Fill a native executable: declare its tensors, pack its weights, create its ops.

    Returns a Loaded: numbers of the tensors, the packed matrices, and arrays for Python kernels. Raises DeviceError for
    weights of the wrong shape or type, and for ops that the kernels cannot run.

    Args:
        native: the empty executable.
        program: the Program whose ops are created.
        layout: which weights are packed together, and where native code stops.
        weights: the source of the weights.
        state: sizes of the K/V cache and of recurrent state.
        threads: threads that pack.
        cache: folder for packed weights; "auto": the usual folder if there are enough weights to make it worth while;
            None: no file on disk.
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

    Returns ({name of packed matrix: packed weight}, {name of vector: values, f32}). Used to give a rank other experts.

    Args:
        native: the executable in which the Program is loaded.
        layout: its layout.
        weights: source of checkpoint tensors.
        state: size of its state.
        program: the loaded Program, whose weights may name other checkpoint tensors than at load, such as other
            experts.
        names: the weights to read, all used by native ops.

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
    """The all_reduces that the host runs together with the addition of a residual that follows them.

    Returns {number of the all_reduce: {"residual": name of the residual, "total": name of the addition's result}}. The
    addition is the next op, a map, and no other op reads the sum. The sum is then not stored.
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
    """Append one op to the native executable. Raises DeviceError if its kernel cannot run the op.

    Operands are passed by the field names of the op's class, attributes as the op's NativeKernel gives them.

    ids: numbers of the Program's tensors in the native executable, by name. more: further operands that the op's class
    does not have, as {operand's name in the kernel: tensor's name}; for example the residual that an all_reduce adds.
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
    """The place where the packed matrices are kept for the next start; None if they are not kept.

    It is an Image, a file on disk, if `cache` is a folder, or if `cache` is "auto" and the matrices have at least
    image.WORTH bytes. Otherwise it is a MemoryImage if `file` is given. They are not kept if neither holds, or if
    weights.identity() is None, so that no key tells whether a later process has the same weights.

    cache, file: the arguments `cache` and `image_file` of load().
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
    """The tensors that ops without native kernels read: {name: weight, constant or zeroed state}.

    Op.reference() takes them from this dict. Raises DeviceError if a weight does not fit its tensor's shape or format.
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

    `packed`: True if the matrices are packed already, for example by a cached file; then only vectors are read.
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
        """True if the native executable needs the tensor."""
        return t.role in ("temp", "output") or t.name in self.layout.native

    def declare(self, t: Tensor) -> int:
        """Declare a tensor to the native executable. Returns its number there.

        Raises DeviceError for state that the StateSpec has no room for, and for weights that do not fit.
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
        """Number of the native buffer of a temp. The buffer is declared at its first use."""
        key = buffer_key(t)
        if key not in self.buffers:
            b = self.layout.buffers[key]
            self.buffers[key] = self.native.buffer(b.columns * 4, b.sampled, b.share, b.shares)
        return self.buffers[key]

    def _vector(self, t: Tensor) -> int:
        """Declare a vector to the native executable, or a stack of vectors as one; return its number there."""
        return self.native.vector(self.vector(t))

    def vector(self, t: Tensor) -> np.ndarray:
        """The values of a vector, or of a stack of vectors as one vector, as an f32 array of one dimension.

        The biases of gate and up of each expert are concatenated, as their matrices are packed together.
        """
        joined = self.layout.joined
        parts = [t, *([self.program.tensors[joined[t.name]]] if t.name in joined else [])]
        values = [np.asarray(assemble(part, self.weights), np.float32) for part in parts]
        return np.concatenate(values, axis=-1).reshape(-1)

    def _matrix(self, t: Tensor) -> int:
        """Declare a matrix and pack its values, unless they are packed already.

        Returns the number by which the native executable knows it.

        Raises DeviceError if the checkpoint's tensors do not fit its shape.
        """
        if not self.packed:
            self.fill(t)
        return self.native.weight(self.matrices[self.layout.homes[t.name].matrix], [int(d) for d in t.shape])

    def fill(self, t: Tensor) -> None:
        """Read a matrix from the checkpoint and pack its values into this loader's image. Returns nothing.

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
        """Pack the values `x` of the checkpoint tensor `name` into weight `t`, from row `at` of the weight on.

        Returns the number of the weight's row after the last one packed. home: where the weight's rows are in the
        packed matrix, which may hold several weights. Raises DeviceError if the values do not fit the weight's shape or
        format.
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
        """Pack `count` rows of a matrix, from its row `first` on, into the native weight from row `to` on.

        Returns nothing. rows: the matrix. name: name of its checkpoint tensor, for errors. Raises DeviceError if the
        host cannot read its type.
        """
        if isinstance(rows, Quantised):
            fill_codes(weight, rows.each(lambda x: x[first : first + count]), to, self.threads)
        else:
            bytes = rows[first : first + count].reshape(-1).view(np.uint8)
            weight.fill(bytes, _source_name(rows, name), to, count, self.threads)
