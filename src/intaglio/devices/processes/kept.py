"""Memory of a group's ranks that the parent process holds, so that it outlives them: K/V caches and packed weights."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Sequence

CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS)


class KeptState:
    """Memory files, one for each rank, that hold the ranks' K/V caches.

    The files exist until the last group that uses them is gone. A step writes K/V only at positions that are not
    computed yet. So all K/V computed before is intact when a process is killed in the middle of a step, and the next
    process can continue from it.
    """

    def __init__(self, ranks: int) -> None:
        self.files = [os.memfd_create("intaglio-state") for _ in range(ranks)]
        weakref.finalize(self, close_all, tuple(self.files))


class KeptImages:
    """Memory files, one for each rank of a group of processes, that keep the ranks' packed weights.

    They are used if packed weights are not cached on disk. They exist until the last group that uses them is gone. A
    group that replaces a crashed one maps them instead of packing again. Once they are filled, ranks map them
    read-only, so that a crashing rank does not damage them.

    ranks: number of ranks.
    """

    def __init__(self, ranks: int) -> None:
        self.files = [os.memfd_create("intaglio-image") for _ in range(ranks)]
        weakref.finalize(self, close_all, tuple(self.files))


def close_all(files: Sequence[int]) -> None:
    """Close these file descriptors. Returns nothing."""
    for file in files:
        os.close(file)


def spoils_memory(returncode: int | None) -> bool:
    """True if a process crashed, such as by SIGSEGV, and may have written to wrong addresses before.

    False for any other end, SIGKILL included, and while it runs. returncode: its exit status, as Popen.returncode; None
    while it runs.
    """
    return returncode is not None and -returncode in CRASHES
