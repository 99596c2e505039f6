"""Router: admits jobs, queues them fairly and places each on a replica.

It does no input or output and reads no clock: callers pass the time `now` in seconds, and act on what methods return.
Jobs wait in the router, not in a replica, once a replica has enough prefill work for its next steps. So many jobs of
one tenant do not delay those of others, and a job is placed as late as possible, when the router knows the most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from intaglio.router.fairness import FairQueue
from intaglio.router.index import PromptMemory
from intaglio.router.job import Job, Refusal
from intaglio.router.pace import Pace, paces
from intaglio.router.placement import POLICIES, Estimate, estimate
from intaglio.router.replica import LoadReport, Replica, Role

SCANNED = 64  # queued jobs that are considered at a time
PREFILL_MIN = 64  # prompt tokens to compute from which a prefill replica does it; fewer disturb a decode replica little
RETRY_MIN, RETRY_MAX = 1.0, 60.0  # bounds of Retry-After, seconds


@dataclass(frozen=True)
class Limits:
    """Limits of a router. `max_queued` is the maximum number of waiting jobs; raises ValueError if it is below 1."""

    max_queued: int = 1024

    def __post_init__(self) -> None:
        if self.max_queued < 1:
            raise ValueError(f"max_queued is {self.max_queued}; allowed: 1 or more")


@dataclass(frozen=True)
class Placement:
    """Decision of the router to place `job` on a replica.

    `replica` is the replica's name. `estimate` is the Estimate of the job's times on this replica. The router has
    chosen the replica by comparing the Estimates of all replicas.
    """

    job: Job
    replica: str
    estimate: Estimate


class Router:
    """Admits jobs, keeps the waiting jobs in a queue, and places each job on a replica.

    Args:
        policy: name of the placement policy, a key of POLICIES.
        limits: limits of the queue; None for the defaults.
        weights: weight of each tenant by name (see FairQueue).

    Raises ValueError for an unknown policy and for an invalid weight.
    """

    def __init__(
        self, policy: str = "cache-aware", limits: Limits | None = None, weights: Mapping[str, float] | None = None
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"the routing policy is {policy!r}; allowed: {', '.join(POLICIES)}")
        self.policy, self.limits = policy, limits or Limits()
        self.replicas: dict[str, Replica] = {}
        self.queue = FairQueue(weights)
        self.memory = PromptMemory()
        self.refused: Counter[str] = Counter()  # jobs, by reason
        self.placements = 0
        self.cached_tokens = 0  # prompt tokens that placements expected to find cached
        self._where: dict[str, str] = {}  # job id: its replica
        self._paces: dict[str, Pace] | None = None  # from the latest reports; None: to be computed

    # Replicas

    def add_replica(self, name: str, role: Role = "mixed") -> Replica:
        """Add a replica, which is in state "starting" at first. Returns its Replica.

        Once the replica is ready, the router gives it jobs according to its role. Raises ValueError if the name is in
        use.
        """
        if name in self.replicas:
            raise ValueError(f"there is a replica {name!r} already; every replica needs its own name")
        self.replicas[name], self._paces = Replica(name, role), None
        return self.replicas[name]

    def ready(self, name: str, incarnation: str) -> None:
        """Record that a replica accepts requests now. Returns nothing.

        Its state becomes "ready", except that a draining replica stays draining.

        Args:
            name: name of the replica.
            incarnation: text that is different for each start of the replica's engine. If it is new, the router forgets
                what the replica had cached.
        """
        replica = self.replicas[name]
        if replica.state != "draining":
            replica.state = "ready"
        replica.index.restarted(incarnation)

    def report(self, name: str, report: LoadReport) -> None:
        """Store the latest LoadReport of the replica `name`. Returns nothing."""
        self.replicas[name].report, self._paces = report, None

    def drain(self, name: str) -> list[Job]:
        """Stop placing jobs on the replica `name`. Returns a list of the jobs that are on it.

        The caller may move these jobs to other replicas with resubmit().
        """
        self.replicas[name].state = "draining"
        return list(self.replicas[name].jobs.values())

    def died(self, name: str) -> list[Job]:
        """Record that the replica `name` has ended, and take all jobs off it.

        Returns a list of these jobs, in order of placement. The caller can move the jobs to other replicas with
        resubmit(). The replica is given no jobs until ready() is called for it. Raises KeyError for an unknown name.
        """
        replica = self.replicas[name]
        replica.state = "dead"
        jobs = list(replica.jobs.values())
        replica.failures += len(jobs)
        for job in jobs:
            self._unplace(job.id)
        return jobs

    def restarting(self, name: str) -> None:
        """Record that the replica `name`, which had ended, is being started again. Returns nothing."""
        self.replicas[name].state = "starting"

    def remove_replica(self, name: str) -> None:
        """Remove the replica `name` from the router. Raises ValueError if jobs are placed on it."""
        if jobs := self.replicas[name].jobs:
            raise ValueError(f"replica {name!r} has {len(jobs)} requests; drain it first")
        del self.replicas[name]
        self._paces = None

    # Jobs

    def submit(self, job: Job, now: float) -> None:
        """Admit a job and add it to the queue. Returns nothing.

        Raises Refusal if the job is not admitted; the error says after how many seconds to try again. A job is not
        admitted in these cases:

        - No replica serves.
        - The queue is full: max_queued jobs wait.
        - The queue is at least half full, and the job's tenant has its full share of waiting jobs.
        - The router estimates that the job would miss its `start_by` or `deadline`.

        now: the time in seconds.
        """
        self._admit(job, now)
        self.queue.push(job)

    def place(self, job: Job, now: float) -> Placement | None:
        """Place a job at once if possible; else add it to the queue.

        Returns the Placement, or None if the job was queued. A job is placed at once if no job of its stage is queued
        and the best replica for it has room. (The stage is "all", or "prefill" to compute only the prompt.) dispatch()
        places a queued job later. Raises Refusal if the job is not admitted.

        now: the time in seconds.
        """
        estimates = self._admit(job, now)
        if not self.queue.jobs_of[job.stage]:
            best = POLICIES[self.policy](estimates)
            if best.replica.has_room:
                return self._place(job, best, now)
        self.queue.push(job)
        return None

    def resubmit(self, job: Job) -> None:
        """Put a job back into the queue, because its replica died or drains. Returns nothing.

        The job was admitted before, so it is not refused, and its tenant is not charged again.
        """
        self._unplace(job.id)
        self.queue.push(job)

    def dispatch(self, now: float) -> list[Placement]:
        """Place queued jobs on replicas that have room, in fair order.

        Returns a list of the Placements, in the order made. Call this after every change of jobs or replicas. now: the
        time in seconds.
        """
        placed: list[Placement] = []
        ahead: Counter[str] = Counter()  # prompt tokens of jobs that wait for a full replica
        for stage in ("all", "prefill"):  # a stage is not held up by jobs of the other
            takers = self._takers(stage)
            if not self.queue.jobs_of[stage] or not any(r.has_room for r in takers):
                continue
            most = min(SCANNED, self.queue.jobs_of[stage])
            for job in list(islice((j for j in self.queue.order() if j.stage == stage), most)):
                best = POLICIES[self.policy](self._estimates(takers, job, now, ahead))
                if not best.replica.has_room:
                    ahead[best.replica.name] += best.uncached
                    continue
                placed.append(self._place(job, best, now))
                if not any(r.has_room for r in takers):
                    break
        return placed

    def started(self, id: str, now: float, tokens: int, names: tuple[str, ...] = (), block_size: int = 1) -> None:
        """Record that the first token of a placed job has come, so that its prompt has been computed. Returns nothing.

        The prompt's number of tokens and its block names are kept, to estimate how much of later prompts is cached.

        Args:
            id: the job's id. A job that is on no replica is ignored.
            now: the time in seconds.
            tokens: number of tokens of the prompt.
            names: names of the prompt's K/V blocks in the replica's cache, in order; () if they are not known.
            block_size: tokens in a block.
        """
        if (name := self._where.get(id)) is not None:
            replica = self.replicas[name]
            keys = replica.started(id, now).keys
            self.memory.learn(keys, tokens, names, block_size)
            replica.index.computed(keys, now)

    def ended(self, job: Job, output_tokens: int) -> None:
        """Record that a job has ended or was cancelled. Returns nothing.

        The job is removed from its replica or from the queue. If the job was ever placed, the charge of its tenant is
        corrected to the output that was generated. Call this also for each job that expired() has returned.

        Args:
            job: the job.
            output_tokens: number of tokens generated, over all choices.
        """
        if not self._unplace(job.id):
            self.queue.discard(job)
        self.queue.settle(job, output_tokens)

    def expired(self, now: float) -> list[Job]:
        """Remove the queued jobs whose `start_by` or `deadline` has passed. Returns a list of these jobs.

        They are counted as refused. now: the time in seconds.
        """
        late = [job for job in self.queue.jobs() if now >= _earliest(job.start_by, job.deadline)]
        for job in late:
            self.queue.discard(job)
            self.refused["late"] += 1
        return late

    def wants_prefill(self, job: Job, now: float) -> bool:
        """True if a prefill replica should compute the job's prompt, before the job goes to another replica.

        This is so under two conditions. A prefill replica is ready. And the best other replica, by the router's policy,
        would have to compute at least PREFILL_MIN tokens of the prompt. now: the time in seconds.
        """
        if not any(r.placeable and r.role == "prefill" for r in self.replicas.values()):
            return False
        decoders = [r for r in self._takers(job.stage) if r.role != "prefill"]
        options = self._estimates(decoders, job, now)
        return bool(options) and POLICIES[self.policy](options).uncached >= PREFILL_MIN

    def where(self, id: str) -> str | None:
        """Returns the name of the replica on which the job `id` is placed; None if the job waits or is unknown."""
        return self._where.get(id)

    def queue_seconds(self) -> float:
        """Returns the estimated seconds in which one replica of mean speed could prefill all queued jobs.

        Returns inf if no replica can be given jobs.
        """
        found = self.paces()
        seconds = [found[name].per_token for name, r in self.replicas.items() if r.placeable]
        return self.queue.tokens_of.total() * sum(seconds) / len(seconds) if seconds else float("inf")

    def paces(self) -> dict[str, Pace]:
        """Returns the Pace (step-time model) of each replica, as a dict by the replica's name.

        It is computed from the step times that the replicas of the same role have reported. A replica without recent
        measurements (see Replica.pace_is_recent()) gets the Pace of the fastest replica of its role. Without this rule,
        a replica that once was slow would be given no jobs, and would never be measured again.
        """
        if self._paces is None:
            self._paces = paces(self.replicas.values())
        found, fastest, old = dict(self._paces), dict[Role, Pace](), list[Replica]()
        for r in self.replicas.values():
            if not r.pace_is_recent(self.placements):
                old.append(r)
            elif r.role not in fastest or found[r.name].per_token < fastest[r.role].per_token:
                fastest[r.role] = found[r.name]
        found.update((r.name, fastest[r.role]) for r in old if r.role in fastest)
        return found

    # Inside

    def _takers(self, stage: str) -> list[Replica]:
        """Returns a list of the replicas on which jobs of one stage can be placed now.

        Only ready replicas are returned. stage: the part of a request that the jobs compute (see Job):

        - "all", the whole request: all replicas except prefill replicas; if there are none, the prefill replicas.
        - "prefill", only the prompt: all prefill replicas; if there are none, the other replicas.
        """
        alive = [r for r in self.replicas.values() if r.placeable]
        if stage == "prefill":
            return [r for r in alive if r.role == "prefill"] or alive
        return [r for r in alive if r.role != "prefill"] or alive

    def _admit(self, job: Job, now: float) -> list[Estimate]:
        """Check that a job can be admitted.

        Returns a list of its Estimates, one for each replica on which it could be placed. An Estimate has the seconds
        until the job's first token and end. Raises Refusal if the job is not admitted: no replica serves, the queue is
        full, or the job would start or end too late. Refusals are counted by reason. now: the time in seconds.
        """
        try:
            return self._check(job, now)
        except Refusal as refusal:
            self.refused[refusal.reason] += 1
            raise

    def _check(self, job: Job, now: float) -> list[Estimate]:
        alive = self._takers(job.stage)
        if not alive:
            if not any(r.state in ("starting", "dead") for r in self.replicas.values()):
                raise Refusal("unavailable", "no replica serves; start one with `intaglio cluster scale`", RETRY_MAX)
            raise Refusal("unavailable", "no replica is ready yet; retry later", RETRY_MIN)
        most, waiting = self.limits.max_queued, len(self.queue)
        wait = self._wait_seconds(alive, job.stage)
        if waiting >= most:
            raise Refusal("full", f"{waiting} requests wait, max_queued is {most}; retry later", _retry(wait))
        if waiting >= most // 2 and self.queue.waiting(job.tenant) >= (own := self.queue.share(job.tenant, most)):
            why = f"{waiting} requests wait, {own} of them this tenant's, which is its share of {most}; retry later"
            raise Refusal("full", why, _retry(wait))
        estimates = self._estimates(alive, job, now)
        if not all(e.pace.measured for e in estimates):
            return estimates
        if job.start_by is not None and now + wait > job.start_by:
            over = now + wait - job.start_by
            raise Refusal("late", f"it would wait {wait:.1f} s, {over:.1f} s too long; retry later", _retry(over))
        if job.deadline is not None:
            end = min(e.end for e in estimates)
            if (over := now + wait + end - job.deadline) > 0:
                why = f"it would take {wait + end:.1f} s, {over:.1f} s more than its timeout; retry later"
                raise Refusal("late", why, _retry(over))
        return estimates

    def _wait_seconds(self, alive: list[Replica], stage: str) -> float:
        """Returns the estimated seconds until the queued jobs of a stage have been placed.

        The estimate divides the prompt tokens of these jobs by the prefill speed of all the replicas together.

        Args:
            alive: the replicas that can be given jobs of the stage; at least one.
            stage: "all" or "prefill", see Job.
        """
        if not self.queue.tokens_of[stage]:
            return 0.0
        found = self.paces()
        return self.queue.tokens_of[stage] / sum(1 / max(found[r.name].per_token, 1e-9) for r in alive)

    def _estimates(
        self, replicas: Iterable[Replica], job: Job, now: float, ahead: Mapping[str, int] | None = None
    ) -> list[Estimate]:
        """Returns a list of Estimates (times of a job on a replica), one for each replica in `replicas`.

        Args:
            replicas: the replicas.
            job: the job.
            now: the time in seconds.
            ahead: by replica name, the number of prompt tokens of waiting jobs that will be placed there before this
                job; None if there are none.
        """
        found, ahead = self.paces(), ahead or {}
        return [estimate(r, job, self.memory, now, found[r.name], ahead.get(r.name, 0)) for r in replicas]

    def _place(self, job: Job, on: Estimate, now: float) -> Placement:
        self.queue.take(job)
        self.placements += 1
        replica = on.replica
        replica.assign(job, on.uncached, now)
        replica.last_placed = self.placements
        replica.index.assume(job.keys, now)
        self.cached_tokens += on.cached
        self._where[job.id] = replica.name
        return Placement(job, replica.name, on)

    def _unplace(self, id: str) -> bool:
        """Take the job `id` off its replica. Returns True if it was on a replica, else False."""
        name = self._where.pop(id, None)
        if name is None:
            return False
        self.replicas[name].release(id)
        return True


def _retry(seconds: float) -> float:
    return min(max(seconds, RETRY_MIN), RETRY_MAX)


def _earliest(*times: float | None) -> float:
    return min((t for t in times if t is not None), default=float("inf"))
