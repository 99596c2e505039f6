"""A simulation of replicas behind a Router in virtual time. Used by tests.

A replica batches continuously: a step computes one token row for each decoding sequence and fills the rest of
`max_batch_tokens` with prefill. It has a prefix cache of whole chunks, evicted least recently used first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from intaglio.router import BlocksRemoved, BlocksStored, Job, LoadReport, Pace, Refusal, Router
from intaglio.runtime import StepFit

CHUNK = 32  # tokens of a chunk; chunk keys are the names of blocks


def steps_of(pace: Pace, weight: float = 64.0) -> StepFit:
    """The fit of steps of unlike sizes, 128 tokens on average, that took as long as the pace says."""
    squared = weight * 128.0**2
    return StepFit(weight, 128.0, pace.per_step + 128 * pace.per_token, squared, squared * pace.per_token)


@dataclass
class Running:
    job: Job
    prefill: int
    left: int  # output tokens


@dataclass
class SimReplica:
    """One replica. `busy_until`: end of its step in progress; None when idle."""

    name: str
    pace: Pace
    cache_chunks: int
    max_batch_tokens: int = 512
    cache: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    running: list[Running] = field(default_factory=list)
    sequence: int = 0
    computed: int = 0  # prefill tokens
    lives: int = 0

    def cached_tokens(self, job: Job) -> int:
        n = 0
        for key in job.keys:
            if key not in self.cache:
                break
            n += 1
        return min(n * CHUNK, job.prompt_tokens - 1)

    def accept(self, job: Job) -> None:
        self.running.append(Running(job, job.prompt_tokens - self.cached_tokens(job), job.output_tokens))

    def step(self) -> tuple[float, list[Job], list[Job]]:
        """Run a step. Returns its seconds, the jobs whose prefill it ended, and the jobs that it ended."""
        decoding = [r for r in self.running if r.prefill == 0]
        rows, begun, ended = len(decoding), [], []
        for r in decoding:
            r.left -= 1
        for r in self.running:
            if r.prefill and rows < self.max_batch_tokens:
                part = min(r.prefill, self.max_batch_tokens - rows)
                r.prefill -= part
                rows += part
                self.computed += part
                if r.prefill == 0:
                    begun.append(r.job)
                    r.left -= 1
        ended = [r.job for r in self.running if r.prefill == 0 and r.left <= 0]
        self.running = [r for r in self.running if r.prefill or r.left > 0]
        return self.pace.per_step + self.pace.per_token * rows, begun, ended

    def store(self, keys: Iterable[bytes]) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Cache a prompt's chunks. Returns (stored, removed) names."""
        stored = []
        for key in keys:
            if key not in self.cache:
                stored.append(key)
            self.cache[key] = None
            self.cache.move_to_end(key)
        removed = []
        while len(self.cache) > self.cache_chunks:
            removed.append(self.cache.popitem(last=False)[0])
        return tuple(stored), tuple(removed)


@dataclass
class Result:
    """Times by job id: first token after its arrival, end after its arrival, seconds; and refusals by reason."""

    first: dict[str, float] = field(default_factory=dict)
    end: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)  # as they were placed
    seconds: float = 0.0

    @property
    def mean_ttft(self) -> float:
        return sum(self.first.values()) / len(self.first)


@dataclass
class Simulation:
    """Jobs that arrive at given times, over replicas, some of which are killed and started again.

    events: whether replicas report which blocks they store and remove. lost_events: numbers of reports that are lost.
    """

    router: Router
    replicas: list[SimReplica]
    events: bool = True
    lost_events: frozenset[int] = frozenset()
    result: Result = field(default_factory=Result)
    arrived: dict[str, float] = field(default_factory=dict)
    agenda: list[tuple[float, int, str, object]] = field(default_factory=list)
    count: int = 0
    reports: int = 0

    def __post_init__(self) -> None:
        self.by_name = {r.name: r for r in self.replicas}
        self.stepping: dict[str, int] = {}  # replica: its life in which a step is in progress
        for r in self.replicas:
            self.router.add_replica(r.name)
            self._ready(r)

    def at(self, time: float, what: str, value: object) -> None:
        """Plan "job" (a Job), "kill", "start" or "drain" (a replica's name)."""
        self.count += 1
        heapq.heappush(self.agenda, (time, self.count, what, value))

    def run(self) -> Result:
        now = 0.0
        while self.agenda:
            now, _, what, value = heapq.heappop(self.agenda)
            getattr(self, f"_{what}")(value, now)
            for job in self.router.expired(now):
                self.result.refused[job.id] = "expired"
            for placement in self.router.dispatch(now):
                self.result.order.append(placement.job.id)
                self.by_name[placement.replica].accept(placement.job)
            for r in self.replicas:
                if r.running and r.name not in self.stepping:
                    self._launch(r, now)
        self.result.seconds = now
        return self.result

    def _ready(self, r: SimReplica) -> None:
        self.router.ready(r.name, f"{r.name}.{r.lives}")
        self.router.report(r.name, LoadReport(steps=steps_of(r.pace), max_batch_tokens=r.max_batch_tokens))

    def _job(self, job: Job, now: float) -> None:
        self.arrived[job.id] = now
        try:
            self.router.submit(job, now)
        except Refusal as e:
            self.result.refused[job.id] = e.reason

    def _launch(self, r: SimReplica, now: float) -> None:
        seconds, begun, ended = r.step()
        self.stepping[r.name] = r.lives
        self.at(now + seconds, "stepped", (r.name, r.lives, begun, ended))

    def _stepped(self, value: tuple[str, int, list[Job], list[Job]], now: float) -> None:
        name, life, begun, ended = value
        r = self.by_name[name]
        if life != r.lives:
            return  # it was killed in this step
        del self.stepping[name]
        for job in begun:
            self.result.first.setdefault(job.id, now - self.arrived[job.id])
            self.router.started(job.id, now, job.prompt_tokens, job.keys, CHUNK)
            self._tell(r, *r.store(job.keys))
        for job in ended:
            self.result.end[job.id] = now - self.arrived[job.id]
            self.router.ended(job, job.output_tokens * job.choices)

    def _tell(self, r: SimReplica, stored: tuple, removed: tuple) -> None:
        for event in (BlocksStored(stored), BlocksRemoved(removed)):
            if self.events and event.names:
                r.sequence += 1
                self.reports += 1
                if self.reports not in self.lost_events:
                    self.router.replicas[r.name].index.apply(f"{r.name}.{r.lives}", r.sequence, event)

    def _kill(self, name: str, now: float) -> None:
        r = self.by_name[name]
        r.lives, r.running, r.sequence = r.lives + 1, [], 0
        r.cache.clear()
        self.stepping.pop(name, None)
        for job in self.router.died(name):
            self.router.resubmit(job)

    def _start(self, name: str, now: float) -> None:
        self.router.restarting(name)
        self._ready(self.by_name[name])

    def _drain(self, name: str, now: float) -> None:
        r = self.by_name[name]
        for job in self.router.drain(name):
            self.router.resubmit(job)
        r.running = []
