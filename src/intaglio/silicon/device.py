"""The silicon device: values from another device or from the chip's own instructions, time from the machine.

Its clock is virtual: it moves by what a step would take on the chip, or on the chips that share a model. An engine that
is given this clock schedules, times out and reports as it would there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import ChipSpec, chip
from intaglio.devices import DeviceError, Executable, StateSpec, StepResult, Weights, open_device
from intaglio.devices.device import assemble, check_batch
from intaglio.formats import Quantised
from intaglio.program import Program, verify
from intaglio.silicon.kernels import Board, execute, refusal
from intaglio.silicon.step import Plan, load_of
from intaglio.silicon.timeline import Timeline

CHIP = "chip"  # values by the chip's own instructions
VALUES = ("host", "reference", "oracle", CHIP)


class VirtualClock:
    """Seconds that pass when a step is run, or by whoever has nothing to do until a moment that is known."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def wait_until(self, seconds: float) -> None:
        """Let the time until then pass, if it is not over."""
        self.seconds = max(self.seconds, seconds)


class ChipExecutable:
    """A Program run by chip instructions: every op by its kernel on the machine. Slow: for checking kernels.

    Raises DeviceError naming an op that no kernel does, before anything is read."""

    def __init__(self, program: Program, weights: Weights, state: StateSpec, spec: ChipSpec) -> None:
        if why := next(filter(None, (refusal(op, program.tensors) for op in program.ops)), None):
            others = ", ".join(v for v in VALUES if v != CHIP)
            raise DeviceError(f"{program.name}: {why}; for its time alone use values from {others}")
        self.program, self.state, self.board = program, state, Board(spec)
        for t in program.of_role("weight"):
            self.board.put(t.name, assemble(t, weights), 4 if t.format.startswith("int4") else 8)
        for t in program.of_role("const"):
            self.board.put(t.name, np.array(t.values, np.float32))
        dims = {"P": state.pages, "B": state.page_tokens}
        for t in program.of_role("state"):
            shape = [dims[d] if isinstance(d, str) else d for d in t.shape]
            zeros = np.zeros(shape, formats.get(t.format).dtype)
            scales = np.zeros((*shape[:-1], 1), np.float32)
            self.board.put(t.name, Quantised(zeros, scales, shape[-1]) if formats.get(t.format).grouped else zeros)
        self.kept = self.board.heap.top

    def step(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> StepResult:
        """One step. `timed` is of no use here: the machine's clock is the device's business."""
        check_batch(self.program, self.state, batch)
        board, t = self.board, self.program.tensors
        board.heap.top = self.kept  # what the step before left is unwritten memory again
        board.memory.written[self.kept :] = False
        for name, values in (("tokens", batch.tokens), ("positions", batch.positions), ("rows", batch.rows)):
            board.put(name, values)
        views = [v for v in t.values() if v.view]
        taken: dict[str, np.ndarray] = {}
        out: dict[str, np.ndarray] = {}
        for op in self.program.ops:
            results = execute(board, op, t, batch)
            for v in views:
                if v.view and v.view[0] in results:
                    base = board.at(v.view[0])
                    board.places[v.name] = base.part(cols=slice(v.view[1], v.view[1] + int(v.shape[1])))
            out |= {n: x for n, x in results.items() if t[n].role == "output"}
            if op.site in taps and op.outputs:
                taken[op.site] = results[op.outputs[0]]
        taken |= {v.name: board.get(v.name) for v in views if v.name in taps}
        return StepResult(out["next_tokens"], out["logprobs"], out["logits"] if logits else None, taken)


class SiliconExecutable:
    """An executable whose clock is modelled. `timelines` are those of the last step, one a stage; a step passes through
    the stages one after the other, for the next one waits for its tokens."""

    def __init__(self, inner: Executable, plans: Sequence[Plan], clock: VirtualClock) -> None:
        self.inner, self.plans, self.clock = inner, plans, clock
        self.program, self.state = inner.program, inner.state
        self.timelines: tuple[Timeline, ...] = ()

    def step(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> StepResult:
        """One step; `timed` gives modelled seconds by site."""
        result = self.inner.step(batch, logits=logits, taps=taps)
        load = load_of(batch)
        self.timelines = tuple(plan.run(load) for plan in self.plans)
        self.clock.seconds += sum(t.seconds for t in self.timelines)
        if not timed:
            return result
        return replace(result, timings={e.site: e.seconds for t in self.timelines for e in t.entries})


class SiliconDevice:
    """A chip by its preset's name or its spec; values by one of VALUES, of the whole Program that is loaded.

    stages: where several chips share a model, one rank's Program of each stage; these are timed in the place of the
    Program that is loaded, for the ranks of a stage are alike."""

    name = "silicon"

    def __init__(
        self, chip_name: str | ChipSpec = "sohu", values: str = "host", stages: Sequence[Program] = (),
        **options: object,
    ) -> None:  # fmt: skip
        if values not in VALUES:
            raise DeviceError(f"values={values!r}; use one of {', '.join(VALUES)}")
        self.spec = chip(chip_name) if isinstance(chip_name, str) else chip_name
        self.values, self.stages, self.options = values, tuple(stages), options
        self.clock = VirtualClock()

    def load(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        verify(program)
        if self.values == CHIP:
            inner: Executable = ChipExecutable(program, weights, state, self.spec)
        else:
            inner = open_device(self.values, **self.options).load(program, weights, state)
        return SiliconExecutable(inner, Plan.of(self.stages or (program,), self.spec), self.clock)


__all__ = ["ChipExecutable", "SiliconDevice", "SiliconExecutable", "VirtualClock"]
