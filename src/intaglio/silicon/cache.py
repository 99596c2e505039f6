"""Cache: the L2 of a simulated chip, which lines of HBM it holds. Write-back; evicts the least recently used lines."""

from __future__ import annotations

from collections import deque

import numpy as np

from intaglio.silicon.memory import Region

LINE = 128  # bytes


class Cache:
    """A write-back cache of `size` bytes, such as the L2 of a chip. Its content persists between launches."""

    def __init__(self, size: float) -> None:
        self.lines = int(size // LINE)
        self.held = 0  # lines
        self.fetched = 0.0  # bytes that the latest access read from HBM
        self.now = 0  # number of the latest access
        self.last_use = np.zeros(0, np.int64)  # of each line, the number of its latest access; 0: not in the cache
        self.dirty = np.zeros(0, bool)
        self.arrival = np.zeros(0)  # of each line, the seconds of the run at which it comes from HBM
        self.ready = 0.0  # seconds of the run at which all lines of the latest access have come from HBM
        self.uses: deque[np.ndarray] = deque()  # the lines of each access, oldest first
        self.oldest = 1  # number of the access at the left of `uses`

    def begin(self) -> None:
        """Prepare for a new run of the simulator, whose clock starts at 0: mark all lines in the cache as arrived at 0.

        The new run then reads lines that earlier runs have fetched without waiting for HBM. Returns nothing.
        """
        self.arrival[:] = 0.0

    def access(self, region: Region, writes: bool, arrival: float = 0.0) -> float:
        """Record an access to a region of HBM. Returns the bytes moved between HBM and cache, both directions summed.

        Lines that are read and not in the cache are fetched. Of a region without gaps, the region's bytes are counted.
        Of one with gaps between its rows, such as some columns of a matrix, whole lines are counted: the neighbouring
        columns are in the cache from then on. Dirty lines that are evicted to make room are written back. A cache of
        size 0 moves all bytes of the region. Afterwards self.fetched has the bytes read from HBM, and self.ready the
        time when all lines of this access have come from HBM (0 for a write).

        Args:
            region: the region.
            writes: True for a write.
            arrival: when lines that this access fetches will have come from HBM, in seconds of the run.
        """
        self.fetched = self.ready = 0.0
        if not region.nbytes:
            return 0.0
        if not self.lines:
            self.fetched = 0.0 if writes else float(region.nbytes)
            return float(region.nbytes)
        lines = lines_of(region)
        if lines[-1] >= len(self.last_use):
            more = int(lines[-1]) + 1
            self.last_use = np.concatenate([self.last_use, np.zeros(more, np.int64)])
            self.dirty = np.concatenate([self.dirty, np.zeros(more, bool)])
            self.arrival = np.concatenate([self.arrival, np.zeros(more)])
        self.now += 1
        absent = self.last_use[lines] == 0
        missed = int(absent.sum())
        if not writes:
            self.arrival[lines[absent]] = arrival
            self.ready = float(self.arrival[lines].max())
        self.last_use[lines] = self.now
        self.uses.append(lines)
        self.held += missed
        self.dirty[lines] |= writes
        gaps = region.rows > 1 and region.stride > region.row_bytes
        most = missed * LINE if gaps else min(missed * LINE, region.nbytes)
        self.fetched = 0.0 if writes else float(most)
        return self.fetched + self._evict() * LINE

    def _evict(self) -> int:
        """Evict least recently used lines until the cache fits its size. Returns the number of evicted dirty lines.

        A dirty line has been written and not yet copied to HBM, so its eviction costs a write-back.

        Lines of the latest access stay, even if they alone exceed the size.
        """
        written = 0
        while self.held > self.lines and len(self.uses) > 1:
            lines = self.uses.popleft()
            gone = lines[self.last_use[lines] == self.oldest]
            self.oldest += 1
            written += int(self.dirty[gone].sum())
            self.last_use[gone], self.dirty[gone] = 0, False
            self.held -= len(gone)
        return written


def lines_of(region: Region) -> np.ndarray:
    """The numbers of the cache lines that a region touches, as an ascending array."""
    low, high = region.span
    if region.rows == 1 or region.stride - region.row_bytes < LINE:
        return np.arange(low // LINE, (high - 1) // LINE + 1)
    starts = region.address + np.arange(region.rows) * region.stride
    first, last = starts // LINE, (starts + region.row_bytes - 1) // LINE
    grid = first[:, None] + np.arange(int((last - first).max()) + 1)
    return np.unique(grid[grid <= last[:, None]])
