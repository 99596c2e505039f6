"""Board: one message in memory shared by processes.

One process writes it, the others read it when they are notified.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np

from intaglio.devices.processes.messages import MessageError, size_of

PAGE = mmap.PAGESIZE
LENGTH = 8  # bytes in front of the message, which hold its length


class Board:
    """A memory file that holds one message for other processes. One process writes it, the others read it.

    A new message replaces the old one. How readers learn of a new message is not this class's task. Each process maps
    as much of the file as it needs.

    `file` is the descriptor of an existing board's file. None creates a file, which exists until the last process has
    closed it.
    """

    def __init__(self, file: int | None = None) -> None:
        self.file = os.memfd_create("intaglio-board") if file is None else file
        self.map: mmap.mmap | None = None

    def write(self, parts: Sequence[np.ndarray]) -> None:
        """Replace the message by the bytes of the arrays `parts`, one after another. Returns None.

        The bytes of each array are padded to a multiple of 8 bytes.
        """
        size = size_of(parts)
        room = self._mapped(LENGTH + size, grow=True)
        room[:LENGTH] = size.to_bytes(LENGTH, "little")
        at = LENGTH
        for x in parts:
            raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
            room[at : at + raw.nbytes] = raw.data
            at += -(-raw.nbytes // 8) * 8

    def read(self) -> memoryview:
        """Return the message as a memoryview, valid until the next write().

        Raises MessageError if the file is too short to hold the message.
        """
        size = int.from_bytes(self._mapped(LENGTH, grow=False)[:LENGTH], "little")
        return memoryview(self._mapped(LENGTH + size, grow=False))[LENGTH : LENGTH + size]

    def close(self) -> None:
        """Close the memory file. Returns None. A second call does nothing.

        Memoryviews that read() has returned stay valid.
        """
        self.map = None  # views of it may live on; it is unmapped with the last of them
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _mapped(self, size: int, grow: bool) -> mmap.mmap:
        if self.map is None or len(self.map) < size:
            held = os.fstat(self.file).st_size
            if grow and held < size:
                held = -(-(size + size // 4) // PAGE) * PAGE
                os.ftruncate(self.file, held)
            if held < size:
                raise MessageError(f"a board of {held} bytes holds no message of {size}")
            self.map = mmap.mmap(self.file, held)
        return self.map
