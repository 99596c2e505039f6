"""A server's queue in virtual time, event by event: arrivals, chunked prefill, decoding, a full K/V cache.

Steps are scheduled as by the engine (`intaglio.runtime`), but no tokens are computed. Between two events (a request
arrives, a prompt ends, a response ends) all steps are alike and are simulated as one.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from random import Random

from intaglio.codesign.memory import KvRoom
from intaglio.codesign.steps import Costs
from intaglio.measure.load import Outcome
from intaglio.measure.workload import LoadRequest

NEVER = float("inf")  # seconds: an event that does not come
LEAP = 256  # steps that are taken together, at most
RANKS = ("any", "round-robin", "random")  # how a prompt gets its DP rank, see QueueSettings.ranks


@dataclass(frozen=True)
class QueueSettings:
    """Settings of a server's serving engine in the queue simulation. Times are in seconds.

    Attributes:
        kv: K/V capacity: a KvRoom, or a number of tokens if every layer keeps all tokens. A request is admitted when
            its prompt and whole response fit.
        max_batch_tokens: maximum tokens of a step, on each data-parallel copy of the attention layers (DP rank). A
            longer prompt is prefilled in chunks.
        max_sequences: maximum sequences that run at once, on all DP ranks together.
        mixed: True if a step can have both prompt chunks and decoding sequences. False: a step with prompts decodes
            nothing.
        step_s: the host's time for each step, during which the chips wait.
        sequence_s: the host's time for each sequence of a step, during which the chips wait. The DP ranks share the
            sequences evenly, and their hosts work in parallel.
        request_s: the host's time for each request before its first token, outside the engine's steps.
        prompt_token_s: the host's time for each token of a request's prompt, outside the engine's steps.
        admission_steps: number of decode steps that a request waits before it is admitted. They are not simulated:
            their time is added to each request's latencies.
        poll_steps: while sequences decode, the engine looks for new requests each time it has run this number of decode
            steps. After a step with prompts it looks at once. 0 or 1: it looks before every step.
        tokens_per_step: mean number of tokens that one decode step adds to a sequence; above 1 with speculative
            decoding.
        ranks: how the DP rank that computes a prompt is chosen, one of RANKS. "any": any rank with room in the step.
            "round-robin": each rank in turn, in the order in which requests are sent. "random": a rank drawn with a
            fixed seed. With "round-robin" and "random", a prompt waits for its rank even if another rank is idle.
    """

    kv: KvRoom | int
    max_batch_tokens: int = 2048
    max_sequences: int = 256
    mixed: bool = True
    step_s: float = 0.0
    sequence_s: float = 0.0
    request_s: float = 0.0
    prompt_token_s: float = 0.0
    admission_steps: float = 0.0
    poll_steps: int = 0
    tokens_per_step: float = 1.0
    ranks: str = "any"

    @cached_property
    def room(self) -> KvRoom:
        """The server's K/V capacity as a KvRoom, also if the field `kv` is a number of tokens."""
        return KvRoom.of_tokens(self.kv) if isinstance(self.kv, int) else self.kv


@dataclass
class Queued:
    """A request in the queue, and how far the server has got with it.

    Attributes:
        planned: the LoadRequest, which has the lengths of prompt and response.
        start: time in seconds at which the request was sent.
        done: number of the prompt's tokens that are computed.
        first: time in seconds of the request's first token; 0 before it.
        rank: number of the DP rank (data-parallel copy of attention) that computes the prompt; -1: any rank can.
    """

    planned: LoadRequest
    start: float
    done: int = 0
    first: float = 0.0
    rank: int = -1

    @property
    def length(self) -> int:
        """Number of tokens of the request's prompt and whole response."""
        return self.planned.prompt + self.planned.output


@dataclass(frozen=True)
class QueueResult:
    """The result of one server that served a load: outcomes of the requests, steps and energy.

    Attributes:
        outcomes: the Outcomes of the requests, in the order in which the requests ended.
        steps: number of steps.
        joules: energy of all chips in these steps.
        busy_s: sum of the seconds of these steps, without the host's overhead.
    """

    outcomes: tuple[Outcome, ...]
    steps: int
    joules: float
    busy_s: float


