"""One simulated history: clients, a device with faults, a clock, and the engine as it is shipped between them."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from serving import VOCABULARY, smallest_program

from intaglio.batch import Batch, Sampling
from intaglio.devices import ArrayWeights, DeviceError, DeviceLost, StateSpec, StepResult, open_device
from intaglio.devices.oracle import expected
from intaglio.runtime import Engine, Event, Refused, Request, RequestError, SamplingParams, Sequence
from intaglio.runtime.sampling import edits
from simulation.options import KILLER, PLAIN, POISON, Faults, Options, Wish, draw_options, draw_wish

PROGRAM = smallest_program()
ORACLE = open_device("oracle")
MOST_STEPS = 4000
HEALTHY_STEPS = 30  # and two a token, prompt or output: recomputing after preemption is bounded by that in practice


class Violation(BaseException):
    """A rule of rules.py, or of the engine's own invariants, does not hold. No Exception: the engine forgives those."""


class Congruent:
    """A grammar that a client may ask for: after k tokens of sum s, only ids with (id + s + k) % m == 0."""

    def __init__(self, m: int, breaks_at: int | None = None, history: Iterable[int] = ()) -> None:
        self.m, self.breaks_at, self.history = m, breaks_at, list(history)

    def allows(self, token: int) -> bool:
        return (token + sum(self.history) + len(self.history)) % self.m == 0

    def mask(self) -> np.ndarray:
        if len(self.history) == self.breaks_at:
            raise RuntimeError("the grammar broke")
        words = np.zeros((VOCABULARY + 31) // 32, np.uint32)
        for token in filter(self.allows, range(VOCABULARY)):
            words[token // 32] |= np.uint32(1 << token % 32)
        return words

    def advance(self, token: int) -> bool:
        allowed = self.allows(token)
        if allowed:
            self.history.append(token)
        return allowed

    def rollback(self, n: int) -> None:
        del self.history[len(self.history) - n :]


class FaultyDevice:
    """The oracle, taking virtual time, and failing as the world's faults say. A lost one is never called again."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.inner = ORACLE.load(PROGRAM, ArrayWeights({}), StateSpec(world.options.pages, world.options.page_tokens))
        self.program, self.state = self.inner.program, self.inner.state
        self.lost = False

    def step(self, batch: Batch, **kwargs: Any) -> StepResult:
        if self.lost:
            raise Violation("a device that was lost is called again")
        self.world.before_launch(batch)
        try:
            result = self._step(batch, **kwargs)
        except DeviceError as e:
            self.lost = isinstance(e, DeviceLost)
            self.world.after_launch(e)
            raise
        self.world.after_launch(None)
        return result

    def _step(self, batch: Batch, **kwargs: Any) -> StepResult:
        world, rng, faults = self.world, self.world.rng, self.world.faults
        world.now += (0.5 + len(batch.tokens) / 32) * (10 if rng.random() < faults.slow else 1)
        fate, late = rng.random(), rng.random() < 0.5
        if fate < faults.lost or KILLER in batch.tokens:
            if late:
                self.inner.step(batch, **kwargs)
            raise DeviceLost("its process died")
        if rng.random() < faults.scarce and len(batch.tokens) > 2:
            raise DeviceError(f"no memory for {len(batch.tokens)} rows")
        if rng.random() < faults.fail or POISON in batch.tokens:
            if late:
                self.inner.step(batch, **kwargs)
            raise DeviceError("it burns")
        result = self.inner.step(batch, **kwargs)
        bad = [rng.random() < faults.nan for _ in batch.rows] if faults.nan else []
        return replace(result, tokens=np.where(bad, -1, result.tokens)) if any(bad) else result


class World:
    """Runs one seed. `plant` may break the engine before it starts; `watch` is a rule book (see rules.py)."""

    def __init__(self, seed: int, plant: Callable[[World], None] | None, watch: Callable[[World], Any]) -> None:
        self.rng = random.Random(seed)
        self.options: Options = draw_options(self.rng)
        self.faults: Faults = self.options.faults
        self.now = self.skew = 0.0
        self.lines: list[str] = []
        self.journal: list[dict[str, Any]] = []  # the engine's own record
        self.asked: list[Wish] = []
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.pushed = 0
        o = self.options
        self.engine = Engine(
            FaultyDevice(self), clock=lambda: self.now + self.skew, rng=random.Random(seed), restart=self._restart,
            max_batch_tokens=o.max_batch_tokens, max_sequences=o.max_sequences, max_waiting=o.max_waiting,
            max_drafts=o.max_drafts, max_restarts=o.max_restarts, journal=self.journal.append,
        )  # fmt: skip
        self.wishes: dict[str, Wish] = {}  # of what was admitted and has not ended
        self.asked_to_abort: set[str] = set()
        self.healed = False
        self.tokens_wanted = 0  # by all that was admitted
        self.rules = watch(self)
        if plant:
            plant(self)
        families = [[self.rng.randrange(90) for _ in range(self.rng.randint(2, 20))] for _ in range(2)]
        for i in range(o.requests):
            wish = draw_wish(self.rng, i, o, families, self.rng.uniform(0, o.spread))
            self.at(wish.at, lambda wish=wish: self._ask(wish))
        if o.drain_at is not None:
            self.at(o.drain_at, self._drain)
        if o.heal_at is not None:
            self.at(o.heal_at, self._heal)

    def log(self, line: str) -> None:
        self.lines.append(f"{self.now:.4f} {line}")

    def at(self, time: float, action: Callable[[], None]) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (time, self.pushed, action))

    def run(self) -> None:
        """To the end of everything. Raises Violation, or whatever the engine should not have raised."""
        steps = healthy = 0
        self.log(repr(self.options))
        while self.heap or not self.engine.idle:
            while self.heap and (self.engine.idle or self.heap[0][0] <= self.now):
                time, _, action = heapq.heappop(self.heap)
                self.now = max(self.now, time)
                action()
            if self.rng.random() < self.faults.jump:
                self.skew += self.rng.uniform(-30, 30)
                self.log(f"the clock is off by {self.skew:.4f}")
            self.rules.before_step()
            self.take(self.engine.step())
            self.rules.after_step()
            steps, healthy = steps + 1, healthy + self.healed
            if steps > MOST_STEPS or healthy > HEALTHY_STEPS + 2 * self.tokens_wanted:
                raise Violation(f"no end after {steps} steps, {healthy} of them with nothing failing")
        self.rules.at_end()

    def before_launch(self, batch: Batch) -> None:
        self.log(f"launch {batch.tokens.tolist()} at {batch.slots.tolist()} rows {batch.rows.tolist()}")
        self.rules.before_launch(batch)

    def after_launch(self, wrong: DeviceError | None) -> None:
        if wrong:
            self.log(repr(wrong))
        self.rules.after_launch(wrong)

    def take(self, events: list[Event]) -> None:
        """What clients get, and what they do about it."""
        for e in events:
            self.log(str(e))
            self.rules.saw(e)
            wish = self.wishes.get(e.request)
            if wish and wish.leaves_after is not None and self.rules.tokens_of(e.request) >= wish.leaves_after:
                self.at(self.now, lambda id=e.request: self.abort(id))
            if e.finish_reason and e.request not in self.engine.requests:
                self.wishes.pop(e.request, None)

    def abort(self, id: str) -> None:
        self.log(f"abort {id}")
        self.asked_to_abort.add(id)
        self.take(self.engine.abort(id))
        self.rules.after_abort(id)

    def _ask(self, wish: Wish) -> None:
        self.log(f"ask {wish}")
        self.asked.append(wish)
        try:
            choices = self.engine.add(self.request(wish))
        except (RequestError, Refused) as e:
            self.log(f"refused: {e!r}")
            self.rules.refused(wish, e)
            return
        self.wishes[wish.id] = wish
        self.tokens_wanted += wish.params.n * (len(wish.prompt) + wish.params.max_tokens)
        self.asked_to_abort.discard(wish.id)
        self.rules.admitted(wish, choices)
        for s in choices:
            s.lookup = Oracular(self.rng, wish, s)  # type: ignore[assignment]
        if wish.abort_at is not None:
            self.at(wish.abort_at, lambda: self.abort(wish.id))

    @staticmethod
    def request(w: Wish) -> Request:
        return Request(
            w.id, w.prompt, w.params, w.eos, stopped=lambda index: Stop(w.stop_at, w.breaks_at), scored=w.scored,
            matcher=grammar_of(w), priority=w.priority, queue_timeout=w.queue_timeout, timeout=w.timeout, salt=w.salt,
        )  # fmt: skip

    def _drain(self) -> None:
        self.log("drain")
        self.engine.drain()

    def _heal(self) -> None:
        self.log("everything is healed")
        self.faults = Faults()
        self.healed = True
        plain = SamplingParams(max_tokens=3)
        probe = Wish(
            self.now, "probe", (1, 2, 3), plain, frozenset(), 0, None, None, None, False, None, None, None, None
        )
        self._ask(probe)

    def _restart(self) -> FaultyDevice:
        self.now += 2.0
        self.rules.restarts += 1
        if self.rng.random() < self.faults.no_restart:
            self.log("no restart")
            raise OSError("no process to be had")
        self.log("restart")
        return FaultyDevice(self)


class Oracular:
    """Guesses that are mostly right: nothing the oracle says ever repeats, so looking it up would find nothing."""

    def __init__(self, rng: random.Random, wish: Wish, sequence: Sequence) -> None:
        self.rng, self.wish, self.sequence = rng, wish, sequence

    def propose(self, tokens: list[int], most: int) -> list[int]:
        p, n, drafts = self.wish.params, len(self.wish.prompt), list[int]()
        for _ in range(most):
            output = [*tokens[n:], *drafts]
            mask = Congruent(int(p.grammar.text), history=output).mask() if p.grammar else None
            edited = edits(p, self.wish.prompt, output)
            drawn = Sampling(p.temperature, seed=self.sequence.seed, edits=edited, mask=mask)
            right = expected([*tokens, *drafts], VOCABULARY, drawn)
            drafts.append(right if self.rng.random() < 0.7 else self.rng.randrange(PLAIN))
        return drafts


class Stop:
    """A client's stop function: yes to multiples of `at`; raises at its token of number `breaks_at`."""

    def __init__(self, at: int | None, breaks_at: int | None) -> None:
        self.at, self.breaks_at, self.told = at, breaks_at, 0

    def __call__(self, token: int) -> bool:
        self.told += 1
        if self.told == self.breaks_at:
            raise RuntimeError("the stop function broke")
        return self.at is not None and token % self.at == 0


def grammar_of(w: Wish) -> Callable[[int], Congruent] | None:
    grammar = w.params.grammar
    return (lambda index: Congruent(int(grammar.text), w.breaks_at)) if grammar else None


def sequences_of(engine: Engine) -> list[Sequence]:
    """All choices of what has not ended."""
    return [s for choices in engine.requests.values() for s in choices]
