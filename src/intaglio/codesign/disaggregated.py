"""Prefill and decode on servers of their own, in virtual time: some servers compute prompts, others decode.

A prompt goes to the prefill server with the fewest open requests. Its K/V then travels over the chips' links to
the decode server with the fewest requests, where it waits for room; the first token counts from there.
"""

from __future__ import annotations

import heapq
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from intaglio.codesign.engines import EngineTimes
from intaglio.codesign.queue import NEVER, Queue, QueueSettings
from intaglio.codesign.steps import StepTimes
from intaglio.measure.workload import LoadRequest


@dataclass(frozen=True)
class Apart:
    """Servers that compute prompts and servers that decode: the step times and settings of one server of each kind.

    The number of servers of a kind is `replicas` of that kind's placement.
    """

    prefill: StepTimes | EngineTimes
    decode: StepTimes | EngineTimes
    prefill_settings: QueueSettings
    decode_settings: QueueSettings

    @property
    def chips(self) -> int:
        """Number of chips of all servers."""
        return self.prefill.server.placement.chips + self.decode.server.placement.chips

    def transfer_s(self, tokens: int) -> float:
        """Seconds from the end of a prompt's prefill until its K/V is on the decode server.

        tokens: length of the prompt. The result is the link latency plus the K/V bytes of one chip over the rate of one
        chip's links: all chips that hold the prompt's K/V send their parts at the same time. If crosses_nodes, latency
        and rate are those of a chip's network adapter.
        """
        links, apart = self.prefill.target.chip.links, self.crosses_nodes
        latency = links.node_latency_s if apart else self.prefill.target.library.link_latency_s
        rate = links.node_bytes_per_s if apart else links.chip_bytes_per_s
        return latency + tokens * self.prefill.server.kv_bytes_per_token / max(1.0, rate)

    @property
    def crosses_nodes(self) -> bool:
        """True if K/V travels between nodes."""
        links = self.prefill.target.chip.links
        return self.chips > links.max_chips and links.node_bytes_per_s > 0

    def spread(self, request: LoadRequest, concurrency: int) -> list[float]:
        """Start times in seconds of the first `concurrency` requests, as a list: 0, and then evenly spaced.

        They fill the estimated time T in which one request is served: request i starts at T * i / concurrency. T is one
        prefill step with this prompt alone, plus one decode step for each output token, with all open requests spread
        over the decode servers and half of the response in the cache.

        request: the lengths, equal for all requests.
        """
        alone = self.prefill.cost(0, 1, [(request.prompt, request.prompt, 1)])[0]
        each = max(1, concurrency // self.decode.server.placement.replicas)
        taken = alone + request.output * self.decode.cost(each, request.prompt + request.output / 2)[0]
        return [taken * i / concurrency for i in range(concurrency)]


@dataclass(frozen=True)
class ApartResult:
    """Means over the middle of a load, without its start and end. Times are in seconds.

    Attributes:
        concurrency: requests open at once.
        ttft: mean time to the first token.
        tpot: mean time per token after the first.
        tokens_per_s: output tokens per second of all servers together.
        watts: power of all chips together.
        prefill_busy: fraction of the time in which the prefill servers compute.
        decode_busy: fraction of the time in which the decode servers compute.
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
        """A dict for JSON: all fields, tokens/s per chip, and tokens per joule."""
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
        ended: (end, TTFT, TPOT) of each request in seconds, in the order in which they ended.
    """

    prefill: list[Queue]
    decode: list[Queue]
    ended: list[tuple[float, float, float]]


def run_apart(apart: Apart, requests: Sequence[LoadRequest], arrivals: Sequence[float]) -> ApartRun:
    """Serve requests in virtual time, and return the ApartRun.

    arrivals: seconds at which the first requests are sent, ascending. Each later request is sent when an earlier one
    has ended. Raises ValueError for a request that a cache cannot hold, and for one with fewer than two output tokens.
    """
    if min(r.output for r in requests) < 2:
        raise ValueError("requests of one new token never reach a decode server; give 2 or more output tokens")
    first = [Queue(apart.prefill, apart.prefill_settings) for _ in range(apart.prefill.server.placement.replicas)]
    second = [
        Queue(apart.decode, apart.decode_settings, prefills=False)
        for _ in range(apart.decode.server.placement.replicas)
    ]
    free, unsent = deque(arrivals), deque(requests)
    whole: dict[int, LoadRequest] = {}  # id of the prompt's part of a request -> the request
    moving, number = list[tuple[float, int, float, LoadRequest]](), 0  # (arrival of its K/V, tie, start, request)
    ended: list[tuple[float, float, float]] = []
    seen = {id(q): 0 for q in (*first, *second)}
    while len(ended) < len(requests):
        busy = [q for q in (*first, *second) if q.open]
        now = min((q.now for q in busy), default=NEVER)
        next_in, next_move = free[0] if free and unsent else NEVER, moving[0][0] if moving else NEVER
        if min(next_in, next_move) <= now:
            if next_in <= next_move:
                free.popleft()
                request = unsent.popleft()
                queue = min(first, key=lambda q: (q.open, q.now))
                queue.now = max(queue.now, next_in) if not queue.open else queue.now
                prompt = replace(request, at=next_in, output=1)
                whole[id(prompt)] = request
                queue.add(prompt, next_in)
            else:
                at, _, start, request = heapq.heappop(moving)
                queue = min(second, key=lambda q: (q.open, q.now))
                queue.now = max(queue.now, at) if not queue.open else queue.now
                queue.add(request, start)
            continue
        queue = min(busy, key=lambda q: q.now)
        others = min((q.now for q in first if q.open and q is not queue), default=NEVER)
        queue.admit()
        queue.take_steps(min(next_in, next_move, others) if queue in second else NEVER)
        for o in queue.done[seen[id(queue)] :]:
            if queue in first:
                number += 1
                at = queue.now + apart.transfer_s(o.request.prompt)
                heapq.heappush(moving, (at, number, o.start, whole[id(o.request)]))
            else:
                ended.append((queue.now, o.first or 0.0, o.each or 0.0))
                free.append(queue.now)
        seen[id(queue)] = len(queue.done)
    return ApartRun(first, second, ended)


def serve_apart(apart: Apart, request: LoadRequest, concurrency: int, turns: int = 4) -> ApartResult:
    """Keep `concurrency` requests like `request` open until `turns` times as many have ended. Returns the ApartResult.

    The first requests start at the times of Apart.spread(). Raises ValueError for a request that a cache cannot hold,
    or with fewer than two output tokens.
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
