"""The engine: one step takes what the scheduler chose through the device and accounts for what came back.

Clock and randomness are passed in. Not thread-safe: one thread calls it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from intaglio.batch import Chunk, Sampling, bind
from intaglio.devices import Executable, StepResult
from intaglio.runtime.kv import BlockPool
from intaglio.runtime.request import Request, RequestError
from intaglio.runtime.scheduler import Piece, Scheduler


@dataclass(frozen=True)
class Event:
    """One token of a request, or its end, or both. After an event with a finish_reason nothing follows."""

    request: str
    token: int | None = None
    logprob: float | None = None
    finish_reason: str | None = None
    error: str | None = None


class Engine:
    """Serves requests on one executable. `max_batch_tokens` bounds a step, `max_sequences` those running at once."""

    def __init__(
        self,
        executable: Executable,
        *,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        max_batch_tokens: int = 512,
        max_sequences: int = 256,
    ) -> None:
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_sequences", max_sequences)):
            if value < 1:
                raise RequestError(f"{name} is {value}; allowed: 1 or more")
        self.executable, self.program, self.state = executable, executable.program, executable.state
        self.rng, self.clock = rng, clock
        self.pool = BlockPool(self.state.pages)
        self.scheduler = Scheduler(self.pool, self.state.page_tokens, max_batch_tokens, max_sequences)
        self.requests: dict[str, Request] = {}  # those that have not ended
        self.added = self.ended = self.steps = 0

    def check(self, request: Request) -> None:
        """Raise RequestError if the request can never be served here."""
        n, context = len(request.prompt), self.program.context
        if n == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if n > context:
            raise RequestError(f"the prompt has {n} tokens, the context holds {context}; shorten it by {n - context}")
        bad = next((t for t in request.prompt if not 0 <= t < self.program.vocabulary), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside 0..{self.program.vocabulary - 1}")
        wanted, size = self.scheduler.blocks_for(request.longest(context)), self.state.page_tokens
        if wanted > self.pool.total:
            raise RequestError(
                f"{n} prompt tokens and max_tokens={request.params.max_tokens} can need {wanted * size} tokens of KV, "
                f"the pool holds {self.pool.total * size}; lower max_tokens or give it more"
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never be served, or if its id is in use."""
        if request.id in self.requests or request.state != "new":
            raise RequestError(f"request {request.id!r} has already been added; every request needs its own id")
        self.check(request)
        p = request.params
        seed = self.rng.getrandbits(63) if p.seed is None else p.seed
        request.sampling = Sampling(p.temperature, p.top_k, p.top_p, p.min_p, seed)
        request.arrival = self.added
        request.times["arrived"] = self.clock()
        self.added += 1
        self.requests[request.id] = request
        self.scheduler.add(request)

    def step(self) -> list[Event]:
        """Run one step: a share of the prompt, or the next token, of as many requests as fit. [] when idle."""
        plan = self.scheduler.schedule()
        if not plan:
            return []
        self.steps += 1
        try:
            batch = bind([self._chunk(piece) for piece in plan], self.state.page_tokens)
            result = self.executable.step(batch, logits=any(p.request.scored for p in plan))
        except Exception as e:  # whatever the device raised: these requests end, the others go on
            return [self._end(p.request, "error", f"the step failed: {type(e).__name__}: {e}") for p in plan]
        return self._account(plan, result)

    def run(self) -> list[Event]:
        """Step until idle; all events in order."""
        events: list[Event] = []
        while self.requests:
            events += self.step()
        return events

    def abort(self, id: str) -> Event | None:
        """End a request now; None if there is none of that id (it may just have ended)."""
        request = self.requests.get(id)
        return self._end(request, "abort") if request else None

    @staticmethod
    def _wanted(piece: Piece) -> range:
        """Offsets into a piece whose logits are wanted."""
        return range(piece.n) if piece.request.scored else range(piece.n - 1, piece.n) if piece.last else range(0)

    def _chunk(self, piece: Piece) -> Chunk:
        r = piece.request
        return Chunk(r.tokens(r.computed, piece.n), r.computed, r.blocks, self._wanted(piece), r.sampling)

    def _account(self, plan: list[Piece], result: StepResult) -> list[Event]:
        events, row = [], 0
        for piece in plan:
            request, first = piece.request, row
            row += len(self._wanted(piece))
            last = piece.last
            request.computed += piece.n
            if request.scored:
                assert result.logits is not None, "the device was asked for logits and gave none"
                request.logits.append(result.logits[first:row])
                if last:
                    events.append(self._end(request, "length"))
            elif last:
                events.append(self._next(request, int(result.tokens[first]), float(result.logprobs[first])))
        return events

    def _next(self, request: Request, token: int, logprob: float) -> Event:
        """Take one new token, and end the request if it was its last."""
        if token < 0:
            return self._end(request, "error", f"the logits after {request.length} tokens hold no finite value, or NaN")
        if not request.output:
            request.times["first_token"] = self.clock()
        request.output.append(token)
        request.logprobs.append(logprob)
        try:
            reason = self._reason(request, token)
        except Exception as e:  # the text side of this request broke; it alone ends
            return self._end(request, "error", f"reading token {token} as text failed: {e}", token, logprob)
        return self._end(request, reason, None, token, logprob) if reason else Event(request.id, token, logprob)

    def _reason(self, request: Request, token: int) -> str | None:
        if token in request.eos_ids and not request.params.ignore_eos:
            return "stop"
        if request.stopped is not None and request.stopped(token):
            return "stop"
        full = request.length > self.program.context  # the new token has no position to be fed back at
        return "length" if full or len(request.output) == request.params.max_tokens else None

    def _end(
        self,
        request: Request,
        reason: str,
        error: str | None = None,
        token: int | None = None,
        logprob: float | None = None,
    ) -> Event:
        self.scheduler.remove(request)
        del self.requests[request.id]
        self.ended += 1
        request.state, request.finish_reason, request.error = "ended", reason, error
        request.times["ended"] = self.clock()
        return Event(request.id, token, logprob, reason, error)
