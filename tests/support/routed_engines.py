"""Shipped engines behind a Router in virtual time, under users who converse in a closed loop. Used by tests.

The device computes nothing: a step lasts as long as the replica's step model and its noise say. Scheduling, K/V blocks,
prefix cache, latency estimates and block events are those of the shipped engine; load reports come as in a cluster.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import numpy as np
from support.serving import VOCABULARY, smallest_program

from intaglio.batch import Batch
from intaglio.cluster.backends import OUTPUT_FIRST, OUTPUT_SHARE, POLL, apply_blocks, read_report
from intaglio.cluster.prompt import TimeLimits, make_job
from intaglio.devices import BlockingExecutable, StateSpec, StepRequest, StepResult
from intaglio.router import Job, Placement, Router
from intaglio.runtime import Engine, Request, SamplingParams
from intaglio.server.control import block_changes, engine_report

BLOCK = 32  # tokens of a K/V block
PROGRAM = smallest_program(context=8192)


@dataclass(frozen=True)
class StepModel:
    """Seconds of a step: per_step + per_token * token rows, times a lognormal factor of width `noise`.

    cold: seconds that the replica's first step takes more. slow: factor of all steps.
    """

    per_step: float = 0.02
    per_token: float = 0.001
    noise: float = 0.0
    cold: float = 0.0
    slow: float = 1.0


class Timed(BlockingExecutable):
    """A device that takes virtual time and draws tokens at random."""

    def __init__(self, model: StepModel, pages: int, rng: random.Random) -> None:
        self.program, self.state = PROGRAM, StateSpec(pages, BLOCK)
        self.model, self.rng, self.now, self.cold = model, rng, 0.0, model.cold

    def seconds(self, batch: Batch) -> float:
        m = self.model
        seconds = (m.per_step + m.per_token * len(batch.tokens)) * m.slow * self.rng.lognormvariate(0.0, m.noise)
        seconds, self.cold = seconds + self.cold, 0.0
        return seconds

    def run(self, request: StepRequest) -> StepResult:
        self.now += self.seconds(request.batch)
        rows = len(request.batch.rows)
        tokens = [self.rng.randrange(VOCABULARY) for _ in range(rows)]
        return StepResult(np.array(tokens, np.int32), np.zeros(rows, np.float32))


class EngineReplica:
    """An engine with its virtual clock. arrived: requests that came during a step."""

    def __init__(self, name: str, model: StepModel, kv_tokens: int, seed: int) -> None:
        self.name, self.stepping, self.arrived = name, False, list[Request]()
        self.device = Timed(model, kv_tokens // BLOCK, random.Random(f"{name} {seed}"))
        self.engine = Engine(
            self.device, clock=lambda: self.device.now, rng=random.Random(seed), incarnation=f"{name} {seed}"
        )

    def load(self, incarnation: str | None, after: int) -> dict[str, Any]:
        """What a replica reports, as server.control.load_report() makes it."""
        report = engine_report(self.engine, self.engine.gauges(), self.engine.counts) | {"tier": {}}
        return report | block_changes(self.engine, after if incarnation == report["incarnation"] else None)


@dataclass(frozen=True)
class Talk:
    """What users do: lengths in tokens, times in seconds, as the options of bench/router.py."""

    users: int = 12
    turns: int = 4
    systems: int = 2
    system: int = 330
    own: int = 60
    turn: int = 20
    output: int = 16
    stagger: float = 0.0
    think: float = 0.0
    warm: int = 6  # requests that are sent one at a time before: in turns of a few tokens and of `system`


@dataclass
class Sent:
    """A request under way. then: called at its end with the prompt and its output."""

    job: Job
    prompt: list[int]
    at: float
    then: Callable[[list[int]], None]
    counts: bool
    output: list[int] = field(default_factory=list)


class EngineFleet:
    """Engines behind a router, and users. run() returns when the last user has ended.

    joins: second at which the last replica begins to serve.

    Attributes:
        ttft: seconds of all requests of users, in order of their first tokens.
        cached: prompt tokens of each that the engine had cached.
        placed: the Placements of all requests of users.
        seconds: from the first user's beginning to the last one's end.
    """

    def __init__(
        self, router: Router, models: list[StepModel], talk: Talk, kv_tokens: int = 16384, seed: int = 0,
        joins: float = 0.0,
    ) -> None:  # fmt: skip
        self.router, self.talk, self.rng, self.seed = router, talk, random.Random(seed), seed
        self.replicas = {f"r{i}": EngineReplica(f"r{i}", m, kv_tokens, seed) for i, m in enumerate(models)}
        self.now, self.pushed, self.live = 0.0, 0, dict[str, Sent]()
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.ttft, self.cached, self.placed = list[float](), list[int](), list[Placement]()
        self.output_tokens, self.left, self.seconds, self.sent = OUTPUT_FIRST, talk.users, 0.0, 0
        for name in self.replicas:
            router.add_replica(name)
            self.at(joins if name == f"r{len(models) - 1}" else 0.0, lambda name=name: self._poll(name))

    @property
    def mean_ttft(self) -> float:
        return mean(self.ttft)

    def at(self, time: float, action: Callable[[], None]) -> None:
        self.pushed += 1
        heapq.heappush(self.agenda, (time, self.pushed, action))

    def run(self) -> EngineFleet:
        self.at(0.0, lambda: self._warm(self.talk.warm))
        while self.left:
            self.now, _, action = heapq.heappop(self.agenda)
            action()
        return self

    # Users

    def _words(self, rng: random.Random, n: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(n)]

    def _warm(self, left: int) -> None:
        if not left:
            return self._begin()
        prompt = self._words(self.rng, 20 if left % 2 == 0 else self.talk.system)
        self._send(prompt, 1, lambda _: self._warm(left - 1), counts=False)

    def _begin(self) -> None:
        talk = self.talk
        systems = [self._words(self.rng, talk.system) for _ in range(talk.systems)]
        system_of = [n % max(1, talk.systems) for n in range(talk.users)]
        self.rng.shuffle(system_of)
        self.began = self.now
        for n in range(talk.users):
            rng = random.Random(f"{self.seed} {n}")
            prompt = [*(systems[system_of[n]] if systems else ()), *self._words(rng, talk.own)]
            self.at(self.now + rng.random() * talk.stagger, lambda p=prompt, r=rng: self._turn(p, talk.turns, r))

    def _turn(self, prompt: list[int], left: int, rng: random.Random) -> None:
        talk = self.talk

        def then(output: list[int]) -> None:
            if left == 1:
                self.left -= 1
                self.seconds = self.now - self.began
                return
            longer = [*prompt, *output, *self._words(rng, talk.turn)]
            think = rng.expovariate(1 / talk.think) if talk.think else 0.002
            self.at(self.now + think, lambda: self._turn(longer, left - 1, rng))

        self._send(prompt, talk.output, then)

    def _send(self, prompt: list[int], output: int, then: Callable[[list[int]], None], counts: bool = True) -> None:
        self.sent += 1
        body = {"prompt": prompt, "max_tokens": output}
        id = f"j{self.sent}"
        job = make_job(id, body, self.router.memory, self.now, TimeLimits(None, None), "", self.output_tokens)
        self.live[id] = Sent(job, prompt, self.now, then, counts)
        if placement := self.router.place(job, self.now):
            self._placed(placement)

    # Router and replicas

    def _pump(self) -> None:
        for placement in self.router.dispatch(self.now):
            self._placed(placement)

    def _placed(self, placement: Placement) -> None:
        sent, replica = self.live[placement.job.id], self.replicas[placement.replica]
        if sent.counts:
            self.placed.append(placement)
        params = SamplingParams(max_tokens=self.talk.output if sent.counts else 1)
        replica.arrived.append(Request(placement.job.id, sent.prompt, params, frozenset()))
        self._step(replica)

    def _step(self, replica: EngineReplica) -> None:
        if replica.stepping:
            return
        replica.device.now = max(replica.device.now, self.now)
        for request in replica.arrived:
            replica.engine.add(request)
        replica.arrived.clear()
        if replica.engine.idle:
            return
        events, replica.stepping = replica.engine.step(), True
        self.at(replica.device.now, lambda: self._stepped(replica, events))

    def _stepped(self, replica: EngineReplica, events: list[Any]) -> None:
        replica.stepping = False
        ended = []
        for e in events:
            sent = self.live[e.request]
            if not sent.output:
                names = replica.engine.pool.names.chain(sent.prompt, None)
                self.router.started(e.request, self.now, len(sent.prompt), tuple(names), BLOCK)
                if sent.counts:
                    self.ttft.append(self.now - sent.at)
            sent.output.append(e.token)
            if e.finish_reason:
                if sent.counts:
                    self.cached.append(e.usage.cached_tokens)
                self.router.ended(sent.job, len(sent.output))
                self.output_tokens += OUTPUT_SHARE * (len(sent.output) - self.output_tokens)
                ended.append(self.live.pop(e.request))
        self._pump()
        for sent in ended:
            sent.then(sent.output)
        self._step(replica)

    def _poll(self, name: str) -> None:
        index, replica = self.router.replicas[name].index, self.replicas[name]
        load = replica.load(index.incarnation, -1 if index.stale else index.sequence)
        self.router.ready(name, load["incarnation"])
        self.router.report(name, read_report(load))
        apply_blocks(index, load)
        self._pump()
        self.at(self.now + POLL, lambda: self._poll(name))
