"""World: simulates one seed. Runs the real engine with simulated clients, a device with faults and a virtual clock."""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from support.serving import VOCABULARY, smallest_program

from intaglio.batch import Batch, Sampling
from intaglio.devices import (
    ArrayWeights,
    DeviceError,
    DeviceLost,
    Executable,
    PendingStep,
    StateSpec,
    StepRequest,
    StepResult,
    open_device,
)
from intaglio.devices.oracle import STALE, OracleExecutable, expected
from intaglio.runtime import (
    Engine,
    Event,
    RecordedEngine,
    Refused,
    Request,
    RequestError,
    Resumption,
    SamplingParams,
    Sequence,
)
from intaglio.runtime.sampling import edits
from simulation.options import (
    KILLER,
    PLAIN,
    POISON,
    ClientRequest,
    Faults,
    Options,
    draw_options,
    draw_request,
    draw_windows,
)
from simulation.tier import SimulatedTier

PROGRAM = smallest_program()
ORACLE = open_device("oracle")
MOVES_LOST = 5  # times as often as in a step is the device lost while K/V blocks are moved
TIERED = 0.6  # of the seeds whose model has a prefix cache; their engines keep no journal
MOST_STEPS = 4000
MOST_MOVES = 30
HEALTHY_STEPS = 30  # plus two per prompt or output token, which bounds recomputation after preemption in practice


class Violation(BaseException):
    """A rule of rules.py or an invariant of the engine does not hold.

    Not an Exception, because the engine catches those.
    """


class Congruent:
    """A grammar: after k tokens with sum s, it allows the ids with (id + s + k) % m == 0."""

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


@dataclass
class FaultyStep:
    """A launched step with its outcome, which nobody knows before its result is taken."""

    device: FaultyDevice
    launched: list[Any]
    outcome: StepResult | DeviceError

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        """Tell the outcome, or that the device was lost in a later step."""
        device = self.device
        if device.lost and device.rng.random() < 0.5:
            self.outcome = device.lost
        device.under_way.remove(self)
        wrong = self.outcome if isinstance(self.outcome, DeviceError) else None
        device.known |= isinstance(wrong, DeviceLost)
        device.world.after_launch(self.launched, wrong, alone=not device.under_way)
        if isinstance(self.outcome, DeviceError):
            raise self.outcome
        return self.outcome


