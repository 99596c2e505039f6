"""L2: the expected content of an L2 while a loop over tiles runs, from which its misses and write-backs follow."""

from __future__ import annotations

from math import exp
from typing import Literal

Source = Literal["l2", "hbm", "gathered", "selected"]
BY_INDEX = "gathered", "selected"


class L2:
    """Expected content, in bytes, of an L2 that evicts lines at random (see cache.py).

    A line that has come into the L2 is still there with probability exp(-evicted / capacity), where `evicted` is the
    number of bytes evicted since it came.

    reads: bytes of all operands. capacity: bytes of the L2, above 0. source: where the operands are before the loop:

    - "l2": in the L2, as far as it holds them, since the op before has just written them.
    - "hbm": only in HBM. All loads miss, and bring their bytes into the L2.
    - "gathered": in HBM, and read by index. All loads miss, and bring nothing into the L2.
    - "selected": as with "gathered", but the L2 has the operands too, since the op before has just written them.
    """

    def __init__(self, reads: float, capacity: float, source: Source) -> None:
        self.capacity, self.source = capacity, source
        written = reads if source in ("l2", "selected") else 0.0  # by the op before
        self.held, self.evicted = min(written, capacity), max(0.0, written - capacity)
        self.dirty = 0.0  # bytes that the loop has stored and that are not in HBM
        self.loaded = 0.0

    def load(self, size: float) -> tuple[float, float]:
        """Record that all cores together load `size` bytes. Returns (fraction that misses, bytes that HBM moves)."""
        missed = 1.0
        if self.source == "l2":
            # Bytes that found the L2 full were not there when the first ones were evicted
            since = self.evicted - max(0.0, self.loaded - self.capacity)
            missed = 1 - exp(-max(0.0, since) / self.capacity)
        self.loaded += size
        return missed, missed * size + (0.0 if self.source in BY_INDEX else self.insert(missed * size))

    def store(self, size: float) -> float:
        """Record that all cores together store `size` bytes. Returns the bytes that HBM writes for evicted lines."""
        written = self.insert(size)
        self.dirty += size
        return written

    def insert(self, size: float) -> float:
        """Bring `size` bytes into the L2, and evict what does not fit. Returns the bytes that HBM writes for it."""
        out = max(0.0, self.held + size - self.capacity)
        written = out * min(1.0, self.dirty / self.capacity)
        self.held, self.evicted, self.dirty = self.held + size - out, self.evicted + out, self.dirty - written
        return written
