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
    """A Program loaded on the reference device, which runs each op in NumPy.

    Weights are NumPy arrays or Quantised objects. K/V caches and recurrent state begin as zeros.
    """

    def __init__(self, program: Program, weights: Weights, state: StateSpec) -> None:
        self.program, self.state = program, state
        self.held: dict[str, Value] = {t.name: assemble(t, weights) for t in program.of_role("weight")}
        self.held |= {t.name: np.array(t.values, np.float32) for t in program.of_role("const")}
        self.held |= {t.name: zeroed_state(t, state, program) for t in program.of_role("state")}

    @property
    def block_parts(self) -> tuple[int, ...]:
        if self.state.window_pages:
            return ()
        return tuple(sum(a[0].nbytes for a in arrays) for arrays in self._pages())

    def read_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        check_blocks(self.state, self.block_bytes, blocks)
        n = len(blocks)
        caches = []
        for arrays in self._pages():
            by_head = [np.ascontiguousarray(np.moveaxis(a[list(blocks)], 2, 1)) for a in arrays]
            parts = [a.view(np.uint8).reshape(n, a.shape[1], -1) for a in by_head]
            caches.append(np.concatenate(parts, axis=2).reshape(n, -1))
        return np.concatenate(caches, axis=1)

    def write_blocks(self, blocks: Sequence[int], contents: np.ndarray) -> None:
        check_blocks(self.state, self.block_bytes, blocks, contents)
        caches = np.split(contents, np.cumsum(self.block_parts)[:-1], axis=1)
        for arrays, cache in zip(self._pages(), caches, strict=True):
            by_head, at = cache.reshape(len(blocks), arrays[0].shape[2], -1), 0
            for a in arrays:
                _, tokens, heads, columns = a.shape
                size = tokens * columns * a.itemsize
                part = np.ascontiguousarray(by_head[:, :, at : at + size]).view(a.dtype)
                a[list(blocks)] = np.moveaxis(part.reshape(len(blocks), heads, tokens, columns), 1, 2)
                at += size

    def _pages(self) -> list[list[np.ndarray]]:
        """Return the arrays of the K/V caches: for each cache of the Program, in order, a list of arrays.

        Each array is [pages, tokens, heads, columns]. A cache without heads is shown as [pages, tokens, 1, columns]. A
        quantised cache has several arrays, such as codes and scales.
        """
        caches = [self.held[t.name] for t in self.program.of_role("state") if t.shape[0] == "P"]
        arrays = [[*x.arrays.values()] if isinstance(x, Quantised) else [x] for x in caches]
        return [[a if a.ndim == 4 else a[:, :, None] for a in cache] for cache in arrays]

    def run_until_collective(self, request: StepRequest) -> CollectiveSteps:
        """Run a step op by op, as a generator that yields at each collective. Its return value is the StepResult.

        It yields a tuple (collective op, this rank's input) and must be sent this rank's output. The input is None if
        the op has none, and so is the output. Raises DeviceError for a batch that does not fit the Program.
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
    """A device that runs Programs with NumPy, by the reference() method of each op. It is slow and serves tests."""

    name = "reference"

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        verify(program)
        return ReferenceExecutable(program, weights, state)
