"""Expected content of an L2 that evicts lines at random (see cache.py), from which misses and write-backs follow.

RandomL2 counts the bytes. L2 adds what a loop over tiles needs; TilesInL2 (core_loop.py) and L2Blocks
(kernels/l2_blocks.py) add which tiles and blocks the L2 holds.
"""

from __future__ import annotations

from math import exp
from typing import Literal

Source = Literal["l2", "hbm", "gathered", "selected"]
BY_INDEX = "gathered", "selected"


class RandomL2:
    """Expected numbers of bytes in an L2 that evicts lines at random.

    Attributes:
        capacity: bytes that it can hold.
        held: bytes that it holds.
        evicted: bytes that it has evicted so far.
        dirty: bytes that it holds and that are not in HBM.
    """

    def __init__(self, capacity: float, held: float = 0.0, evicted: float = 0.0) -> None:
        self.capacity, self.held, self.evicted, self.dirty = capacity, held, evicted, 0.0

    def kept(self, before: float) -> float:
        """Probability that a line is still there which came when `before` bytes had been evicted.

        It is exp(-n / capacity), where n is the number of bytes evicted since.
        """
        return exp((before - self.evicted) / self.capacity)

    def insert(self, size: float) -> float:
        """Bring `size` bytes into the L2, and evict what does not fit. Returns the bytes that HBM writes for it."""
        out = max(0.0, self.held + size - self.capacity)
        written = out * min(1.0, self.dirty / self.capacity)
        self.held, self.evicted, self.dirty = self.held + size - out, self.evicted + out, self.dirty - written
        return written


class L2(RandomL2):
    """Expected content, in bytes, of an L2 while a loop over tiles runs.

    reads: bytes of all operands. capacity: bytes of the L2, above 0. source: where the operands are before the loop:

    - "l2": in the L2, as far as it holds them, since the op before has just written them.
    - "hbm": only in HBM. All loads miss, and bring their bytes into the L2.
    - "gathered": in HBM, and read by index. All loads miss, and bring nothing into the L2.
    - "selected": as with "gathered", but the L2 has the operands too, since the op before has just written them.
    """

    def __init__(self, reads: float, capacity: float, source: Source) -> None:
        written = reads if source in ("l2", "selected") else 0.0  # by the op before
        super().__init__(capacity, min(written, capacity), max(0.0, written - capacity))
        self.source, self.loaded = source, 0.0

    def load(self, size: float) -> tuple[float, float]:
        """Record that all cores together load `size` bytes. Returns (fraction that misses, bytes that HBM moves)."""
        missed = 1.0
        if self.source == "l2":
            # Bytes that found the L2 full were not there when the first ones were evicted
            missed = 1 - min(1.0, self.kept(max(0.0, self.loaded - self.capacity)))
        self.loaded += size
        return missed, missed * size + (0.0 if self.source in BY_INDEX else self.insert(missed * size))

    def store(self, size: float) -> float:
        """Record that all cores together store `size` bytes. Returns the bytes that HBM writes for evicted lines."""
        written = self.insert(size)
        self.dirty += size
        return written
