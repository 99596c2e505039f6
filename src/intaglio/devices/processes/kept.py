"""Memory of a group's ranks that the parent process holds, so that it outlives them: K/V caches and packed weights."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Sequence

CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS)


class KeptState:
    """Memory files, one for each rank, that hold the ranks' K/V caches.

    The files exist until the last group of ranks that uses them has ended. A process that replaces a killed one can
    continue with the K/V cache: a step writes only positions that are not computed yet, so that the K/V of all earlier
    positions is intact even if the process was killed during a step.
    """

    def __init__(self, ranks: int) -> None:
        self.files = [os.memfd_create("intaglio-state") for _ in range(ranks)]
        weakref.finalize(self, close_all, tuple(self.files))


class KeptImages:
    """Memory files that hold the packed weights of ranks, one file for each of the `ranks` ranks.

    The files are used if packed weights are not cached on disk. They exist until the last group of ranks that uses them
    has ended. A group that replaces a crashed one maps the files instead of packing the weights again. Ranks map filled
    files read-only, so that a crashing rank cannot damage them.
    """

    def __init__(self, ranks: int) -> None:
        self.files = [os.memfd_create("intaglio-image") for _ in range(ranks)]
        weakref.finalize(self, close_all, tuple(self.files))


def close_all(files: Sequence[int]) -> None:
    """Close the file descriptors `files`. Returns None."""
    for file in files:
        os.close(file)


def spoils_memory(returncode: int | None) -> bool:
    """True if a process crashed, for example by SIGSEGV. It may have written to wrong addresses before.

    `returncode` is the process's exit status as in Popen.returncode: -n if signal n killed it, None while it runs. The
    result is False for a process that runs, that exited, or that SIGKILL ended.
    """
    return returncode is not None and -returncode in CRASHES
