"""HostExecutable: a Program loaded on the host device (CPU).

A step is one native call, interrupted at collectives and at ops with Python kernels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from intaglio import _native
from intaglio.batch import Batch
from intaglio.devices.device import (
    CollectiveSteps,
    DeviceError,
    RankExecutable,
    StateSpec,
    StepRequest,
    StepResult,
    Weights,
    check_batch,
    check_blocks,
    limits,
)
from intaglio.devices.expert_load import ExpertLoad
from intaglio.devices.host.layout import HostLayout, Stop, columns_of
from intaglio.devices.host.load import load, pack_again
from intaglio.devices.host.move import ExpertMoves
from intaglio.devices.host.step import Draws, Timings, edits_of, taps_of
from intaglio.devices.weights import inner_weights
from intaglio.ops import Collective, Experts, Op, Value
from intaglio.program import Program
from intaglio.program.expert_placement import Ranks

NUMPY = {"f32": np.float32, "i32": np.int32}  # types of rows


@dataclass(frozen=True)
class _Step:
    """Result arrays of a step in progress. R is the number of rows that are sampled.

    Attributes:
        taken: the op results that the caller asked for (taps): {name of the op or view: array}.
        taps: a triple (number of the op, number of a native tensor, array in `taken`) for each tap of an op with a
            Python kernel. After the op has run, Python copies the native tensor to the array. Native code fills the
            other arrays in `taken`.
        seconds: seconds of each op, an array indexed by op number, if requested; else None.
        tokens: sampled token ids, int32 [R].
        logprobs: log-probabilities of the sampled tokens, f32 [R].
        logits: f32 [R, vocabulary], if requested; else None.
        outs: pairs (number of a native tensor, array to which it is copied at the end of the step).
    """

    taken: dict[str, np.ndarray]
    taps: list[tuple[int, int, np.ndarray]]
    seconds: np.ndarray | None
    tokens: np.ndarray
    logprobs: np.ndarray
    logits: np.ndarray | None
    outs: list[tuple[int, np.ndarray]]


class HostExecutable(RankExecutable):
    """A Program loaded on the CPU: native ops with packed weights, K/V cache and recurrent state.

    Attributes:
        program: the Program.
        threads: number of CPU threads.
        isa: name of the instruction set that the kernels use.
        layout: which weights are packed together and which buffers a step needs, derived from the Program.
        matrices: packed weights: {name of the packed matrix: native Weight}.
        packed_bytes: size of the packed weights in bytes.
        image: the file on disk that holds the packed weights, or None.
        state_in_file: True if the whole K/V cache is in the state file.
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        state: StateSpec,
        threads: int,
        isa: str,
        cache: str | Path | None,
        communicator: _native.Communicator | None = None,
        state_file: int | None = None,
        image_file: int | None = None,
    ) -> None:
        self.program, self.state, self.threads, self.isa = program, state, threads, isa
        self.native = _native.Executable(isa, threads, state.page_tokens, tuple(limits(program, state).values()))
        if communicator is not None:
            self.native.join(communicator)
        if state_file is not None:
            self.native.keep_caches_in(state_file)
        self.layout = HostLayout.of(program, native_collectives=communicator is not None)
        loaded = load(self.native, program, self.layout, weights, state, threads, cache, image_file)
        self.ids, self.matrices, self.image, self._arrays = loaded.ids, loaded.matrices, loaded.image, loaded.arrays
        self.packed_bytes = sum(matrix.nbytes for matrix in self.matrices.values())
        self._python_state = any(program.tensors[name].role == "state" for name in self.layout.arrays)
        self.state_in_file = state_file is not None and not self._python_state
        movable = any(isinstance(op, Experts) and op.held for op in program.ops)
        self._weights = inner_weights(weights) if movable else None  # kept to read experts again
        self._sites = [op.site for op in program.ops]
        self._drawn = [self.ids[name] for name in ("next_tokens", "logprobs") if name in self.ids]
        self._draws = Draws.of(())

    @cached_property
    def experts(self) -> ExpertMoves:
        """The ExpertMoves, which counts the tokens of each expert and replaces the experts that this rank holds.

        A model without experts has an ExpertMoves too, which does nothing.
        """
        return ExpertMoves(self.native, self.program, self.ids, self.matrices, self._pack)

    def _pack(self, program: Program, names: Sequence[str]) -> tuple[dict[str, _native.Weight], dict[str, np.ndarray]]:
        """Read weights from their source again and pack them. Returns a tuple of two dicts (matrices, vectors).

        `matrices` is {name of the packed matrix: native Weight}. `vectors` is {name of the weight: f32 array}.

        Args:
            program: the Program that says from which checkpoint tensors each weight is made.
            names: names of the weights to pack.

        Raises DeviceError if this executable did not keep its source of weights. It keeps the source only in layouts
        with redundant experts.
        """
        if self._weights is None:
            raise DeviceError("experts are moved only in layouts with redundant experts, such as ep4r8")
        return pack_again(self.native, self.layout, self._weights, self.state, program, names)

    def expert_loads(self) -> dict[str, ExpertLoad]:
        return self.experts.loads()

    def load_experts(self, layers: Mapping[str, Ranks]) -> None:
        self.experts.load(layers)

    def experts_loaded(self) -> bool:
        return self.experts.loaded()

    def switch_experts(self) -> None:
        self.experts.switch()

    @property
    def block_parts(self) -> tuple[int, ...]:
        return () if self._python_state or self.state.window_pages else tuple(self.native.page_parts)

    def read_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        if not self.block_bytes:
            return super().read_blocks(blocks)
        check_blocks(self.state, self.block_bytes, blocks)
        contents = np.empty((len(blocks), self.block_bytes), np.uint8)
        for block, content in zip(blocks, contents, strict=True):
            self.native.read_page(block, content)
        return contents

    def write_blocks(self, blocks: Sequence[int], contents: np.ndarray) -> None:
        if not self.block_bytes:
            return super().write_blocks(blocks, contents)
        check_blocks(self.state, self.block_bytes, blocks, contents)
        for block, content in zip(blocks, contents, strict=True):
            self.native.write_page(block, np.ascontiguousarray(content))

    @property
    def plans(self) -> int:
        """Number of plans made so far. A plan is the list of a step's tasks, made if no cached plan fits the step."""
        return self.native.plans

    @property
    def planning_seconds(self) -> float:
        """Seconds spent so far on planning steps and on looking up cached plans, a float."""
        return self.native.planning_seconds

    def run_until_collective(self, request: StepRequest) -> CollectiveSteps:
        """Run a step as a generator, which yields at each collective. The generator's return value is the StepResult.

        It yields a tuple (collective op, this rank's input) and must be sent this rank's output. The input is None for
        a rank that only receives. The output is None for a rank that only sends. Ops between two collectives run in one
        native call, which releases Python's GIL; an op with a Python kernel interrupts the call. Raises DeviceError for
        a batch out of range, and for wrong results of a Python kernel.
        """
        batch, step = request.batch, self._begin(request)
        for stop in self.layout.stops:
            rows = [name for name in stop.op.inputs if name in self.ids and name not in self.layout.native]
            inputs = {name: self._empty(name, batch) for name in rows}
            self.native.advance([(self.ids[name], x) for name, x in inputs.items() if len(x)])
            results: Mapping[str, np.ndarray]
            if isinstance(stop.op, Collective):
                got = yield stop.op, inputs[rows[0]] if rows else None
                results = {} if got is None else {stop.op.outputs[0]: got}
            else:
                results = self._run_python(stop, inputs, batch, step.seconds)
            for name, x in results.items():
                self.native.copy_in(self.ids[name], np.ascontiguousarray(x, self._type(name)))
            for at, tensor, x in step.taps:
                if at == stop.at:
                    self.native.copy_out(tensor, x)
        self.native.advance(step.outs)
        timings = {} if step.seconds is None else Timings(self._sites, step.seconds)
        return StepResult(step.tokens, step.logprobs, step.logits, step.taken, timings)

    def _begin(self, request: StepRequest) -> _Step:
        """Check a step's batch, start its native plan, and return a _Step with newly allocated result arrays.

        Raises DeviceError for a batch out of range.
        """
        batch = request.batch
        if batch.block_size != self.state.page_tokens:
            check_batch(self.program, self.state, batch)
        if batch.sampling != self._draws.ways:
            self._draws = Draws.of(batch.sampling)
        seconds = np.zeros(len(self._sites)) if request.timed else None
        taken, wanted = taps_of(self.program, self.ids, batch, request.taps) if request.taps else ({}, [])
        native = [tap for tap in wanted if tap[0] not in self.layout.stopped]
        edits = edits_of(batch.sampling, self.program.vocabulary) if self._drawn else None
        try:
            self.native.begin(batch.numbers, batch.counts, self._draws.native, edits, native, seconds)
        except IndexError:  # the batch is out of range: check_batch() names the value
            check_batch(self.program, self.state, batch)
            raise
        rows = batch.counts[2]
        drawn = rows if self._drawn else 0  # a pipeline stage may sample none
        tokens, logprobs = np.empty(drawn, np.int32), np.empty(drawn, np.float32)
        outs: list[tuple[int, np.ndarray]] = [*zip(self._drawn, (tokens, logprobs), strict=True)] if drawn else []
        wide = (
            np.empty((rows, self.program.vocabulary), np.float32)
            if request.logits and self.program.vocabulary
            else None
        )
        if wide is not None and rows:
            outs.append((self.ids["logits"], wide))
        outside = [tap for tap in wanted if tap[0] in self.layout.stopped]
        return _Step(taken, outside, seconds, tokens, logprobs, wide, outs)

    def _run_python(
        self, stop: Stop, rows: Mapping[str, np.ndarray], batch: Batch, seconds: np.ndarray | None
    ) -> Mapping[str, np.ndarray]:
        """Run an op whose kernel is a Python function. Returns its results: {name of the tensor: array}.

        Args:
            stop: the op, its number in the Program and its kernel.
            rows: those of the op's operands that this step has computed: {name of the tensor: array}.
            batch: the step's batch.
            seconds: array indexed by op number, in which the op's seconds are stored; None: they are not measured.

        Raises DeviceError unless the results have the names and shapes that the op declares.
        """
        start = time.perf_counter()
        inputs = {"tokens": batch.tokens, "positions": batch.positions, "rows": batch.rows}
        values: dict[str, Value] = {**self._arrays, **inputs, **rows}
        assert stop.kernel is not None, "a collective has no kernel"
        read = batch.of_windows if self.program.has_window(stop.op) else batch
        results = stop.kernel.function(stop.op, values, read)
        self._check_results(stop.op, results, batch)
        if seconds is not None:
            seconds[stop.at] = time.perf_counter() - start
        return results

    def _check_results(self, op: Op, results: Mapping[str, np.ndarray], batch: Batch) -> None:
        """Raise DeviceError unless `results` has the tensor names and shapes that `op` declares. Returns None."""
        wanted = {name: self._empty(name, batch).shape for name in op.outputs}
        given = {name: np.shape(x) for name, x in results.items()}
        if given != wanted:
            raise DeviceError(f"{op.site} ({op.kind}): the host kernel returned {given}; the op declares {wanted}")

    def _type(self, name: str) -> type[np.generic]:
        """Return the NumPy type of the values of the tensor `name`: float32 or int32."""
        return NUMPY[self.program.tensors[name].format]

    def _empty(self, name: str, batch: Batch) -> np.ndarray:
        """Return an uninitialised array for the tensor `name`, an intermediate result of this step.

        Its shape is [rows, columns], or [rows] if the tensor has one dimension.
        """
        t = self.program.tensors[name]
        rows = batch.sizes[str(t.shape[0])]
        return np.empty((rows, columns_of(t)) if len(t.shape) == 2 else rows, self._type(name))
