"""Measured speed of a loaded Program: prefill and decode, each beside its bound from the device's measured roofs.

Every time here is measured; a bound is the work of the same steps over the roofs, never mixed into a time.
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
from intaglio.devices import Device, Executable
from intaglio.devices.host import HostDevice
from intaglio.ops import Linear, Op, Work
from intaglio.program import Program

DECODE_STEPS = 16
LENGTHS = (64, 256, 1024)  # prompt tokens, those that fit
SEQUENCES = (1, 8)
MOST_MEGABYTES = 1024  # read to measure bandwidth; a working set larger still is read no slower


class BenchError(ValueError):
    """A size the loaded Program cannot run."""


@dataclass(frozen=True)
class Roofs:
    """Measured: bytes/s read from a working set of so many MB, and FLOP/s of a matrix product by format."""

    bandwidth: Callable[[int], float]
    peak: Callable[[str], float]


@dataclass(frozen=True)
class Bound:
    """The least seconds that memory allows, and the least that arithmetic does."""

    memory: float = 0.0
    matrix: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.memory, self.matrix)

    @property
    def by(self) -> str:
        return "memory" if self.memory > self.matrix else "matrix"

    def __add__(self, other: Bound) -> Bound:
        return Bound(self.memory + other.memory, self.matrix + other.matrix)


@dataclass(frozen=True)
class Row:
    """One phase at one size. `seconds` is the median: of a whole prefill, or of one decode step."""

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
        """Of the roof that bounds it."""
        return None if self.bound_seconds is None else self.bound_seconds / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def measured_roofs(device: Device) -> Roofs | str:
    """The roofs of the machine as the native part measures them for this device, or why there are none."""
    if not isinstance(device, HostDevice):
        return f"device {device.name} has no measured roofs: speeds stand without bounds"
    native, n, isa = import_module("intaglio._native"), device.threads, device.isa

    @cache
    def read(megabytes: int) -> float:
        return read_stream(device, megabytes)

    @cache
    def peak(format: str) -> float:
        fmt = formats.get(format)
        return float(native.matrix_peak(n, fmt.family, fmt.group_of(1024) if fmt.grouped else 0, isa=isa))

    return Roofs(lambda megabytes: read(min(megabytes, MOST_MEGABYTES)), peak)


def read_stream(device: HostDevice, megabytes: int) -> float:
    """Bytes/s that the device's threads read of a working set of so many MB, measured now: the best of some passes."""
    native = import_module("intaglio._native")
    return float(native.read_bandwidth(device.threads, megabytes, isa=device.isa))


def bench(
    executable: Executable,
    roofs: Roofs | None = None,
    *,
    lengths: Sequence[int] | None = None,
    sequences: Sequence[int] = SEQUENCES,
    runs: int = 3,
    max_batch_tokens: int = 512,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], object] = lambda what: None,
) -> list[Row]:
    """Prefill and decode at each size; overwrites the executable's state. Raises BenchError if a size does not fit."""
    context = executable.program.context
    if lengths is None:
        lengths = [n for n in LENGTHS if n + DECODE_STEPS <= context] or [max(1, context - DECODE_STEPS)]
    rows = []
    for count in sequences:
        for length in lengths:
            check_size(executable, count, length, runs)
            steps = list(prefill_steps(executable, count, length, max_batch_tokens))
            progress(f"prefill of {count} x {length} tokens")
            times = [sum(_times(executable, steps, clock)) for _ in range(runs + 1)][1:]  # the first warms up
            rows.append(_row("prefill", count, length, median(times), count * length, executable, steps, roofs))
            progress(f"decode of {count} after {length} tokens")
            steps = list(decode_steps(executable, count, length))
            seconds = median(t for _ in range(runs) for t in _times(executable, steps, clock))
            rows.append(_row("decode", count, length, seconds, count, executable, steps[:1], roofs))
    return rows


def check_size(executable: Executable, count: int, length: int, runs: int) -> None:
    program, state = executable.program, executable.state
    longest = program.context - DECODE_STEPS
    if count < 1 or runs < 1 or not 1 <= length <= longest:
        raise BenchError(
            f"{runs} runs of {count} sequences of {length} tokens: give 1 or more of each, at most {longest} tokens "
            f"({DECODE_STEPS} of the context of {program.context} are for decoding)"
        )
    pages = count * len(_blocks(executable, 0, length))
    if pages > state.pages:
        raise BenchError(f"{count} x {length} tokens need {pages} pages of KV, {state.pages} are held; ask for less")


def _blocks(executable: Executable, sequence: int, length: int) -> range:
    each = -(-(length + DECODE_STEPS) // executable.state.page_tokens)
    return range(sequence * each, (sequence + 1) * each)


def prefill_steps(executable: Executable, count: int, length: int, budget: int) -> Iterator[Batch]:
    """The steps of a prefill, each filled up to `budget` tokens."""
    rng = random.Random(0)
    chunks: list[Chunk] = []
    room = budget
    for s in range(count):
        at = 0
        while at < length:
            n = min(room, length - at)
            ids = [rng.randrange(executable.program.vocabulary) for _ in range(n)]
            chunks.append(Chunk(ids, at, _blocks(executable, s, length), (n - 1,) if at + n == length else ()))
            at, room = at + n, room - n
            if not room:
                yield bind(chunks, executable.state.page_tokens)
                chunks, room = [], budget
    if chunks:
        yield bind(chunks, executable.state.page_tokens)


def decode_steps(executable: Executable, count: int, length: int) -> Iterator[Batch]:
    for k in range(DECODE_STEPS):
        token = k % executable.program.vocabulary
        chunks = [Chunk([token], length + k, _blocks(executable, s, length), (0,)) for s in range(count)]
        yield bind(chunks, executable.state.page_tokens)


def _times(executable: Executable, steps: Sequence[Batch], clock: Callable[[], float]) -> list[float]:
    times = []
    for batch in steps:
        start = clock()
        executable.step(batch)
        times.append(clock() - start)
    return times


def _row(
    phase: str, count: int, length: int, seconds: float, tokens: int,
    executable: Executable, steps: Sequence[Batch], roofs: Roofs | None,
) -> Row:  # fmt: skip
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
    """Bytes that come from memory; temps stay in cache."""
    return work.weight_bytes + work.state_bytes


def site_bounds(program: Program, batch: Batch, roofs: Roofs) -> dict[str, Bound]:
    """The least time of each site of a step. Its bytes come at the bandwidth of the whole step's working set."""
    work = program.work(batch)
    bandwidth = roofs.bandwidth(1 << (sum(map(moved, work.values())) >> 20).bit_length())
    return {
        op.site: Bound(moved(work[op.site]) / bandwidth, work[op.site].flops / roofs.peak(_format(program, op)))
        for op in program.ops
    }


def _format(program: Program, op: Op) -> str:
    """The format an op multiplies in: a grouped weight's own if x is rounded to match it, else what x is rounded to."""
    if not isinstance(op, Linear):
        return "f32"
    return program.tensors[op.w].format if op.x_format == "int8" else op.x_format
