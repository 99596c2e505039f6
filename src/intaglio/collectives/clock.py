"""The time a schedule takes over a topology: latency and bandwidth of links, contention, nothing else.

alpha-beta: a transfer holds each link of its route for bytes / bandwidth, and arrives a latency later.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import inf

from intaglio.collectives.algorithms import algorithms, schedule
from intaglio.collectives.rules import order
from intaglio.collectives.schedule import Schedule, ScheduleError
from intaglio.collectives.topology import Link, Topology


def chunk_bytes(s: Schedule, nbytes: float) -> list[float]:
    """Bytes of each chunk, equal, of a payload of `nbytes`: what one rank brings (all_reduce, reduce_scatter,
    all_to_all, send) or what it gets (all_gather)."""
    parts = s.chunks // s.ranks if s.collective == "all_to_all" else s.chunks
    return [nbytes / parts] * s.chunks


def seconds(s: Schedule, topology: Topology, sizes: Sequence[float], local: float = inf) -> float:
    """Seconds until the last step has ended, `sizes` being the bytes of each chunk.

    `local`: bytes a second at which a rank copies and reduces, one at a time. A transfer starts when its send, its recv
    and every link of its route are free; of those that could start, the earliest, then the first in the schedule.
    """
    if topology.ranks != s.ranks:
        raise ScheduleError(f"{topology.name} has {topology.ranks} ranks, the schedule {s.ranks}")
    waits = [len(step.after) + (step.kind == "recv") for step in s.steps]
    then: list[list[int]] = [[] for _ in s.steps]
    sends = {step.tag: i for i, step in enumerate(s.steps) if step.kind == "send"}
    for i, step in enumerate(s.steps):
        for j in step.after:
            then[j].append(i)
    recvs = {sends[step.tag]: i for i, step in enumerate(s.steps) if step.kind == "recv"}
    ready, free = [0.0] * len(s.steps), dict[Link | int, float]()
    queue = [(0.0, i) for i, n in enumerate(waits) if n == 0]
    last = 0.0

    def end(step: int, at: float) -> None:
        nonlocal last
        last = max(last, at)
        for i in then[step]:
            reach(i, at)

    def reach(step: int, at: float) -> None:
        ready[step] = max(ready[step], at)
        waits[step] -= 1
        if waits[step] == 0:
            heapq.heappush(queue, (ready[step], step))

    heapq.heapify(queue)
    while queue:
        at, i = heapq.heappop(queue)
        step, size = s.steps[i], sizes[s.steps[i].chunk]
        if step.kind == "send":
            reach(recvs[i], at)
            continue
        held: Sequence[Link | int] = topology.route(step.peer, step.rank) if step.kind == "recv" else (step.rank,)
        start = max([at, *(free.get(thing, 0.0) for thing in held)])
        if start > at:
            heapq.heappush(queue, (start, i))  # others may come first
            continue
        if step.kind != "recv":
            free[step.rank] = start + size / local
            end(i, start + size / local)
            continue
        slowest = inf
        for link in topology.route(step.peer, step.rank):
            free[link] = start + size / link.bandwidth
            slowest = min(slowest, link.bandwidth)
        delay = sum(link.latency for link in topology.route(step.peer, step.rank))
        end(sends[step.tag], start + size / slowest)
        end(i, start + delay + size / slowest)
    return last


def choose(
    collective: str, topology: Topology, nbytes: float, *, node: int = 0, local: float = inf, ordered: bool = False
) -> tuple[Schedule, float]:
    """The quickest schedule and its seconds.

    `ordered`: only those that sum every value in order of rank or by one tree, so that no bit depends on where in the
    payload a value lies.
    """
    best: tuple[Schedule, float] | None = None
    for algorithm in algorithms(collective, topology.ranks, node):
        s = schedule(collective, algorithm, topology.ranks, node)
        if not (ordered and order(s) == "chunk"):
            took = seconds(s, topology, chunk_bytes(s, nbytes), local)
            if best is None or took < best[1]:
                best = s, took
    assert best, "direct algorithms fit any number of ranks"
    return best
