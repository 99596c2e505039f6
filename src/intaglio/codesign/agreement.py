"""Compares two models of the time of an op: its chip kernel's closed form, and the simulator.

`intaglio simulate` times ops by closed forms. The simulator times the instruction streams that compute an op's values.
This module measures how far a closed form is from its streams. For timing, the simulator runs them without values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from intaglio import formats
from intaglio.batch import Sizes
from intaglio.chips import Target
from intaglio.codesign.kernel_cases import CASES, Case
from intaglio.ops import Attend, Linear, Tensor
from intaglio.ops.op import dim_size
from intaglio.silicon.kernels import ChipMemory, kernel_class
from intaglio.silicon.kernels.experts import ROUTING, ExpertsKernel
from intaglio.silicon.kernels.tiled import ROUNDING
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import sizes_of

VALUE_BYTES = 4  # of an activation in the streams, which keep activations in FP32
LEFT_OUT = (ROUNDING, ROUTING)  # labels of launches that are not compared


@dataclass(frozen=True)
class KernelAgreement:
    """Modelled times of one kernel call in two models: the simulator and the closed form. Launch overhead is included.

    Attributes:
        case: the call.
        machine: seconds in the simulator, which times the instruction streams.
        closed: seconds in the closed form (the formula) of the op's chip kernel.
    """

    case: Case
    machine: float
    closed: float

    @property
    def ratio(self) -> float:
        """The simulator's seconds divided by the closed form's seconds; 1.0 if they agree."""
        return self.machine / self.closed


def allocate(memory: ChipMemory, t: Tensor, case: Case) -> Region | None:
    """Allocate one tensor of a call in the simulated HBM. Returns its Region; None for a quantised tensor.

    A quantised weight is stored as codes and scales, which kernels find by the tensor's name. A K/V cache gets one page
    for each block number up to the highest in the batch's block table.

    Args:
        memory: the simulated memories.
        t: the tensor.
        case: the call. Its batch gives the sizes of symbolic dimensions.
    """
    slots = int(case.batch.block_table.max(initial=0)) + 1
    states = int(case.batch.state_to.max(initial=0)) + 1
    sizes = Sizes(case.batch.sizes, P=slots, B=case.batch.block_size, N=states)
    dims = [dim_size(d, sizes) for d in t.shape]
    rows, cols = int(np.prod(dims[:-1])) if len(dims) > 1 else 1, int(dims[-1])
    info = formats.get(t.format)
    if info.grouped:
        group = info.group_of(cols)
        codes = np.empty((rows, cols), formats.E4M3 if "fp8" in t.format else np.int8)
        scales = np.empty((rows, -(-cols // group)), np.float32)
        memory.put(t.name, formats.Quantised(codes, scales, group, format=t.format))  # only its shapes are used
        return None
    return memory.allocate(t.name, rows, cols, t.format)


def warm(memory: ChipMemory, regions: Sequence[Region]) -> None:
    """Read a call's operands into the simulated L2, where the preceding op would have left them. Returns nothing.

    The first row of every operand is read, then the second row of every operand, and so on. So all operands are equally
    recent in the L2. memory: the simulated memories. regions: the places of the operands in simulated HBM.
    """
    for row in range(max((r.rows for r in regions), default=0)):
        for region in regions:
            if row < region.rows:
                memory.l2.access(region.part(slice(row, row + 1)), writes=False)


def compare_kernel(on: Target, case: Case) -> KernelAgreement:
    """Time one call with the simulator and with the closed form. Returns a KernelAgreement with both times.

    The closed form is set to compute what the simulated instruction streams compute: values between ops are FP32, and
    the experts' activation function is fused into the product before it. Launches for rounding and for routing
    (LEFT_OUT) are counted in neither time, because libraries do these steps in other ways than the streams, or not at
    all.

    on: the chip and its library. case: the call. Raises ChipError if the op has no chip kernel.
    """
    on = on.with_library(activation_bytes=VALUE_BYTES, expert_fused_activation=True)
    memory = ChipMemory(on, values=False)
    given = []
    for name in dict.fromkeys((*case.op.inputs, *case.op.outputs)):
        t, region = case.tensors[name], allocate(memory, case.tensors[name], case)
        small = region is not None and region.rows == 1  # such as a norm's weight: it stays in the L2
        if region is not None and name in case.op.inputs and (small or t.role in ("temp", "input")):
            given.append(region)
    warm(memory, given)
    kernel = kernel_class(case.op)
    streams = kernel.streams(memory, case.op, case.tensors, case.batch)
    memory.run(streams, kernel.runs_on(on, case.op, case.tensors, case.batch))
    launches = [run for run in memory.launches if run.label not in LEFT_OUT]
    once = isinstance(case.op, Linear) or (isinstance(case.op, Attend) and not on.library.merge_launch)
    counted = 1 if once else len(launches)
    made, sizes = kernel.of(case.op, case.tensors), sizes_of(case.batch)
    if isinstance(made, ExpertsKernel):
        closed = sum(t.seconds for label, t in made.parts(on, sizes).items() if label not in LEFT_OUT)
    else:
        closed = made.time(on, sizes, prefetched=False).seconds
    seconds = sum(run.seconds for run in launches) + counted * on.library.launch_s
    return KernelAgreement(case, seconds, closed)


def random_agreements(rng: np.random.Generator, on: Target, kind: str, count: int) -> list[KernelAgreement]:
    """Time `count` random calls of one op, each with the simulator and with the closed form.

    Returns a list of KernelAgreements; each has one call and its two modelled times. rng: random generator that draws
    the calls. on: chip and kernel library. kind: the op, a key of CASES.
    """
    return [compare_kernel(on, CASES[kind](rng, on)) for _ in range(count)]


def differences(found: Sequence[KernelAgreement]) -> tuple[float, float, KernelAgreement]:
    """Returns (median error, largest error, KernelAgreement with the largest error) of the calls in `found`.

    The error of a call is abs(a / b - 1), where a is the simulator's time and b the closed form's time. Raises
    ValueError if `found` is empty.
    """
    off = np.array([abs(a.ratio - 1) for a in found])
    return float(np.median(off)), float(off.max()), found[int(off.argmax())]
