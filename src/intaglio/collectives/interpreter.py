"""Reference interpreter for collective schedules: executes every rank in one process with NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from intaglio.collectives.schedule import Schedule, ScheduleError, Slot


def execute(
    s: Schedule, inputs: Sequence[Mapping[int, np.ndarray]], order: Iterable[int] | None = None
) -> list[dict[int, np.ndarray]]:
    """Execute a schedule on arrays. Returns the output chunks of each rank: a list of dicts {chunk number: array}.

    The dict of a rank has the chunks in Schedule.outputs(rank). Sums keep the arrays' dtype.

    Args:
        s: the schedule.
        inputs: one dict per rank: {chunk number: array} for the chunks in Schedule.inputs(rank).
        order: indices of all steps in execution order; None: schedule order. The result does not depend on the order.

    Raises ScheduleError if `inputs` has other chunks than Schedule.inputs() says, if a step runs before a step that it
    depends on, and for a malformed step.
    """
    memory: list[dict[Slot, np.ndarray]] = []
    for rank, chunks in enumerate(inputs):
        if set(chunks) != set(s.inputs(rank)):
            raise ScheduleError(f"rank {rank} has input chunks {sorted(chunks)}; wanted {list(s.inputs(rank))}")
        memory.append({Slot("in", c): x for c, x in chunks.items()})
    in_flight: dict[int, np.ndarray] = {}
    ended = [False] * len(s.steps)
    for i in range(len(s.steps)) if order is None else order:
        step = s.steps[i]
        late = next((j for j in step.after if not ended[j]), None)
        if late is not None or (step.kind == "recv" and step.tag not in in_flight):
            raise ScheduleError(
                f"{step} waits for {s.steps[late] if late is not None else 'a message that was not sent'}"
            )
        slots = memory[step.rank]
        match step.kind, step.src, step.add, step.dst:
            case "send", Slot() as src, _, _:
                in_flight[step.tag] = slots[src]
            case "recv", _, _, Slot() as dst:
                slots[dst] = in_flight.pop(step.tag)
            case "copy", Slot() as src, _, Slot() as dst:
                slots[dst] = slots[src]
            case "reduce", Slot() as src, Slot() as add, Slot() as dst:
                slots[dst] = slots[src] + slots[add]
            case _:
                raise ScheduleError(f"{step} lacks a slot, or has an unknown kind")
        ended[i] = True
    return [{c: memory[rank][Slot("out", c)] for c in s.outputs(rank)} for rank in range(s.ranks)]


def cut(x: np.ndarray, parts: int) -> list[np.ndarray]:
    """Cut the array `x` along its last axis. Returns a list of `parts` views whose widths differ by at most 1.

    If there are more parts than columns, some views are empty. Which part a value is in depends only on its column and
    the number of columns. Therefore the order in which a collective sums the values of a row does not depend on the
    number of rows.
    """
    n = x.shape[-1]
    return [x[..., n * i // parts : n * (i + 1) // parts] for i in range(parts)]


def join(chunks: Mapping[int, np.ndarray]) -> np.ndarray:
    """Concatenate chunks along the last axis, in the order of their numbers. Returns one array.

    chunks: {number: array}. The function is the inverse of cut().
    """
    return np.concatenate([chunks[c] for c in sorted(chunks)], axis=-1)


def all_reduce(s: Schedule, x: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run an all_reduce schedule. Returns a list of arrays: for each rank, the sum of all arrays in `x`.

    x: one array per rank, all of the same shape. Raises ScheduleError for a malformed schedule.
    """
    return [join(got) for got in execute(s, [dict(enumerate(cut(a, s.chunks))) for a in x])]


def reduce_scatter(s: Schedule, x: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Run a reduce_scatter schedule. Returns a list of arrays: for each rank, the sum of the arrays sent to it.

    x: arrays x[sender][receiver]. The arrays for one receiver have the same shape. Raises ScheduleError for a malformed
    schedule.
    """
    each = s.chunks // s.ranks
    inputs = [{r * each + i: c for r, part in enumerate(row) for i, c in enumerate(cut(part, each))} for row in x]
    return [join(got) for got in execute(s, inputs)]


def all_gather(s: Schedule, x: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Run an all_gather schedule. Returns, for each rank, a list with the arrays of all ranks.

    x: one array per rank, of any shapes. Raises ScheduleError for a malformed schedule.
    """
    each = s.chunks // s.ranks
    inputs = [{r * each + i: c for i, c in enumerate(cut(part, each))} for r, part in enumerate(x)]
    runs = [range(r * each, (r + 1) * each) for r in range(s.ranks)]
    return [[join({c: got[c] for c in run}) for run in runs] for got in execute(s, inputs)]


def all_to_all(s: Schedule, x: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
    """Run an all_to_all schedule. Returns lists of arrays y[receiver][sender], with the values of x[sender][receiver].

    x: arrays x[sender][receiver], of any shapes. Raises ScheduleError for a malformed schedule.
    """
    each, n = s.chunks // s.ranks**2, s.ranks
    first = [[(sender * n + receiver) * each for receiver in range(n)] for sender in range(n)]
    inputs = [
        {first[g][t] + i: c for t, part in enumerate(row) for i, c in enumerate(cut(part, each))}
        for g, row in enumerate(x)
    ]
    got = execute(s, inputs)
    return [[join({c: got[t][c] for c in range(first[g][t], first[g][t] + each)}) for g in range(n)] for t in range(n)]
