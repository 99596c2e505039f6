"""The reference device: runs each op's reference() in NumPy. Slow; other devices are tested against it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from intaglio.devices.device import (
    CollectiveSteps,
    Device,
    Executable,
    RankExecutable,
    StateSpec,
    StepRequest,
    StepResult,
    Weights,
    check_batch,
    check_blocks,
)
from intaglio.devices.weights import assemble, zeroed_state
from intaglio.formats import Quantised
from intaglio.ops import Collective, Value
from intaglio.program import Program, verify


class ReferenceExecutable(RankExecutable):
    """A Program with its weights as NumPy arrays (or quantised values) and zeroed K/V caches."""

    def __init__(self, program: Program, weights: Weights, state: StateSpec) -> None:
        self.program, self.state = program, state
        self.held: dict[str, Value] = {t.name: assemble(t, weights) for t in program.of_role("weight")}
        self.held |= {t.name: np.array(t.values, np.float32) for t in program.of_role("const")}
        self.held |= {t.name: zeroed_state(t, state, program) for t in program.of_role("state")}

    @property
    def block_bytes(self) -> int:
        if self.state.window_pages:
            return 0
        return sum(x[0].nbytes for x in self._pages())

    def read_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        check_blocks(self.state, self.block_bytes, blocks)
        pages = [b"".join(x[block].tobytes() for x in self._pages()) for block in blocks]
        return np.frombuffer(b"".join(pages), np.uint8).reshape(len(blocks), self.block_bytes)

    def write_blocks(self, blocks: Sequence[int], contents: np.ndarray) -> None:
        check_blocks(self.state, self.block_bytes, blocks, contents)
        at = 0
        for x in self._pages():
            part = contents[:, at : at + x[0].nbytes]
            x[list(blocks)] = np.ascontiguousarray(part).view(x.dtype).reshape(len(blocks), *x.shape[1:])
            at += x[0].nbytes

    def _pages(self) -> list[np.ndarray]:
        """The arrays of all K/V caches, [pages, ...] each, as a list in the order of the Program."""
        caches = [self.held[t.name] for t in self.program.of_role("state") if t.shape[0] == "P"]
        return [a for x in caches for a in (x.arrays.values() if isinstance(x, Quantised) else (x,))]

    def run_until_collective(self, request: StepRequest) -> CollectiveSteps:
        """Generator that executes one step of this rank, op by op, and returns the StepResult.

        At each collective it yields (the op, this rank's input or None if the op has none). The caller runs the
        collective with the other ranks and sends back this rank's output, or None if the rank gets none. Raises
        DeviceError for a batch that does not fit the executable.
        """
        batch, taps = request.batch, request.taps
        check_batch(self.program, self.state, batch)
        v: dict[str, Value] = {**self.held, "tokens": batch.tokens, "positions": batch.positions, "rows": batch.rows}
        views = [t for t in self.program.tensors.values() if t.view]
        taken: dict[str, np.ndarray] = {}
        timings: dict[str, float] = {}
        for op in self.program.ops:
            start = time.perf_counter()
            if isinstance(op, Collective):
                output = yield op, np.asarray(v[op.inputs[0]]) if op.inputs else None
                results = {name: output for name in op.outputs if output is not None}
            else:
                results = op.reference(v, batch.of_windows if self.program.has_window(op) else batch)
            v |= results
            for t in views:
                if t.view and t.view[0] in results:
                    v[t.name] = results[t.view[0]][:, t.view[1] : t.view[1] + int(t.shape[1])]
            timings[op.site] = time.perf_counter() - start
            if op.site in taps and op.outputs:
                taken[op.site] = results[op.outputs[0]]
        taken |= {t.name: np.asarray(v[t.name]) for t in views if t.name in taps}
        nothing = {"next_tokens": np.empty(0, np.int32), "logprobs": np.empty(0, np.float32), "logits": None}
        out = {name: v.get(name, empty) for name, empty in nothing.items()}  # a pipeline stage may have none of them
        return StepResult(
            np.asarray(out["next_tokens"]),
            np.asarray(out["logprobs"]),
            np.asarray(out["logits"]) if request.logits and out["logits"] is not None else None,
            taken,
            timings if request.timed else {},
        )


class ReferenceDevice(Device):
    """Runs Programs with NumPy, by the reference() method of each op."""

    name = "reference"

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        verify(program)
        return ReferenceExecutable(program, weights, state)
