"""Disaggregated serving in virtual time, event by event: some servers compute prompts (prefill), others decode.

A router gives each prompt to a prefill server. When the prompt is computed, the router chooses a decode server, and the
K/V is sent there over the chips' links. The request then waits for a free sequence and for room in the cache. The time
to the first token ends when the decode server admits it.
"""

from __future__ import annotations

import heapq
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from intaglio.codesign.engines import EngineTimes
from intaglio.codesign.fleet import Member, choice
from intaglio.codesign.queue import NEVER, Queue, QueueSettings
from intaglio.codesign.steps import StepTimes
from intaglio.measure.workload import LoadRequest


@dataclass(frozen=True)
class Apart:
    """A disaggregated deployment: servers that compute prompts (prefill) and servers that decode.

    Attributes:
        prefill: step times of a prefill server. prefill.server.placement.replicas is the number of these servers.
        decode: step times of a decode server. decode.server.placement.replicas is the number of these servers.
        prefill_settings: engine settings of each prefill server.
        decode_settings: engine settings of each decode server.
        route: how the router chooses a server of each kind, one of codesign.fleet.ROUTES.
    """

    prefill: StepTimes | EngineTimes
    decode: StepTimes | EngineTimes
    prefill_settings: QueueSettings
    decode_settings: QueueSettings
    route: str = "least-open"

    @property
    def chips(self) -> int:
        """Number of chips that all servers have together."""
        return self.prefill.server.placement.chips + self.decode.server.placement.chips

    def transfer_s(self, tokens: int) -> float:
        """Returns the seconds from the end of a prompt's prefill until its K/V is on the decode server.

        The result is latency + bytes / rate. Here `bytes` is the part of the K/V that one chip holds and `rate` is that
        of one chip's links, because all chips that hold K/V of the prompt send their parts at the same time. If
        crosses_nodes is True, latency and rate are those of a chip's network adapter.

        tokens: length of the prompt.
        """
        links, apart = self.prefill.target.chip.links, self.crosses_nodes
        latency = links.node_latency_s if apart else self.prefill.target.library.link_latency_s
        rate = links.node_bytes_per_s if apart else links.chip_bytes_per_s
        return latency + tokens * self.prefill.server.kv_bytes_per_token / max(1.0, rate)

    @property
    def crosses_nodes(self) -> bool:
        """True if K/V travels between nodes: the deployment has more chips than the links of one node connect.

        It is always False if the chip has no links between nodes.
        """
        links = self.prefill.target.chip.links
        return self.chips > links.max_chips and links.node_bytes_per_s > 0

    def spread(self, request: LoadRequest, concurrency: int) -> list[float]:
        """Returns start times in seconds for the first `concurrency` requests, as a list: 0, then evenly spaced.

        Request i starts at T * i / concurrency, where T is the estimated time from a request's start to its end. T is
        the time of one prefill step with this prompt alone, plus the time of one decode step for each output token. The
        time of a decode step is that of a server with concurrency / (number of decode servers) requests, of which each
        has its prompt and half of its response in the cache.

        request: prompt and output length, the same for all requests.
        """
        alone = self.prefill.cost(0, 1, [(request.prompt, request.prompt, 1)])[0]
        each = max(1, concurrency // self.decode.server.placement.replicas)
        taken = alone + request.output * self.decode.cost(each, request.prompt + request.output / 2)[0]
        return [taken * i / concurrency for i in range(concurrency)]


@dataclass(frozen=True)
class ApartResult:
    """Figures of a disaggregated deployment under a load. Times are in seconds.

    `ttft`, `tpot` and `tokens_per_s` leave out the requests that end first and last; `watts` and the busy fractions are
    for the whole load.

    Attributes:
        concurrency: requests open at once.
        ttft: mean time to the first token.
        tpot: mean time per token after the first.
        tokens_per_s: output tokens per second of all servers together.
        watts: mean power of all chips together.
        prefill_busy: fraction of the time in which a prefill server computes, mean over these servers.
        decode_busy: fraction of the time in which a decode server computes, mean over these servers.
        chips: number of chips of all servers.
    """

    concurrency: int
    ttft: float
    tpot: float
    tokens_per_s: float
    watts: float
    prefill_busy: float
    decode_busy: float
    chips: int

    def as_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON: all fields, and also the tokens/s per chip and the tokens per joule."""
        per = {
            "tokens_per_s_per_chip": self.tokens_per_s / self.chips,
            "tokens_per_joule": self.tokens_per_s / self.watts,
        }
        return {**vars(self), **per}


@dataclass
class ApartRun:
    """Result of run_apart(): the queues of all servers after the load, and the times of its requests.

    Attributes:
        prefill: queue of each prefill server.
        decode: queue of each decode server.
        ended: (end, TTFT, TPOT) of each request in seconds, not exactly in the order of the ends.
    """

    prefill: list[Queue]
    decode: list[Queue]
    ended: list[tuple[float, float, float]]


def run_apart(apart: Apart, requests: Sequence[LoadRequest], arrivals: Sequence[float]) -> ApartRun:
    """Simulate requests on disaggregated servers in virtual time. Returns the ApartRun.

    Some servers only prefill, the others only decode.

    Args:
        apart: the servers. Its field `route` names how a router chooses among them.
        requests: at least one request, in the order in which they are sent.
        arrivals: seconds at which the first requests are sent. Each later request is sent when an earlier one ends.

    Raises ValueError for a request that a server's K/V cache cannot hold, for a request with fewer than two output
    tokens, and if apart.route is not one of codesign.fleet.ROUTES.
    """
    if min(r.output for r in requests) < 2:
        raise ValueError("requests of one new token never reach a decode server; give 2 or more output tokens")
    choose = choice(apart.route)
    first = [
        Member(i, Queue(apart.prefill, apart.prefill_settings)) for i in range(apart.prefill.server.placement.replicas)
    ]
    second = [
        Member(i, Queue(apart.decode, apart.decode_settings, prefills=False))
        for i in range(apart.decode.server.placement.replicas)
    ]
    first_sent, unsent = deque(sorted(arrivals)), deque(requests)
    free: list[float] = []  # heap of the times at which requests ended; another is sent for each, after the arrivals
    whole: dict[int, LoadRequest] = {}  # id of the prompt's part of a request -> the request
    moving, number = list[tuple[float, int, float, LoadRequest]](), 0  # (arrival of its K/V, tie, start, request)
    ended: list[tuple[float, float, float]] = []
    queues = [m.queue for m in (*first, *second)]
    prefilling = [m.queue for m in first]
    seen = {id(q): 0 for q in queues}

    def route(members: Sequence[Member], request: LoadRequest, at: float, start: float) -> None:
        choose(members, sum(m.given for m in members)).put(request, at, start)

    while len(ended) < len(requests):
        busy = [q for q in queues if q.open]
        now = min((q.now for q in busy), default=NEVER)
        sent = first_sent or free
        next_in, next_move = sent[0] if sent and unsent else NEVER, moving[0][0] if moving else NEVER
        if min(next_in, next_move) <= now:
            if next_in <= next_move:
                first_sent.popleft() if first_sent else heapq.heappop(free)
                request = unsent.popleft()
                prompt = replace(request, at=next_in, output=1)
                whole[id(prompt)] = request
                route(first, prompt, next_in, next_in)
            else:
                at, _, start, request = heapq.heappop(moving)
                route(second, request, at, start)
            continue
        queue = min(busy, key=lambda q: q.now)
        prefills = queue in prefilling
        others = min((q.now for q in prefilling if q.open and q is not queue), default=NEVER)
        queue.admit()
        queue.take_steps(NEVER if prefills else min(next_in, next_move, others))
        for o in queue.done[seen[id(queue)] :]:
            if prefills:
                number += 1
                at = queue.now + apart.transfer_s(o.request.prompt)
                heapq.heappush(moving, (at, number, o.start, whole[id(o.request)]))
            else:
                ended.append((queue.now, o.first or 0.0, o.each or 0.0))
                heapq.heappush(free, queue.now)
        seen[id(queue)] = len(queue.done)
    return ApartRun(prefilling, [m.queue for m in second], ended)


def serve_apart(apart: Apart, request: LoadRequest, concurrency: int, turns: int = 4) -> ApartResult:
    """Simulate a constant load on separate prefill and decode servers. Returns the ApartResult.

    `concurrency` requests are open at all times, each with the lengths of `request`. The load ends when turns *
    concurrency requests have ended. The first requests start at the times of Apart.spread(). Raises ValueError for a
    request that a cache cannot hold, or with fewer than two output tokens.
    """
    total = turns * concurrency
    run = run_apart(apart, [request] * total, apart.spread(request, concurrency))
    first, second, ended = run.prefill, run.decode, sorted(run.ended)
    low, high = total // turns, total - total // turns
    middle = ended[low:high]
    rate = (len(middle) - 1) * request.output / max(1e-9, middle[-1][0] - middle[0][0])
    end = max(q.now for q in (*first, *second))
    idle_w = [x.target.chip.energy.idle_w * x.server.placement.chips for x in (apart.prefill, apart.decode)]
    prefill_busy, decode_busy = (sum(q.busy_s for q in qs) / len(qs) / end for qs in (first, second))
    joules = sum(q.joules for q in (*first, *second))
    watts = joules / end + sum(
        w * max(0.0, 1 - share) for w, share in zip(idle_w, (prefill_busy, decode_busy), strict=True)
    )
    ttft, tpot = statistics.fmean(t for _, t, _ in middle), statistics.fmean(e for *_, e in middle)
    return ApartResult(concurrency, ttft, tpot, rate, watts, prefill_busy, decode_busy, apart.chips)
