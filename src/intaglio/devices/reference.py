"""The reference device: runs each op's own NumPy meaning. Slow, obvious, and the truth for every other device."""

from __future__ import annotations

import time
from collections.abc import Collection

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.devices.device import (
    Executable,
    Rounds,
    StateSpec,
    StepResult,
    Weights,
    alone,
    assemble,
    check_batch,
)
from intaglio.ops import Collective, Value
from intaglio.program import Program, verify


class ReferenceExecutable:
    """A Program with its weights as NumPy arrays (or codes and scales) and its state as zeroed arrays."""

    def __init__(self, program: Program, weights: Weights, state: StateSpec) -> None:
        self.program, self.state = program, state
        self.held: dict[str, Value] = {t.name: assemble(t, weights) for t in program.of_role("weight")}
        self.held |= {t.name: np.array(t.values, np.float32) for t in program.of_role("const")}
        dims = {"P": state.pages, "B": state.page_tokens}
        for t in program.of_role("state"):
            shape = [dims[d] if isinstance(d, str) else d for d in t.shape]
            fmt, zeros = formats.get(t.format), np.zeros(shape, formats.get(t.format).dtype)
            scales = np.zeros((*shape[:-1], 1), np.float32)
            self.held[t.name] = formats.Quantised(zeros, scales, shape[-1]) if fmt.grouped else zeros

    def step(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> StepResult:
        """One step. `taps` are sites whose first result is wanted."""
        return alone(self.program, self.rounds(batch, logits=logits, taps=taps, timed=timed))

    def rounds(self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False) -> Rounds:
        """A step as one rank of a mesh."""
        check_batch(self.program, self.state, batch)
        v: dict[str, Value] = {**self.held, "tokens": batch.tokens, "positions": batch.positions, "rows": batch.rows}
        views = [t for t in self.program.tensors.values() if t.view]
        taken: dict[str, np.ndarray] = {}
        timings: dict[str, float] = {}
        for op in self.program.ops:
            start = time.perf_counter()
            if isinstance(op, Collective):
                got = yield op, np.asarray(v[op.inputs[0]]) if op.inputs else None
                results = {name: got for name in op.outputs if got is not None}
            else:
                results = op.reference(v, batch)
            v |= results
            for t in views:
                if t.view and t.view[0] in results:
                    v[t.name] = results[t.view[0]][:, t.view[1] : t.view[1] + int(t.shape[1])]
            timings[op.site] = time.perf_counter() - start
            if op.site in taps and op.outputs:
                taken[op.site] = results[op.outputs[0]]
        taken |= {t.name: np.asarray(v[t.name]) for t in views if t.name in taps}
        nothing = {"next_tokens": np.empty(0, np.int32), "logprobs": np.empty(0, np.float32), "logits": None}
        out = {name: v.get(name, empty) for name, empty in nothing.items()}  # a stage of a pipeline may have none
        return StepResult(
            np.asarray(out["next_tokens"]),
            np.asarray(out["logprobs"]),
            np.asarray(out["logits"]) if logits and out["logits"] is not None else None,
            taken,
            timings if timed else {},
        )


class ReferenceDevice:
    """NumPy, exactly as the ops say."""

    name = "reference"

    def load(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        verify(program)
        return ReferenceExecutable(program, weights, state)