class FaultyDevice(Executable):
    """The oracle with virtual step times and the world's faults. Calling it after its loss is known is a Violation.

    after: the lost device whose K/V this one has.
    """

    def __init__(self, world: World, after: FaultyDevice | None = None) -> None:
        self.world = world
        state = StateSpec(world.options.pages, world.options.page_tokens, world.options.slots, *world.windows)
        self.inner = after.inner if after else ORACLE.load(PROGRAM, ArrayWeights({}), state)
        self.state_kept = after is not None
        self.program, self.state, self.depth = self.inner.program, self.inner.state, world.options.depth
        self.rng = world.rng
        self.lost: DeviceLost | None = None
        self.known = False  # the engine has been told
        self.under_way: list[FaultyStep] = []

    def launch(self, request: StepRequest) -> PendingStep:
        if self.known:
            raise Violation("a device that was lost is called again")
        launched = self.world.before_launch(request.batch)
        for other in self.under_way:
            if any(r in other.launched and r.sequence.state != "ended" for r in launched):
                raise Violation("a sequence is launched that is in flight")
        outcome: StepResult | DeviceError
        try:
            if self.lost:
                raise self.lost
            outcome = self.fail_or_step(request)
        except DeviceError as e:
            self.lost = e if isinstance(e, DeviceLost) else None
            outcome = e
        self.under_way.append(FaultyStep(self, launched, outcome))
        if len(self.under_way) > self.depth:
            raise Violation(f"{len(self.under_way)} steps are under way on {self.depth} stages")
        return self.under_way[-1]

    @property
    def block_bytes(self) -> int:
        return self.inner.block_bytes

    def read_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        self.fail_or_move()
        return self.inner.read_blocks(blocks)

    def write_blocks(self, blocks: Sequence[int], contents: np.ndarray) -> None:
        tier, salts, rng = self.world.tier, self.world.rules.salts, self.rng
        assert tier
        try:
            self.fail_or_move()
        except DeviceError:
            if rng.random() < 0.5:  # it had begun to write
                self.inner.write_blocks(blocks[:1], contents[:1])
            raise
        self.inner.write_blocks(blocks, contents)
        salts.update({b: tier.loaded.get(x.tobytes(), "of no load") for b, x in zip(blocks, contents, strict=True)})
        self.world.log(f"blocks {list(blocks)} are loaded")

    def fail_or_move(self) -> None:
        """Take some time to move K/V blocks. Raises DeviceError or DeviceLost by the world's faults."""
        if self.known:
            raise Violation("a device that was lost is called again")
        if self.lost is None and self.rng.random() < MOVES_LOST * self.world.faults.lost:
            self.lost = DeviceLost("its process died")
        if self.lost:
            self.known = True
            raise self.lost
        if self.rng.random() < self.world.faults.fail:
            raise DeviceError("it burns")

    def fail_or_step(self, request: StepRequest) -> StepResult:
        batch = request.batch
        world, rng, faults = self.world, self.world.rng, self.world.faults
        world.now += (0.5 + len(batch.tokens) / 32) * (10 if rng.random() < faults.slow else 1)
        fate, late = rng.random(), rng.random() < 0.5
        if fate < faults.lost or KILLER in batch.tokens:
            if late:
                self.inner.step(request)
            else:  # it had begun to write
                assert isinstance(self.inner, OracleExecutable)
                self.inner.links[[slot for slot in batch.slots if rng.random() < 0.5]] = STALE
                self.inner.window_links[[slot for slot in batch.window_slots if rng.random() < 0.5]] = STALE
            raise DeviceLost("its process died")
        if rng.random() < faults.scarce and len(batch.tokens) > 2:
            raise DeviceError(f"no memory for {len(batch.tokens)} rows")
        if rng.random() < faults.fail or POISON in batch.tokens:
            if late:
                self.inner.step(request)
            raise DeviceError("it burns")
        result = self.inner.step(request)
        bad = [rng.random() < faults.nan for _ in batch.rows] if faults.nan else []
        return replace(result, tokens=np.where(bad, -1, result.tokens)) if any(bad) else result


