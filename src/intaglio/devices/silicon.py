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
    """Executes the chip instructions of every op's chip kernel to compute values. Slow; for checking kernels.

    Raises DeviceError naming an op that no chip kernel supports, before any weight is read.
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
        """Run one step and return its StepResult. `timed` is ignored: SiliconExecutable models the time.

        Raises DeviceError for a batch that does not fit.
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
    """Computes no values: the next token of every row is id 0. For studies of time alone, with models of any size."""

    def __init__(self, program: Program, state: StateSpec) -> None:
        self.program, self.state = program, state

    def run(self, request: StepRequest) -> StepResult:
        """Run a step without computing. Returns a StepResult: token id 0 and log-probability 0 for each row to sample.

        It has no timings, even if `timed` is requested. Raises DeviceError if logits or taps are requested.
        """
        if request.logits or request.taps:
            raise DeviceError(f"values={NONE!r} computes no logits and no taps; use another value, such as host")
        rows = len(request.batch.rows)
        return StepResult(np.zeros(rows, np.int32), np.zeros(rows, np.float32))


@dataclass(frozen=True)
class ModelledStep:
    """The PendingStep of a step on a simulated chip: its values are computed already, its end lies in virtual time.

    outcome: its result. end: virtual time, in seconds on `clock`, at which the step ends. done() is False before then.
    """

    outcome: StepResult
    end: float
    clock: VirtualClock

    def done(self) -> bool:
        """True if the clock has reached the step's end."""
        return self.clock() >= self.end

    def result(self) -> StepResult:
        """Return the StepResult. The virtual clock is set forward to the step's end if it shows an earlier time."""
        self.clock.wait_until(self.end)
        return self.outcome


class SiliconExecutable(Executable):
    """Takes values from another executable and models the time of each step.

    The chips of a pipeline's stages work on different steps at a time. A stage starts a step as soon as two things have
    happened: the stage before it has ended this step, and it has itself ended the step before this one.

    Attributes:
        inner: the executable that computes the values.
        plans: the Plan of one chip of each stage.
        clock: the modelled clock, which a step's time sets forward.
        overhead_s: the host's seconds for each launch, before which the first stage cannot start the step.
        joules: estimated energy of all steps so far, summed over one chip of each stage, without what chips draw
            between steps.
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
        """Timelines of the last step, one for each pipeline stage, as a tuple.

        Before the first step they are those of an empty batch.
        """
        return tuple(plan.run(self.last_sizes) for plan in self.plans)

    def launch(self, request: StepRequest) -> PendingStep:
        """Compute a step's values and model its time. Returns a PendingStep that ends at the modelled time.

        Its result() sets the clock forward to that time and returns the StepResult, or raises the step's error. If
        `request.timed`, the result has the modelled seconds of each op, by site (name of the op).
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
    """A simulated chip as a device: models the time of steps on a Target. Raises DeviceError for an unknown `values`.

    Args:
        chip: name of a preset, which comes with its own kernel library, or a Target.
        values: what computes the numbers of a step (logits and tokens), one of VALUES: the name of another device,
            "chip" for the chip's own instructions, or "none" if only the time is wanted.
        stages: if several chips share a model, one rank's Program per pipeline stage. These are timed instead of the
            loaded Program; the ranks of a stage take equal time.
        overhead_s: the host's seconds before each step.
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
