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
    """Measured times of one rank in one step. Each is the median of several steps, in seconds.

    Attributes:
        rank: number of the rank.
        seconds: time in all ops.
        collectives: the part of `seconds` that was spent in collectives (communication between ranks).
        waited: {number of another rank: time that this rank waited for that rank}; a part of `collectives`.
    """

    rank: int
    seconds: float
    collectives: float
    waited: dict[int, float]


def timed_decode(executable: Executable, sequences: int, runs: int) -> list[StepResult]:
    """Run decode steps and time each op. Returns the StepResults of runs * DECODE_STEPS steps, as a list.

    Each run decodes DECODE_STEPS tokens after short prompts. One more run before them is a warm-up and is left out.
    Overwrites the K/V cache. sequences: number of sequences in a step.
    """
    length = max(1, min(8, executable.program.context - DECODE_STEPS))
    steps = [
        executable.step(StepRequest(batch, timed=True))
        for _ in range(1 + runs) for batch in decode_steps(executable, sequences, length)
    ]  # fmt: skip
    return steps[DECODE_STEPS:]  # the first run warms up


def rank_times(mesh: MeshProgram, steps: Sequence[StepResult]) -> list[RankTimes]:
    """The RankTimes of each rank, as a list in order of rank. Times are medians over `steps`.

    mesh: the Programs of all ranks. steps: StepResults that have the time of each op, such as timed_decode() returns.
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
    """The seconds that each rank waited for each other rank in one step, as a list with one dict per rank.

    Each dict is {number of the other rank: seconds}. Ranks that were not waited for are missing.

    All the time of a receive counts as waiting for its sender. In any other collective, the rank that spent the
    shortest time in the op is taken for the last to arrive. Each other rank waited for this last rank: its own time in
    the op minus the shortest time.

    mesh: the Programs of all ranks. timings: for each rank, {name of the op: seconds}.
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
    """The times of one step as JSON text in Chrome's trace event format, which Perfetto opens.

    Each rank is shown as a process. Its ops follow one another without gaps from 0 s on, because only their durations
    are known.

    timings: for each rank, {name of the op: seconds}, in the order in which the ops ran.
    """
    events: list[dict[str, Any]] = []
    for rank, sites in enumerate(timings):
        events.append(metadata_event("process_name", rank, 0, f"rank {rank}"))
        start = 0.0
        for site, seconds in sites.items():
            events.append(duration_event(site, "op", rank, 0, start, seconds, {}))
            start += seconds
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ns"})
