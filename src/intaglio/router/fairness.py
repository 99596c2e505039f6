"""FairQueue: waiting jobs by priority, and within a priority by tenant in proportion to weights.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each tenant has a
counter of the tokens it is charged, divided by its weight, and the tenant with the lowest counter is next. A job is
charged its prompt and expected output when it is first taken, and what it really had at its end. A job that is queued
again, because its replica died, is not charged again. A tenant gains nothing by an idle time: when it returns, its
counter is raised to the lowest of the tenants that have waiting jobs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from intaglio.router.job import Job

IDLE_MAX = 1024  # tenants that wait for nothing and whose counters are kept
Entry = tuple[int, int, Job]  # priority, arrival number, job


def _place_in_order(entry: Entry) -> tuple[int, int]:
    return entry[:2]


@dataclass
class Tenant:
    """State of one tenant in a FairQueue.

    Attributes:
        weight: the tenant's share of the service, relative to the weights of other tenants.
        counter: tokens that the tenant has been charged, divided by its weight. The tenant with the lowest counter is
            next.
        waiting: the tenant's waiting jobs, as (priority, arrival number, job), in this order.
    """

    weight: float
    counter: float = 0.0
    waiting: list[Entry] = field(default_factory=list)


class FairQueue:
    """Queue of the waiting jobs of all tenants, in the order in which to place them.

    Jobs of a lower priority number come first. Among jobs of equal priority, the tenant that has used the least service
    in proportion to its weight comes first.

    weights: weight of each tenant by name; a tenant that is not named has weight 1. Raises ValueError for a weight that
    is not a finite number above 0.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        for name, weight in (weights or {}).items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of tenant {name!r} is {weight}; allowed: a finite number above 0")
        self.weights = dict(weights or {})
        self.tenants: dict[str, Tenant] = {}
        self.charged: set[str] = set()  # ids of the jobs that were taken and have not ended
        self.jobs_of, self.tokens_of = Counter[str](), Counter[str]()  # by stage: waiting jobs, and their prompt tokens
        self._entries: dict[str, Entry] = {}  # of the waiting jobs, by id
        self._arrivals = 0
        self._floor = 0.0  # highest counter at which a job was taken

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, job: Job) -> None:
        """Add a job to the queue, behind the other waiting jobs of the same tenant and priority."""
        tenant = self._tenant(job.tenant)
        self._return(tenant)
        self._arrivals += 1
        entry = self._entries[job.id] = job.priority, self._arrivals, job
        insort(tenant.waiting, entry, key=_place_in_order)
        self.jobs_of[job.stage] += 1
        self.tokens_of[job.stage] += job.prompt_tokens - job.handed

    def jobs(self) -> Iterator[Job]:
        """Yield the waiting jobs in no particular order. Do not change the queue during the iteration."""
        return (entry[2] for entry in self._entries.values())

    def order(self) -> Iterator[Job]:
        """Yield the waiting jobs in the order in which they should be placed.

        Do not change the queue during the iteration.
        """
        heads = {name: 0 for name, t in self.tenants.items() if t.waiting}
        counters = {name: self.tenants[name].counter for name in heads}

        def rank(name: str) -> tuple[int, float, int]:
            priority, arrival, _ = self.tenants[name].waiting[heads[name]]
            return priority, counters[name], arrival

        while heads:
            name = min(heads, key=rank)
            tenant = self.tenants[name]
            job = tenant.waiting[heads[name]][2]
            yield job
            counters[name] += 0 if job.id in self.charged else job.tokens / tenant.weight
            heads[name] += 1
            if heads[name] == len(tenant.waiting):
                del heads[name]

    def take(self, job: Job) -> None:
        """Remove a job from the queue because it is placed now, and charge its tenant for it. Returns nothing.

        The charge is the number of tokens of the prompt and of the expected output. A job that is not in the queue is
        charged, too. A job that was charged before and has not ended is not charged again.
        """
        tenant = self._tenant(job.tenant)
        if job.id in self._entries:
            self._remove(job)
        else:
            self._return(tenant)
        if job.id not in self.charged:
            self._floor = max(self._floor, tenant.counter)
            tenant.counter += job.tokens / tenant.weight
            self.charged.add(job.id)
        self._forget_idle()

    def discard(self, job: Job) -> None:
        """Remove a job from the queue without charging its tenant. Does nothing if the job is not in the queue."""
        self._remove(job)
        self._forget_idle()

    def settle(self, job: Job, output_tokens: int) -> None:
        """Correct the charge of a job's tenant after the job has ended. Returns nothing.

        take() charged the tenant for the expected output; afterwards the charge is for the output that was generated.
        Does nothing for a job that was never taken or was already settled.

        Args:
            job: the job that has ended.
            output_tokens: number of tokens that the job has generated, over all its choices.
        """
        if job.id not in self.charged:
            return
        self.charged.remove(job.id)
        tenant = self._tenant(job.tenant)
        tenant.counter += (output_tokens - job.output_tokens * job.choices) / tenant.weight
        self._forget_idle()

    def share(self, tenant: str, total: int) -> int:
        """Returns the tenant's maximum number of waiting jobs, at least 1, if the queue has `total` places for all.

        The places are divided in proportion to weight among three parties: this tenant, the other tenants with waiting
        jobs, and one reserved share of weight 1 for a tenant that may come next.
        """
        own = self._tenant(tenant).weight
        others = sum(t.weight for name, t in self.tenants.items() if t.waiting and name != tenant)
        return max(1, int(total * own / (own + others + 1.0)))

    def waiting(self, tenant: str) -> int:
        """Returns the number of waiting jobs of the tenant with this name."""
        return len(self.tenants[tenant].waiting) if tenant in self.tenants else 0

    def _return(self, tenant: Tenant) -> None:
        """Raise the counter of a tenant that had no waiting jobs and now gets a job. Returns nothing.

        So a tenant gains no credit by idle time. A counter is the tokens that the tenant was charged, divided by its
        weight. It is raised to the lowest counter of all tenants with waiting jobs. If no tenant has any, it is raised
        to the highest counter at which a job was ever taken. A counter that is already higher stays unchanged. Does
        nothing if the tenant has waiting jobs.
        """
        if not tenant.waiting:
            others = [t.counter for t in self.tenants.values() if t.waiting]
            tenant.counter = max(tenant.counter, min(others, default=self._floor))

    def _remove(self, job: Job) -> None:
        """Remove a job from the waiting jobs. Does nothing if it is not among them."""
        if (entry := self._entries.pop(job.id, None)) is None:
            return
        waiting, own = self.tenants[entry[2].tenant].waiting, entry[2]
        del waiting[bisect_left(waiting, entry[:2], key=_place_in_order)]
        self.jobs_of[own.stage] -= 1
        self.tokens_of[own.stage] -= own.prompt_tokens - own.handed

    def _tenant(self, name: str) -> Tenant:
        return self.tenants.setdefault(name, Tenant(self.weights.get(name, 1.0), self._floor))

    def _forget_idle(self) -> None:
        """Forget tenants without waiting jobs, so that the number of tenants stays bounded. Returns nothing.

        A counter is the tokens that a tenant was charged, divided by its weight. A tenant without waiting jobs is
        forgotten if its counter is at most the lowest counter of the tenants with waiting jobs, because _return() would
        raise it to this value anyway. If no tenant has waiting jobs, the limit is the highest counter at which a job
        was ever taken. If more than IDLE_MAX tenants without waiting jobs remain, only the IDLE_MAX / 2 with the
        highest counters are kept.
        """
        lowest = min((t.counter for t in self.tenants.values() if t.waiting), default=self._floor)
        idle = [name for name, t in self.tenants.items() if not t.waiting]
        for name in [name for name in idle if self.tenants[name].counter <= lowest]:
            del self.tenants[name]
        kept = [name for name in idle if name in self.tenants]
        if len(kept) > IDLE_MAX:
            kept.sort(key=lambda name: self.tenants[name].counter)
            for name in kept[: len(kept) - IDLE_MAX // 2]:
                del self.tenants[name]
