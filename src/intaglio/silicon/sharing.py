"""Detects cores of one chip that access the same bytes of HBM in one run, where at least one of them writes.

Nothing orders cores within a run: counters and waits belong to one core. So such a program is refused in whichever
order the accesses happen. The check needs values, since the rows of Gather and Scatter depend on them.
"""

from __future__ import annotations

import numpy as np

MANY = -1


class SharedHbm:
    """Detects conflicts between the cores of one run in their accesses to HBM.

    In a conflict, two cores access the same byte, and at least one of them writes it. The simulator refuses a run with
    a conflict, because the order of the two accesses is not defined.

    Attributes:
        writer: for each byte, 1 + the number of the core that wrote it; 0: none has.
        reader: for each byte, 1 + the number of the core that read it; 0: none has; MANY: several have.
    """

    def __init__(self) -> None:
        self.writer, self.reader = np.zeros(0, np.int16), np.zeros(0, np.int16)  # core + 1, 0: none

    def access(self, core: int, indices: np.ndarray, writes: bool) -> str:
        """Record that `core` accesses the bytes at `indices`. Returns the kind of conflict: "writes", "reads" or "".

        - "writes": another core has written one of the bytes.
        - "reads": this core writes, and another core has read one of the bytes.
        - "": there is no conflict.

        writes: True if `core` writes, False if it reads.
        """
        if not indices.size:
            return ""
        missing = int(indices.max()) + 1 - len(self.writer)
        if missing > 0:
            self.writer, self.reader = (
                np.concatenate([v, np.zeros(missing + len(v), np.int16)]) for v in (self.writer, self.reader)
            )
        me = core + 1
        wrote = self.writer[indices]
        if ((wrote != 0) & (wrote != me)).any():
            return "writes"
        read = self.reader[indices]
        others = (read != 0) & (read != me)
        if writes:
            self.writer[indices] = me
            return "reads" if others.any() else ""
        self.reader[indices] = np.where(others, MANY, me)
        return ""
