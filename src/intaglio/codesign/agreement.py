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
    """Modelled seconds of one call, launch overhead included, by two models of time.

    Attributes:
        case: the call.
        machine: seconds by the simulator, which times the instruction streams.
        closed: seconds by the closed form of the op's chip kernel.
    """

    case: Case
    machine: float
    closed: float

    @property
    def ratio(self) -> float:
        """The simulator's seconds divided by the closed form's seconds; 1.0 if they agree."""
        return self.machine / self.closed


def allocate(memory: ChipMemory, t: Tensor, case: Case) -> Region | None:
    """Put one tensor of a call into the simulated HBM. Returns its Region, or None for a quantised tensor.

    A quantised weight is stored too, as codes and scales; kernels find it by its name. A K/V cache gets a page for each
    block up to the highest in the batch's block table. case: the call; its batch gives the sizes of symbolic
    dimensions.
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
    """Bring a call's operands into the simulated L2, where the op before the call would have left them.

    The first row of every region is read, then the second row of every region, and so on: no operand is older in the
    L2 than the others. Returns nothing. memory: the simulated memories. regions: the operands' places in simulated HBM.
    """
    for row in range(max((r.rows for r in regions), default=0)):
        for region in regions:
            if row < region.rows:
                memory.l2.access(region.part(slice(row, row + 1)), writes=False)


def compare_kernel(on: Target, case: Case) -> KernelAgreement:
    """Time one call by the simulator and by the closed form. Returns a KernelAgreement with the seconds of each.

    For the comparison, the closed form is told to do as the simulated streams do: values between ops are FP32, and the
    experts' activation function is fused into the product before it. Launches of rounding and of routing (LEFT_OUT) are
    not counted on either side, since libraries do them in other ways than the streams, or not at all. Raises ChipError
    if the op has no chip kernel.

    on: the chip and its library. case: the call.
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
    """Time `count` random calls of an op by the simulator and by the closed form. Returns a list of KernelAgreements.

    Each KernelAgreement has one call and the modelled seconds of both. rng: draws the calls. on: chip and kernel
    library. kind: the op, a key of CASES.
    """
    return [compare_kernel(on, CASES[kind](rng, on)) for _ in range(count)]


def differences(found: Sequence[KernelAgreement]) -> tuple[float, float, KernelAgreement]:
    """(median error, largest error, KernelAgreement with the largest error) of some calls.

    An error is abs(ratio - 1); ratio is the simulator's seconds divided by the closed form's. found: one call or more;
    ValueError for none.
    """
    off = np.array([abs(a.ratio - 1) for a in found])
    return float(np.median(off)), float(off.max()), found[int(off.argmax())]