class World:
    """Runs one seed. `plant` may break the engine before it starts; `watch` makes the rules (see rules.py)."""

    def __init__(self, seed: int, plant: Callable[[Engine], None] | None, watch: Callable[[World], Any]) -> None:
        self.rng = random.Random(seed)
        self.options: Options = draw_options(self.rng)
        self.faults: Faults = self.options.faults
        self.now = self.skew = 0.0
        self.lines: list[str] = []
        self.journal: list[dict[str, Any]] = []  # the engine's own journal
        self.asked: list[ClientRequest] = []
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.pushed = 0
        o = self.options
        tiered = not o.slots and random.Random(f"tiered {seed}").random() < TIERED
        self.tier = SimulatedTier(self, seed) if tiered else None
        self.windows = (0, 0) if tiered else draw_windows(random.Random(f"windows {seed}"), o)
        kind: Any = (
            partial(Engine, connector=self.tier) if tiered else partial(RecordedEngine, journal=self.journal.append)
        )
        self.engine: Engine = kind(
            FaultyDevice(self), clock=lambda: self.now + self.skew, rng=random.Random(seed), restart=self._restart,
            max_batch_tokens=o.max_batch_tokens, max_sequences=o.max_sequences, max_waiting=o.max_waiting,
            max_drafts=o.max_drafts, checkpoint_blocks=o.checkpoint_blocks, max_restarts=o.max_restarts,
        )  # fmt: skip
        self.client_requests: dict[str, ClientRequest] = {}  # of what was admitted and has not ended
        self.asked_to_abort: set[str] = set()
        self.healed = False
        self.tokens_wanted = 0  # prompt and output tokens of all admitted requests
        self.rules = watch(self)
        if plant:
            plant(self.engine)
        families = [[self.rng.randrange(90) for _ in range(self.rng.randint(2, 20))] for _ in range(2)]
        for i in range(o.requests):
            wanted = draw_request(self.rng, i, o, families, self.rng.uniform(0, o.spread))
            self.at(wanted.at, lambda wanted=wanted: self._ask(wanted))
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
        """Run until all is done. Raises Violation, or an exception that the engine should not have raised."""
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
            if self.may_move and self.engine.requests and self.rng.random() < self.options.moves:
                self.move(self.rng.choice(list(self.engine.requests)))
            if self.tier and self.tier.rng.random() < self.tier.forgets:
                self.engine.pool.release(self.engine.pool.allocate(self.engine.pool.available))  # all are evicted
            loading = self.engine.offload.loading
            if loading and loading.sequence.state == "waiting" and self.may_move and self.rng.random() < 0.2:
                self.move(loading.sequence.request.id)  # it goes to the end of the queue
            self.rules.before_step()
            self.take(self.engine.step())
            self.rules.after_step()
            steps, healthy = steps + 1, healthy + self.healed
            if steps > MOST_STEPS or healthy > HEALTHY_STEPS + 2 * self.tokens_wanted:
                raise Violation(f"no end after {steps} steps, {healthy} of them with nothing failing")
        self.rules.at_end()

    @property
    def may_move(self) -> bool:
        """Whether requests are still moved: for ever, one that loses its K/V each time might never come to its end."""
        return not self.healed and self.engine.counts.suspended < MOST_MOVES

    def before_launch(self, batch: Batch) -> list[Any]:
        self.log(f"launch {batch.tokens.tolist()} at {batch.slots.tolist()} rows {batch.rows.tolist()}")
        launched: list[Any] = self.rules.before_launch(batch)
        return launched

    def after_launch(self, launched: list[Any], wrong: DeviceError | None, alone: bool) -> None:
        if wrong:
            self.log(repr(wrong))
        self.rules.after_launch(launched, wrong, alone)

    def take(self, events: list[Event]) -> None:
        """Deliver events to clients, and act as they do."""
        for e in events:
            self.log(str(e))
            self.rules.observe(e)
            wanted = self.client_requests.get(e.request)
            if wanted and wanted.leaves_after is not None and self.rules.tokens_of(e.request) >= wanted.leaves_after:
                self.at(self.now, lambda id=e.request: self.abort(id))
            if e.finish_reason and e.request not in self.engine.requests:
                self.client_requests.pop(e.request, None)

    def abort(self, id: str) -> None:
        self.log(f"abort {id}")
        self.asked_to_abort.add(id)
        self.take(self.engine.abort(id))
        self.rules.after_abort(id)

    def move(self, id: str) -> None:
        """Suspend a request and resume it, as if on another engine: through JSON, and with new functions."""
        self.log(f"move {id}")
        suspended = self.engine.suspend(id)
        assert suspended, f"{id} is live"
        read, wanted = Resumption.from_dict(json.loads(json.dumps(suspended.as_dict()))), self.client_requests[id]
        functions = {"stop_checker": self.request(wanted).stop_checker, "matcher": self.request(wanted).matcher}
        again = replace(read, request=replace(read.request, **functions))
        try:
            choices = self.engine.resume(again)
        except (RequestError, Refused) as e:
            self.log(f"not resumed: {e!r}")
            del self.client_requests[id]
            self.rules.not_resumed(id, e)
            return
        self.tokens_wanted += sum(s.length for s in choices)
        self.rules.resumed(again, choices)
        for s in choices:
            s.lookup = OracleDrafts(self.rng, wanted, s)  # type: ignore[assignment]

    def _ask(self, wanted: ClientRequest) -> None:
        self.log(f"ask {wanted}")
        self.asked.append(wanted)
        try:
            choices = self.engine.add(self.request(wanted))
        except (RequestError, Refused) as e:
            self.log(f"refused: {e!r}")
            self.rules.refused(wanted, e)
            return
        self.client_requests[wanted.id] = wanted
        self.tokens_wanted += wanted.params.n * (len(wanted.prompt) + wanted.params.max_tokens)
        self.asked_to_abort.discard(wanted.id)
        self.rules.admitted(wanted, choices)
        for s in choices:
            s.lookup = OracleDrafts(self.rng, wanted, s)  # type: ignore[assignment]
        if wanted.abort_at is not None:
            self.at(wanted.abort_at, lambda: self.abort(wanted.id))

    @staticmethod
    def request(w: ClientRequest) -> Request:
        return Request(
            w.id, w.prompt, w.params, w.eos, stop_checker=lambda index: Stop(w.stop_at, w.breaks_at), scored=w.scored,
            matcher=grammar_of(w), priority=w.priority, queue_timeout=w.queue_timeout, timeout=w.timeout, salt=w.salt,
        )  # fmt: skip

    def _drain(self) -> None:
        self.log("drain")
        self.engine.drain()

    def _heal(self) -> None:
        self.log("everything is healed")
        self.faults = Faults()
        if self.tier:
            self.tier.heal()
        self.healed = True
        plain = SamplingParams(max_tokens=3)
        probe = ClientRequest(
            self.now, "probe", (1, 2, 3), plain, frozenset(), 0, None, None, None, False, None, None, None, None
        )
        self._ask(probe)

    def _restart(self) -> FaultyDevice:
        self.now += 2.0
        self.rules.restarts += 1
        if self.rng.random() < self.faults.no_restart:
            self.log("no restart")
            raise OSError("no process to be had")
        lost = self.engine.executable.unwrapped()
        assert isinstance(lost, FaultyDevice)
        keeps = self.options.keeps and self.rng.random() >= self.faults.forgets
        self.log("restart, with its K/V" if keeps else "restart")
        return FaultyDevice(self, lost if keeps else None)


