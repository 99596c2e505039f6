"""Measured speed of a loaded Program: prefill and decode, each beside its bound from the device's measured roofs.

Every time here is measured. A bound is the work of the same steps over the roofs, and is never mixed into a time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from statistics import median
from typing import Any

from intaglio import formats
from intaglio.batch import Batch, Chunk, bind
from intaglio.devices import Device, DeviceFacts, Executable, StepRequest, StepResult
from intaglio.ops import Linear, Op, Work
from intaglio.program import Program
from intaglio.progress import Progress, silent

DECODE_STEPS = 16
LENGTHS = (64, 256, 1024)  # prompt tokens, those that fit
SEQUENCES = (1, 8)
LEAST_COST = 16  # tokens: below, reading the weights takes most of a step
MOST_MEGABYTES = 1024  # read to measure bandwidth; a working set larger still is read no slower


class BenchError(ValueError):
    """Raised for a batch size, prompt length or number of runs that cannot be measured on the loaded Program."""


@dataclass(frozen=True)
class Roofs:
    """Measured limits of the computer: its memory bandwidth and its arithmetic throughput.

    Attributes:
        bandwidth: function from the size of a working set in megabytes to the bytes/s at which the set is read.
        peak: function from the name of a number format to the FLOP/s of a matrix product in that format.
    """

    bandwidth: Callable[[int], float]
    peak: Callable[[str], float]


@dataclass(frozen=True)
class Bound:
    """Roofline bound of one or more ops: the minimum seconds that they can take on this computer.

    Both attributes are in seconds: `memory` is the minimum that the memory bandwidth allows, `matrix` the minimum that
    the arithmetic throughput allows.
    """

    memory: float = 0.0
    matrix: float = 0.0

    @property
    def seconds(self) -> float:
        """The minimum seconds that the ops can take: the larger of `memory` and `matrix`."""
        return max(self.memory, self.matrix)

    @property
    def by(self) -> str:
        """The limit that sets the bound: "memory" (bandwidth) or "matrix" (arithmetic throughput).

        It is "memory" if the attribute `memory` is larger than `matrix`, else "matrix".
        """
        return "memory" if self.memory > self.matrix else "matrix"

    def __add__(self, other: Bound) -> Bound:
        return Bound(self.memory + other.memory, self.matrix + other.matrix)


@dataclass(frozen=True)
class Row:
    """Measured speed of prefill or decode, at one number of sequences and one prompt length.

    Attributes:
        phase: "prefill" or "decode".
        sequences: number of sequences that ran together.
        prompt_tokens: prompt length of each sequence.
        seconds: median time of a whole prefill of all sequences, or of one decode step.
        tokens_per_second: prompt tokens per second in prefill, sampled tokens per second in decode.
        flops: floating-point operations that were done in `seconds`.
        bytes: bytes of weights, K/V cache and recurrent state that were read or written in `seconds`.
        bound_seconds: the roofline bound for `flops` and `bytes`; None if the computer's limits were not measured.
        bound_by: the limit that sets the bound, "memory" or "matrix"; None if there is no bound.
    """

    phase: str
    sequences: int
    prompt_tokens: int
    seconds: float
    tokens_per_second: float
    flops: int
    bytes: int
    bound_seconds: float | None = None
    bound_by: str | None = None

    @property
    def share(self) -> float | None:
        """The roofline bound divided by the measured seconds; None without a bound.

        1 means that the phase runs as fast as the computer allows.
        """
        return None if self.bound_seconds is None else self.bound_seconds / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """The attributes of this Row and its `share`, as a dict that can be written as JSON."""
        return {**asdict(self), "share": self.share}


def measured_roofs(device: Device) -> Roofs | str:
    """Returns the limits of the computer as Roofs, if `device` runs on the CPU, or else a text that says why not.

    Nothing is measured before a function of the Roofs is called. The first call with an argument measures the limit;
    later calls with the same argument return the same number.
    """
    facts = device.facts()
    if facts.threads is None or facts.isa is None:
        return f"device {device.name} has no measured roofs: speeds are printed without bounds"
    native, n, isa = import_module("intaglio._native"), facts.threads, facts.isa

    @cache
    def read(megabytes: int) -> float:
        return read_stream(facts, megabytes)

    @cache
    def peak(format: str) -> float:
        fmt = formats.get(format)
        return float(native.matrix_peak(n, fmt.family, fmt.group_of(1024) if fmt.grouped else 0, isa=isa))

    return Roofs(lambda megabytes: read(min(megabytes, MOST_MEGABYTES)), peak)


def read_stream(facts: DeviceFacts, megabytes: int) -> float:
    """Measure the bytes/s at which the CPU reads a working set of `megabytes` MB. Returns the best of several tries.

    facts: the device's threads and instruction set.
    """
    native = import_module("intaglio._native")
    return float(native.read_bandwidth(facts.threads, megabytes, isa=facts.isa))


def bench(
    executable: Executable,
    roofs: Roofs | None = None,
    *,
    lengths: Sequence[int] | None = None,
    sequences: Sequence[int] = SEQUENCES,
    runs: int = 3,
    max_batch_tokens: int = 512,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = silent,
) -> list[Row]:
    """Measure the speed of prefill and decode, for every batch size with every prompt length.

    Returns a list with two Rows for each such pair: prefill, then decode. Overwrites the executable's K/V cache. Raises
    BenchError if a pair does not fit the executable, see check_size().

    Args:
        executable: the loaded Program.
        roofs: the computer's limits, from which roofline bounds are computed; None: the Rows have no bounds.
        lengths: prompt lengths. None: the lengths in LENGTHS that fit the context together with the decode steps; if
            none of them fits, the longest length that does.
        sequences: batch sizes, as numbers of sequences run together.
        runs: number of times that each pair is measured; a Row has the median.
        max_batch_tokens: largest number of tokens of a prefill step.
        clock: function that returns the time in seconds.
        progress: called before each step as progress(done, total, text that says what is measured).
    """
    context = executable.program.context
    if lengths is None:
        lengths = [n for n in LENGTHS if n + DECODE_STEPS <= context] or [max(1, context - DECODE_STEPS)]
    sizes = [(count, length) for count in sequences for length in lengths]
    for count, length in sizes:
        check_size(executable, count, length, runs)
    plan = [
        (list(prefill_steps(executable, n, length, max_batch_tokens)), list(decode_steps(executable, n, length)))
        for n, length in sizes
    ]
    watch = Stopwatch(executable, clock, progress)
    for prefill, decode in plan:
        watch.expect(prefill, runs + 1)
        watch.expect(decode, runs)
    rows = []
    for (count, length), (prefill, decode) in zip(sizes, plan, strict=True):
        watch.what = f"prefill of {count} x {length} tokens"
        times = [sum(watch.times(prefill)) for _ in range(runs + 1)][1:]  # the first warms up
        watch.report("roofs of this machine")
        rows.append(_row("prefill", count, length, median(times), count * length, executable, prefill, roofs))
        watch.what = f"decode of {count} x 1 token after {length}"
        seconds = median(t for _ in range(runs) for t in watch.times(decode))
        watch.report("roofs of this machine")
        rows.append(_row("decode", count, length, seconds, count, executable, decode[:1], roofs))
    return rows


class Stopwatch:
    """Runs steps of an executable, times each step, and reports progress.

    Attributes:
        done: tokens of the steps that have run. A step of fewer than LEAST_COST tokens counts as LEAST_COST.
        total: tokens of all steps that are expected, counted in the same way.
        what: text that the progress display shows; callers set it.
    """

    def __init__(self, executable: Executable, clock: Callable[[], float], progress: Progress) -> None:
        self.executable, self.clock, self.progress = executable, clock, progress
        self.done, self.total, self.what = 0, 0, ""

    def expect(self, steps: Sequence[Batch], runs: int) -> None:
        """Add the number of tokens in `runs` runs of `steps` to `total`. Returns None."""
        self.total += runs * sum(_cost(batch) for batch in steps)

    def times(self, steps: Sequence[Batch]) -> list[float]:
        """Run the steps in order. Returns a list with the seconds that each step took."""
        return [self.step(StepRequest(batch))[0] for batch in steps]

    def step(self, request: StepRequest) -> tuple[float, StepResult]:
        """Report progress and run one step. Returns (seconds that the step took, its StepResult)."""
        self.report(self.what)
        start = self.clock()
        result = self.executable.step(request)
        seconds = self.clock() - start
        self.done += _cost(request.batch)
        return seconds, result

    def report(self, what: str) -> None:
        """Call the progress function with (done, total, what). `what`: the text to show."""
        self.progress(self.done, self.total, what)


def _cost(batch: Batch) -> int:
    """The weight of a step in the progress report: its number of tokens, but at least LEAST_COST."""
    return max(len(batch.tokens), LEAST_COST)


def check_size(executable: Executable, count: int, length: int, runs: int) -> None:
    """Raise BenchError if bench() cannot measure `count` sequences with prompts of `length` tokens.

    BenchError is raised in these cases:

    - The prompt and DECODE_STEPS (16) decoded tokens do not fit the context.
    - The sequences need more K/V pages, or more recurrent states, than the executable has.
    - `count`, `length` or `runs` (number of times that each size is measured) is below 1.
    - Layers with a sliding window have K/V blocks of their own, which the benchmark does not allocate.
    """
    program, state = executable.program, executable.state
    longest = program.context - DECODE_STEPS
    if longest < 1:
        raise BenchError(
            f"a context of {program.context} tokens is too short to measure: {DECODE_STEPS} of them are for decoding; "
            f"use a context of {DECODE_STEPS + 1} or more"
        )
    if count < 1 or runs < 1 or not 1 <= length <= longest:
        raise BenchError(
            f"{runs} runs of {count} sequences of {length} tokens: give 1 or more of each, at most {longest} tokens "
            f"({DECODE_STEPS} of the context of {program.context} are for decoding)"
        )
    pages = count * len(_blocks(executable, 0, length))
    if pages > state.pages:
        raise BenchError(f"{count} x {length} tokens need {pages} pages of KV, {state.pages} are held; ask for less")
    if state.window_pages:
        raise BenchError("the layers with a window have K/V blocks of their own; load the model with window_tokens=0")
    slots = executable.state.slots
    if slots and 2 * count > slots:
        raise BenchError(
            f"{count} sequences need {2 * count} slots of recurrent state, {slots} are held; ask for fewer"
        )


def _blocks(executable: Executable, sequence: int, length: int) -> range:
    """The numbers of the K/V blocks of one sequence, as a range.

    The blocks hold a prompt of `length` tokens and the decode steps. No two sequences have a block in common. sequence:
    number of the sequence, from 0.
    """
    each = -(-(length + DECODE_STEPS) // executable.state.page_tokens)
    return range(sequence * each, (sequence + 1) * each)


def prefill_steps(executable: Executable, count: int, length: int, budget: int) -> Iterator[Batch]:
    """Yield the Batches that prefill `count` prompts of `length` random tokens each.

    Each Batch has `budget` tokens; the last may have fewer. A prompt may be split over several Batches.
    """
    rng = random.Random(0)
    chunks: list[Chunk] = []
    room = budget
    for s in range(count):
        at = 0
        while at < length:
            n = min(room, length - at)
            ids = [rng.randrange(executable.program.vocabulary) for _ in range(n)]
            rows = (n - 1,) if at + n == length else ()
            # Later chunks and decode steps all read the state after the first chunk: times do not depend on values.
            state = executable.state.pair(s, 1 if at else 0)
            chunks.append(Chunk(ids, at, _blocks(executable, s, length), rows, state=state))
            at, room = at + n, room - n
            if not room:
                yield bind(chunks, executable.state.page_tokens)
                chunks, room = [], budget
    if chunks:
        yield bind(chunks, executable.state.page_tokens)


def decode_steps(executable: Executable, count: int, length: int) -> Iterator[Batch]:
    """Yield DECODE_STEPS (16) Batches, one per decode step, for `count` sequences with prompts of `length` tokens.

    Each Batch has one token, and one row of logits, per sequence. The context grows by one token from Batch to Batch.
    """
    for k in range(DECODE_STEPS):
        token = k % executable.program.vocabulary
        chunks = [
            Chunk([token], length + k, _blocks(executable, s, length), (0,), state=executable.state.pair(s, 1))
            for s in range(count)
        ]
        yield bind(chunks, executable.state.page_tokens)


def _row(
    phase: str, count: int, length: int, seconds: float, tokens: int,
    executable: Executable, steps: Sequence[Batch], roofs: Roofs | None,
) -> Row:  # fmt: skip
    """The Row of one measured phase: its time, and the FLOPs, bytes and roofline bound of `steps`.

    Args:
        phase: "prefill" or "decode".
        count: number of sequences run together.
        length: prompt tokens of each sequence.
        seconds: measured time of `steps`.
        tokens: number of tokens that `steps` prefilled or sampled; the rate is `tokens` / `seconds`.
        executable: the loaded Program.
        steps: the Batches that ran in `seconds`.
        roofs: measured limits of the computer; None: the Row has no bound.
    """
    program = executable.program
    flops = read = 0
    memory = matrix = 0.0
    for batch in steps:
        work = program.work(batch).values()
        flops, read = flops + sum(w.flops for w in work), read + sum(moved(w) for w in work)
        if roofs:
            bounds = site_bounds(program, batch, roofs).values()
            memory, matrix = memory + sum(b.memory for b in bounds), matrix + sum(b.matrix for b in bounds)
    bound = Bound(memory, matrix) if roofs else None
    by = (bound.seconds, bound.by) if bound else (None, None)
    return Row(phase, count, length, seconds, tokens / seconds, flops, read, *by)


def moved(work: Work) -> int:
    """The number of bytes of weights and state that an op reads or writes.

    The op's roofline bound is computed from this number. State is the K/V cache and recurrent state. Activations do not
    count, because they stay in the CPU caches.
    """
    return work.weight_bytes + work.state_bytes


def site_bounds(program: Program, batch: Batch, roofs: Roofs) -> dict[str, Bound]:
    """The roofline Bound of each op in one step, as a dict {name of the op: Bound}.

    All ops get the same bandwidth: the bandwidth measured for a working set as large as all bytes of the step. (A small
    model stays in the CPU caches, which are read faster than memory.) batch: the batch of the step. roofs: measured
    limits of the computer.
    """
    work = program.work(batch)
    bandwidth = roofs.bandwidth(1 << (sum(map(moved, work.values())) >> 20).bit_length())
    return {
        op.site: Bound(moved(work[op.site]) / bandwidth, work[op.site].flops / roofs.peak(_format(program, op)))
        for op in program.ops
    }


def _format(program: Program, op: Op) -> str:
    """The name of the number format in which an op multiplies.

    - A linear layer with int8 activations: the format of the weight.
    - Another linear layer: the format to which the activations are rounded.
    - Every other op: "f32".

    Roofs.peak() has the FLOP/s of each format.
    """
    if not isinstance(op, Linear):
        return "f32"
    return program.tensors[op.w].format if op.x_format == "int8" else op.x_format
