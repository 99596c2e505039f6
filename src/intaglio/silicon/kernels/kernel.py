"""ChipKernel: base class of chip kernels, and their registry by op class, which other packages can extend.

timing() models a kernel's time in a step, run_op() executes one op on the simulator. WorkKernel is the base of kernels
that are timed by FLOPs and bytes alone. A kernel instance holds all that the time of an op depends on apart from the
batch. Equal instances (such as those of a model's layers) are timed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import ChipError, Target
from intaglio.ops import Op, Tensor
from intaglio.silicon.kernels.chip_memory import ChipMemory
from intaglio.silicon.memory import MachineError
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Stream
from intaglio.silicon.timing import Timing

Tensors = Mapping[str, Tensor]
WIDE = 4  # bytes of an activation from which operands of products are FP32, as in the streams
CHIP_KERNELS: dict[type[Op], type[ChipKernel]] = {}
K = TypeVar("K", bound="type[ChipKernel]")


@dataclass(frozen=True)
class ChipKernel:
    """Base class of chip kernels: frozen dataclasses with the sizes and formats that an op's time depends on.

    A subclass defines of() and time(). It also defines streams() if the simulator can execute the op, and unsupported()
    if streams() does not support all that the op can express.

    Attributes:
        by_sequence: True if time() reads the queries and keys of the batch's sequences. False: it reads only the
            numbers of tokens, rows and sequences, so steps that differ only in their keys share one Timing.
    """

    by_sequence: ClassVar[bool] = True

    @classmethod
    def of(cls, op: Any, t: Tensors) -> ChipKernel:
        """The kernel instance for an op, with the sizes and formats that its time depends on.

        t: the Tensors of the op's Program (shapes, formats and roles), by name.
        """
        raise NotImplementedError(f"{cls.__name__} must define of()")

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        """The Timing of the op in a step of these sizes.

        prefetched: True if HBM delivers the op's weights during earlier ops. The Timing's `seconds` then do not count
        the transfer of the weights; its hbm_bytes do.
        """
        raise NotImplementedError(f"{type(self).__name__} must define time()")

    @classmethod
    def unsupported(cls, op: Any, t: Tensors) -> str | None:
        """The reason why streams() does not support this op, for an error message; None if it does."""
        return None

    @classmethod
    def runs_on(cls, target: Target, op: Any, t: Tensors, batch: Batch) -> Target:
        """The target with which the simulator times the Streams of this op. The base class returns `target` itself.

        A kernel library may describe several kernels for one kind of op, such as attention, with other values for some
        fields. Subclasses for such ops return a target with the values of the kernel that is used, see Target.kernel().
        t: the Program's tensors by name. batch: the step's batch.
        """
        return target

    @classmethod
    def streams(cls, mem: ChipMemory, op: Any, t: Tensors, batch: Batch) -> list[Stream]:
        """Write the op's instructions for one batch: returns a list with one Stream for each core that has work.

        A kernel of several launches executes all but the last in `mem` during the call, and returns the Streams of the
        last.

        mem: the chip's memory, with the operands and regions for the results. t: the Program's tensors by name. batch:
        the step's batch; attention and other ops on sequences read from it which rows belong together.
        """
        raise NotImplementedError(f"{cls.__name__} must define streams()")


def chip_kernel(*ops: type[Op]) -> Callable[[K], K]:
    """A class decorator that registers the class as the chip kernel of these op classes, and returns the class.

    The decorator raises TypeError if one of the op classes already has a kernel.
    """

    def register(kernel: K) -> K:
        for op in ops:
            if op in CHIP_KERNELS:
                raise TypeError(f"op {op.kind} has a chip kernel already: {CHIP_KERNELS[op].__name__}")
            CHIP_KERNELS[op] = kernel
        return kernel

    return register


def kernel_class(op: Op) -> type[ChipKernel]:
    """The kernel class of an op. Raises ChipError, with how to register one, if the op has none."""
    if type(op) not in CHIP_KERNELS:
        known = ", ".join(sorted(k.kind for k in CHIP_KERNELS))
        register = f"register one with @intaglio.silicon.chip_kernel({type(op).__name__})"
        raise ChipError(f"op {op.kind} at {op.site} has no chip kernel; there are kernels for {known}; {register}")
    return CHIP_KERNELS[type(op)]


@lru_cache(maxsize=65536)
def timing(kernel: ChipKernel, target: Target, sizes: BatchSizes, prefetched: bool = False) -> Timing:
    """The Timing of a kernel in a step of these sizes, cached. prefetched: as in ChipKernel.time()."""
    return kernel.time(target, sizes, prefetched)


@dataclass(frozen=True)
class WorkKernel(ChipKernel):
    """A chip kernel timed by the op's work(), for ops without a formula of their own.

    The time is launch overhead, plus HBM latency, plus the longer of two times: that of the op's FLOPs at the rate of
    `engine` (VEC: the vector lanes, MXU: the matrix array in bf16, at the library's efficiency), and that of its bytes
    at HBM's rate. The time does not count bytes of weights that are prefetched. The simulator cannot execute such a
    kernel, unless a subclass defines streams().
    """

    op: Op
    tensors: tuple[Tensor, ...]
    engine: ClassVar[str] = "VEC"

    @classmethod
    def of(cls, op: Op, t: Tensors) -> WorkKernel:
        """Make a WorkKernel (a kernel timed by its FLOPs and bytes) for an op.

        In the kernel the op's tensors are named t0, t1, and so on, and the op has no site (name of its place in the
        model). Ops that differ only in these names therefore have equal kernels, whose times are cached once.

        t: the tensors of the op, by name.
        """
        short = {name: f"t{i}" for i, name in enumerate(dict.fromkeys((*op.inputs, *op.outputs)))}
        tensors = tuple(Tensor(by, t[name].shape, t[name].format, t[name].role) for name, by in short.items())
        return cls(replace(op.rename(short), site=""), tensors)

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        chip, library = target.chip, target.library
        work = self.op.work({t.name: t for t in self.tensors}, sizes.batch())
        array = self.engine == "MXU"
        rate = (
            chip.peak_flops("bf16") * library.mxu_efficiency if array else chip.cores * chip.vec_lanes * chip.clock_hz
        )
        busy = {self.engine: work.flops / rate, "HBM": work.bytes / chip.hbm_rate}
        counted = work.bytes - (work.weight_bytes if prefetched else 0)
        longest = max(busy[self.engine], counted / chip.hbm_rate)
        seconds = library.launch_s + chip.constants.hbm_latency_s + longest
        flops = float(work.flops) if array else 0.0  # Timing.flops counts only the matrix array's
        weights = float(work.weight_bytes)
        return Timing(seconds, busy, work.bytes, work.bytes, flops=flops, weight_bytes=weights)


def unsupported_reason(op: Op, t: Tensors) -> str | None:
    """The reason why no chip kernel can execute this op, for an error message; None if one can."""
    try:
        kernel = kernel_class(op)
    except ChipError as e:
        return str(e)
    if kernel.streams.__func__ is ChipKernel.streams.__func__:  # type: ignore[attr-defined]
        return kernel.unsupported(op, t) or f"op {op.kind} at {op.site}: {kernel.__name__} does not define streams()"
    for name in op.inputs:
        has_minima = t[name].format in ("q4_k", "q5_k")  # no instruction subtracts a group's minimum
        if t[name].role == "weight" and (has_minima or formats.get(t[name].format).published):
            taken = ", ".join((*formats.PLAIN, formats.SCALED))
            return f"weight {name} of {op.site} is {t[name].format}; chip kernels take {taken}"
    return kernel.unsupported(op, t)


def run_op(board: ChipMemory, op: Op, t: Tensors, batch: Batch) -> dict[str, np.ndarray]:
    """Execute one op on the simulator and return a dict of its results by tensor name.

    `board`: the chip's memory, which holds the operands. Raises MachineError if no kernel supports the op.
    """
    if why := unsupported_reason(op, t):
        raise MachineError(why)
    shapes = {name: [batch.sizes[d] if isinstance(d, str) else d for d in t[name].shape] for name in op.outputs}
    for name, dims in shapes.items():
        board.allocate(name, dims[0] if len(dims) > 1 else 1, dims[-1], t[name].format)
    kernel = kernel_class(op)
    board.run(kernel.streams(board, op, t, batch), kernel.runs_on(board.target, op, t, batch))
    return {name: board.read(name).reshape(dims) for name, dims in shapes.items()}
