"""Running a schedule with values, all ranks in one process: the reference reader of schedules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from intaglio.collectives.schedule import Schedule, ScheduleError, Slot


def execute(
    s: Schedule, brought: Sequence[Mapping[int, np.ndarray]], turns: Iterable[int] | None = None
) -> list[dict[int, np.ndarray]]:
    """What each rank gets, by chunk, from what each brings, by chunk. Sums keep the arrays' dtype.

    `turns`: all steps in the order to run them, default as they stand; the result does not depend on it. Raises
    ScheduleError for a chunk that is missing, and for a step whose turn comes before what it waits for.
    """
    memory: list[dict[Slot, np.ndarray]] = []
    for rank, chunks in enumerate(brought):
        if set(chunks) != set(s.brings(rank)):
            raise ScheduleError(f"rank {rank} brings chunks {sorted(chunks)}; wanted {list(s.brings(rank))}")
        memory.append({Slot("in", c): x for c, x in chunks.items()})
    flying: dict[int, np.ndarray] = {}
    ended = [False] * len(s.steps)
    for i in range(len(s.steps)) if turns is None else turns:
        step = s.steps[i]
        late = next((j for j in step.after if not ended[j]), None)
        if late is not None or (step.kind == "recv" and step.tag not in flying):
            raise ScheduleError(f"{step} waits for {s.steps[late] if late is not None else 'what nobody has sent'}")
        slots = memory[step.rank]
        match step.kind, step.src, step.add, step.dst:
            case "send", Slot() as src, _, _:
                flying[step.tag] = slots[src]
            case "recv", _, _, Slot() as dst:
                slots[dst] = flying.pop(step.tag)
            case "copy", Slot() as src, _, Slot() as dst:
                slots[dst] = slots[src]
            case "reduce", Slot() as src, Slot() as add, Slot() as dst:
                slots[dst] = slots[src] + slots[add]
            case _:
                raise ScheduleError(f"{step} lacks a slot, or is of no known kind")
        ended[i] = True
    return [{c: memory[rank][Slot("out", c)] for c in s.gets(rank)} for rank in range(s.ranks)]


def cut(x: np.ndarray, parts: int) -> list[np.ndarray]:
    """Views of `parts` near-equal runs of the last axis; some are empty if it is shorter. By columns, so that a value's
    chunk, and with it the order of its sum, does not depend on how many rows there are."""
    n = x.shape[-1]
    return [x[..., n * i // parts : n * (i + 1) // parts] for i in range(parts)]


def join(chunks: Mapping[int, np.ndarray]) -> np.ndarray:
    return np.concatenate([chunks[c] for c in sorted(chunks)], axis=-1)


def all_reduce(s: Schedule, x: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The sum of the ranks' arrays, of one shape, for each rank."""
    return [join(got) for got in execute(s, [dict(enumerate(cut(a, s.chunks))) for a in x])]


def reduce_scatter(s: Schedule, x: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """For each rank the sum of the parts meant for it: x[giver][taker]; parts for one taker have one shape."""
    each = s.chunks // s.ranks
    brought = [{r * each + i: c for r, part in enumerate(row) for i, c in enumerate(cut(part, each))} for row in x]
    return [join(got) for got in execute(s, brought)]


def all_gather(s: Schedule, x: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """All ranks' arrays, of whatever shapes, for each rank."""
    each = s.chunks // s.ranks
    brought = [{r * each + i: c for i, c in enumerate(cut(part, each))} for r, part in enumerate(x)]
    runs = [range(r * each, (r + 1) * each) for r in range(s.ranks)]
    return [[join({c: got[c] for c in run}) for run in runs] for got in execute(s, brought)]


def all_to_all(s: Schedule, x: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
    """For each rank what the others have for it: x[giver][taker], of whatever shapes, becomes y[taker][giver]."""
    each, n = s.chunks // s.ranks**2, s.ranks
    first = [[(giver * n + taker) * each for taker in range(n)] for giver in range(n)]
    brought = [
        {first[g][t] + i: c for t, part in enumerate(row) for i, c in enumerate(cut(part, each))}
        for g, row in enumerate(x)
    ]
    got = execute(s, brought)
    return [[join({c: got[t][c] for c in range(first[g][t], first[g][t] + each)}) for g in range(n)] for t in range(n)]