class OracleDrafts:
    """Proposes drafts that are mostly right.

    Prompt lookup would find nothing, because the oracle's output never repeats.
    """

    def __init__(self, rng: random.Random, wanted: ClientRequest, sequence: Sequence) -> None:
        self.rng, self.wanted, self.sequence = rng, wanted, sequence

    def propose(self, tokens: list[int], most: int) -> list[int]:
        p, n, drafts = self.wanted.params, len(self.wanted.prompt), list[int]()
        for _ in range(most):
            output = [*tokens[n:], *drafts]
            mask = Congruent(int(p.grammar.text), history=output).mask() if p.grammar else None
            edited = edits(p, self.wanted.prompt, output)
            drawn = Sampling(p.temperature, seed=self.sequence.seed, edits=edited, mask=mask)
            right = expected([*tokens, *drafts], VOCABULARY, drawn)
            drafts.append(right if self.rng.random() < 0.7 else self.rng.randrange(PLAIN))
        return drafts


class Stop:
    """A client's stop function: yes to multiples of `at`; raises at its token of number `breaks_at`."""

    def __init__(self, at: int | None, breaks_at: int | None) -> None:
        self.at, self.breaks_at, self.tokens_seen = at, breaks_at, 0

    def __call__(self, token: int) -> bool:
        self.tokens_seen += 1
        if self.tokens_seen == self.breaks_at:
            raise RuntimeError("the stop function broke")
        return self.at is not None and token % self.at == 0


def grammar_of(w: ClientRequest) -> Callable[[int], Congruent] | None:
    grammar = w.params.grammar
    return (lambda index: Congruent(int(grammar.text), w.breaks_at)) if grammar else None


def sequences_of(engine: Engine) -> list[Sequence]:
    """All choices of what has not ended."""
    return [s for choices in engine.requests.values() for s in choices]
