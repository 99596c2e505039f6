"""The engine: one step takes what the scheduler chose through the device and accounts for what came back.

Clock, randomness and the device are passed in, and so is how to get another device. One thread calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol

from intaglio.batch import GREEDY, Chunk, bind
from intaglio.devices import DeviceLost, Executable, StepResult
from intaglio.runtime import sampling
from intaglio.runtime.journal import recorded, told
from intaglio.runtime.kv import BlockPool
from intaglio.runtime.pace import Pace
from intaglio.runtime.request import Event, Fault, FinishReason, Refused, Request, RequestError, Scored
from intaglio.runtime.scheduler import Piece, Scheduler
from intaglio.runtime.sequence import Sequence, longest
from intaglio.runtime.stats import Counts, Gauges, StepRecord

LOSSES = 2  # of the device by one sequence alone, with no token between: then it is the cause
RETRY_LEAST, RETRY_MOST = 1.0, 60.0  # seconds a refused client is told to wait


class Rng(Protocol):
    """Where seeds come from when a request brings none."""

    def getrandbits(self, k: int, /) -> int: ...


class Engine:
    """Serves requests on one executable, until it is drained or its device is lost for good.

    clock: seconds, from any start; a reading before the last one counts as the last. max_batch_tokens bounds a step,
    max_sequences those running at once, max_waiting those waiting, max_drafts the guesses a sequence and step (0: no
    speculation). restart: gives a new executable for the same Program and state when the old one is lost; if it has not
    given one that works after `max_restarts` tries, everything ends and `failed` says why. journal: is
    told all that happens, an entry at a time, as replay() takes it (replay.py).
    """

    def __init__(
        self,
        executable: Executable,
        *,
        clock: Callable[[], float],
        rng: Rng,
        max_batch_tokens: int = 512,
        max_sequences: int = 256,
        max_waiting: int = 1024,
        max_drafts: int = 0,
        restart: Callable[[], Executable] | None = None,
        max_restarts: int = 5,
        journal: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        bounds = {"max_batch_tokens": max_batch_tokens, "max_sequences": max_sequences, "max_waiting": max_waiting}
        for name, value in bounds.items():
            if value < 1:
                raise RequestError(f"{name} is {value}; allowed: 1 or more")
        self.executable, self.program, self.state = executable, executable.program, executable.state
        self.clock, self.rng = clock, rng
        self.restart, self.max_restarts = restart, max_restarts
        self.max_waiting = max_waiting
        self.pool = BlockPool(self.state.pages, self.state.page_tokens)
        self.scheduler = Scheduler(
            self.pool, context=self.program.context, max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences, max_drafts=max_drafts,
        )  # fmt: skip
        self.requests: dict[str, list[Sequence]] = {}  # the choices, in order, of each that has one not ended
        self.draining = False
        self.failed: str | None = None
        self.counts = Counts()
        self.last: StepRecord | None = None  # of the last step that ran
        self.launching: Callable[[], None] | None = None  # called when a batch is about to go to the device
        self._events: list[Event] = []  # of this step so far
        self._launched: list[Sequence] = []  # in the launch that is under way, or was last
        self._due = math.inf
        self.pace = Pace()
        self.journal = journal
        self._readings: list[float] = []  # of the clock, launches and restarts since the last entry
        self._fates: list[str | None] = []
        self._restarts: list[bool] = []
        self._now = -math.inf
        self._read_clock()
        if journal:
            self._note("engine", **self.described())

    # Asking

    def check(self, request: Request) -> None:
        """Raise RequestError if the request can never be served here."""
        n, context, p = len(request.prompt), self.program.context, request.params
        if n == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if n > context:
            raise RequestError(f"the prompt has {n} tokens, the context holds {context}; shorten it by {n - context}")
        for what, ids in (("", request.prompt), ("stop ", p.stop_token_ids), ("biased ", p.logit_bias)):
            if ids and not 0 <= min(ids) <= max(ids) < self.program.vocabulary:
                bad = next(t for t in ids if not 0 <= t < self.program.vocabulary)
                raise RequestError(f"{what}token id {bad} is outside 0..{self.program.vocabulary - 1}")
        wanted, size = self.pool.blocks_for(longest(request, context)), self.state.page_tokens
        if wanted > self.pool.total:
            raise RequestError(
                f"{n} prompt tokens and max_tokens={p.max_tokens} can need {wanted * size} tokens of KV, "
                f"the pool holds {self.pool.total * size}; lower max_tokens or give it more"
            )
        if p.n > self.max_waiting:
            raise RequestError(f"n is {p.n}, max_waiting is {self.max_waiting}; ask for fewer choices at a time")
        if (p.grammar is None) != (request.matcher is None):
            raise RequestError("a grammar needs a matcher, and a matcher a grammar; give both or neither")
        for name, value in (("queue_timeout", request.queue_timeout), ("timeout", request.timeout)):
            if value is not None and not value > 0:
                raise RequestError(f"{name} is {value}; allowed: seconds above 0, or None")

    def most_tokens(self, prompt_tokens: int) -> int:
        """The largest max_tokens that a prompt of that many tokens can be served with here; below 1: it is too long."""
        return min(self.program.context, self.pool.total * self.state.page_tokens) - prompt_tokens + 1

    def add(self, request: Request) -> list[Sequence]:
        """Queue a request; its choices, to be read as they grow. Raises RequestError if it can never be served or its
        id is in use, and Refused, with when to come back, if it can not be served now."""
        self.counts.received += request.params.n
        seed = self.rng.getrandbits(62) if request.params.seed is None else request.params.seed
        try:
            if request.id in self.requests:
                raise RequestError(f"request {request.id!r} is still running; every request needs its own id")
            self.check(request)
            expected = self._admit(request)
            choices = self._choices(request, seed, expected)
        except (RequestError, Refused) as e:
            self.counts.refused[e.reason if isinstance(e, Refused) else "invalid"] += request.params.n
            self._note_request(request, seed, type(e).__name__)
            raise
        self._note_request(request, seed, None)
        self.requests[request.id] = choices
        self.counts.admitted += len(choices)
        for s in choices:
            self.scheduler.add(s)
            self._due = min(self._due, s.due())
        return choices

    def abort(self, id: str) -> list[Event]:
        """End a request now; [] if there is none of that id (it may just have ended)."""
        self._read_clock()
        events = [self._end(s, "abort") for s in self.requests.get(id, []) if s.state != "ended"]
        self._note("abort", id=id, events=events)
        return events

    def drain(self) -> None:
        """Admit nothing from now on; what was admitted goes on to its end."""
        self.draining = True
        self._note("drain")

    @property
    def idle(self) -> bool:
        """Nothing is left to do until something is added."""
        return not self.requests

    def gauges(self) -> Gauges:
        waiting = self.scheduler.waiting
        return Gauges(
            len(self.scheduler.running), len(waiting), sum(s.length for s in waiting), self.pool.total, self.pool.held,
            len(self.pool.cached), self.draining, self.failed,
        )  # fmt: skip

    # Running

    def step(self) -> list[Event]:
        """Run one step: a share of the prompt, or what comes next, of as many sequences as fit. [] when idle."""
        began = self._read_clock()
        self._expire(began)
        plan = self._begin(self.scheduler.schedule(), began)
        try:
            for pieces in _apart(plan):
                self._launch(pieces)
        except DeviceLost as e:
            self._recover(e)
        return self._report(plan, began)

    def run(self) -> list[Event]:
        """Step until idle; all events in order."""
        events: list[Event] = []
        while not self.idle:
            events += self.step()
        return events

    def _expire(self, now: float) -> None:
        """End whatever is past its deadline. `_due` is never later than the first of them."""
        if now >= self._due:
            for s in [s for s in self._live() if s.due() <= now]:
                self._emit(self._end(s, "deadline"))
            self._due = min((s.due() for s in self._live()), default=math.inf)

    def _begin(self, plan: list[Piece], now: float) -> list[Piece]:
        """Note whose first step this is."""
        for piece in plan:
            s = piece.sequence
            if s.started is None:
                s.started, s.cached = now, s.computed
                self.counts.prompt_tokens += len(s.prompt)
                self.counts.cached_tokens += s.computed
        return plan

    def _launch(self, plan: list[Piece], again: bool = True) -> None:
        """Take the pieces through the device and account for them. If it fails nothing has happened yet: each half is
        tried by itself, down to the one that fails alone, twice; that one ends, and the others go on."""
        ready = [(piece, chunk) for piece in plan if (chunk := self._chunk(piece))]
        if not ready:
            return
        self._launched = [piece.sequence for piece, _ in ready]
        try:
            result = self._run([chunk for _, chunk in ready], any(s.wants_logits for s in self._launched))
        except DeviceLost:
            raise
        except Exception as e:  # whatever the device raised
            self.counts.faults["step"] += 1
            whole, half = [piece for piece, _ in ready], len(ready) // 2
            if half:
                self._launch(whole[:half])
                self._launch(whole[half:])
            elif again:
                self._launch([replace(whole[0], drafts=())], again=False)  # no request answers for a wrong guess
            else:
                fault = Fault("step", f"the step failed: {type(e).__name__}: {e}")
                self._emit(self._end(whole[0].sequence, "error", fault))
            return
        self._read_clock()
        row = 0
        for piece, chunk in ready:
            self._account(piece, chunk, result, row)
            row += len(chunk.rows)

    def _recover(self, lost: DeviceLost) -> None:
        """Get another device; what ran is computed again from its token ids. Without one, everything ends.

        Those in the step that lost it are launched alone, and without guesses, until their next token; one that loses
        the device alone twice before that ends.
        """
        self.counts.faults["worker"] += 1
        why = f"the device was lost: {lost}"
        for s in self._launched:
            s.suspect = True
            s.losses += len(self._launched) == 1
            if s.losses == LOSSES and s.state != "ended":
                self._emit(self._end(s, "error", Fault("worker", f"{why}, with this request alone")))
        self.pool.forget()
        for s in reversed(self.scheduler.running.copy()):
            self.scheduler.preempt(s)
        if not self._replaced():
            self.failed = why
            for s in self._live():
                self._emit(self._end(s, "error", Fault("worker", why)))

    def _replaced(self) -> bool:
        """Whether another device could be had, one that takes a step of one token."""
        for _ in range(self.max_restarts if self.restart else 0):
            try:
                self.executable = self._restarted()
                self._run([Chunk([0], 0, [0], [0])])  # no block holds anything now
            except Exception:  # whatever starting a device, or its first step, can raise
                continue
            self.counts.restarts += 1
            return True
        return False

    def _restarted(self) -> Executable:
        assert self.restart
        self._restarts.append(False)
        executable = self.restart()
        self._restarts[-1] = True
        return executable

    def _run(self, chunks: list[Chunk], logits: bool = False) -> StepResult:
        """Take chunks through the device, noting how it fared."""
        try:
            batch = bind(chunks, self.state.page_tokens)
            if self.launching:
                self.launching()
            result = self.executable.step(batch, logits=logits)
        except Exception as e:
            self._fates.append(f"lost: {e}" if isinstance(e, DeviceLost) else f"{type(e).__name__}: {e}")
            raise
        self._fates.append(None)
        return result

    def _report(self, plan: list[Piece], began: float) -> list[Event]:
        """Close the step: its record, and its events."""
        if plan:
            seconds = self._read_clock() - began
            decode = sum(1 + len(p.drafts) for p in plan if p.n == 1)
            prefill = sum(p.n for p in plan if p.n > 1)
            drawn = sum(e.scored is not None for e in self._events)
            self.counts.steps += 1
            self.counts.computed_tokens += prefill + decode
            self.last = StepRecord(self.counts.steps, began, seconds, prefill, decode, len(plan), drawn)
            self.pace.step(prefill + decode, drawn, seconds)
        self.counts.preemptions = self.scheduler.preemptions
        events, self._events = self._events, []
        self._note("step", events=events, launches=self._fates, restarts=self._restarts)
        self._fates, self._restarts = [], []
        return events

    def described(self) -> dict[str, Any]:
        """What a record needs to know of this engine."""
        options = {
            "max_batch_tokens": self.scheduler.max_batch_tokens, "max_sequences": self.scheduler.max_sequences,
            "max_waiting": self.max_waiting, "max_drafts": self.scheduler.max_drafts,
            "max_restarts": self.max_restarts,
        }  # fmt: skip
        state = {"pages": self.state.pages, "page_tokens": self.state.page_tokens}
        return {"program": self.program.hash, **state, "options": options}

    def _note_request(self, request: Request, seed: int, refused: str | None) -> None:
        if self.journal:
            self._note("add", request=recorded(request, seed), refused=refused)

    def _note(self, do: str, events: Iterable[Event] = (), **facts: Any) -> None:
        if self.journal:
            seen = {"events": [told(e) for e in events]} if do in ("step", "abort") else {}
            self.journal({"do": do, "clock": self._readings, **facts, **seen})
            self._readings = []

    # One sequence

    def _admit(self, request: Request) -> float:
        """What the pace says of it, in seconds; raises Refused if it can not be served now, or not in time."""
        waiting, n, pace = len(self.scheduler.waiting), request.params.n, self.pace
        if self.failed is not None:
            raise Refused("failed", self.failed, None)
        if self.draining:
            raise Refused("draining", "the engine is draining and admits nothing", None)
        if waiting + n > self.max_waiting:
            tokens = sum(s.remaining for s in self.scheduler.waiting)
            wait = pace.raw(tokens, -(-tokens // self.scheduler.max_batch_tokens), 0)
            raise Refused(
                "full", f"{waiting} wait already, max_waiting is {self.max_waiting}; retry later", _soon(wait)
            )
        live, prompt = self._live(), len(request.prompt)
        outputs = 0.0 if request.scored else pace.outputs(request.params.max_tokens)
        before = sum(s.remaining for s in live if s.remaining > 1)
        raw = pace.raw(before + prompt, outputs, len(live) + n)
        takes, alone = pace.promise(raw), pace.promise(pace.raw(prompt, outputs, n))
        if live and request.timeout is not None and alone <= request.timeout < takes:
            why = f"beside {len(live)} it would take about {takes:.3g} s, its timeout is {request.timeout:g} s"
            raise Refused("late", f"{why}; retry later or ask for less", _soon(takes - request.timeout))
        return raw

    def _choices(self, request: Request, seed: int, expected: float) -> list[Sequence]:
        now, p = self._read_clock(), request.params
        try:
            watchers = [request.stopped(i) if request.stopped else None for i in range(p.n)]
            matchers = [request.matcher(i) if request.matcher else None for i in range(p.n)]
        except Exception as e:  # the caller's own functions
            raise RequestError(f"the request cannot be begun: {e}") from e
        return [
            Sequence(request, i, (seed + i) % 2**63, self.counts.admitted + i, now, expected, watchers[i], matchers[i])
            for i in range(p.n)
        ]

    def _chunk(self, piece: Piece) -> Chunk | None:
        """A piece as the device takes it; None if that cannot be made, which ends its sequence alone."""
        s, start, stop = piece.sequence, piece.sequence.computed, piece.sequence.computed + piece.n
        try:
            fed = [*s.tokens(start, stop), *piece.drafts]
            read = range(max(start, s.read), min(stop, s.to_read)) if s.read < s.to_read else ()
            draws = sampling.rows(s, piece.drafts) if piece.last and not s.request.scored else []
        except Exception as e:  # a matcher is foreign code
            self._emit(self._end(s, "error", Fault("request", f"the grammar failed: {e}")))
            return None
        rows = [*(at - start for at in read), *range(len(fed) - len(draws), len(fed))]
        return Chunk(fed, start, s.blocks, rows, [GREEDY] * len(read) + draws)

    def _account(self, piece: Piece, chunk: Chunk, result: StepResult, row: int) -> None:
        """Take in what a piece gave: its rows begin at `row`."""
        s, drafts = piece.sequence, piece.drafts
        draws = 0 if s.request.scored or not piece.last else 1 + len(drafts)
        s.computed += piece.n
        row = self._read(s, result, row, len(chunk.rows) - draws)
        if draws and s.request.params.prompt_logprobs is not None and not s.output:
            self._emit(Event(s.request.id, s.index, prompt=tuple(s.prompt_scores)))
        for i in range(draws):
            s.computed += i > 0  # the guess before this row was right, so its K/V stands
            self._next(s, result, row + i)
            if s.state == "ended" or i == len(drafts) or s.output[-1] != drafts[i]:
                break
            self.counts.accepted_tokens += 1
        self.counts.drafts += bool(drafts)
        self.counts.draft_tokens += len(drafts)
        if s.state != "ended":
            self.scheduler.settle(s)
            if s.request.scored and s.remaining == 0:
                self._emit(self._end(s, "length"))

    @staticmethod
    def _read(s: Sequence, result: StepResult, row: int, n: int) -> int:
        """Keep the logits of `n` rows of the prompt, or what they say of the token after each; the first row beyond."""
        if n:
            assert result.logits is not None, "the device was asked for logits and gave none"
            if s.request.scored:
                s.logits.append(result.logits[row : row + n])
            else:
                most = s.request.params.prompt_logprobs or 0
                told = s.prompt[s.read + 1 : s.read + 1 + n]
                s.prompt_scores += [sampling.score(result.logits[row + i], t, most) for i, t in enumerate(told)]
            s.read += n
        return row + n

    def _next(self, s: Sequence, result: StepResult, row: int) -> None:
        """Take one new token, and end the sequence if it was its last."""
        token, logprob = int(result.tokens[row]), float(result.logprobs[row])
        if token < 0:
            why = f"the logits after {s.length} tokens hold no finite value that may be drawn, or NaN"
            return self._emit(self._end(s, "error", Fault("request", why)))
        scored = Scored(token, logprob)
        if (most := s.request.params.logprobs) and result.logits is not None:
            scored = sampling.score(result.logits[row], token, most)
        s.suspect, s.losses = False, 0
        s.first_token = self._now if s.first_token is None else s.first_token
        s.output.append(token)
        if s.tally:
            s.tally.push(token)
        s.logprobs.append(logprob)
        self.counts.output_tokens += 1
        try:
            reason = self._reason(s, token)
        except Exception as e:  # the text side of this request broke; it alone ends
            return self._emit(self._end(s, "error", Fault("request", f"reading token {token} failed: {e}"), scored))
        self._emit(self._end(s, reason, None, scored) if reason else Event(s.request.id, s.index, scored))

    def _reason(self, s: Sequence, token: int) -> FinishReason | None:
        p = s.request.params
        if token in s.request.eos_ids and not p.ignore_eos:
            return "stop"
        if token in p.stop_token_ids or (s.stopped is not None and s.stopped(token)):
            return "stop"
        if s.matcher is not None and not s.matcher.advance(token):
            raise ValueError("the grammar does not allow it")
        full = s.length > self.program.context  # the new token has no position to be fed back at
        return "length" if full or len(s.output) == p.max_tokens else None

    def _end(
        self, s: Sequence, reason: FinishReason, fault: Fault | None = None, scored: Scored | None = None
    ) -> Event:
        if reason in ("stop", "length"):
            self.scheduler.settle(s)
        self.scheduler.remove(s)
        s.state, s.finish_reason, s.fault, s.ended = "ended", reason, fault, self._now
        choices = self.requests[s.request.id]
        if all(c.state == "ended" for c in choices):
            del self.requests[s.request.id]
        self.counts.finished[reason] += 1
        if reason in ("stop", "length", "deadline"):
            self._learn(s, self._now - s.arrived, cut=reason == "deadline")
        if fault and fault.kind == "request":
            self.counts.faults["request"] += 1
        return Event(s.request.id, s.index, scored, reason, fault, s.usage(self._now))

    def _learn(self, s: Sequence, seconds: float, cut: bool) -> None:
        """Tell the pace of a sequence that ended; one cut short would have gone on as it went."""
        likely = max(1.0, self.pace.outputs(s.request.params.max_tokens))
        self.pace.ended(s.expected, seconds * max(1.0, likely / max(1, len(s.output))) if cut else seconds)
        if s.output and (not cut or len(s.output) > self.pace.length):
            self.pace.answered(len(s.output))

    def _emit(self, event: Event) -> None:
        self._events.append(event)

    def _read_clock(self) -> float:
        reading = self.clock()
        self._now = max(self._now, reading)
        if self.journal:
            self._readings.append(reading)
        return self._now

    def _live(self) -> list[Sequence]:
        return [s for choices in self.requests.values() for s in choices if s.state != "ended"]


def _soon(seconds: float) -> float:
    """When a refused client is told to come back."""
    return min(max(seconds, RETRY_LEAST), RETRY_MOST)


def _apart(plan: list[Piece]) -> list[list[Piece]]:
    """The launches of a step: one of all pieces, but each suspect alone."""
    together = [piece for piece in plan if not piece.sequence.suspect]
    alone = [[piece] for piece in plan if piece.sequence.suspect]
    return [together, *alone] if together else alone
