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
    """Load and token counts that a replica reports about itself.

    Attributes:
        running: number of choices (outputs of requests) that run.
        waiting: number of choices that wait in the replica.
        kv_usage: fraction of the K/V cache in use, 0 to 1.
        draining: True if the replica takes no new requests.
        steps: StepFit, a linear model of its step times, fitted to its latest steps.
        max_sequences: maximum number of choices that run at the same time.
        max_batch_tokens: maximum number of token rows of a step.
        prompt_tokens: number of prompt tokens since the replica's start.
        cached_tokens: number of prompt tokens found in the K/V cache since the replica's start.
        output_tokens: number of tokens generated since the replica's start.
        tier: counts of its K/V tier (a store of K/V blocks outside the engine) by name, see TierCounts; {} without a
            tier.
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
    """The router's record of one replica.

    Attributes:
        name: the replica's name in the router.
        role: stages of requests that it is given: "mixed", "prefill" or "decode".
        state: "starting", "ready", "draining" or "dead".
        report: its latest LoadReport.
        index: CacheIndex of the K/V blocks that it has cached.
        jobs: the jobs placed on it, by id. Only the methods of this class change it.
        prefill_tokens: number of prompt tokens that it still has to compute, the sum over `prefills`.
        prefills: for each job whose first token has not come, by id: number of prompt tokens to compute. In the order
            of placement.
        prefill_since: estimated time in seconds at which the replica began to compute the first job in `prefills`.
        sequences: number of choices (outputs) of all its jobs.
        last_placed: number of the latest placement on this replica; placements of the router are counted from 1. Among
            equally good replicas, the one with the lowest number is chosen.
        failures: number of jobs that were lost because the replica died.
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
        """True if the router may give the replica one more job now.

        A placeable replica without jobs always has room. A placeable replica with jobs has room if it meets three
        conditions:

        - It has fewer sequences than its maximum.
        - The prompt tokens that it still has to compute fill less than PREFILL_STEPS steps.
        - If sequences wait inside the replica for room in its K/V cache: it has no more sequences than fit into the
          cache.

        Jobs without room wait in the router, where they may still go to another replica. If they waited in the replica,
        it might evict the blocks of their prefix before they start.
        """
        if not self.placeable:
            return False
        free = self.sequences < min(self.report.max_sequences, self._fits + 1)
        return not self.jobs or (free and self.prefill_tokens < PREFILL_STEPS * self.report.max_batch_tokens)

    @property
    def _fits(self) -> float:
        """Returns the estimated number of sequences that fit into the whole K/V cache, a float.

        Returns inf if no sequence waits in the replica. The estimate is the number of running sequences, divided by the
        fraction of the cache in use (`kv_usage`).
        """
        report = self.report
        limited = report.waiting and report.running and report.kv_usage
        return report.running / report.kv_usage if limited else inf

    def pace_is_recent(self, placements: int) -> bool:
        """True if the replica has reported step times and they are recent.

        They are recent if the replica has jobs, or if it was given one of the latest PACE_KEPT jobs that the router
        placed.

        placements: number of jobs that the router has placed so far.
        """
        return self.report.steps.weight > 0 and (bool(self.jobs) or placements - self.last_placed < PACE_KEPT)

    def prefill_left(self, now: float, per_token: float) -> float:
        """Returns the estimated number of prompt tokens that the replica still has to compute for its jobs, a float.

        The replica computes prompts in the order of placement, so it works at the first job without an output token.
        For this job, the number of tokens already computed is estimated: the time since the replica began the job /
        `per_token`.

        Args:
            now: the time in seconds.
            per_token: seconds that the replica takes for a prompt token.
        """
        first = next(iter(self.prefills.values()), 0)
        return self.prefill_tokens - min(first, max(0.0, now - self.prefill_since) / per_token)

    def assign(self, job: Job, prefill: int, now: float) -> None:
        """Record that the router has placed a job on this replica. Returns nothing.

        Args:
            job: the job.
            prefill: number of prompt tokens that the replica has to compute for the job.
            now: the time in seconds.
        """
        if not self.prefills:
            self.prefill_since = now
        self.jobs[job.id] = job
        self.prefills[job.id] = prefill
        self.prefill_tokens += prefill
        self.sequences += job.choices

    def started(self, id: str, now: float) -> Job:
        """Record that a job's first token has come, so that its prompt has been computed. Returns the Job.

        id: id of a job on this replica. now: the time in seconds. Raises KeyError if no such job is on this replica.
        """
        job, self.prefill_since = self.jobs[id], now
        self.prefill_tokens -= self.prefills.pop(id, 0)
        return job

    def release(self, id: str) -> None:
        """Remove a job from this replica's jobs, because it has ended or goes to another replica. Returns nothing.

        id: id of a job on this replica. Raises KeyError if no such job is on this replica.
        """
        job = self.jobs.pop(id)
        self.prefill_tokens -= self.prefills.pop(id, 0)
        self.sequences -= job.choices
