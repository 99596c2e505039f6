"""DiskTier: keeps K/V blocks in a directory, which survives restarts and which several engines may share.

On a file system in memory (/dev/shm) it is a pool that all engines of a host share.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from intaglio.runtime import BlockScope
from intaglio.tiers.directory import BlockDirectory
from intaglio.tiers.store import StoreTier


class DiskTier(StoreTier):
    """A Connector that keeps K/V blocks as files in a directory.

    Args:
        folder: the directory; it is made if it does not exist.
        budget: largest number of bytes of all files there together.
        scope: BlockScope of the engine's blocks; blocks of another scope are never returned.
        report: function that is called with a message for the operator. Only the first message of each kind is
            reported. By default the function issues a warning.
    """

    def __init__(
        self, folder: Path, budget: int, scope: BlockScope, report: Callable[[str], None] = warnings.warn
    ) -> None:
        self.directory = BlockDirectory(folder, budget)
        super().__init__(self.directory, scope, report)
