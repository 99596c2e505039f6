"""Times of the ranks of a mesh in a decode step: in all ops, in collectives, and waiting for each other rank.

The rank that spends the least time in a collective is taken to have entered it last. Each other rank of the group has
waited for that rank, for as long as it spends in the collective beyond that rank's time. A recv is counted whole as
waiting for its sender. Only durations are used, since the clocks of different ranks are not synchronised.
chrome_trace() shows a step in Chrome's trace event format.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from intaglio.devices import Executable, StepRequest, StepResult
from intaglio.measure.bench import DECODE_STEPS, decode_steps
from intaglio.ops import Collective, Grouped, Recv
from intaglio.program import MeshProgram
from intaglio.silicon.timeline import duration_event, metadata_event

Timings = Sequence[Mapping[str, float]]  # seconds by site, of each rank


@dataclass(frozen=True)
class RankTimes:
    """Seconds of a rank in a step; medians of several steps.

    Attributes:
        rank: number of the rank.
        seconds: seconds in all ops.
        collectives: seconds in collectives, a part of `seconds`.
        waited: {number of another rank: seconds in which this rank waited for it}, a part of `collectives`.
    """

    rank: int
    seconds: float
    collectives: float
    waited: dict[int, float]


def timed_decode(executable: Executable, sequences: int, runs: int) -> list[StepResult]:
    """Measure decode steps. Returns a list of runs * DECODE_STEPS StepResults with the seconds of each op.

    Each run decodes DECODE_STEPS tokens after short prompts; one more run before them warms up and is left out.
    sequences: number of sequences in a step. Overwrites the K/V cache.
    """
    length = max(1, min(8, executable.program.context - DECODE_STEPS))
    steps = [
        executable.step(StepRequest(batch, timed=True))
        for _ in range(1 + runs) for batch in decode_steps(executable, sequences, length)
    ]  # fmt: skip
    return steps[DECODE_STEPS:]  # the first run warms up


def rank_times(mesh: MeshProgram, steps: Sequence[StepResult]) -> list[RankTimes]:
    """A list with the RankTimes of each rank of a mesh, in order of rank. Times are medians over `steps`.

    mesh: the Programs of all ranks. steps: results of one or more steps, with the seconds of each op (see
    timed_decode()).
    """
    waits = [waited(mesh, step.rank_timings) for step in steps]
    collectives = [{op.site for op in p.ops if isinstance(op, Collective)} for p in mesh.programs]
    found = []
    for rank, sites in enumerate(collectives):
        times = [step.rank_timings[rank] for step in steps]
        peers = sorted({peer for w in waits for peer in w[rank]})
        found.append(RankTimes(
            rank, median(sum(t.values()) for t in times), median(sum(t[s] for s in sites) for t in times),
            {peer: median(w[rank][peer] for w in waits) for peer in peers},
        ))  # fmt: skip
    return found


def waited(mesh: MeshProgram, timings: Timings) -> list[defaultdict[int, float]]:
    """How long each rank of a mesh waited for others in one step: a list with a dict {other rank: seconds} for each.

    All seconds of a recv count as waiting for its sender. In any other collective, the rank with the shortest time is
    taken for the one that arrived last. Every other rank has waited for this rank, for its own time in the op minus the
    shortest time. A dict has no item for a rank that was not waited for.

    timings: for each rank, the seconds of each op by site (name of the op).
    """
    found = [defaultdict[int, float](float) for _ in mesh.programs]
    for rank, program in enumerate(mesh.programs):
        for op in program.ops:
            mine = timings[rank][op.site]
            if isinstance(op, Recv):
                found[rank][op.peer] += mine
            elif isinstance(op, Grouped):
                last = min(op.group, key=lambda peer: timings[peer][op.site])
                if last != rank:
                    found[rank][last] += mine - timings[last][op.site]
    return found


def chrome_trace(timings: Timings) -> str:
    """JSON text of a step in Chrome's trace event format, which Perfetto opens. Each rank is a process.

    The ops of each rank follow one another without gaps, from 0 s on, since only their durations are known.

    timings: for each rank, {site (name of the op): seconds}, in the order in which the ops ran.
    """
    events: list[dict[str, Any]] = []
    for rank, sites in enumerate(timings):
        events.append(metadata_event("process_name", rank, 0, f"rank {rank}"))
        start = 0.0
        for site, seconds in sites.items():
            events.append(duration_event(site, "op", rank, 0, start, seconds, {}))
            start += seconds
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ns"})
