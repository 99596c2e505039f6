"""MonotonicClock: the engine's clock, which never goes back even if its source does."""

from __future__ import annotations

import math
from collections.abc import Callable


class MonotonicClock:
    """Clock in seconds that never goes back, made from the clock `source`.

    If `source` returns a lower time than before, the latest time is returned again. `now` is the result of the latest
    read(); it is the time of events until the next read().
    """

    def __init__(self, source: Callable[[], float]) -> None:
        self.source = source
        self.now = -math.inf
        self.read()

    def read(self) -> float:
        """Read the source clock. Returns the time in seconds, never a lower time than before."""
        self.now = max(self.now, self.source())
        return self.now
