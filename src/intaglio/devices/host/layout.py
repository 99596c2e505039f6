"""HostLayout: what the host derives from a Program before it loads weights.

It has the weights that are packed together, the buffers of a step, the layout of caches, and the ops at which native
code returns to Python. All follow from the uses that ops declare for their operands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from intaglio import _native, formats
from intaglio.batch import SHARE
from intaglio.devices.device import DeviceError
from intaglio.devices.host.kernels import NativeKernel, PythonKernel, kernel_of
from intaglio.ops import Collective, Op, Tensor
from intaglio.ops.op import WEIGHT_MATRICES
from intaglio.program import Program


@dataclass(frozen=True)
class Packing:
    """How a weight matrix is packed.

    Attributes:
        family: family of the weight's format; formats of one family are packed alike.
        group: number of columns that share a scale; 0 if the format has no groups.
        glu: True if rows of gate and up alternate.
    """

    family: str
    group: int
    glu: bool


@dataclass(frozen=True)
class PackedMatrix:
    """Shape of a packed weight [rows, columns]: one matrix, a stack of matrices, or gate and up together."""

    packing: Packing
    rows: int
    columns: int

    def make(self) -> _native.Weight:
        """A new native weight of this shape, allocated without values."""
        return _native.Weight(self.packing.family, self.rows, self.columns, self.packing.group, self.packing.glu)


@dataclass(frozen=True)
class Home:
    """Location of a weight in a packed matrix.

    Attributes:
        matrix: name of the packed matrix.
        first: row of the packed matrix at which the weight begins.
        rows: rows of the weight; for a stack, rows of each matrix.
        step: distance in rows from one matrix of a stack to the next; `rows` for a single matrix.
    """

    matrix: str
    first: int
    rows: int
    step: int


@dataclass(frozen=True)
class Buffer:
    """Size of the memory for the temps that are planned into one buffer.

    Attributes:
        columns: number of columns of the widest temp.
        sampled: True if it has a row for each of the R rows to sample; False for token rows.
        share: with sequence parallelism, which part of the T token rows the buffer holds, counted from 0; else 0.
        shares: number of near-equal parts into which the token rows are divided; 1 without sequence parallelism.
    """

    columns: int
    sampled: bool
    share: int
    shares: int


@dataclass(frozen=True)
class Stop:
    """An op at which native code returns to Python: a collective (kernel is None), or an op with a Python kernel.

    `at`: the op's number in the Program.
    """

    at: int
    op: Op
    kernel: PythonKernel | None


@dataclass(frozen=True)
class HostLayout:
    """How the host stores and runs a Program: packed weights, buffers, and where native code stops.

    Attributes:
        matrices: shape of each packed matrix, by the name of the first weight in it.
        homes: where each packed weight is: {name of the weight: Home (packed matrix, first row)}.
        buffers: size of each buffer for temps, a Buffer (columns, kind of rows), by buffer_key().
        keys: names of the caches that hold attention keys, which are stored transposed.
        joined: {bias of an MLP's gate: bias of its up-projection, which is appended to the gate's}.
        stops: ops at which native code returns to Python, in order.
        native: names of weights, constants and state that native ops use.
        arrays: names of weights, constants and state that Python kernels use.
    """

    matrices: Mapping[str, PackedMatrix]
    homes: Mapping[str, Home]
    buffers: Mapping[str | int, Buffer]
    keys: frozenset[str]
    joined: Mapping[str, str]
    stops: tuple[Stop, ...]
    native: frozenset[str]
    arrays: frozenset[str]

    @cached_property
    def stopped(self) -> frozenset[int]:
        """The numbers of the ops at which native code returns to Python, as a frozenset."""
        return frozenset(stop.at for stop in self.stops)

    @classmethod
    def of(cls, program: Program, native_collectives: bool = False) -> HostLayout:
        """The HostLayout derived from a Program.

        native_collectives: True if collectives are native ops, for a rank with a communicator. Raises DeviceError
        naming an op without a host kernel, or state that both native and Python code use.
        """
        stops_at = () if native_collectives else (Collective,)
        kernels = [None if isinstance(op, stops_at) else kernel_of(op) for op in program.ops]
        stops = tuple(
            Stop(i, op, kernel)
            for i, (op, kernel) in enumerate(zip(program.ops, kernels, strict=True))
            if not isinstance(kernel, NativeKernel)
        )
        ops = [op for op, kernel in zip(program.ops, kernels, strict=True) if isinstance(kernel, NativeKernel)]
        held = {t.name for t in program.tensors.values() if t.role in ("weight", "const", "state")}
        native = frozenset(name for op in ops for name in op.inputs if name in held)
        arrays = frozenset(name for stop in stops if stop.kernel for name in stop.op.inputs if name in held)
        _check_state(program, native & arrays)
        gates = {gate: up for op in ops for gate, up in op.gates.items()}
        matrices, homes = _matrices(program, ops, gates)
        return cls(
            matrices=matrices,
            homes=homes,
            buffers=_buffers(program),
            keys=frozenset(cache for op in ops for cache in op.operands("pages", keys=True)),
            joined={gate: up for gate, up in gates.items() if gate not in homes},
            stops=stops,
            native=native,
            arrays=arrays,
        )


def _check_state(program: Program, both: frozenset[str]) -> None:
    """Raise DeviceError if one of the tensors `both`, which native and Python code both use, is state."""
    for name in sorted(both):
        if program.tensors[name].role == "state":
            users = [op.site for op in program.ops if name in op.inputs]
            raise DeviceError(
                f"state {name} is used by {', '.join(users)}, of which some have a native kernel and some a Python "
                "one; give all of them kernels of one kind"
            )


def packing_of(t: Tensor, glu: bool) -> Packing:
    """The Packing of a weight. glu: True if rows of gate and up alternate in the packed matrix."""
    fmt = formats.get(t.format)
    return Packing(fmt.family, fmt.group_of(int(t.shape[-1])) if fmt.grouped else 0, glu)


def _matrices(
    program: Program, ops: list[Op], gates: Mapping[str, str]
) -> tuple[dict[str, PackedMatrix], dict[str, Home]]:
    """Choose the packed matrices of a Program, and where each weight lies in them.

    Returns ({name of a packed matrix: PackedMatrix}, {name of a weight: Home, its place in one of these matrices}).

    Each weight of a matrix product has a packed matrix of its own, named after it; a gated MLP's gate and up matrices
    share the gate's. In a weight [n, rows, columns], such as that of n experts, each of the n matrices begins at a
    multiple of _native.PANEL_ROWS rows.

    ops: the ops with native kernels. gates: {gate weight: up weight} of gated MLPs, and likewise for their biases.
    """
    packed = {w for op in ops for w in op.operands(*WEIGHT_MATRICES)}
    interleaved = {w for op in ops for w in op.interleaved}
    ups = {gate: up for gate, up in gates.items() if gate in packed}
    matrices, homes = dict[str, PackedMatrix](), dict[str, Home]()
    for t in program.of_role("weight"):
        if t.name in packed - set(ups.values()):
            *stack, rows, columns = map(int, t.shape)
            step = -(-rows // _native.PANEL_ROWS) * _native.PANEL_ROWS if stack else rows
            n = step * (stack[0] if stack else 1)
            packing = packing_of(t, t.name in interleaved)
            matrices[t.name] = PackedMatrix(packing, 2 * n if t.name in ups else n, columns)
            homes[t.name] = Home(t.name, 0, rows, step)
            if t.name in ups:
                homes[ups[t.name]] = Home(t.name, n, rows, step)
    return matrices, homes


def columns_of(t: Tensor) -> int:
    """Number of values per row of a temp; 1 if it has one dimension."""
    return int(t.shape[1]) if len(t.shape) == 2 else 1


def buffer_key(t: Tensor) -> str | int:
    """Key of a temp's buffer: the buffer's number, or the temp's name if memory was not planned."""
    return t.name if t.buffer is None else t.buffer


def _buffers(program: Program) -> dict[str | int, Buffer]:
    """The buffers in which a step keeps its temps and outputs: {buffer_key() of the tensors in it: Buffer}."""
    buffers = dict[str | int, Buffer]()
    for t in program.tensors.values():
        if t.role in ("temp", "output") and not t.view:
            match = SHARE.fullmatch(str(t.shape[0]))
            share, shares = (int(match[1]), int(match[2])) if match else (0, 1)
            own = Buffer(columns_of(t), t.shape[0] == "R", share, shares)
            first = buffers.get(buffer_key(t), own)
            buffers[buffer_key(t)] = replace(first, columns=max(first.columns, own.columns))
    return buffers
