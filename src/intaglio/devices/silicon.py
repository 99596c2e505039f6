"""The silicon device: models the time of steps on a simulated chip; values come from another device or the simulator.

Its clock is virtual: each step advances it by the step's modelled time on the chip, or on the chips that share a model.
An engine with this clock schedules, times out and reports as it would on that hardware.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from intaglio.chips import Target, target
from intaglio.devices import open_device
from intaglio.devices.clock import VirtualClock
from intaglio.devices.device import (
    BlockingExecutable,
    CompletedStep,
    Device,
    DeviceError,
    DeviceFacts,
    Executable,
    PendingStep,
    StateSpec,
    StepRequest,
    StepResult,
    Weights,
    check_batch,
)
from intaglio.devices.weights import assemble, zeroed_state
from intaglio.program import Program, verify
from intaglio.silicon.kernels import ChipMemory, run_op, unsupported_reason
from intaglio.silicon.plan import Plan
from intaglio.silicon.sizes import BatchSizes, sizes_of
from intaglio.silicon.timeline import Timeline

CHIP = "chip"  # values are computed by chip instructions
NONE = "none"  # no values are computed: every token id is 0
VALUES = ("host", "reference", "oracle", CHIP, NONE)


class ChipExecutable(BlockingExecutable):
    """Computes the values of a step by simulating the chip's instructions for every op.

    Slow; for checking chip kernels.

    Raises DeviceError with the name of an op that no chip kernel supports, before any weight is read.
    """

    def __init__(self, program: Program, weights: Weights, state: StateSpec, target: Target) -> None:
        if why := next(filter(None, (unsupported_reason(op, program.tensors) for op in program.ops)), None):
            others = ", ".join(v for v in VALUES if v not in (CHIP, NONE))
            raise DeviceError(f"{program.name}: {why}; to model only its time, use values from {others}")
        if state.window_pages:
            raise DeviceError("chip kernels use the same K/V blocks in all layers; load with window_pages=0")
        self.program, self.state, self.memory = program, state, ChipMemory(target)
        for t in program.of_role("weight"):
            self.memory.put(t.name, assemble(t, weights), 4 if t.format.startswith("int4") else 8)
        for t in program.of_role("const"):
            self.memory.put(t.name, np.array(t.values, np.float32))
        for t in program.of_role("state"):
            self.memory.put(t.name, zeroed_state(t, state, program))
        self.loaded_bytes = self.memory.heap.top  # end of weights, constants and caches

    def run(self, request: StepRequest) -> StepResult:
        """Run one step on the simulated chip and return its StepResult.

        The result has no timings, even if `request.timed` is True. Raises DeviceError for a batch that does not fit.
        """
        batch, taps = request.batch, request.taps
        check_batch(self.program, self.state, batch)
        memory, t = self.memory, self.program.tensors
        memory.heap.top = self.loaded_bytes  # discard the previous step's tensors
        memory.hbm.written[self.loaded_bytes :] = False
        for name, values in (("tokens", batch.tokens), ("positions", batch.positions), ("rows", batch.rows)):
            memory.put(name, values)
        views = [v for v in t.values() if v.view]
        taken: dict[str, np.ndarray] = {}
        out: dict[str, np.ndarray] = {}
        for op in self.program.ops:
            results = run_op(memory, op, t, batch)
            for v in views:
                if v.view and v.view[0] in results:
                    base = memory.region(v.view[0])
                    memory.regions[v.name] = base.part(cols=slice(v.view[1], v.view[1] + int(v.shape[1])))
            out |= {n: x for n, x in results.items() if t[n].role == "output"}
            if op.site in taps and op.outputs:
                taken[op.site] = results[op.outputs[0]]
        taken |= {v.name: memory.read(v.name) for v in views if v.name in taps}
        return StepResult(out["next_tokens"], out["logprobs"], out["logits"] if request.logits else None, taken)


class TimeOnlyExecutable(BlockingExecutable):
    """An Executable that computes nothing: every next token has id 0. For studies of time, with models of any size."""

    def __init__(self, program: Program, state: StateSpec) -> None:
        self.program, self.state = program, state

    def run(self, request: StepRequest) -> StepResult:
        """Return a StepResult with token id 0 and log-probability 0 for each row to sample. Nothing is computed.

        The result has no timings, even if `request.timed` is True. Raises DeviceError if logits or results of ops
        (taps) are requested.
        """
        if request.logits or request.taps:
            raise DeviceError(f"values={NONE!r} computes no logits and no taps; use another value, such as host")
        rows = len(request.batch.rows)
        return StepResult(np.zeros(rows, np.int32), np.zeros(rows, np.float32))


@dataclass(frozen=True)
class ModelledStep:
    """A step on a simulated chip, which ends at a modelled time. It implements the interface PendingStep.

    Attributes:
        outcome: the step's result, which is computed already.
        end: time in seconds on `clock` at which the step ends. done() is False before.
        clock: the modelled clock.
    """

    outcome: StepResult
    end: float
    clock: VirtualClock

    def done(self) -> bool:
        """True if the modelled clock has reached the end of the step."""
        return self.clock() >= self.end

    def result(self) -> StepResult:
        """Return the StepResult.

        If the clock shows a time before the step's end, it is first set forward to the end.
        """
        self.clock.wait_until(self.end)
        return self.outcome


class SiliconExecutable(Executable):
    """Models the time of each step on a simulated chip. The values are computed by another executable.

    If the chips form a pipeline, its stages work on different steps at the same time. A stage starts a step when two
    conditions hold: the previous stage has ended this step, and the stage itself has ended the previous step.

    Attributes:
        inner: the executable that computes the values.
        plans: for each pipeline stage, the Plan that times one chip of the stage.
        clock: the modelled clock. The time of each step sets it forward.
        overhead_s: seconds that the host needs to launch a step, before the first stage can start.
        joules: estimated energy of all steps so far, for one chip of each stage, summed over the stages. Energy used
            between steps is not included.
        busy_s: seconds of all steps so far, summed over the stages.
    """

    def __init__(
        self, inner: Executable, plans: Sequence[Plan], clock: VirtualClock, overhead_s: float = 0.0
    ) -> None:  # fmt: skip
        self.inner, self.plans, self.clock, self.overhead_s = inner, plans, clock, overhead_s
        self.program, self.state, self.depth = inner.program, inner.state, len(plans)
        self.free_at = [0.0] * len(plans)  # when each stage has ended its steps so far
        self.joules, self.busy_s, self.last_sizes = 0.0, 0.0, BatchSizes(0, 0, ())

    @property
    def timelines(self) -> tuple[Timeline, ...]:
        """The Timelines of the last step, one for each pipeline stage, as a tuple.

        Before the first step, they are the Timelines of an empty batch.
        """
        return tuple(plan.run(self.last_sizes) for plan in self.plans)

    def launch(self, request: StepRequest) -> PendingStep:
        """Compute a step's values and model its time. Returns a PendingStep that ends at the modelled time.

        PendingStep.result() sets the clock forward to that time and returns the StepResult, or raises the step's error.
        If `request.timed` is True, the StepResult has the modelled seconds of each op: {op's name: seconds}.
        """
        try:
            result = self.inner.step(replace(request, timed=False))
        except Exception as e:
            return CompletedStep(e)
        self.last_sizes = sizes_of(request.batch)
        self.clock.seconds += self.overhead_s
        end = self.clock()
        for stage, plan in enumerate(self.plans):
            seconds, joules = plan.cost(self.last_sizes)
            end = self.free_at[stage] = max(end, self.free_at[stage]) + seconds
            self.joules += joules
            self.busy_s += seconds
        if request.timed:
            result = replace(result, timings={e.site: e.seconds for t in self.timelines for e in t.ops})
        return ModelledStep(result, end, self.clock)


class SiliconDevice(Device):
    """A simulated chip as a device, which models the time of steps. Raises DeviceError for an unknown `values`.

    Args:
        chip: name of a chip preset, or a Target (a chip with its kernel library).
        values: what computes the logits and tokens of a step: the name of another device, "chip" for the chip's own
            instructions, or "none" if only the time is wanted.
        stages: if several chips share a model, the Program of one rank of each pipeline stage. These Programs are timed
            instead of the loaded one. All ranks of a stage are assumed to take equal time.
        overhead_s: seconds that the host needs before each step.
        options: arguments for the device that computes the values.
    """

    name = "silicon"

    def __init__(
        self, chip: str | Target = "sohu", values: str = "host", stages: Sequence[Program] = (),
        overhead_s: float = 0.0, **options: object,
    ) -> None:  # fmt: skip
        if values not in VALUES:
            raise DeviceError(f"values={values!r}; use one of {', '.join(VALUES)}")
        self.target = target(chip) if isinstance(chip, str) else chip
        self.values, self.stages, self.options = values, tuple(stages), options
        self.overhead_s = overhead_s
        self.clock: VirtualClock = VirtualClock()

    def facts(self) -> DeviceFacts:
        return DeviceFacts(memory=self.target.chip.hbm_bytes)

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        verify(program)
        if self.values == CHIP:
            inner: Executable = ChipExecutable(program, weights, state, self.target)
        elif self.values == NONE:
            inner = TimeOnlyExecutable(program, state)
        else:
            inner = open_device(self.values, **self.options).load(program, weights, state)
        return SiliconExecutable(inner, Plan.of(self.stages or (program,), self.target), self.clock, self.overhead_s)
