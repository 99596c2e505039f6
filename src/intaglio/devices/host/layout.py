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
    """The packed format of a weight matrix, as the host's matrix product reads it.

    Attributes:
        family: family of the weight's format. All formats of a family are packed in the same way.
        group: number of columns that share a scale; 0 if the format has no groups.
        glu: True if the matrix holds the gate and up projections of an MLP with alternating rows.
    """

    family: str
    group: int
    glu: bool


@dataclass(frozen=True)
class PackedMatrix:
    """Shape and packing of a native weight [rows, columns].

    It holds one matrix, a stack of matrices, or a gate and an up matrix together.
    """

    packing: Packing
    rows: int
    columns: int

    def make(self) -> _native.Weight:
        """Allocate a native weight of this shape and return it. Its values are not set."""
        return _native.Weight(self.packing.family, self.rows, self.columns, self.packing.group, self.packing.glu)


@dataclass(frozen=True)
class Home:
    """The rows of a packed matrix in which a weight is stored.

    Attributes:
        matrix: name of the packed matrix.
        first: number of the packed matrix's row at which the weight begins.
        rows: number of rows of the weight. If the weight is a stack of matrices, rows of each matrix.
        step: distance in rows from the beginning of one matrix of a stack to the next; `rows` for a single matrix.
    """

    matrix: str
    first: int
    rows: int
    step: int


@dataclass(frozen=True)
class Buffer:
    """Size of one memory buffer for intermediate results of a step (temps). Several temps may use one buffer in turn.

    Attributes:
        columns: number of columns of the widest temp.
        sampled: True if the buffer has one row for each row that is sampled; False if it has one row per token.
        share: with sequence parallelism, the number of the part of the token rows that the buffer holds, counted from
            0; otherwise 0.
        shares: number of nearly equal parts into which the token rows are divided; 1 without sequence parallelism.
    """

    columns: int
    sampled: bool
    share: int
    shares: int


@dataclass(frozen=True)
class Stop:
    """An op at which the native code of a step returns to Python: a collective, or an op with a Python kernel.

    Attributes:
        at: the op's number in the Program.
        op: the op.
        kernel: the op's Python kernel; None for a collective.
    """

    at: int
    op: Op
    kernel: PythonKernel | None


@dataclass(frozen=True)
class HostLayout:
    """The host's layout for a Program: packed weights, buffers, and the ops at which native code stops.

    Attributes:
        matrices: {name of a packed matrix: its shape}. A packed matrix is named after the first weight in it.
        homes: {name of a packed weight: the rows in which it is stored}.
        buffers: {buffer_key() of a tensor: size of the buffer in which the tensor is stored}.
        keys: names of the caches that hold attention keys. They are stored transposed.
        joined: {bias of an MLP's gate: bias of its up projection}. The second is appended to the first.
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
        """Return the HostLayout for a Program.

        `native_collectives` is True if collectives run as native ops, which needs a communicator. Raises DeviceError
        for an op without a host kernel, and for state that both native and Python kernels use.
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
    """Raise DeviceError if a tensor in `both` is state, such as a K/V cache. Returns None.

    `both` has the names of the tensors that native and Python kernels both use. They must not share state.
    """
    for name in sorted(both):
        if program.tensors[name].role == "state":
            users = [op.site for op in program.ops if name in op.inputs]
            raise DeviceError(
                f"state {name} is used by {', '.join(users)}, of which some have a native kernel and some a Python "
                "one; give all of them kernels of one kind"
            )


def packing_of(t: Tensor, glu: bool) -> Packing:
    """Return how the weight tensor `t` is packed, as a Packing.

    `glu` is True if rows of a gate and an up projection alternate in the packed matrix.
    """
    fmt = formats.get(t.format)
    return Packing(fmt.family, fmt.group_of(int(t.shape[-1])) if fmt.grouped else 0, glu)


def _matrices(
    program: Program, ops: list[Op], gates: Mapping[str, str]
) -> tuple[dict[str, PackedMatrix], dict[str, Home]]:
    """Choose the packed matrices of a Program, and the rows in which each weight is stored.

    Returns a tuple ({name of a packed matrix: PackedMatrix}, {name of a weight: Home}). A Home says in which packed
    matrix and in which rows the weight is.

    Each weight of a matrix product has a packed matrix of its own, with the weight's name. The exception is a gated
    MLP: its gate and up weights share one packed matrix, with the gate's name. A weight [n, rows, columns], such as the
    weights of n experts, is a stack of n matrices; each begins at a multiple of _native.PANEL_ROWS rows.

    Args:
        program: the Program.
        ops: the ops with native kernels.
        gates: {gate weight: up weight} of gated MLPs, and {gate bias: up bias}.
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
    """Return the number of values in a row of `t`, an intermediate result of a step; 1 if `t` has one dimension."""
    return int(t.shape[1]) if len(t.shape) == 2 else 1


def buffer_key(t: Tensor) -> str | int:
    """Return the key of the buffer in which an intermediate result `t` is stored.

    It is the buffer's number, or the tensor's own name if the Program's memory was not planned.
    """
    return t.name if t.buffer is None else t.buffer


def _buffers(program: Program) -> dict[str | int, Buffer]:
    """Return the buffers in which a step keeps its intermediate results and outputs, as a dict {key: Buffer}.

    A key is the buffer_key() of the tensors that are stored in the buffer.
    """
    buffers = dict[str | int, Buffer]()
    for t in program.tensors.values():
        if t.role in ("temp", "output") and not t.view:
            match = SHARE.fullmatch(str(t.shape[0]))
            share, shares = (int(match[1]), int(match[2])) if match else (0, 1)
            own = Buffer(columns_of(t), t.shape[0] == "R", share, shares)
            first = buffers.get(buffer_key(t), own)
            buffers[buffer_key(t)] = replace(first, columns=max(first.columns, own.columns))
    return buffers
