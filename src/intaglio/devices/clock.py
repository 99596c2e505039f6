"""Clocks of devices: measured seconds, or the modelled seconds of a simulated chip."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod


class Clock(ABC):
    """Interface of clocks. Calling a clock returns its time in seconds since an arbitrary start.

    The attribute `modelled` is False for a clock that measures real time. It is True for the clock of a simulated chip:
    its time advances only in steps of the chip and in wait_until().
    """

    modelled: bool

    @abstractmethod
    def __call__(self) -> float:
        """Return the clock's present time in seconds."""

    @abstractmethod
    def wait_until(self, seconds: float) -> None:
        """Wait until the clock shows `seconds` or more. A modelled clock is set forward instead."""


class WallClock(Clock):
    """A clock that measures real time: the machine's monotonic clock."""

    modelled = False

    def __call__(self) -> float:
        return time.monotonic()

    def wait_until(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds - time.monotonic()))


class VirtualClock(Clock):
    """The clock of a simulated chip. Its time advances only when the chip runs a step and in wait_until()."""

    modelled = True

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def wait_until(self, seconds: float) -> None:
        self.seconds = max(self.seconds, seconds)
