"""Autoscaler: how many replicas there should be, by the length of the queue and the replicas' pace.

It does no input or output and reads no clock: callers pass the time in seconds. One more replica is wanted when
requests have waited in the router for some time because no replica has room. One fewer is wanted after a quiet time, if
the running sequences would hardly be slower on the remaining replicas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from intaglio.router.pace import Pace
from intaglio.router.replica import Replica
from intaglio.router.router import Router

UP_AFTER = 3.0  # seconds that requests must have waited, one after another, before a replica is added
UP_WAIT = 1.0  # seconds of prefill that may wait in the queue for each replica
DOWN_AFTER = 60.0  # seconds without a queue before a replica is removed
SLOWER = 1.25  # factor by which a step may become longer when a replica is removed


class Autoscaler:
    """Decides how many replicas should run, from `least` to `most`.

    `why` is the reason for the last change, as text. Raises ValueError unless 1 <= least <= most.
    """

    def __init__(self, least: int, most: int) -> None:
        if not 1 <= least <= most:
            raise ValueError(f"autoscaling between {least} and {most} replicas; allowed: 1 or more, the lower first")
        self.least, self.most, self.why = least, most, ""
        self._busy: float | None = None  # since when requests wait
        self._quiet: float | None = None  # since when one replica less would do

    def wanted(self, router: Router, replicas: int, now: float) -> int:
        """Returns the number of replicas that should run from now on, at least `least` and at most `most`.

        The number rises if there have been waiting requests at all times for the last UP_AFTER seconds. It falls by 1
        if for the last DOWN_AFTER seconds no request has waited, and one replica less would have been enough. Call this
        about once per second, because both times are measured between calls.

        Args:
            router: the router, whose queue and replicas are examined.
            replicas: the present number of replicas.
            now: the time in seconds.
        """
        if not self.least <= replicas <= self.most:
            self.why = f"allowed are {self.least} to {self.most}"
            return min(max(replicas, self.least), self.most)
        serving = [r for r in router.replicas.values() if r.placeable]
        waiting = len(router.queue)
        self._busy = (now if self._busy is None else self._busy) if waiting else None
        idle = not waiting and not any(r.report.waiting for r in serving)
        quiet = idle and len(serving) == replicas and self._enough_without_one(serving, router.paces())
        self._quiet = (now if self._quiet is None else self._quiet) if quiet else None
        if self._busy is not None and now - self._busy >= UP_AFTER and replicas < self.most:
            seconds = router.queue_seconds()
            more = max(1, math.ceil(seconds / UP_WAIT) - replicas) if math.isfinite(seconds) else 1
            self.why = f"{waiting} requests wait, {seconds:.1f} s of prefill"
            return self._changed(min(replicas + more, 2 * replicas, self.most))
        if self._quiet is not None and now - self._quiet >= DOWN_AFTER and replicas > self.least:
            self.why = f"no request has waited for {now - self._quiet:.0f} s"
            return self._changed(replicas - 1)
        return replicas

    def _changed(self, replicas: int) -> int:
        self._busy = self._quiet = None
        return replicas

    def _enough_without_one(self, serving: list[Replica], paces: Mapping[str, Pace]) -> bool:
        """True if one of the replicas `serving` could be removed; always False for fewer than two replicas.

        There are two conditions. The remaining replicas must have room for all running sequences. And when they share
        these sequences, their mean step must take at most SLOWER times as long as the mean step takes now.

        serving: the replicas that serve now. paces: {name of a replica: its Pace}, which gives the time of its steps.
        """
        n, sequences = len(serving), sum(r.sequences for r in serving)
        if n < 2 or sequences > sum(r.report.max_sequences for r in serving) * (n - 1) / n:
            return False
        per_step = sum(paces[r.name].per_step for r in serving) / n
        per_token = sum(paces[r.name].per_token for r in serving) / n
        return per_step + per_token * sequences / (n - 1) <= SLOWER * (per_step + per_token * sequences / n)
