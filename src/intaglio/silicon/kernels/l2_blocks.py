"""L2Blocks: which blocks of data the L2 holds, for closed forms that follow the transfers of all cores."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from intaglio.silicon.cache import LINE
from intaglio.silicon.l2 import RandomL2


class L2Blocks(RandomL2):
    """Model of the contents of an L2 that evicts lines at random. It holds blocks of operands, and results.

    Its byte counts are expected values. capacity: bytes that the L2 can hold. need: bytes of all data that a kernel
    uses; if they fit the L2, nothing is evicted.
    """

    def __init__(self, capacity: float, need: float) -> None:
        super().__init__(capacity)
        self.tight = need > capacity
        self.blocks: dict[int, tuple[float, float]] = {}  # by key: (arrival from HBM, bytes evicted before)
        self.results = 0.0  # the part of `dirty` that are results of this product
        self.stored = self.gone = 0.0  # bytes of results: stored, and written back to HBM since

    def put(self, size: float, dirty: bool = False) -> float:
        """Put `size` bytes into the L2. Returns the number of evicted bytes that are written to HBM to make room.

        dirty: True if HBM does not have the new bytes, so that they must be written to HBM when they are evicted.
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
        """Put the missing bytes of a block into the L2. Returns the bytes that are written back to HBM to make room.

        Args:
            key: number of the block.
            size: bytes of the block that the L2 lacks.
            dirty: True if HBM does not have these bytes.
            arrival: time at which the bytes arrive from HBM, in seconds since the kernel's start.
        """
        written = self.put(size, dirty)
        self.blocks[key] = arrival, self.evicted
        return written

    def missing(self, key: int, size: float) -> float:
        """Returns how many bytes of block number `key` are expected to be missing in the L2.

        Less than half a line counts as 0.0. size: bytes of the block.
        """
        found = self.blocks.get(key)
        if found is None:
            return size
        if not self.tight or self.evicted == found[1]:
            return 0.0
        lacks = size * (1 - self.kept(found[1]))
        return lacks if lacks > LINE / 2 else 0.0

    def load(self, keys: Sequence[int], size: float, arrival: float) -> tuple[int, float, float, float]:
        """Load some blocks of `size` bytes each into the L2. Returns (absent, read, ready, written).

        - absent: number of blocks that the L2 did not hold completely.
        - read: bytes that are read from HBM.
        - ready: time at which the other blocks, which the L2 holds, have all arrived from HBM; in seconds since the
          kernel's start.
        - written: bytes that are written back to HBM.

        keys: numbers of the blocks. arrival: time at which the bytes that are read from HBM arrive.
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
        """True if the L2 has all blocks `keys`, of `size` bytes each. They may still be on their way from HBM."""
        return not any(self.missing(key, size) for key in keys)

    def store(self, size: float) -> float:
        """Store `size` bytes of results in the L2. Returns the bytes that are written back to HBM to make room."""
        written = self.put(size, True)
        self.stored, self.results = self.stored + size, self.results + size
        return written


def fetched_bytes(start: int, stop: int, width: int, first: int) -> float:
    """Returns the mean number of bytes that HBM reads per row to load bytes start .. stop - 1 of each row of a matrix.

    HBM reads whole lines. The mean is taken over rows that begin at different places in a line. Each row is loaded in
    several loads from left to right. Lines that earlier loads of the rows have fetched are not counted again.

    width: bytes of a row. first: bytes of a row that the first of these loads takes.
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
