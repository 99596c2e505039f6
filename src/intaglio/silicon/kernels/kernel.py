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
    """Base class of chip kernels. A chip kernel is made for one op of a Program; it models the op's time on a chip.

    Subclasses are frozen dataclasses, whose fields are the sizes and formats on which the time depends. A subclass
    defines of() and time(). If the simulator can execute the op, it also defines streams(), and unsupported() if
    streams() cannot execute all variants of the op.

    Attributes:
        by_sequence: True if time() depends on how many queries and keys each sequence of the batch has. False: it
            depends only on the numbers of tokens, rows and sequences, so steps that differ only in their keys share one
            Timing.
    """

    by_sequence: ClassVar[bool] = True

    @classmethod
    def of(cls, op: Any, t: Tensors) -> ChipKernel:
        """Returns the kernel instance for an op.

        It has the sizes and formats on which its time depends. t: the Tensors of the op's Program (shapes, formats and
        roles), by name.
        """
        raise NotImplementedError(f"{cls.__name__} must define of()")

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        """Returns the modelled Timing of the op for a step with the batch sizes `sizes`.

        prefetched: True if the op's weights are loaded from HBM during earlier ops. Then the `seconds` of the Timing do
        not include the transfer of the weights, while its `hbm_bytes` do.
        """
        raise NotImplementedError(f"{type(self).__name__} must define time()")

    @classmethod
    def unsupported(cls, op: Any, t: Tensors) -> str | None:
        """Returns None if streams() can execute this op; else the reason why not, as text for an error message."""
        return None

    @classmethod
    def runs_on(cls, target: Target, op: Any, t: Tensors, batch: Batch) -> Target:
        """Returns the target (chip and kernel library) with which the simulator times this op's Streams.

        The base class returns `target` itself. A kernel library may describe several kernels for one kind of op, such
        as attention, each with its own values of some fields. Subclasses for such ops return a target with the values
        of the kernel that is used, see Target.kernel().

        t: the Program's tensors by name. batch: the step's batch.
        """
        return target

    @classmethod
    def streams(cls, mem: ChipMemory, op: Any, t: Tensors, batch: Batch) -> list[Stream]:
        """Write the op's instructions for one batch. Returns a list with one Stream for each core that has work.

        Some ops need several launches. Their method executes all launches but the last in `mem`, and returns the
        Streams of the last.

        Args:
            mem: the chip's memory, with the op's operands and regions for its results.
            op: the op.
            t: the Program's tensors by name.
            batch: the step's batch. Ops on sequences, such as attention, read from it which rows belong to a sequence.
        """
        raise NotImplementedError(f"{cls.__name__} must define streams()")


def chip_kernel(*ops: type[Op]) -> Callable[[K], K]:
    """Returns a class decorator that registers a class as the chip kernel of the op classes `ops`.

    The decorator returns the class. It raises TypeError if one of the op classes already has a kernel.
    """

    def register(kernel: K) -> K:
        for op in ops:
            if op in CHIP_KERNELS:
                raise TypeError(f"op {op.kind} has a chip kernel already: {CHIP_KERNELS[op].__name__}")
            CHIP_KERNELS[op] = kernel
        return kernel

    return register


def kernel_class(op: Op) -> type[ChipKernel]:
    """Returns the ChipKernel subclass that is registered for an op.

    Raises ChipError if there is none; the message says how to register one.
    """
    if type(op) not in CHIP_KERNELS:
        known = ", ".join(sorted(k.kind for k in CHIP_KERNELS))
        register = f"register one with @intaglio.silicon.chip_kernel({type(op).__name__})"
        raise ChipError(f"op {op.kind} at {op.site} has no chip kernel; there are kernels for {known}; {register}")
    return CHIP_KERNELS[type(op)]


@lru_cache(maxsize=65536)
def timing(kernel: ChipKernel, target: Target, sizes: BatchSizes, prefetched: bool = False) -> Timing:
    """Returns the modelled Timing of a kernel for a step with the batch sizes `sizes`. The result is cached.

    prefetched: True if the op's weights are loaded from HBM during earlier ops, see ChipKernel.time().
    """
    return kernel.time(target, sizes, prefetched)


@dataclass(frozen=True)
class WorkKernel(ChipKernel):
    """A chip kernel whose time follows from the op's FLOPs and bytes, for ops without a time model of their own.

    The time is launch overhead, plus HBM latency, plus the longer of two times. One is the op's FLOPs at the rate of
    `engine`: "VEC" for the vector lanes, "MXU" for the matrix array in bf16, at the library's efficiency. The other is
    the op's bytes at HBM's rate, without weights that are prefetched. The simulator can execute the kernel only if a
    subclass defines streams().
    """

    op: Op
    tensors: tuple[Tensor, ...]
    engine: ClassVar[str] = "VEC"

    @classmethod
    def of(cls, op: Op, t: Tensors) -> WorkKernel:
        """Returns a WorkKernel for an op.

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
    """Returns None if a chip kernel can execute this op; else the reason why not, as text for an error message."""
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
    """Execute one op on the simulator. Returns a dict {tensor name: array} of its results.

    board: the chip's memory, which holds the op's operands. Raises MachineError if no kernel can execute the op.
    """
    if why := unsupported_reason(op, t):
        raise MachineError(why)
    shapes = {name: [batch.sizes[d] if isinstance(d, str) else d for d in t[name].shape] for name in op.outputs}
    for name, dims in shapes.items():
        board.allocate(name, dims[0] if len(dims) > 1 else 1, dims[-1], t[name].format)
    kernel = kernel_class(op)
    board.run(kernel.streams(board, op, t, batch), kernel.runs_on(board.target, op, t, batch))
    return {name: board.read(name).reshape(dims) for name, dims in shapes.items()}
