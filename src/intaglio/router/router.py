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
    """Limits of a router. Raises ValueError if `max_queued`, the maximum number of jobs that wait in it, is below 1."""

    max_queued: int = 1024

    def __post_init__(self) -> None:
        if self.max_queued < 1:
            raise ValueError(f"max_queued is {self.max_queued}; allowed: 1 or more")


@dataclass(frozen=True)
class Placement:
    """A job and the name of the replica it goes to, with the Estimate by which that was decided."""

    job: Job
    replica: str
    estimate: Estimate


class Router:
    """Queue of jobs, and their placement on replicas.

    policy: a name in POLICIES. limits: limits of the queue; None: Limits(). weights: weight of each tenant by name (see
    FairQueue). Raises ValueError for an unknown policy and for an invalid weight.
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
        """Add a replica in state "starting". Returns its Replica. Once it is ready, it is given jobs of its role.

        Raises ValueError if the name is in use.
        """
        if name in self.replicas:
            raise ValueError(f"there is a replica {name!r} already; every replica needs its own name")
        self.replicas[name], self._paces = Replica(name, role), None
        return self.replicas[name]

    def ready(self, name: str, incarnation: str) -> None:
        """Record that a replica accepts requests. A replica that is being drained stays so.

        Args:
            name: name of the replica.
            incarnation: identifies the content of its K/V cache. If it differs from the last one, nothing counts as
                cached.
        """
        replica = self.replicas[name]
        if replica.state != "draining":
            replica.state = "ready"
        replica.index.restarted(incarnation)

    def report(self, name: str, report: LoadReport) -> None:
        """Store a replica's latest LoadReport."""
        self.replicas[name].report, self._paces = report, None

    def drain(self, name: str) -> list[Job]:
        """Place no more jobs on the replica `name`.

        Returns a list of its jobs; the caller may move them by resubmit().
        """
        self.replicas[name].state = "draining"
        return list(self.replicas[name].jobs.values())

    def died(self, name: str) -> list[Job]:
        """Record that a replica has ended, and take all its jobs off it.

        Returns a list of these jobs, in the order of their placement, so that the caller can resubmit() them. The
        replica is given no jobs until it is ready() again.

        name: name of the replica. Raises KeyError for an unknown one.
        """
        replica = self.replicas[name]
        replica.state = "dead"
        jobs = list(replica.jobs.values())
        replica.failures += len(jobs)
        for job in jobs:
            self._unplace(job.id)
        return jobs

    def restarting(self, name: str) -> None:
        """Record that a replica that had ended is being started again."""
        self.replicas[name].state = "starting"

    def remove_replica(self, name: str) -> None:
        """Forget a replica. Raises ValueError if it has jobs."""
        if jobs := self.replicas[name].jobs:
            raise ValueError(f"replica {name!r} has {len(jobs)} requests; drain it first")
        del self.replicas[name]
        self._paces = None

    # Jobs

    def submit(self, job: Job, now: float) -> None:
        """Queue a job. Raises Refusal, with the seconds after which to retry, if it is not admitted.

        A job is not admitted if no replica serves, if too many jobs wait (in all, or of its tenant), or if it would
        miss its `start_by` or `deadline` by the estimate. now: the time in seconds.
        """
        self._admit(job, now)
        self.queue.push(job)

    def place(self, job: Job, now: float) -> Placement | None:
        """Place a job at once, if its stage's queue is empty and the best replica has room; else add it to the queue.

        A job's stage is "all" or "prefill" (only the prompt is computed). Returns the Placement; None if the job is
        queued, to be placed by dispatch() later. Raises Refusal if the job is not admitted. now: the time in seconds.
        """
        estimates = self._admit(job, now)
        if not self.queue.jobs_of[job.stage]:
            best = POLICIES[self.policy](estimates)
            if best.replica.has_room:
                return self._place(job, best, now)
        self.queue.push(job)
        return None

    def resubmit(self, job: Job) -> None:
        """Queue a job again whose replica died or drains.

        It was admitted before, so it is not refused, and its tenant is not charged again.
        """
        self._unplace(job.id)
        self.queue.push(job)

    def dispatch(self, now: float) -> list[Placement]:
        """Place queued jobs, in fair order, on replicas that have room. Returns a list of the Placements, in order.

        Call this after every change of jobs or replicas.
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
        """Record that a placed job's first token has come, so its prompt has been computed. Returns nothing.

        The prompt's length and block names are remembered, for the estimates of later jobs.

        Args:
            id: the job's id; one that is not placed is ignored.
            now: the time in seconds.
            tokens: number of tokens of the prompt.
            names: names of the K/V blocks that hold the prompt, in order, as the replica's cache reports them; (): not
                known.
            block_size: tokens of a block.
        """
        if (name := self._where.get(id)) is not None:
            replica = self.replicas[name]
            keys = replica.started(id, now).keys
            self.memory.learn(keys, tokens, names, block_size)
            replica.index.computed(keys, now)

    def ended(self, job: Job, output_tokens: int) -> None:
        """Record that a job has ended or was cancelled: take it off its replica, or out of the queue.

        Its tenant is charged for its real output, if it was ever placed. Call this also for a job that expired() has
        returned.

        Args:
            job: the job.
            output_tokens: tokens generated, over all choices.
        """
        if not self._unplace(job.id):
            self.queue.discard(job)
        self.queue.settle(job, output_tokens)

    def expired(self, now: float) -> list[Job]:
        """Remove the queued jobs that have waited too long, or whose deadline has passed. Returns a list of them.

        They count as refused.
        """
        late = [job for job in self.queue.jobs() if now >= _earliest(job.start_by, job.deadline)]
        for job in late:
            self.queue.discard(job)
            self.refused["late"] += 1
        return late

    def wants_prefill(self, job: Job, now: float) -> bool:
        """True if the job's prompt should be computed by a prefill replica, before the job goes to another replica.

        It should if a prefill replica may be given jobs, and if the best of the other replicas would have PREFILL_MIN
        tokens or more to compute. The policy says which is best.
        """
        if not any(r.placeable and r.role == "prefill" for r in self.replicas.values()):
            return False
        decoders = [r for r in self._takers(job.stage) if r.role != "prefill"]
        options = self._estimates(decoders, job, now)
        return bool(options) and POLICIES[self.policy](options).uncached >= PREFILL_MIN

    def where(self, id: str) -> str | None:
        """Name of the replica on which a job is placed; None if it waits or is unknown."""
        return self._where.get(id)

    def queue_seconds(self) -> float:
        """Seconds in which one replica of mean pace would compute the prompts of all queued jobs.

        inf if no replica may be given jobs.
        """
        found = self.paces()
        seconds = [found[name].per_token for name, r in self.replicas.items() if r.placeable]
        return self.queue.tokens_of.total() * sum(seconds) / len(seconds) if seconds else float("inf")

    def paces(self) -> dict[str, Pace]:
        """The Pace of each replica by name, from the steps that replicas of its role have reported.

        A replica whose measurement is not recent (see Replica.pace_is_recent()) counts as fast as the fastest of the
        others of its role: a replica that seemed slow would be given no jobs, and then never be measured again.
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
        """The replicas that may be given jobs of a stage now, as a list. stage: "all" or "prefill", see Job.

        Prefill replicas take whole requests only if no other replica takes any. A job of stage "prefill" goes to any
        replica if no prefill replica is left.
        """
        alive = [r for r in self.replicas.values() if r.placeable]
        if stage == "prefill":
            return [r for r in alive if r.role == "prefill"] or alive
        return [r for r in alive if r.role != "prefill"] or alive

    def _admit(self, job: Job, now: float) -> list[Estimate]:
        """A list of Estimates (first token and end, in seconds), one for each replica on which the job can be placed.

        Raises Refusal if the job is not admitted: there is no such replica, the queue is full, or the job would start
        or end too late. A refusal is also counted by its reason.
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
        """Estimated seconds until the waiting jobs of a stage have been placed, from the replicas' pace of prefill.

        Args:
            alive: the replicas that may be given jobs of the stage; at least one.
            stage: "all" or "prefill", see Job.
        """
        if not self.queue.tokens_of[stage]:
            return 0.0
        found = self.paces()
        return self.queue.tokens_of[stage] / sum(1 / max(found[r.name].per_token, 1e-9) for r in alive)

    def _estimates(
        self, replicas: Iterable[Replica], job: Job, now: float, ahead: Mapping[str, int] | None = None
    ) -> list[Estimate]:
        """A list of the Estimates of a job, one for each of the replicas.

        Args:
            replicas: the replicas.
            job: the job.
            now: the time in seconds.
            ahead: {replica's name: prompt tokens of waiting jobs that will be placed on it first}; None: there are
                none.
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
        """Take a job off its replica. Returns True, or False if the job was on no replica."""
        name = self._where.pop(id, None)
        if name is None:
            return False
        self.replicas[name].release(id)
        return True


def _retry(seconds: float) -> float:
    return min(max(seconds, RETRY_MIN), RETRY_MAX)


def _earliest(*times: float | None) -> float:
    return min((t for t in times if t is not None), default=float("inf"))
