"""Rules that every simulated run must keep, checked on what clients receive and on the batches that the device gets."""

from __future__ import annotations

import math
from collections import Counter
from copy import copy
from dataclasses import replace
from typing import Any

from support.serving import VOCABULARY

from intaglio.batch import Batch, Sampling
from intaglio.devices import DeviceError, DeviceLost
from intaglio.devices.oracle import START, draw, link
from intaglio.runtime import Event, Refused, Resumption, Sequence, check_invariants
from intaglio.runtime.sampling import edits
from simulation.options import ClientRequest
from simulation.world import Stop, Violation, World, grammar_of, sequences_of

REASONS = ("stop", "length", "abort", "deadline", "error")


def lost(wrong: DeviceError | None) -> bool:
    return isinstance(wrong, DeviceLost)


class Reader:
    """One choice as its client sees it, and the token that must come next by definition."""

    def __init__(self, wanted: ClientRequest, sequence: Sequence) -> None:
        self.wanted, self.sequence, self.index = wanted, sequence, sequence.index
        self.ids, self.output = list(wanted.prompt), list[int]()
        self.links: list[int] = []
        for token in self.ids:
            self._link(token)
        matcher = grammar_of(wanted)
        self.matcher = matcher(self.index) if matcher else None
        self.stop = Stop(wanted.stop_at, None)
        self.stopping = self.ended = False
        self.failures = 0  # consecutive failed launches with only this choice
        self.losses = 0  # device losses with only this choice since its last token
        self.had_drafts = False  # in its last launch
        self.brought = 0  # output tokens that it had when it was resumed

    def _link(self, token: int) -> None:
        self.links.append(link(self.links[-1] if self.links else START, token))

    def deadline(self) -> float:
        """The latest time at which the choice must have ended, from its request."""
        w, s = self.wanted, self.sequence
        timeouts = [w.timeout, w.queue_timeout if s.started is None else None]
        return self.arrived + min((t for t in timeouts if t is not None), default=math.inf)

    @property
    def arrived(self) -> float:
        """When the engine that has it now got it."""
        return self.sequence.arrived

    def due(self) -> int:
        """The only token that may come next."""
        p = self.wanted.params
        mask = self.matcher.mask() if self.matcher else None
        if p.seed is not None and self.sequence.seed != p.seed + self.index:
            raise Violation(f"choice {self.index} of seed {p.seed} runs with seed {self.sequence.seed}")
        edited = edits(p, self.wanted.prompt, self.output)
        return draw(self.links, VOCABULARY, Sampling(p.temperature, seed=self.sequence.seed, edits=edited, mask=mask))

    def take(self, token: int) -> None:
        if self.stopping:
            raise Violation(f"token {token} after the one that ends it")
        if token != (due := self.due()):
            raise Violation(f"token {len(self.output)} is {token}, the definition says {due}")
        p, n = self.wanted.params, len(self.output) + 1
        if self.matcher and not self.matcher.advance(token):
            raise Violation(f"token {token} is against the grammar")
        self.losses = 0
        self.output.append(token)
        self._link(token)
        self.stopping = token in self.wanted.eos or token in p.stop_token_ids or self.stop(token) or n == p.max_tokens


