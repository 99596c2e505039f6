"""The silicon device: models the time of steps on a simulated chip; values come from another device or the simulator.

Its clock is virtual: each step advances it by the step's modelled time on the chip, or on the chips that share a model.
An engine with this clock schedules, times out and reports as it would on that hardware.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from intaglio.chips import Target, target
from intaglio.devices import open_device
from intaglio.devices.clock import VirtualClock
from intaglio.devices.device import (
    BlockingExecutable,
    Device,
    DeviceError,
    DeviceFacts,
    Executable,
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
from intaglio.silicon.sizes import sizes_of
from intaglio.silicon.timeline import Timeline

CHIP = "chip"  # values are computed by chip instructions
VALUES = ("host", "reference", "oracle", CHIP)


class ChipExecutable(BlockingExecutable):
    """An executable that computes values by executing chip instructions, with the chip kernel of every op.

    It is slow, and is for checking kernels. Raises DeviceError naming an op that no chip kernel supports, before
    any weight is read.
    """

    def __init__(self, program: Program, weights: Weights, state: StateSpec, target: Target) -> None:
        if why := next(filter(None, (unsupported_reason(op, program.tensors) for op in program.ops)), None):
            others = ", ".join(v for v in VALUES if v != CHIP)
            raise DeviceError(f"{program.name}: {why}; to model only its time, use values from {others}")
        self.program, self.state, self.memory = program, state, ChipMemory(target)
        for t in program.of_role("weight"):
            self.memory.put(t.name, assemble(t, weights), 4 if t.format.startswith("int4") else 8)
        for t in program.of_role("const"):
            self.memory.put(t.name, np.array(t.values, np.float32))
        for t in program.of_role("state"):
            self.memory.put(t.name, zeroed_state(t, state))
        self.loaded_bytes = self.memory.heap.top  # end of weights, constants and caches

    def run(self, request: StepRequest) -> StepResult:
        """Run one step and return its StepResult. `timed` is ignored: SiliconExecutable models the time."""
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


class SiliconExecutable(BlockingExecutable):
    """An executable that takes the values of each step from another executable and models the step's time.

    `timelines`: of the last step, one for each pipeline stage. A step passes through the stages one after the
    other, since the next step needs its tokens.
    """

    def __init__(self, inner: Executable, plans: Sequence[Plan], clock: VirtualClock) -> None:
        self.inner, self.plans, self.clock = inner, plans, clock
        self.program, self.state = inner.program, inner.state
        self.timelines: tuple[Timeline, ...] = ()

    def run(self, request: StepRequest) -> StepResult:
        """Run one step, advance the clock by its modelled time, and return its StepResult.

        With `timed` the result has modelled seconds by site.
        """
        result = self.inner.step(replace(request, timed=False))
        sizes = sizes_of(request.batch)
        self.timelines = tuple(plan.run(sizes) for plan in self.plans)
        self.clock.seconds += sum(t.seconds for t in self.timelines)
        if not request.timed:
            return result
        return replace(result, timings={e.site: e.seconds for t in self.timelines for e in t.ops})


class SiliconDevice(Device):
    """A simulated chip as a device: models the time of steps on a Target.

    Args:
        chip: name of a preset, which comes with its own kernel library, or a Target.
        values: name of the device that computes the values (see VALUES), always of the whole Program.
        stages: if several chips share a model, one rank's Program per pipeline stage. These are timed instead of the
            loaded Program; the ranks of a stage take equal time.
        options: arguments for the device that computes the values.
    """

    name = "silicon"

    def __init__(
        self, chip: str | Target = "sohu", values: str = "host", stages: Sequence[Program] = (),
        **options: object,
    ) -> None:  # fmt: skip
        if values not in VALUES:
            raise DeviceError(f"values={values!r}; use one of {', '.join(VALUES)}")
        self.target = target(chip) if isinstance(chip, str) else chip
        self.values, self.stages, self.options = values, tuple(stages), options
        self.clock: VirtualClock = VirtualClock()

    def facts(self) -> DeviceFacts:
        return DeviceFacts(memory=self.target.chip.hbm_bytes)

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        verify(program)
        if self.values == CHIP:
            inner: Executable = ChipExecutable(program, weights, state, self.target)
        else:
            inner = open_device(self.values, **self.options).load(program, weights, state)
        return SiliconExecutable(inner, Plan.of(self.stages or (program,), self.target), self.clock)
