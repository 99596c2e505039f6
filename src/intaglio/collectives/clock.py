"""Time model of schedules on a topology: the alpha-beta model with link contention.

A transfer occupies each link of its route for bytes / bandwidth and arrives one latency later. Time is counted in
integer ticks, so that two paths of equal duration end at the same tick. With floats, rounding would decide which
of them gets a link first, and the times of payloads 4 bytes apart would differ by up to 20%.
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
    """Bytes of each chunk of a schedule, as a list with the same number for every chunk.

    nbytes: size of the payload in bytes: one rank's input, but for an all_gather one rank's output.
    """
    parts = s.chunks // s.ranks if s.collective == "all_to_all" else s.chunks
    return [nbytes / parts] * s.chunks


def seconds(s: Schedule, topology: Topology, sizes: Sequence[float], local: float = inf) -> float:
    """Modelled seconds of a collective, until the last step of its schedule has ended.

    A transfer starts when its send and its recv are ready and every link of its route is free. Transfers that wait for
    the same link use it in schedule order.

    Args:
        s: the schedule.
        topology: the links.
        sizes: bytes of each chunk. Chunks are the parts into which the schedule cuts each rank's data.
        local: bytes per second at which a rank copies and reduces, one chunk at a time.

    Raises ScheduleError if topology and schedule have different numbers of ranks.
    """
    return ScheduleClock(s, topology, local).seconds(sizes)


TICK = 2.0**-60  # seconds; a byte at 1 TB/s takes about a million ticks
FREE, END, BEGIN = 0, 1, 2  # events: a link or rank becomes free, a step ends, a step is ready


class ScheduleClock:
    """Event-driven simulation of the time that a schedule takes on a topology. seconds() runs the simulation.

    Time is counted in ticks of 2**-60 s.

    Args:
        s: the schedule.
        topology: the links.
        local: bytes per second at which a rank copies and reduces, one chunk at a time.

    Attributes:
        chunks: number of chunks of the payload.
        needs: for each step, a list of pairs (number, bytes per second): the links that the step occupies, or its rank.
            The number of a link is its index in topology.links; the number of rank r is -1 - r.
        arrival: for each step, the sum of its links' latencies in ticks. A transfer ends this much later than its last
            byte is sent.
        waits: for each step, the number of its dependencies that have not been met.
        busy: {number of a link or rank, as in `needs`: the tick at which it becomes free}.
        held: cache {(bytes of a chunk, bytes per second): ticks for which the chunk occupies a link or rank}.

    Raises ScheduleError if topology and schedule have different numbers of ranks.
    """

    def __init__(self, s: Schedule, topology: Topology, local: float) -> None:
        if topology.ranks != s.ranks:
            raise ScheduleError(f"{topology.name} has {topology.ranks} ranks, the schedule {s.ranks}")
        self.steps, self.chunks = s.steps, s.chunks
        links = {link: i for i, link in enumerate(topology.links)}
        self.needs, self.arrival = list[list[tuple[int, float]]](), list[int]()
        self.then: list[list[int]] = [[] for _ in s.steps]  # steps that wait for each step
        for i, step in enumerate(s.steps):
            route = topology.route(step.peer, step.rank) if step.kind == "recv" else ()
            self.needs.append([(links[link], link.bandwidth) for link in route] or [(-1 - step.rank, local)])
            self.arrival.append(sum(ticks(link.latency) for link in route))
            for j in step.after:
                self.then[j].append(i)
        self.dependencies = [len(step.after) + (step.kind == "recv") for step in s.steps]
        self.sends = {step.tag: i for i, step in enumerate(s.steps) if step.kind == "send"}
        self.recvs = {step.tag: i for i, step in enumerate(s.steps) if step.kind == "recv"}

    def seconds(self, sizes: Sequence[float]) -> float:
        """Modelled seconds until the last step of the schedule has ended. sizes: bytes of each chunk."""
        now, self.sizes, self.waits = 0, sizes, self.dependencies.copy()
        self.busy: dict[int, int] = {}
        self.held: dict[tuple[float, float], int] = {}
        self.queues: dict[int, list[int]] = {}  # steps that wait for a link or rank
        self.events = [(0, BEGIN, i) for i, n in enumerate(self.waits) if n == 0]
        while self.events:
            now, what, which = heapq.heappop(self.events)
            if what == BEGIN:
                self.begin(which, now)
            elif what == END:
                for step in self.then[which]:
                    self.count_down(step, now)
            else:
                queue = self.queues.get(which, [])
                while queue and self.busy[which] <= now:
                    self.begin(heapq.heappop(queue), now)
        return now * TICK

    def count_down(self, step: int, now: int) -> None:
        """Record at tick `now` that one dependency of step number `step` is met. Returns nothing.

        If no unmet dependency is left, the step is queued to begin at this tick.
        """
        self.waits[step] -= 1
        if self.waits[step] == 0:
            heapq.heappush(self.events, (now, BEGIN, step))

    def begin(self, i: int, now: int) -> None:
        """Start step number `i` at tick `now`. If a link or the rank that the step needs is busy, queue the step there.

        A send takes no time itself: it only allows its recv to start, which occupies the links. Returns nothing.
        """
        step, needs = self.steps[i], self.needs[i]
        if step.kind == "send":
            return self.count_down(self.recvs[step.tag], now)
        busy = self.busy
        for thing, _ in needs:
            if busy.get(thing, 0) > now:
                return heapq.heappush(self.queues.setdefault(thing, []), i)
        size, longest = self.sizes[step.chunk], 0
        for thing, rate in needs:
            held = self.held.get((size, rate))
            if held is None:
                held = self.held[size, rate] = ticks(size / rate)
            busy[thing] = now + held
            heapq.heappush(self.events, (now + held, FREE, thing))
            longest = max(longest, held)
        gone = now + longest
        if step.kind == "recv":
            heapq.heappush(self.events, (gone, END, self.sends[step.tag]))
        return heapq.heappush(self.events, (gone + self.arrival[i], END, i))


def ticks(seconds: float) -> int:
    """A time in seconds as a number of ticks (2**-60 s), rounded to a whole number."""
    return round(seconds / TICK)


def choose(
    collective: str, topology: Topology, nbytes: float, *, node: int = 0, local: float = inf, ordered: bool = False
) -> tuple[Schedule, float]:
    """Find the fastest schedule for a collective on a topology. Returns (schedule, modelled seconds).

    Args:
        collective: name of the collective, such as "all_reduce".
        topology: the ranks and links.
        nbytes: size of the payload in bytes: one rank's input, but for an all_gather one rank's output.
        node: ranks per node, for algorithms with two levels; 0: no nodes.
        local: bytes per second at which a rank copies and reduces.
        ordered: True to consider only schedules that add the ranks' contributions in the same order for every value,
            see rules.order(). The bits of a sum then do not depend on the value's position in the payload.

    Raises ScheduleError for an unknown collective.
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
