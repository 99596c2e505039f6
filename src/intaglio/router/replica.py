"""Replica: the router's view of one replica, from its reports and from what the router itself has sent to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from intaglio.router.index import CacheIndex
from intaglio.router.job import Job
from intaglio.runtime import StepFit

PREFILL_STEPS = 4  # a replica is given prefill work for this many steps at a time
PACE_KEPT = 32  # placements on others after which the measured step times of a replica are no longer trusted
ReplicaState = Literal["starting", "ready", "draining", "dead"]
Role = Literal["mixed", "prefill", "decode"]  # of a replica: which stages of requests it is given


@dataclass(frozen=True)
class LoadReport:
    """Figures that a replica reports about itself.

    Attributes:
        running: choices that run.
        waiting: choices that wait.
        kv_usage: fraction of the K/V cache in use, 0 to 1.
        draining: True if it takes no new requests.
        steps: fit of the times of its latest steps.
        max_sequences: maximum number of choices that run at a time.
        max_batch_tokens: maximum number of token rows of a step.
        prompt_tokens: tokens of prompts since its start.
        cached_tokens: prompt tokens found in the K/V cache since its start.
        output_tokens: tokens generated since its start.
        tier: counts of its K/V tier by name, see TierCounts; {} without one.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    draining: bool = False
    steps: StepFit = field(default_factory=StepFit)
    max_sequences: int = 256
    max_batch_tokens: int = 512
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    tier: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Replica:
    """One replica: its state, its last report, its cache index and the jobs the router has placed on it.

    Attributes:
        name: the router's name for it.
        role: which stages of requests it is given: "mixed", "prefill" or "decode".
        state: "starting", "ready", "draining" or "dead".
        report: its latest LoadReport.
        index: the blocks it has cached.
        jobs: placed jobs by id; only the methods change them.
        prefill_tokens: number of prompt tokens that the replica still has to compute, for all jobs in `prefills`.
        prefills: {id of a job whose first token has not come: prompt tokens to compute}, in the order of placement.
        prefill_since: time in seconds at which the replica began the first job in `prefills`, as far as the router
            knows.
        sequences: number of sequences of its jobs: the sum of their `choices`.
        last_placed: number of the router's placement that last chose it; breaks ties, so that equal replicas take
            turns.
        failures: number of requests it lost by dying.
    """

    name: str
    role: Role = "mixed"
    state: ReplicaState = "starting"
    report: LoadReport = LoadReport()
    index: CacheIndex = field(default_factory=CacheIndex)
    jobs: dict[str, Job] = field(default_factory=dict)
    prefill_tokens: int = 0
    prefills: dict[str, int] = field(default_factory=dict)
    prefill_since: float = 0.0
    sequences: int = 0
    last_placed: int = 0
    failures: int = 0

    @property
    def placeable(self) -> bool:
        """True if new jobs may be placed on the replica: it is ready and not draining."""
        return self.state == "ready" and not self.report.draining

    @property
    def has_room(self) -> bool:
        """True if the replica may be given one more job now. A ready replica without jobs always may.

        A replica in which sequences wait for room in its K/V cache is given only one job more than it can run. The
        others wait in the router: until they can start, blocks of their prefix may be evicted, and another replica may
        become the better one.
        """
        if not self.placeable:
            return False
        free = self.sequences < min(self.report.max_sequences, self._fits + 1)
        return not self.jobs or (free and self.prefill_tokens < PREFILL_STEPS * self.report.max_batch_tokens)

    @property
    def _fits(self) -> float:
        """Estimated number of sequences that fit the whole K/V cache; inf unless sequences wait in the replica.

        It is the number of running sequences divided by the fraction of the cache that they hold (`kv_usage`).
        """
        report = self.report
        limited = report.waiting and report.running and report.kv_usage
        return report.running / report.kv_usage if limited else inf

    def pace_is_recent(self, placements: int) -> bool:
        """True if the replica has measured the times of its steps and the measurement is recent.

        It is recent if the replica has jobs, or was given one of the router's latest PACE_KEPT jobs. placements: number
        of placements that the router has made.
        """
        return self.report.steps.weight > 0 and (bool(self.jobs) or placements - self.last_placed < PACE_KEPT)

    def prefill_left(self, now: float, per_token: float) -> float:
        """Estimated number of prompt tokens of this replica's jobs that are still to be computed.

        The replica computes prompts in the order of placement. So it works at the first job that has no output token
        yet. The part of this prompt that is done is estimated as the time since the replica began it, divided by
        `per_token`. A replica near the end of a long prompt is thus free sooner than one at its beginning.

        Args:
            now: the time in seconds.
            per_token: seconds that the replica takes for a prompt token.
        """
        first = next(iter(self.prefills.values()), 0)
        return self.prefill_tokens - min(first, max(0.0, now - self.prefill_since) / per_token)

    def assign(self, job: Job, prefill: int, now: float) -> None:
        """Add a job that the router has placed on this replica.

        Args:
            job: the job.
            prefill: number of its prompt tokens that the replica has to compute.
            now: the time in seconds.
        """
        if not self.prefills:
            self.prefill_since = now
        self.jobs[job.id] = job
        self.prefills[job.id] = prefill
        self.prefill_tokens += prefill
        self.sequences += job.choices

    def started(self, id: str, now: float) -> Job:
        """Record that a job's first token has come: no prompt tokens are left to compute. Returns the Job.

        id: id of a job on this replica. now: the time in seconds. Raises KeyError for any other id.
        """
        job, self.prefill_since = self.jobs[id], now
        self.prefill_tokens -= self.prefills.pop(id, 0)
        return job

    def release(self, id: str) -> None:
        """Remove a job from the replica's jobs, because it has ended or goes to another replica. Returns nothing.

        id: id of a job on this replica. Raises KeyError for any other.
        """
        job = self.jobs.pop(id)
        self.prefill_tokens -= self.prefills.pop(id, 0)
        self.sequences -= job.choices
