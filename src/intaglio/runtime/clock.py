"""MonotonicClock: the engine's clock, which never goes back even if its source does."""

from __future__ import annotations

import math
from collections.abc import Callable


class MonotonicClock:
    """Wraps a clock in seconds so that time never goes back: a reading below the latest one returns the latest.

    `now` is the latest reading; events between two readings are stamped with it.
    """

    def __init__(self, source: Callable[[], float]) -> None:
        self.source = source
        self.now = -math.inf
        self.read()

    def read(self) -> float:
        """Read the source clock and return the time in seconds, never before the last reading."""
        self.now = max(self.now, self.source())
        return self.now
