"""L2Blocks: which blocks of data the L2 holds, for closed forms that follow the transfers of all cores."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, gcd

from intaglio.silicon.cache import LINE


class L2Blocks:
    """What an L2 has that evicts lines at random (cache.py), as expected values: blocks of operands, and results.

    capacity: bytes. need: bytes of all that is used; if they fit, nothing is evicted.
    """

    def __init__(self, capacity: float, need: float) -> None:
        self.capacity, self.held, self.tight = capacity, 0.0, need > capacity
        self.blocks: dict[int, tuple[float, float]] = {}  # by key: (arrival from HBM, bytes evicted before)
        self.evicted = self.dirty = 0.0  # bytes evicted so far; in the L2 and not in HBM
        self.results = 0.0  # the part of `dirty` that are results of this product
        self.stored = self.gone = 0.0  # bytes of results: stored, and written back to HBM since

    def put(self, size: float, dirty: bool = False) -> float:
        """Bring bytes into the L2 and evict as many as do not fit. Returns the bytes that are written back to HBM."""
        if not self.tight:
            return 0.0
        out = max(0.0, self.held + size - self.capacity)
        part = out / self.capacity  # of all that the L2 has
        written = self.dirty * part
        self.gone += self.results * part
        self.results -= self.results * part
        self.held, self.evicted = self.held + size - out, self.evicted + out
        self.dirty = min(self.held, self.dirty - written + size * dirty)
        return written

    def bring(self, key: int, size: float, dirty: bool = False, arrival: float = 0.0) -> float:
        """Bring an absent block into the L2. Returns the bytes that are written back to HBM."""
        written = self.put(size, dirty)
        self.blocks[key] = arrival, self.evicted
        return written

    def missing(self, key: int, size: float) -> float:
        """Bytes of a block that the L2 lacks; 0.0 if the probability that it lacks any is small."""
        found = self.blocks.get(key)
        if found is None:
            return size
        if not self.tight or self.evicted == found[1]:
            return 0.0
        lacks = size * (1 - exp((found[1] - self.evicted) / self.capacity))
        return lacks if lacks > LINE / 2 else 0.0

    def load(self, keys: Sequence[int], size: float, arrival: float) -> tuple[int, float, float, float]:
        """Load blocks of `size` bytes.

        Returns (number of blocks of which bytes were missing, bytes that HBM reads, when the others are there, bytes
        that are written back to HBM).
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
        """True if all these blocks are in the L2, or on their way there."""
        return not any(self.missing(key, size) for key in keys)

    def store(self, size: float) -> float:
        """Store results. Returns the bytes that are written back to HBM."""
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
