"""Clocks of devices: measured seconds, or the modelled seconds of a simulated chip."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod


class Clock(ABC):
    """Interface of clocks. Calling a clock returns its time in seconds from an arbitrary start.

    `modelled` is True for the seconds of a simulated chip, which only its steps and wait_until() advance.
    """

    modelled: bool

    @abstractmethod
    def __call__(self) -> float:
        """The clock's present time in seconds."""

    @abstractmethod
    def wait_until(self, seconds: float) -> None:
        """Wait until the clock shows `seconds` or more. A modelled clock is set forward instead."""


class WallClock(Clock):
    """The machine's monotonic clock."""

    modelled = False

    def __call__(self) -> float:
        return time.monotonic()

    def wait_until(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds - time.monotonic()))


class VirtualClock(Clock):
    """A clock that only steps and wait_until() advance."""

    modelled = True

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def wait_until(self, seconds: float) -> None:
        self.seconds = max(self.seconds, seconds)
