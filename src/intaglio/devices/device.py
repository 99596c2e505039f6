"""The seam: what every device offers, whatever it is made of. Loading a Program, and one step of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.formats import Quantised
from intaglio.ops import Collective, Tensor, Value
from intaglio.program import Program
from intaglio.program.source import read


class DeviceError(RuntimeError):
    """A device that cannot load or run what it was given."""


class DeviceLost(DeviceError):
    """The device itself is gone: its process died, hung or spoke nonsense. What it held is lost; load anew."""


class Weights(Protocol):
    """Where a device reads weights from: arrays [rows, ...] in their stored type, possibly maps of a file, or codes."""

    def read(self, name: str) -> Value: ...

    def strips(self, name: str) -> Iterator[Value]:
        """The same, but codes may come in runs along their first dimension, one at a time in memory."""

    def release(self, name: str) -> None:
        """The device has taken its copy; the pages behind `name` may be dropped."""

    def identity(self) -> str | None:
        """The same for the same values, even tomorrow: a device may keep what it made of them. None: it may not."""


@dataclass(frozen=True)
class ArrayWeights:
    """Weights already in memory."""

    arrays: Mapping[str, Value]

    def read(self, name: str) -> Value:
        return self.arrays[name]

    def strips(self, name: str) -> Iterator[Value]:
        yield self.arrays[name]

    def release(self, name: str) -> None:
        """Nothing to drop."""

    def identity(self) -> None:
        """Arrays may change."""


@dataclass(frozen=True)
class StateSpec:
    """How much state to hold: the dims P (pages in the pool) and B (tokens a page)."""

    pages: int
    page_tokens: int = 32


@dataclass(frozen=True)
class StepResult:
    """What a step gives back: tokens int32 [R] (-1: no finite logits), logprobs f32 [R], logits f32 [R, vocabulary] if
    wanted, the tapped tensors by site, and seconds by site if timed."""

    tokens: np.ndarray
    logprobs: np.ndarray
    logits: np.ndarray | None = None
    taps: dict[str, np.ndarray] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)


class Executable(Protocol):
    """A loaded Program with its weights packed and its state held."""

    program: Program
    state: StateSpec

    def step(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> StepResult: ...


# A step of one rank of a mesh: it stops at each collective with what the rank brings (None for a recv), to be sent what
# the rank gets (None for a send).
Rounds = Generator[tuple[Collective, np.ndarray | None], np.ndarray | None, StepResult]


class Rank(Executable, Protocol):
    """An Executable that can be one rank of a mesh."""

    def rounds(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> Rounds: ...


def alone(program: Program, rounds: Rounds) -> StepResult:
    """Step a Program that is a mesh of its own. Raises DeviceError at its first collective if it is not."""
    try:
        op, _ = next(rounds)
    except StopIteration as end:
        result: StepResult = end.value
        return result
    raise DeviceError(
        f"{op.site} ({op.kind}): rank {program.rank} of {program.mesh} waits for the others; load all of them into a "
        "MeshDevice"
    )


class Device(Protocol):
    """Loads Programs. May pack, fuse and thread; may not change results."""

    name: str

    def load(self, program: Program, weights: Weights, state: StateSpec) -> Executable: ...


def limits(program: Program, state: StateSpec) -> dict[str, int]:
    """What the token ids, positions, slots and blocks of a batch stay below."""
    return {
        "token id": program.vocabulary or np.iinfo(np.int32).max,
        "position": program.context,
        "slot": state.pages * state.page_tokens,
        "block": state.pages,
    }


def check_batch(program: Program, state: StateSpec, batch: Batch) -> None:
    """Refuse a batch the Program or the state cannot hold, naming what is out of range. Raises DeviceError."""
    if batch.block_size != state.page_tokens:
        raise DeviceError(f"the batch counts {batch.block_size} tokens a page, the state holds {state.page_tokens}")
    below = limits(program, state) | {"row": len(batch.tokens)}
    given = (batch.tokens, batch.positions, batch.slots, batch.block_table, batch.rows)
    for (what, limit), values in zip(below.items(), given, strict=True):
        low = -1 if what == "block" else 0
        if values.size and (int(values.min()) < low or int(values.max()) >= limit):
            bad = int(values.min()) if int(values.min()) < low else int(values.max())
            raise DeviceError(f"{what} {bad} is outside 0..{limit - 1}")


def assemble(tensor: Tensor, weights: Weights) -> Value:
    """A weight in its declared format, from its checkpoint tensors. Raises DeviceError if the shape is another."""
    parts = [(name, x) for source in tensor.source for name, x in read(source, weights.read)]
    fmt, shape = formats.get(tensor.format), tuple(int(d) for d in tensor.shape)
    row = shape[-1:] if len(shape) > 1 else ()  # of a vector, every value is a row
    fits = all(x.shape[len(x.shape) - len(row) :] == row for _, x in parts)
    if not fits or sum(math.prod(x.shape) for _, x in parts) != math.prod(shape):
        held = " + ".join(str(list(x.shape)) for _, x in parts[:4])
        raise DeviceError(f"weight {tensor.name} is {tensor.type} but {' + '.join(tensor.source)} holds {held}")
    for name, _ in parts:
        weights.release(name)
    if all(isinstance(x, Quantised) and x.format == fmt.name for _, x in parts):
        return _joined([x for _, x in parts if isinstance(x, Quantised)], shape)
    plain = [x.rows(slice(None)) if isinstance(x, Quantised) else x for _, x in parts]
    whole = np.concatenate([x.reshape(-1, *row) for x in plain]) if len(plain) > 1 else plain[0]
    if fmt.grouped:
        return formats.quantise(whole.reshape(-1, *row).astype(np.float32), fmt.name).stacked(shape)
    return whole.astype(fmt.dtype).reshape(shape)


def _joined(parts: list[Quantised], shape: tuple[int, ...]) -> Quantised:
    """Codes in the order of their rows, as published."""

    def join(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([x.reshape(-1, x.shape[-1]) for x in arrays])

    whole = parts[0].holding({name: join([x.arrays[name] for x in parts]) for name in parts[0].arrays})
    return whole.stacked(shape)
