"""Helpers that ops with recurrent state share: the state's shape rule, and each sequence's tokens with its state.

An op reads a sequence's state from slot `state_from`, and writes the state after the step's tokens to slot `state_to`.
The state is float32 and advances token by token, so it does not depend on how a prompt was cut into steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from intaglio.batch import Batch
from intaglio.ops.op import Op, Tensors, Value


def check_state(op: Op, t: Tensors, name: str, *shape: int) -> None:
    """Raise OpError unless the state tensor `name` is f32 [N, *shape], with N state slots. Returns nothing."""
    fits = t[name].shape == ("N", *shape) and t[name].format == "f32"
    op.check(fits, f"{name} is {t[name].type}; wanted f32[N, {', '.join(map(str, shape))}]")


def sequences(v: Mapping[str, Value], name: str, batch: Batch) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield a pair (token rows, state) for each sequence in the batch.

    The token rows are a slice of the step's tokens. The state is a float32 array: a copy of the sequence's state, or
    zeros if it has none yet. The caller changes this array in place to the new state. It is then written to the
    sequence's slot `state_to`.

    v: values of the op's operands by name. name: name of the state tensor, an array with one item per slot.
    """
    held = v[name]
    assert isinstance(held, np.ndarray), f"state {name} is a plain array"
    slots = zip(batch.first_row, batch.q_len, batch.state_from, batch.state_to, strict=True)
    for first, n, before, after in slots:
        state = np.zeros_like(held[0]) if before < 0 else held[before].copy()
        yield slice(int(first), int(first + n)), state
        held[after] = state


def state_bytes(t: Tensors, name: str, batch: Batch) -> int:
    """Returns the number of bytes of state that a step reads and writes, in total.

    The step reads and writes each sequence's state once. t: the Program's tensors by name. name: name of the state
    tensor. batch: the sequences of the step.
    """
    return 2 * len(batch.q_len) * t[name].nbytes({"N": 1})


def softplus(x: np.ndarray) -> np.ndarray:
    """Returns ln(1 + e^x) for each element of x, as float64."""
    return np.logaddexp(0, x.astype(np.float64))
