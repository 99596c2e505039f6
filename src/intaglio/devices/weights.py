"""Sources of weights (arrays in memory; a wrapper that reports progress), assembly of a weight, and zeroed state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from intaglio import formats
from intaglio.devices.device import DeviceError, StateSpec, Weights
from intaglio.formats import Quantised
from intaglio.ops import Tensor, Value
from intaglio.ops.op import dim_size
from intaglio.program import MeshProgram, Program
from intaglio.program.source import names, read
from intaglio.progress import Progress


@dataclass(frozen=True)
class ArrayWeights:
    """A source of weights that holds arrays in memory: {name of a checkpoint tensor: array or Quantised}."""

    arrays: Mapping[str, Value]

    def read(self, name: str) -> Value:
        """Return the array or Quantised object of the checkpoint tensor `name`. Raises KeyError if there is none."""
        return self.arrays[name]

    def strips(self, name: str) -> Iterator[Value]:
        """Yield the tensor `name` once, as a whole. It is in memory already, so that parts would save nothing."""
        yield self.arrays[name]

    def release(self, name: str) -> None:
        """Do nothing, because the arrays belong to the caller."""

    def identity(self) -> None:
        """Return None, which means that packed weights must not be cached, because the arrays may change."""


class ReportedWeights:
    """A wrapper of a weight source that reports progress after each tensor that a device has loaded."""

    def __init__(
        self, weights: Weights, mesh: MeshProgram, shape: Callable[[str], tuple[int, ...]], progress: Progress
    ) -> None:
        """Wrap the source `weights` to report progress.

        Args:
            weights: the source that holds the values.
            mesh: the Programs to be loaded, which say how often each checkpoint tensor is used.
            shape: function that takes the name of a checkpoint tensor and returns its shape.
            progress: called with (number of values loaded, number of all values, text) after each tensor.
        """
        self.weights, self.progress = weights, progress
        self.left = Counter(
            name
            for program in mesh.programs
            for tensor in program.of_role("weight")
            for source in tensor.source
            for name in names(source)
        )
        self.values = {name: math.prod(shape(name)) for name in self.left}
        self.total = sum(self.values[name] * times for name, times in self.left.items())
        self.taken = 0

    def read(self, name: str) -> Value:
        """Return the values of the checkpoint tensor `name`, an array or Quantised, from the wrapped source.

        Raises the errors of the wrapped source.
        """
        return self.weights.read(name)

    def strips(self, name: str) -> Iterator[Value]:
        """Yield the checkpoint tensor `name` in parts of consecutive rows, from the wrapped source."""
        return self.weights.strips(name)

    def release(self, name: str) -> None:
        """Tell the wrapped source that the device has copied the tensor `name`, and report progress. Returns None.

        A tensor that the Programs use several times is reported once for each use. Further releases of it report
        nothing.
        """
        self.weights.release(name)
        if self.left[name] > 0:
            self.left[name] -= 1
            self.taken += self.values[name]
            amount = f"{self.taken / 1e6:,.0f} of {self.total / 1e6:,.0f} million"
            self.progress(self.taken, self.total, f"loading the weights, {amount}")

    def identity(self) -> str | None:
        """Return a text that is equal for equal weights, in other processes too; None if the wrapped source has none.

        It is the key under which packed weights are cached.
        """
        return self.weights.identity()


def inner_weights(weights: Weights) -> Weights:
    """Return the source that `weights` wraps if it is a ReportedWeights, otherwise `weights` itself.

    Reading from the returned source reports no progress.
    """
    return weights.weights if isinstance(weights, ReportedWeights) else weights


def zeroed_state(tensor: Tensor, state: StateSpec, program: Program) -> Value:
    """Return the initial contents of a K/V cache or recurrent state: zeros, as an array or Quantised object.

    The tensor gives the format and the shape. In the shape, P is replaced by the number of pages, B by the tokens per
    page and N by the number of slots of recurrent state, all from `state`. Raises DeviceError for recurrent state if
    `state` has too few slots.
    """
    check_slots(tensor, state)
    dims = {"P": state.pages_of(program, tensor.name), "B": state.page_tokens, "N": state.slots}
    shape = [dim_size(d, dims) for d in tensor.shape]
    fmt = formats.get(tensor.format)
    zeros = np.zeros(shape, fmt.dtype)
    if not fmt.grouped:
        return zeros
    return Quantised(zeros, np.zeros((*shape[:-1], 1), np.float32), shape[-1])


def check_slots(tensor: Tensor, state: StateSpec) -> None:
    """Raise DeviceError if `tensor` is recurrent state and `state` has fewer than two slots. Returns None.

    A sequence needs two slots: each step reads the old state from one and writes the new state to the other.
    """
    if tensor.shape[0] == "N" and state.slots < 2:
        raise DeviceError(
            f"{tensor.name} is recurrent state, {tensor.type}, and the StateSpec has {state.slots} slots; give it two "
            "or more for each sequence that runs at once"
        )


def assemble(tensor: Tensor, weights: Weights) -> Value:
    """Read a weight's checkpoint tensors and put them together. Returns an array or Quantised in the weight's format.

    Raises DeviceError if the shapes of the checkpoint tensors do not fit.
    """
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
    """Join quantised parts along their rows.

    Returns a Quantised of shape `shape`, in the number format of the parts.
    """

    def join(arrays: list[np.ndarray]) -> np.ndarray:
        """Join arrays [..., rows, columns] along their rows. Returns one array [all rows, columns]."""
        return np.concatenate([x.reshape(-1, x.shape[-1]) for x in arrays])

    whole = parts[0].holding({name: join([x.arrays[name] for x in parts]) for name in parts[0].arrays})
    return whole.stacked(shape)
