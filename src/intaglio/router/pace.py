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
    """Model of a replica's step time.

    A step with T token rows takes per_step + T * per_token seconds.

    measured: False if the numbers are defaults, because no replica has reported step times yet.
    """

    per_step: float = 0.02
    per_token: float = 0.001
    measured: bool = False

    @classmethod
    def fitted(cls, fit: StepFit) -> Pace:
        """Returns the Pace with the coefficients of `fit`, a fit of step times.

        If the fit has no steps, returns the default Pace. If all steps had about the same number of tokens, the fit
        gives no time per token. The time per token is then 1/32 of the time per step: with 0, a cached prefix would
        seem to save nothing.
        """
        if fit.mean_seconds <= 0:
            return cls()
        return cls(fit.seconds_per_step, fit.seconds_per_token or fit.seconds_per_step / 32, measured=True)

    def slower(self, factor: float) -> Pace:
        """Returns the Pace of a replica whose steps take `factor` times as long as those of this Pace."""
        return Pace(self.per_step * factor, self.per_token * factor, self.measured)


def paces(replicas: Iterable[Replica]) -> dict[str, Pace]:
    """Returns the Pace (step-time model) of each replica, as a dict by the replica's name.

    A common Pace is fitted to the steps of all replicas of the same role. A replica's Pace is the common Pace, with
    both times multiplied by the replica's slowness:

        slowness = (m / c) ** trust
        trust = w / (w + TRUSTED_STEPS)

    Here m is the mean time of the replica's steps, and c is the time that the common Pace gives for a step of their
    mean size. w is the weight of the replica's steps (see StepFit). So a replica with few steps counts as about as fast
    as the others.
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
    """Returns the factor by which a replica's steps are slower than the Pace `common` predicts, a float above 0.

    It is the ratio of the mean measured time to the predicted time. With few steps, it is moved towards 1 (see
    paces()).

    fit: the StepFit of the replica's own steps.
    """
    if fit.mean_seconds <= 0:
        return 1.0
    expected = common.per_step + common.per_token * fit.mean_tokens
    return float((fit.mean_seconds / expected) ** (fit.weight / (fit.weight + TRUSTED_STEPS)))
