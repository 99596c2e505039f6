"""L2Blocks: which blocks of data the L2 holds, for closed forms that follow the transfers of all cores."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from intaglio.silicon.cache import LINE
from intaglio.silicon.l2 import RandomL2


class L2Blocks(RandomL2):
    """The expected content of an L2 that evicts lines at random: blocks of operands, and results.

    capacity: bytes that it can hold. need: bytes of everything that will be used; if that fits, nothing is evicted.
    """

    def __init__(self, capacity: float, need: float) -> None:
        super().__init__(capacity)
        self.tight = need > capacity
        self.blocks: dict[int, tuple[float, float]] = {}  # by key: (arrival from HBM, bytes evicted before)
        self.results = 0.0  # the part of `dirty` that are results of this product
        self.stored = self.gone = 0.0  # bytes of results: stored, and written back to HBM since

    def put(self, size: float, dirty: bool = False) -> float:
        """Bring `size` bytes into the L2, and evict what does not fit. Returns the bytes that are written back to HBM.

        dirty: True if the bytes are not in HBM, so that they are written back when they are evicted.
        """
        if not self.tight:
            return 0.0
        before = self.evicted
        written = self.insert(size)
        gone = self.results * (self.evicted - before) / self.capacity
        self.gone, self.results = self.gone + gone, self.results - gone
        self.dirty = min(self.held, self.dirty + size * dirty)
        return written

    def bring(self, key: int, size: float, dirty: bool = False, arrival: float = 0.0) -> float:
        """Bring bytes of a block into the L2. Returns the bytes that are written back to HBM for it.

        Args:
            key: the block.
            size: bytes of the block that the L2 lacks.
            dirty: True if they are not in HBM.
            arrival: when they have come from HBM, in seconds of the run.
        """
        written = self.put(size, dirty)
        self.blocks[key] = arrival, self.evicted
        return written

    def missing(self, key: int, size: float) -> float:
        """Expected bytes of a block of `size` bytes that the L2 lacks; 0.0 if that is less than half a line."""
        found = self.blocks.get(key)
        if found is None:
            return size
        if not self.tight or self.evicted == found[1]:
            return 0.0
        lacks = size * (1 - self.kept(found[1]))
        return lacks if lacks > LINE / 2 else 0.0

    def load(self, keys: Sequence[int], size: float, arrival: float) -> tuple[int, float, float, float]:
        """Load blocks of `size` bytes each. Returns (absent, read, ready, written).

        - absent: number of blocks of which bytes were missing.
        - read: bytes that HBM reads.
        - ready: when the last of the other blocks has come from HBM, in seconds of the run.
        - written: bytes that are written back to HBM.

        keys: the blocks. arrival: when the bytes that HBM reads will have come, in seconds of the run.
        """
        absent, read, ready, written = 0, 0.0, 0.0, 0.0
        for key in keys:
            lacks = self.missing(key, size)
            if lacks:
                absent, read = absent + 1, read + lacks
                written += self.bring(key, lacks, arrival=arrival)
            else:
                ready = max(ready, self.blocks.get(key, (0.0, 0.0))[0])
        return absent, read, ready, written

    def has(self, keys: Sequence[int], size: float) -> bool:
        """True if all blocks `keys`, of `size` bytes each, are in the L2 or on their way there."""
        return not any(self.missing(key, size) for key in keys)

    def store(self, size: float) -> float:
        """Store `size` bytes of results. Returns the bytes that are written back to HBM for it."""
        written = self.put(size, True)
        self.stored, self.results = self.stored + size, self.results + size
        return written


def fetched_bytes(start: int, stop: int, width: int, first: int) -> float:
    """Mean bytes that HBM reads, in whole lines, for a load of the bytes start .. stop - 1 of each row of a matrix.

    The mean is over rows, which begin at different places of a line. Lines that earlier loads of the same rows touch
    are not counted again, see cache.py. width: bytes of a row. first: bytes of a row in the first load.
    """
    if width - first < LINE:  # the first load touches all lines
        return 0.0 if start else float(width)
    count = 0
    offsets = range(0, LINE, gcd(width, LINE))
    for at in offsets:
        low, high, end = (start + at) // LINE, -(-(stop + at) // LINE), -(-(width + at) // LINE)
        if start:  # the load before has touched the first line, and the next row's first load the last line of this row
            low += (start + at) % LINE > 0
            high -= high == end and (width + at) % LINE > 0
        count += max(0, high - low)
    return LINE * count / len(offsets)
