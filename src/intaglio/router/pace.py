"""Pace: step times of replicas, from one fit over the steps of all replicas that do the same work.

A replica's own fit is wrong in two ways for a comparison of replicas. After few steps, or steps of one size, its
coefficients are arbitrary. And replicas on one machine disturb each other, so that equal replicas measure unlike times.
So the router fits one model to the steps of all replicas of a role, and takes only one number from each replica: how
slow its steps were in proportion to this model. The more steps that number is from, the more weight it has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from intaglio.router.replica import Replica
from intaglio.runtime import StepFit

TRUSTED_STEPS = 50.0  # weight of a replica's steps at which its own speed counts half; StepFit's limit is also 50


@dataclass(frozen=True)
class Pace:
    """Step-time model of a replica: a step of T token rows takes per_step + T * per_token seconds.

    measured: False for the values used before any replica has reported steps.
    """

    per_step: float = 0.02
    per_token: float = 0.001
    measured: bool = False

    @classmethod
    def fitted(cls, fit: StepFit) -> Pace:
        """The Pace of a fit. Without steps that took any time it is the default Pace.

        While all steps had about the same number of tokens, the fit has no slope. A token then counts as 1/32 of a
        step, since with a slope of 0 a cached prefix would seem to save nothing.
        """
        if fit.mean_seconds <= 0:
            return cls()
        return cls(fit.seconds_per_step, fit.seconds_per_token or fit.seconds_per_step / 32, measured=True)

    def slower(self, factor: float) -> Pace:
        """The Pace of a replica whose steps take `factor` times as long."""
        return Pace(self.per_step * factor, self.per_token * factor, self.measured)


def paces(replicas: Iterable[Replica]) -> dict[str, Pace]:
    """The Pace of each replica, by name.

    A common pace is fitted to the steps of all replicas of one role. A replica's pace is the common one times its own
    slowness:

        (mean time of its steps / time that the common pace gives to a step of their mean size) ** trust

    trust = w / (w + TRUSTED_STEPS), from 0 to 1, where w is the weight of its steps (see StepFit). So a replica with
    few steps so far is taken to be as fast as the others.
    """
    by_role: dict[str, list[Replica]] = {}
    for replica in replicas:
        by_role.setdefault(replica.role, []).append(replica)
    found: dict[str, Pace] = {}
    for members in by_role.values():
        common = Pace.fitted(StepFit.pooled([r.report.steps for r in members]))
        found |= {r.name: common.slower(_slowness(r.report.steps, common)) for r in members}
    return found


def _slowness(fit: StepFit, common: Pace) -> float:
    """Mean time of a replica's steps, divided by the time that the common pace gives for them.

    With few steps the quotient is drawn towards 1, see paces(). fit: of the replica's steps.
    """
    if fit.mean_seconds <= 0:
        return 1.0
    expected = common.per_step + common.per_token * fit.mean_tokens
    return float((fit.mean_seconds / expected) ** (fit.weight / (fit.weight + TRUSTED_STEPS)))
