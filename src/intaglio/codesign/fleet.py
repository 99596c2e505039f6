"""Many replicas of a server in virtual time, event by event: a router gives each arriving request to one of them.

Every replica is a Queue of its own. Between two events of a replica (a prompt ends, a response ends) all of its steps
are alike, so they are simulated as one: a day of thousands of chips takes minutes. If a request arrives between two
events, the steps before its arrival are simulated as one, and later steps with the new request.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from intaglio.chips import Target
from intaglio.codesign.queue import NEVER, Queue, QueueSettings
from intaglio.codesign.serving import EngineSettings, Limits, ServingResult, check_context, moments
from intaglio.codesign.steps import Costs, Server, StepTimes
from intaglio.measure.load import Outcome, summarise
from intaglio.measure.workload import LoadRequest
from intaglio.progress import Progress, silent

ROUTES = ("least-open", "round-robin")  # to the replica with the fewest open requests; to each in turn
REPORT = 1000  # arrivals between two reports of progress


@dataclass(frozen=True)
class FleetResult:
    """Result of simulating a load on many replicas: outcomes of the requests, steps and energy.

    Attributes:
        outcomes: a tuple for each replica: the Outcomes of its requests, in the order in which they ended.
        seconds: time from the beginning to the last response.
        steps: number of steps of all replicas together.
        joules: energy of all chips during steps.
        busy_s: seconds in steps, summed over replicas.
    """

    outcomes: tuple[tuple[Outcome, ...], ...]
    seconds: float
    steps: int
    joules: float
    busy_s: float

    @property
    def all(self) -> list[Outcome]:
        """The Outcomes of all requests as a list, one replica after another."""
        return [o for mine in self.outcomes for o in mine]


class Member:
    """One replica of a fleet that is simulated in virtual time.

    Attributes:
        number: number of the replica, from 0.
        queue: the replica's Queue of requests.
        next: time in seconds at which take() must be called next; look_ahead() sets it. NEVER (infinity) if no request
            is open.
        given: number of requests that the router gave the replica.
    """

    def __init__(self, number: int, queue: Queue) -> None:
        self.number, self.queue, self.next, self.given = number, queue, NEVER, 0

    def look_ahead(self) -> None:
        """Admit waiting requests, then set the attribute `next`. Returns nothing.

        `next` is set to the time in seconds at which the next decode steps end if no further request arrives. It is set
        to the current time if a prompt is being computed, and to NEVER (infinity) if no request is open.
        """
        self.queue.admit()
        self.next = self.queue.next_event() if self.queue.open else NEVER

    def take(self, until: float = NEVER) -> None:
        """Simulate the replica's next steps, then set `next` by look_ahead(). Returns nothing.

        The next steps are one step with a prompt, or one or more decode steps. Decode steps stop when a response ends,
        when the engine looks for new requests, or when the next step would begin at or after `until` seconds, the time
        of another event of the simulation. If no request is admitted, no step is simulated.
        """
        self.queue.take_steps(until)
        self.look_ahead()

    def give(self, request: LoadRequest) -> None:
        """Add a request to the replica's queue at the time request.at, and admit it if there is room.

        The replica's steps that begin before that time are simulated first. Raises ValueError if the replica's K/V
        cache cannot hold the request.
        """
        while self.queue.open and self.queue.now < request.at:
            self.take(request.at)
        self.put(request, request.at, request.at)
        self.look_ahead()

    def put(self, request: LoadRequest, at: float, start: float) -> None:
        """Add a request to the replica's queue, without simulating anything. Returns nothing.

        Args:
            request: the request.
            at: time in seconds at which the replica gets the request. If the replica has no open request and its clock
                is earlier, the clock is set to `at`.
            start: time in seconds from which the request's latencies count.

        Raises ValueError if the replica's K/V cache cannot hold the request.
        """
        if not self.queue.open:
            self.queue.now = max(self.queue.now, at)
        self.given += 1
        self.queue.add(request, start)


def least_open(members: Sequence[Member], number: int) -> Member:
    """Returns the Member (replica) with the fewest open requests.

    If several have the fewest, it is the one that has been given the fewest requests so far. number: number of the
    arriving request; not used.
    """
    return min(members, key=lambda m: (m.queue.open, m.given, m.number))


def in_turn(members: Sequence[Member], number: int) -> Member:
    """Returns the Member (replica) that is next in round-robin order.

    number: number of the arriving request, from 0.
    """
    return members[number % len(members)]


Choice = Callable[[Sequence[Member], int], Member]


def choice(route: str) -> Choice:
    """Returns a router's function choose(members, number), which chooses a replica for an arriving request.

    `members` are the replicas, as Members; `number` counts the requests in order of arrival, from 0. The function
    returns one of `members`.

    route: "least-open" or "round-robin" (ROUTES). Raises ValueError for another text.
    """
    if route not in ROUTES:
        raise ValueError(f"route {route!r}; use one of {', '.join(ROUTES)}")
    return least_open if route == "least-open" else in_turn


def serve_fleet(
    times: Costs, settings: QueueSettings, requests: Sequence[LoadRequest], replicas: int, route: str = "least-open",
    progress: Progress = silent,
) -> FleetResult:  # fmt: skip
    """Simulate a load on equal replicas in virtual time. Returns the FleetResult.

    A router gives each request to one replica when the request arrives. The route "least-open" takes the replica with
    the fewest open requests at that time. For a replica that is in a step with prompts, the open requests at the end of
    that step are counted instead. Each replica is simulated as queue.serve() simulates a single server.

    Args:
        times: step times of one replica.
        settings: settings of one replica's engine.
        requests: the load, ordered by time of arrival.
        replicas: number of replicas, 1 or more.
        route: how the router chooses a replica, one of ROUTES.
        progress: called every REPORT requests.

    Raises ValueError for an unknown route, and for a request that a replica's K/V cache cannot hold.
    """
    choose = choice(route)
    members = [Member(i, Queue(times, settings)) for i in range(replicas)]
    events: list[tuple[float, int]] = []  # (end of a replica's steps, its number); a later entry replaces it
    for i, request in enumerate(requests):
        while events and events[0][0] < request.at:
            at, number = heapq.heappop(events)
            one = members[number]
            if at == one.next:
                one.take()
                if one.next < NEVER:
                    heapq.heappush(events, (one.next, number))
        one = choose(members, i)
        one.give(request)
        heapq.heappush(events, (one.next, one.number))
        if i % REPORT == 0:
            progress(i, len(requests), f"{i:,} of {len(requests):,} requests, {request.at:,.0f} s modelled")
    for one in members:
        while one.queue.open:
            one.take()
    queues = [m.queue for m in members]
    return FleetResult(
        tuple(tuple(q.done) for q in queues), max(q.now for q in queues), sum(q.steps for q in queues),
        sum(q.joules for q in queues), sum(q.busy_s for q in queues),
    )  # fmt: skip


def simulate_fleet(
    server: Server, target: Target, requests: Sequence[LoadRequest], settings: EngineSettings, limits: Limits,
    route: str = "least-open", progress: Progress = silent,
) -> ServingResult:  # fmt: skip
    """Simulate a load on all replicas of a placement, event by event. Returns the ServingResult.

    Step times come from a StepTimes table. When a request is admitted, K/V is reserved for its prompt and its whole
    response, so no request is preempted.

    Args:
        server: one compiled replica. Its placement gives the number of replicas.
        target: chip and kernel library.
        requests: the load, ordered by time of arrival.
        settings: settings of each replica's engine.
        limits: the latencies that a good response must not exceed.
        route: how the router chooses a replica, one of ROUTES.
        progress: called as requests arrive.

    Raises ChipError if weights and K/V cache do not fit. Raises ValueError for an unknown route, and for a request that
    is longer than the context or that a replica's K/V cache cannot hold.
    """
    longest = max(requests, key=lambda r: r.prompt + r.output)
    check_context(server.program, longest)
    placement, times = server.placement, StepTimes(server, target)
    per_copy = -(-settings.max_sequences // placement.copies)
    kv = server.kv_room(target, settings.memory_share, settings.max_batch_tokens, per_copy, settings.max_sequences)
    how = QueueSettings(
        kv, settings.max_batch_tokens, settings.max_sequences, step_s=settings.step_overhead_s,
        request_s=settings.request_overhead_s,
    )  # fmt: skip
    done = serve_fleet(times, how, requests, placement.replicas, route, progress)
    outcomes = done.all
    summary = summarise(outcomes, NEVER)
    good = sum(map(limits.met_by, outcomes))
    idle_s = max(0.0, done.seconds * placement.replicas - done.busy_s)
    joules = done.joules + idle_s * target.chip.energy.idle_w * placement.chips_per_server
    mean = statistics.fmean(r.prompt + r.output for r in requests)
    return ServingResult(
        summary, placement.chips, good / len(outcomes), good / summary.seconds, joules, done.steps, 0,
        kv.tokens(mean), moments(outcomes, kv, placement.replicas),
    )  # fmt: skip
