"""A device that takes no time, so that what is left is what drives it. In a file of its own for a worker to import."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from intaglio.batch import Batch
from intaglio.devices import Executable, StateSpec, StepResult, Weights
from intaglio.program import Program

VOCABULARY = 49152


class Idle:
    """Says a token for every row at once: another at every step, as text does."""

    def __init__(self, program: Program, state: StateSpec) -> None:
        self.program, self.state, self.steps = program, state, 0

    def step(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> StepResult:
        self.steps += 1
        n = len(batch.rows)
        return StepResult(np.full(n, self.steps * 7919 % VOCABULARY, np.int32), np.zeros(n, np.float32))


class IdleDevice:
    """A device for nobody but bench/runtime.py."""

    name = "idle"

    def load(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        return Idle(program, state)
