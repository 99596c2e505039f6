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
    """Model of an L2 cache that evicts lines at random. It keeps expected numbers of bytes, not addresses.

    Attributes:
        capacity: bytes that the L2 can hold.
        held: bytes that it holds.
        evicted: bytes that it has evicted since the start.
        dirty: bytes that it holds and that HBM does not have yet.
    """

    def __init__(self, capacity: float, held: float = 0.0, evicted: float = 0.0) -> None:
        self.capacity, self.held, self.evicted, self.dirty = capacity, held, evicted, 0.0

    def kept(self, before: float) -> float:
        """Returns the probability that the L2 still has a line that was loaded earlier.

        It is exp(-n / capacity), where n is the number of bytes evicted since the line was loaded. before: value of
        the attribute `evicted` when the line was loaded.
        """
        return exp((before - self.evicted) / self.capacity)

    def insert(self, size: float) -> float:
        """Put `size` bytes into the L2, which evicts others if it is full. Returns the bytes written back to HBM."""
        out = max(0.0, self.held + size - self.capacity)
        written = out * min(1.0, self.dirty / self.capacity)
        self.held, self.evicted, self.dirty = self.held + size - out, self.evicted + out, self.dirty - written
        return written


class L2(RandomL2):
    """Model of the L2 while the cores run a loop over tiles. Its byte counts are expected values.

    `source` says where the operands are before the loop:

    - "l2": in the L2, as far as they fit, since the op before has just written them.
    - "hbm": only in HBM. All loads miss the L2, and put their bytes into it.
    - "gathered": in HBM, and read by index. All loads miss the L2, and put nothing into it.
    - "selected": read by index, as with "gathered", but the L2 holds the operands too, since the op before has just
      written them.

    reads: bytes of all operands of the loop. capacity: bytes that the L2 can hold, above 0.
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
        """Record that all cores together store `size` bytes. Returns the bytes that evictions write back to HBM."""
        written = self.insert(size)
        self.dirty += size
        return written
