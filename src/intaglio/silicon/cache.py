"""Cache: the L2 of a simulated chip, which lines of HBM it holds. Write-back; evicts lines at random."""

from __future__ import annotations

from math import gcd

import numpy as np

from intaglio.silicon.memory import Region

LINE = 128  # bytes
WAYS = 16  # slots of a set


class Cache:
    """A write-back cache of `size` bytes, such as the L2 of a chip. Its content persists between launches.

    A line that is fetched or written takes a free slot. If no slot is free, another line is evicted. The evicted line
    is chosen by pseudo-random numbers with a fixed seed, so that a run can be repeated exactly.

    Vendors do not publish which lines their L2 evicts. But measured miss rates rise gradually as an array outgrows the
    L2. Eviction of the least recently used line would not show this: a loop over an array of 1.01 times the cache's
    size would miss every line.
    """

    def __init__(self, size: float) -> None:
        self.ways = min(WAYS, int(size // LINE))
        self.sets = int(size // LINE) // max(1, self.ways)
        self.lines = self.sets * self.ways
        self.slots = np.full(self.lines, -1)  # the line that each slot holds; -1: none
        self.held = 0  # slots in use, which are the first
        self.slot = np.zeros(0, np.int64)  # of each line, the slot that it took last
        self.dirty = np.zeros(0, bool)
        self.arrival = np.zeros(0)  # of each line, the seconds of the run at which it comes from HBM
        self.fetched = 0.0  # bytes that the latest access read from HBM
        self.ready = 0.0  # seconds of the run at which all lines of the latest access have come from HBM
        self.random = np.random.default_rng(0)
        self.evictions = 0
        # The set of an eviction is so far from that of the eviction before: a number without a common divisor with sets
        self.step = next((n for n in range(int(self.sets * 0.618) + 1, 2 * self.sets) if gcd(n, self.sets) == 1), 1)

    def begin(self) -> None:
        """Prepare for a new run of the simulator, whose clock starts at 0. Returns nothing.

        All lines in the cache count as present from time 0 on. The new run can read them without waiting for HBM.
        """
        self.arrival[:] = 0.0

    def access(self, region: Region, writes: bool, arrival: float = 0.0) -> float:
        """Record an access to a region of HBM. Returns how many bytes it moves between HBM and cache, both ways.

        A read fetches the region's lines that are not in the cache. If the region's rows follow each other without
        gaps, the fetched bytes are at most the region's own bytes. If there are gaps between its rows, whole lines are
        counted, because the cache then also holds the neighbouring columns. Dirty lines that must be evicted to make
        room are written back to HBM. With a cache of size 0, the access moves all bytes of the region.

        Afterwards `self.fetched` is the number of bytes read from HBM. `self.ready` is the time when all lines of this
        access have come from HBM, in seconds of the run; it is 0 for a write.

        Args:
            region: the region.
            writes: True for a write.
            arrival: time when the lines that this access fetches will have come from HBM, in seconds of the run.
        """
        self.fetched = self.ready = 0.0
        if not region.nbytes:
            return 0.0
        if not self.lines:
            self.fetched = 0.0 if writes else float(region.nbytes)
            return float(region.nbytes)
        lines = lines_of(region)
        if lines[-1] >= len(self.slot):
            more = int(lines[-1]) + 1
            self.slot = np.concatenate([self.slot, np.zeros(more, np.int64)])
            self.dirty = np.concatenate([self.dirty, np.zeros(more, bool)])
            self.arrival = np.concatenate([self.arrival, np.zeros(more)])
        absent = lines[self.slots[self.slot[lines]] != lines]
        missed = len(absent)
        if not writes:
            self.arrival[absent] = arrival
            self.ready = float(self.arrival[lines].max())
        self.dirty[lines] |= writes
        gaps = region.rows > 1 and region.stride > region.row_bytes
        most = missed * LINE if gaps else min(missed * LINE, region.nbytes)
        self.fetched = 0.0 if writes else float(most)
        written = sum(self._insert(absent[i : i + self.sets]) for i in range(0, missed, self.sets))
        return self.fetched + written * LINE

    def _insert(self, lines: np.ndarray) -> int:
        """Put lines that are not in the cache into slots. Returns the number of dirty lines that are evicted for this.

        A dirty line has been written and not yet copied to HBM, so its eviction costs a write-back. lines: numbers of
        the lines, at most `self.lines` of them.
        """
        free = min(len(lines), self.lines - self.held)
        self._place(lines[:free], np.arange(self.held, self.held + free))
        self.held += free
        if free == len(lines):
            return 0
        numbers = self.evictions + np.arange(len(lines) - free)
        slots = numbers * self.step % self.sets * self.ways + self.random.integers(self.ways, size=len(numbers))
        self.evictions += len(numbers)
        gone = self.slots[slots]
        written = int(self.dirty[gone].sum())
        self.dirty[gone] = False
        self._place(lines[free:], slots)
        return written

    def _place(self, lines: np.ndarray, slots: np.ndarray) -> None:
        self.slots[slots], self.slot[lines] = lines, slots


def lines_of(region: Region) -> np.ndarray:
    """Returns the numbers of the cache lines that a region touches, as an ascending array of integers."""
    low, high = region.span
    if region.rows == 1 or region.stride - region.row_bytes < LINE:
        return np.arange(low // LINE, (high - 1) // LINE + 1)
    starts = region.address + np.arange(region.rows) * region.stride
    first, last = starts // LINE, (starts + region.row_bytes - 1) // LINE
    grid = first[:, None] + np.arange(int((last - first).max()) + 1)
    return np.unique(grid[grid <= last[:, None]])
