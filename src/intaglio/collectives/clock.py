"""The time a schedule takes over a topology: latency and bandwidth of links, contention, nothing else.

alpha-beta: a transfer holds each link of its route for bytes / bandwidth, and arrives a latency later. Time is counted
in whole ticks, so that what takes equally long on two ways ends at once: a rounding between them would choose who comes
first at a link, and times of sizes 4 bytes apart would differ by up to a fifth.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import inf

from intaglio.collectives.algorithms import algorithms, schedule
from intaglio.collectives.rules import order
from intaglio.collectives.schedule import Schedule, ScheduleError
from intaglio.collectives.topology import Topology


def chunk_bytes(s: Schedule, nbytes: float) -> list[float]:
    """Bytes of each chunk, equal, of a payload of `nbytes`: what one rank brings (all_reduce, reduce_scatter,
    all_to_all, send) or what it gets (all_gather)."""
    parts = s.chunks // s.ranks if s.collective == "all_to_all" else s.chunks
    return [nbytes / parts] * s.chunks


def seconds(s: Schedule, topology: Topology, sizes: Sequence[float], local: float = inf) -> float:
    """Seconds until the last step has ended, `sizes` being the bytes of each chunk.

    `local`: bytes a second at which a rank copies and reduces, one chunk at a time. A transfer starts when its send and
    its recv are ready and every link of its route is free; among those that wait for a link, the first in the schedule.
    """
    if topology.ranks != s.ranks:
        raise ScheduleError(f"{topology.name} has {topology.ranks} ranks, the schedule {s.ranks}")
    return _Run(s, topology, sizes, local).time()


TICK = 2.0**-60  # seconds: a byte at 1 TB/s takes a million
FREE, END, BEGIN = 0, 1, 2  # what happens at a time: a link or rank is free again, a step ends, a step may begin


class _Run:
    """A schedule under way: how much each step still waits for, and until when links and ranks are busy."""

    def __init__(self, s: Schedule, topology: Topology, sizes: Sequence[float], local: float) -> None:
        self.steps, self.topology, self.sizes, self.local = s.steps, topology, sizes, local
        self.links = {link: i for i, link in enumerate(topology.links)}
        self.waits = [len(step.after) + (step.kind == "recv") for step in s.steps]
        self.then: list[list[int]] = [[] for _ in s.steps]
        for i, step in enumerate(s.steps):
            for j in step.after:
                self.then[j].append(i)
        self.sends = {step.tag: i for i, step in enumerate(s.steps) if step.kind == "send"}
        self.recvs = {step.tag: i for i, step in enumerate(s.steps) if step.kind == "recv"}
        self.busy: dict[int, int] = {}  # by the link's number, or -1 - rank
        self.queues: dict[int, list[int]] = {}
        self.events = [(0, BEGIN, i) for i, n in enumerate(self.waits) if n == 0]

    def time(self) -> float:
        now = 0
        while self.events:
            now, what, which = heapq.heappop(self.events)
            if what == BEGIN:
                self.begin(which, now)
            elif what == END:
                for step in self.then[which]:
                    self.met(step, now)
            else:
                queue = self.queues.get(which, [])
                while queue and self.busy[which] <= now:
                    self.begin(heapq.heappop(queue), now)
        return now * TICK

    def met(self, step: int, now: int) -> None:
        """`step` waits for one thing less."""
        self.waits[step] -= 1
        if self.waits[step] == 0:
            heapq.heappush(self.events, (now, BEGIN, step))

    def begin(self, i: int, now: int) -> None:
        """Start a step, or queue it for the first thing it needs that is busy. A send is told to its recv."""
        step, size = self.steps[i], self.sizes[self.steps[i].chunk]
        if step.kind == "send":
            return self.met(self.recvs[step.tag], now)
        route = self.topology.route(step.peer, step.rank) if step.kind == "recv" else ()
        needs = {self.links[link]: ticks(size / link.bandwidth) for link in route}
        needs = needs or {-1 - step.rank: ticks(size / self.local)}
        for thing in needs:
            if self.busy.get(thing, 0) > now:
                return heapq.heappush(self.queues.setdefault(thing, []), i)
        for thing, held in needs.items():
            self.busy[thing] = now + held
            heapq.heappush(self.events, (now + held, FREE, thing))
        gone = now + max(needs.values())
        if step.kind == "recv":
            heapq.heappush(self.events, (gone, END, self.sends[step.tag]))
        return heapq.heappush(self.events, (gone + sum(ticks(link.latency) for link in route), END, i))


def ticks(seconds: float) -> int:
    return round(seconds / TICK)


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
