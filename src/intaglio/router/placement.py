"""Placement policies: functions that choose the replica of a job.

cache-aware: the replica with the lowest cost. The cost is the estimated time until the job ends plus half of its
prefill's time there; the second term stands for the other jobs that the prefill delays. round-robin: the replica that
was used least recently, for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from intaglio.router.index import PromptMemory
from intaglio.router.job import Job
from intaglio.router.pace import Pace
from intaglio.router.replica import Replica

PREFILL_SHARE = 0.5  # of the time of a job's prefill, which is added to its cost


@dataclass(frozen=True)
class Estimate:
    """Estimated times of a job if it is placed on a certain replica.

    Attributes:
        replica: the replica.
        pace: the replica's step times, from which the estimate is made.
        cached: number of prompt tokens that the replica has cached.
        uncached: number of prompt tokens that the replica has to compute.
        first_token: seconds from now until the job's first token.
        end: seconds from now until the job's end.
    """

    replica: Replica
    pace: Pace  # by which the times are estimated
    cached: int
    uncached: int
    first_token: float
    end: float

    @property
    def cost(self) -> float:
        """Returns the cost of the placement in seconds. The replica with the lowest cost is chosen.

        The cost is the time until the job ends, plus PREFILL_SHARE times the time of its prefill. The second term
        stands for the delay of other jobs on the replica, whose steps the prefill makes longer. Without it, a job would
        often leave the replica that has its prefix cached in order to end a little earlier, and all replicas together
        would compute more. If PREFILL_SHARE were 1, replicas would stay idle while jobs with the same prefix queue at
        another replica.
        """
        return self.end + PREFILL_SHARE * self.uncached * self.pace.per_token


Policy = Callable[[Sequence[Estimate]], Estimate]


def estimate(replica: Replica, job: Job, memory: PromptMemory, now: float, pace: Pace, ahead: int = 0) -> Estimate:
    """Returns the Estimate of a job on a replica.

    It has the number of cached prompt tokens, and the seconds until the job's first token and until its end. The
    calculation is as follows. The replica first prefills the jobs before this job, then this job's uncached tokens.
    After that the first token comes, and the decode steps follow. At least the last prompt token is computed, because
    its logits are needed. A job of stage "prefill" ends with its first token.

    Args:
        replica: the replica.
        job: the job.
        memory: token counts and block names of the prompt prefixes that replicas have reported.
        now: the time in seconds.
        pace: step times of the replica.
        ahead: number of prompt tokens of queued jobs that will go to this replica before this job.
    """
    cached = max(job.handed, replica.index.cached_tokens(job.keys, memory, now))
    cached = min(cached, job.prompt_tokens - 1)
    uncached = job.prompt_tokens - cached
    before = replica.prefill_left(now, pace.per_token) + ahead
    first = pace.per_step + pace.per_token * (before + uncached)
    step = pace.per_step + pace.per_token * (replica.sequences + job.choices)
    steps = 0 if job.stage == "prefill" else job.output_tokens
    return Estimate(replica, pace, cached, uncached, first, first + steps * step)


def lowest_cost(estimates: Sequence[Estimate]) -> Estimate:
    """Returns the Estimate with the lowest cost.

    Among equal costs, it is the one whose replica was given a job least recently.

    estimates: one Estimate for each replica on which the job may be placed. Raises ValueError if there are none.
    """
    return min(estimates, key=lambda e: (e.cost, e.replica.last_placed))


def take_turns(estimates: Sequence[Estimate]) -> Estimate:
    """Returns the Estimate whose replica was given a job least recently. This is the placement policy "round-robin".

    A replica without room is chosen only if no replica has room. Load and cached tokens make no difference.

    estimates: one Estimate for each replica on which the job may be placed. Raises ValueError if there are none.
    """
    return min(estimates, key=lambda e: (not e.replica.has_room, e.replica.last_placed))


POLICIES: Mapping[str, Policy] = {"cache-aware": lowest_cost, "round-robin": take_turns}