class Rules:
    """Observes everything in a world. Raises Violation."""

    def __init__(self, world: World) -> None:
        self.world, self.engine = world, world.engine
        self.live: dict[str, list[Reader]] = {}  # requests with a choice that has not ended
        self.finished: Counter[str] = Counter()
        self.tokens = self.asked = self.refusals = 0
        self.salts: dict[int, str | None] = {}  # by block: the salt of the tokens last written to it
        self.state_salts: dict[int, str | None] = {}  # by slot of recurrent state: the same
        self.running: set[int] = set()
        self.probe = "never asked"
        self.restarts = 0  # restarts since a step last completed

    # Called by the world

    def admitted(self, wanted: ClientRequest, choices: list[Sequence]) -> None:
        o, e = self.world.options, self.engine
        self.asked += wanted.params.n
        if e.draining or e.failed:
            raise Violation(f"{wanted.id} is admitted though the engine is draining or has failed")
        if wanted.id in self.live:
            raise Violation(f"{wanted.id} is admitted though its id is in use")
        new = [s for s in e.scheduler.waiting if s.started is None]
        if len(new) > o.max_waiting:
            raise Violation(f"{len(new)} new choices wait, max_waiting is {o.max_waiting}")
        if [s.index for s in choices] != list(range(wanted.params.n)):
            raise Violation(f"{wanted.id} has choices {[s.index for s in choices]}")
        self.live[wanted.id] = [Reader(wanted, s) for s in choices]

    def refused(self, wanted: ClientRequest, why: Exception) -> None:
        e = self.engine
        self.asked += wanted.params.n
        self.refusals += wanted.params.n
        self.probe = "refused" if wanted.id == "probe" else self.probe
        if isinstance(why, Refused):
            full = len(e.scheduler.waiting) + wanted.params.n > e.admission.max_waiting
            late = wanted.timeout is not None and bool(self.live)
            true = {"full": full, "late": late, "draining": e.draining, "failed": e.failed is not None}[why.reason]
            passing = why.retry_after is not None and 1 <= why.retry_after <= 60
            if not true or (why.reason in ("full", "late")) != passing:
                raise Violation(f"{wanted.id} is refused as {why.reason}, retry after {why.retry_after}")

    def resumed(self, resumption: Resumption, choices: list[Sequence]) -> None:
        """A request goes on in new sequences: as it was, with the time that is left."""
        r, now = resumption.request, self.engine.clock.now
        self.asked += len(choices)
        readers = {reader.index: reader for reader in self.live[r.id] if not reader.ended}
        if {s.index for s in choices} != readers.keys():
            raise Violation(
                f"{r.id}: choices {[s.index for s in choices]} are resumed, {sorted(readers)} had not ended"
            )
        started = any(reader.sequence.started is not None for reader in readers.values())
        for s in choices:
            reader = readers[s.index]
            if (s.seed, s.output) != (reader.sequence.seed, reader.output):
                raise Violation(
                    f"{r.id} is resumed with seed {s.seed} after {s.output}, its client saw {reader.output}"
                )
            before = reader.deadline() if not started else reader.arrived + (reader.wanted.timeout or math.inf)
            reader = copy(reader)  # a step under way has the old one
            reader.sequence, reader.failures, reader.losses = s, 0, 0
            reader.brought = len(s.output)
            reader.wanted = replace(reader.wanted, timeout=r.timeout, queue_timeout=r.queue_timeout)
            self.live[r.id][s.index] = reader
            if before > now and not math.isclose(reader.deadline(), before, abs_tol=1e-6):
                raise Violation(f"{r.id} is resumed with deadline {reader.deadline()}, it was {before}")

    def not_resumed(self, id: str, why: Exception) -> None:
        left = [reader for reader in self.live.pop(id) if not reader.ended]
        self.asked += len(left)
        self.refusals += len(left)
        self.probe = "refused" if id == "probe" else self.probe
        if not isinstance(why, Refused):
            raise Violation(f"{id} is not resumed: {why}")

    def observe(self, event: Event) -> None:
        readers = self.live.get(event.request)
        if readers is None or event.index >= len(readers) or readers[event.index].ended:
            raise Violation(f"an event for what has ended or never was: {event}")
        reader = readers[event.index]
        if event.prompt is not None:
            self._prompt(reader, event)
        if event.token is not None:
            reader.take(event.token)
            self.tokens += 1
        if event.scored and len(event.scored.top) != reader.wanted.params.logprobs:
            raise Violation(f"{len(event.scored.top)} likeliest tokens, {reader.wanted.params.logprobs} were asked for")
        if event.finish_reason is not None:
            self._end(reader, event)

    def before_step(self) -> None:
        self.began = max(self.engine.clock.now, self.world.now + self.world.skew)
        self.running = {id(s) for s in self.engine.scheduler.running}

    def before_launch(self, batch: Batch) -> list[Reader]:
        """Check a batch: within limits, before deadlines, and without K/V or state of another salt.

        Returns its choices.
        """
        o = self.world.options
        if batch.tokens.tolist() == [0] and not self.engine.pool.refcounts[block := int(batch.block_table[0, 0])]:
            self.salts[block] = "written by a test"  # the test step of a new device
            self.state_salts[int(batch.state_to[0])] = "written by a test"
            return []
        if len(batch.tokens) > o.max_batch_tokens or len(batch.q_len) > o.max_sequences:
            raise Violation(f"a step of {len(batch.tokens)} tokens of {len(batch.q_len)} sequences")
        owners = {s.blocks[-1]: s for s in self.engine.scheduler.running}
        launched: list[Reader] = []
        states = zip(batch.state_from.tolist(), batch.state_to.tolist(), strict=True)
        per_sequence = zip(batch.block_table.tolist(), batch.q_len, batch.context_len, states, strict=True)
        for row, n, context, (state, next_state) in per_sequence:
            held = [b for b in row if b >= 0]
            s = owners.get(held[-1])
            if s is None or s.blocks != held:
                raise Violation(f"blocks {held} go to the device, and no running sequence holds them")
            launched.append(self.live[s.request.id][s.index])
            launched[-1].had_drafts = int(context) > s.length
            if (due := launched[-1].deadline()) <= self.began:
                raise Violation(f"{s.request.id} is launched at {self.began}, its deadline was {due}")
            first = (int(context) - int(n)) // o.page_tokens
            for at, block in enumerate(held[: -(-int(context) // o.page_tokens)]):
                if at >= first:
                    self.salts[block] = s.request.salt
                elif self.salts.get(block, s) != s.request.salt:
                    raise Violation(f"{s.request.id} of salt {s.request.salt} reads block {block} of another salt")
            if state >= 0 and self.state_salts[state] != s.request.salt:
                raise Violation(f"{s.request.id} of salt {s.request.salt} reads state {state} of another salt")
            self.state_salts[next_state] = s.request.salt
        return launched

    def after_launch(self, launched: list[Reader], wrong: DeviceError | None, alone: bool) -> None:
        """Record which sequences failed or lost the device while alone; only that may end them with a fault."""
        self.restarts = self.restarts if wrong else 0
        for r in launched:
            r.failures = r.failures + 1 if len(launched) == 1 and wrong and not lost(wrong) else 0
            r.losses += len(launched) == 1 and alone and lost(wrong)

    def after_step(self) -> None:
        e = self.engine
        try:
            check_invariants(e)
        except AssertionError as wrong:
            raise Violation(str(wrong)) from None
        first = min((s.order for s in e.scheduler.waiting), default=None)
        for s in e.scheduler.running:
            if id(s) not in self.running and first is not None and s.order > first:
                raise Violation(f"{s.request.id} was started before one that should go first")
        for s in sequences_of(e):
            reader = self.live[s.request.id][s.index]
            if s.output != reader.output:
                raise Violation(f"{s.request.id}: the engine holds {s.output}, its client saw {reader.output}")
            if s.state != "ended" and reader.deadline() <= self.began:
                raise Violation(f"{s.request.id} lives on after a step that began past its deadline")
        self._counts()

    def after_abort(self, id: str) -> None:
        if id in self.engine.requests:
            raise Violation(f"{id} lives on after its abort")

    def at_end(self) -> None:
        e = self.engine
        if self.live or e.pool.held:
            raise Violation(f"at the end {sorted(self.live)} have not ended, {e.pool.held} blocks are held")
        if e.failed is None and e.counts.faults["worker"] != e.counts.restarts:
            raise Violation(f"{e.counts.faults['worker']} devices lost, {e.counts.restarts} restarts")
        if self.world.healed and self.probe not in ("length", "refused") and e.failed is None:
            raise Violation(f"after all was healed a plain request ends with {self.probe}")

    def tokens_of(self, id: str) -> int:
        return sum(len(r.output) for r in self.live.get(id, []))

    # Rules

    def _prompt(self, reader: Reader, event: Event) -> None:
        scored = [s.token for s in event.prompt or ()]
        if reader.output or reader.wanted.params.prompt_logprobs is None or scored != list(reader.wanted.prompt[1:]):
            raise Violation(f"the prompt's scores come late, unasked or for other tokens: {event}")

    def _end(self, r: Reader, e: Event) -> None:
        """The finish reason is known and true."""
        w, fault = r.wanted, e.fault
        if e.finish_reason not in REASONS or (fault is not None) != (e.finish_reason == "error") or e.usage is None:
            raise Violation(f"an end without what belongs to it: {e}")
        ends_itself = r.stopping or len(r.ids) + len(r.output) > self.engine.program.context
        scored = w.scored and e.finish_reason == "length"
        truths: dict[str, Any] = {
            "stop": r.stopping,
            "length": ends_itself or scored,
            "abort": w.id in self.world.asked_to_abort,
            "deadline": r.deadline() <= self.engine.clock.now,
            "error": fault is not None and self._blamed(r, fault.kind),
        }
        if not truths[e.finish_reason]:
            raise Violation(f"{w.id} ends with {e.finish_reason}, which is not so: {e}")
        u = e.usage
        if (u.prompt_tokens, u.output_tokens) != (len(w.prompt), len(r.output)) or u.cached_tokens >= len(w.prompt):
            raise Violation(f"usage does not add up: {e}")
        times = [t for t in (u.arrived, u.started, u.first_token, u.ended) if t is not None]
        if times != sorted(times) or (u.first_token is not None) != bool(r.output[r.brought :]):
            raise Violation(f"times are out of order: {e}")
        r.ended = True
        self.finished[e.finish_reason] += 1
        self.probe = e.finish_reason if w.id == "probe" else self.probe
        if all(other.ended for other in self.live[w.id]):
            del self.live[w.id]

    def _blamed(self, r: Reader, kind: str) -> bool:
        """Whether a request may end with a fault of this kind: nobody pays for another."""
        if kind == "request":
            return r.wanted.breaks_at is not None or self.world.options.faults.nan > 0
        if kind == "step":
            return r.failures >= 2 and not r.had_drafts
        return (r.losses >= 2 and not r.had_drafts) or (
            self.engine.failed is not None and self.restarts >= self.world.options.max_restarts
        )

    def _counts(self) -> None:
        c = self.engine.counts
        if (self.tokens, self.asked, self.finished) != (c.output_tokens, c.received, c.finished):
            raise Violation(f"clients saw {self.tokens} tokens and {self.finished}, the engine counts {c}")
        if self.refusals != c.refused.total():
            raise Violation(f"{self.refusals} were refused, the engine counts {c.refused}")
