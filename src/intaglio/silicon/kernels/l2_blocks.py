"""L2Blocks: which blocks of data the L2 holds, for closed forms that follow the transfers of all cores."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from intaglio.silicon.cache import LINE


class L2Blocks:
    """What the L2 has: blocks of operands by key, and results; the least recently used ones are evicted.

    capacity: bytes. need: bytes of all that is used; if they fit, the order of uses does not matter.
    """

    def __init__(self, capacity: float, need: float) -> None:
        self.capacity, self.held, self.tight = capacity, 0.0, need > capacity
        self.blocks: dict[int, tuple[float, float, bool]] = {}  # (arrival from HBM, bytes, dirty), oldest use first
        self.results = 0
        self.stored = self.gone = 0.0  # bytes of results: stored, and written back to HBM since

    def put(self, key: int, size: float, dirty: bool, arrival: float = 0.0) -> None:
        """Put a block into the L2."""
        self.blocks[key] = arrival, size, dirty
        self.held += size

    def evict(self) -> float:
        """Evict blocks until the others fit. Returns the bytes that are written back to HBM."""
        written = 0.0
        while self.held > self.capacity and len(self.blocks) > 1:
            key = next(iter(self.blocks))
            _, size, dirty = self.blocks.pop(key)
            self.held -= size
            written += size * dirty
            self.gone += size * (dirty and key < 0)
        return written

    def load(self, keys: Sequence[int], size: float, arrival: float) -> tuple[int, float, float]:
        """Load blocks. Returns (number of blocks that were absent, when the others are there, bytes written back)."""
        absent, ready, blocks = 0, 0.0, self.blocks
        for key in keys:
            found = blocks.get(key)
            if found is None:
                absent += 1
                self.put(key, size, False, arrival)
                continue
            ready = max(ready, found[0])
            if self.tight:
                blocks[key] = blocks.pop(key)
        return absent, ready, self.evict() if absent and self.tight else 0.0

    def has(self, keys: Sequence[int]) -> bool:
        """True if all these blocks are in the L2, or on their way there."""
        return all(key in self.blocks for key in keys)

    def store(self, size: float) -> float:
        """Store results. Returns the bytes that are written back to HBM."""
        self.stored += size
        if not self.tight:
            return 0.0
        self.results -= 1
        self.put(self.results, size, True)
        return self.evict()


def fetched_bytes(start: int, stop: int, width: int, first: int) -> float:
    """Mean bytes that HBM reads, in whole lines, for a load of the bytes start .. stop - 1 of each row of a matrix.

    The mean is over rows, which begin at different places of a line. Lines that earlier loads of the same rows touch
    are not counted again, see cache.py. width: bytes of a row. first: bytes of a row in the first load.
    """
    if width - first < LINE:  # without gaps, so the first load touches all lines
        return 0.0 if start else stop
    count = 0
    offsets = range(0, LINE, gcd(width, LINE))
    for at in offsets:
        low, high, end = (start + at) // LINE, -(-(stop + at) // LINE), -(-(width + at) // LINE)
        if (
            start
        ):  # the load before may have touched the first line; the first load of the next row, the row's last line
            low += (start + at) % LINE > 0
            high -= high == end and (width + at) % LINE > 0
        count += max(0, high - low)
    return LINE * count / len(offsets)
