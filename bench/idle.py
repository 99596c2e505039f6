"""IdleDevice: a device whose steps take no time, so that a measurement shows the time of the code that drives it.

Used by bench/runtime.py; in a module of its own so that a worker process can import it.
"""

from __future__ import annotations

import numpy as np

from intaglio.devices import BlockingExecutable, Device, Executable, StateSpec, StepRequest, StepResult, Weights
from intaglio.program import Program

VOCABULARY = 49152


class Idle(BlockingExecutable):
    """Says a token for every row at once: another at every step, as text does."""

    def __init__(self, program: Program, state: StateSpec) -> None:
        self.program, self.state, self.steps = program, state, 0

    def run(self, request: StepRequest) -> StepResult:
        self.steps += 1
        n = len(request.batch.rows)
        return StepResult(np.full(n, self.steps * 7919 % VOCABULARY, np.int32), np.zeros(n, np.float32))


class IdleDevice(Device):
    """A device for nobody but bench/runtime.py."""

    name = "idle"

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        return Idle(program, state)