class Queue:
    """A simulated server under load, in virtual time. It holds the waiting, prefilling, decoding and ended requests.

    Args:
        times: gives the seconds and joules of each step.
        settings: settings of the engine.
        prefills: True for a server that computes prompts. False for a decode server, which gets requests whose prompts
            another server has computed. On a decode server, a request starts to decode when it is admitted, and the
            time of its admission is recorded as the time of its first token.
    """

    def __init__(self, times: Costs, settings: QueueSettings, prefills: bool = True) -> None:
        self.times, self.settings, self.prefills = times, settings, prefills
        self.now, self.counter, self.steps, self.joules, self.busy_s = 0.0, 0, 0, 0.0, 0.0
        self.waiting, self.prefilling = deque[Queued](), deque[Queued]()
        self.running: list[tuple[int, int, Queued]] = []  # (counter at which it ends, tie, request)
        self.keys, self.held, self.kept, self.number = 0.0, 0, 0.0, 0  # keys of running ones; tokens of K/V reserved
        self.seen, self.unlooked = 0, 0  # waiting requests that the engine knows; decode steps since it last looked
        self.done: list[Outcome] = []
        self.added, self.random = 0, Random(0)  # requests so far; the source of their ranks if settings.ranks is random

    @property
    def open(self) -> int:
        """Number of requests that have not ended."""
        return len(self.waiting) + len(self.prefilling) + len(self.running)

    def add(self, request: LoadRequest, start: float) -> None:
        """Add a request to the waiting requests. Returns nothing.

        start: time in seconds at which the request was sent. Raises ValueError if the request's prompt and whole
        response do not fit into the empty K/V cache.
        """
        check_room(self.settings.room, request.prompt, request.output)
        self.waiting.append(Queued(request, start, rank=self._rank()))
        self.added += 1

    def _rank(self) -> int:
        """Number of the DP rank that will compute the next request's prompt; -1 if any rank can.

        A DP rank is a copy of the attention layers.
        """
        if self.settings.ranks == "any":
            return -1
        copies = self.times.copies
        return self.added % copies if self.settings.ranks == "round-robin" else self.random.randrange(copies)

    def admit(self) -> None:
        """Admit waiting requests in order of arrival, as many as the engine can take. Returns nothing.

        Admission stops when settings.max_sequences requests are admitted and have not ended, or when the K/V cache has
        no room for the prompt and whole response of the next request. A request that was sent after the engine last
        looked for new requests (see QueueSettings.poll_steps) is not admitted yet. An admitted request starts prefill;
        if `prefills` is False, it starts to decode.
        """
        s = self.settings
        if self.unlooked >= s.poll_steps or not self.running:
            self.seen, self.unlooked = len(self.waiting), 0
        while self.seen and len(self.prefilling) + len(self.running) < s.max_sequences:
            length = self.waiting[0].length
            kept = s.room.kept(length)
            if not s.room.fits(self.held + length, self.kept + kept):
                return
            one = self.waiting.popleft()
            self.seen -= 1
            self.held += length
            self.kept += kept
            if self.prefills:
                self.prefilling.append(one)
            else:
                self.start_decoding(one)

    def take_steps(self, until: float) -> None:
        """Simulate the next step or steps, and advance the clock. Returns nothing.

        If a prompt is being computed, this is one step. Otherwise it is 1 to LEAP decode steps. Each of them is given
        the time of the middle one, since a decode step's time grows linearly with the keys in the cache. The decode
        steps stop when a response ends, when the engine looks for waiting requests, or when the next step would begin
        at or after `until` seconds. If no request is admitted, nothing happens.
        """
        n = len(self.running)
        if not n and not self.prefilling:
            return
        if self.prefilling:
            self._mixed_step(n)
            return
        count = self._equal_steps()
        if until < NEVER:
            first = self._overhead(n) + self.times.cost(n, self.keys / n)[0]
            count = max(1, min(count, int((until - self.now) / first) + 1))
        self._advance(n, *self._mean_cost(count), count)

    def next_event(self) -> float:
        """The time of this queue's next event, in seconds on the queue's clock.

        If sequences decode and no prompt is being computed, the event is the end of the decode steps that the next call
        of take_steps() will simulate if no request arrives before. Otherwise the time is `now`, the present time on the
        clock.
        """
        if self.prefilling or not self.running:
            return self.now
        count = self._equal_steps()
        return self.now + count * (self._mean_cost(count)[0] + self._overhead(len(self.running)))

    def _equal_steps(self) -> int:
        """Number of decode steps, 1 to LEAP, until a response ends or the engine looks for waiting requests."""
        until_look = self.settings.poll_steps - self.unlooked if self.seen < len(self.waiting) else LEAP
        return max(1, min(self.running[0][0] - self.counter, until_look, LEAP))

    def _mean_cost(self, count: int) -> tuple[float, float]:
        """Time and energy of the middle one of the next `count` decode steps, as (seconds, joules).

        The step is timed as if each running sequence had the mean number of keys.
        """
        n = len(self.running)
        return self.times.cost(n, self.keys / n + count * self.settings.tokens_per_step / 2)

    def _overhead(self, sequences: int) -> float:
        return self.settings.step_s + self.settings.sequence_s * sequences / self.times.copies

    def _mixed_step(self, n: int) -> None:
        s, decoding = self.settings, n if self.settings.mixed else 0
        copies = self.times.copies
        budget = s.max_batch_tokens * copies - decoding
        longest = s.max_batch_tokens - -(-decoding // copies)  # of one copy
        left = [longest] * copies  # tokens of this step that each copy can still take from prompts of its own
        chunks: dict[tuple[int, int], int] = {}
        ended: list[Queued] = []
        partial = 0  # prompts that do not end in this step, at most one for each copy
        for one in self.prefilling:
            if budget < 1:
                break
            q = min(one.planned.prompt - one.done, budget, longest if one.rank < 0 else left[one.rank])
            if q < 1:
                continue  # a later prompt may belong to a copy that has room
            if one.rank >= 0:
                left[one.rank] -= q
            one.done += q
            budget -= q
            chunks[q, one.done] = chunks.get((q, one.done), 0) + 1
            if one.done == one.planned.prompt:
                ended.append(one)
                continue
            partial += 1
            if partial == copies:
                break
        context = self.keys / n if n else 1
        seconds, joules = self.times.cost(decoding, context, [(q, keys, m) for (q, keys), m in chunks.items()])
        for one in ended:
            self.prefilling.remove(one)
        self._advance(decoding, seconds, joules, 1, sum(chunks.values()))
        for one in ended:
            self.start_decoding(one)

    def start_decoding(self, one: Queued) -> None:
        """Start to decode a request whose prompt is computed. The current time becomes the time of its first token.

        A request for a single token ends here: its Outcome is added to `done`. Returns nothing.
        """
        one.first = self.now
        if one.planned.output == 1:
            self._end(one)
            return
        self.number += 1
        self.keys += one.planned.prompt + 1
        heapq.heappush(self.running, (self.counter + self._steps(one), self.number, one))

    def _steps(self, one: Queued) -> int:
        """Number of decode steps after a request's first token: (output tokens - 1) / tokens_per_step, rounded up."""
        return ceil((one.planned.output - 1) / self.settings.tokens_per_step)

    def _advance(self, decoding: int, seconds: float, joules: float, count: int, prompts: int = 0) -> None:
        self.now += count * (seconds + self._overhead(decoding + prompts))
        self.joules += count * joules
        self.busy_s += count * seconds
        self.steps += count
        if prompts:
            self.unlooked = self.settings.poll_steps  # the engine looks after each step with prompts
        elif self.settings.poll_steps:
            self.unlooked += count
            if self.seen == len(self.waiting):  # looks meanwhile found nothing
                self.unlooked = (self.unlooked - 1) % self.settings.poll_steps + 1
        if decoding:
            self.counter += count
            self.keys += count * decoding * self.settings.tokens_per_step
        while self.running and self.running[0][0] <= self.counter:
            one = heapq.heappop(self.running)[2]
            self.keys -= one.planned.prompt + 1 + self._steps(one) * self.settings.tokens_per_step
            self._end(one)

    def _end(self, one: Queued) -> None:
        self.held -= one.length
        self.kept -= self.settings.room.kept(one.length)
        s, planned = self.settings, one.planned
        each = (self.now - one.first) / max(1, planned.output - 1)
        step = each * s.tokens_per_step
        added = s.request_s + s.prompt_token_s * planned.prompt + s.admission_steps * step
        first, end = one.first - one.start + added, self.now - one.start + added
        gaps = ((end - first) / (planned.output - 1),) if planned.output > 1 else ()
        self.done.append(Outcome(planned, one.start, end, first, gaps, planned.prompt, planned.output))


def check_room(room: KvRoom, prompt: int, output: int) -> None:
    """Raise ValueError if the K/V cache of an idle server has no room for one request.

    room: the server's K/V capacity. prompt, output: numbers of tokens of the request's prompt and response.
    """
    length = prompt + output
    if not room.fits(length, room.kept(length)):
        raise ValueError(
            f"a request of {prompt:,} + {output:,} tokens; the K/V cache holds {room.tokens(length):,}; "
            "use more chips, a smaller format or shorter requests"
        )


def serve(
    times: Costs, settings: QueueSettings, requests: Sequence[LoadRequest], concurrency: int | None = None
) -> QueueResult:  # fmt: skip
    """Simulate one server that serves a load, in virtual time. Returns the QueueResult: outcomes, steps and energy.

    Args:
        times: gives the seconds and joules of each step of the server.
        settings: settings of the server's engine.
        requests: the load, ordered by time of arrival.
        concurrency: maximum number of requests open at once. A request that has arrived is sent as soon as fewer
            requests than this are open, and its latencies count from then. None: no maximum; each request is sent when
            it arrives.

    Raises ValueError for a request that the K/V cache cannot hold.
    """
    queue, pending, most = Queue(times, settings), deque(requests), concurrency or len(requests)
    while pending or queue.open:
        if not queue.open:
            queue.now = max(queue.now, pending[0].at)
        while pending and queue.open < most and pending[0].at <= queue.now:
            one = pending.popleft()
            queue.add(one, one.at if concurrency is None else queue.now)
        queue.admit()
        queue.take_steps(pending[0].at if pending and queue.open < most else NEVER)
    return QueueResult(tuple(queue.done), queue.steps, queue.joules, queue.busy_s)
