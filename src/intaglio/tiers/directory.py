"""BlockDirectory: files of K/V blocks in a folder, with a budget in bytes and LRU eviction.

Several engines, in one process or several, may use the same folder. Files appear under their names only when they are
whole; modification times are the times of last use.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from intaglio.runtime import BlockKey, BlockScope
from intaglio.tiers.block_file import read_block
from intaglio.tiers.leases import Leases

SUFFIX, PARTIAL = ".kv", ".part"
PARTIAL_SECONDS = 600.0  # age at which a partial file is deleted: the process that wrote it was killed
RESCAN = 16  # look at all files again after each 1 / RESCAN of the budget: other engines write too
ROOM = 32  # when over the budget, delete down to 1 / ROOM below it
DEPTH = 1000  # ns between the times of last use of a block and the next one of its prefix
NUMBERS = itertools.count()


@dataclass(frozen=True)
class HeldFile:
    """A file in the directory: when it was last used (ns since the epoch), its path and its size in bytes."""

    used: int
    path: str
    size: int


class NoRoom(Exception):
    """Raised for a block that is not kept, because pinned blocks leave no room for it within the budget."""


class BlockDirectory:
    """The K/V block files of a folder, with LRU eviction. The folder is made at the first write, for this user only.

    One thread writes; any thread may read. The attribute `leases` (a Leases) protects blocks from eviction for a time.

    Args:
        folder: the folder; several processes may use the same one.
        budget: bytes of all files together. A process notices what other processes have written only when it looks at
            the sizes of all files, which it does after writing 1/16 of the budget. So for a while the files may exceed
            the budget by 1/16 of it for each process.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget, self.leases, self.where = folder, budget, Leases(folder), str(folder)
        self.held: int | None = None  # bytes of all files, as far as known; None: not looked yet
        self.written = 0  # bytes since all files were looked at

    def file(self, name: str) -> Path:
        """The path of a block's file."""
        return self.folder / name[:2] / f"{name}{SUFFIX}"

    def has(self, name: str) -> bool:
        """True if the folder has a file for the block of this name. Its contents are not checked."""
        return os.path.exists(self.file(name))

    def read(self, scope: BlockScope, key: BlockKey, block_bytes: int) -> np.ndarray:
        """The contents of a block, uint8 [block_bytes].

        Raises FileNotFoundError if it is not here, BlockFileError if it is another block or damaged, OSError if it
        cannot be read.
        """
        return read_block(self.file(key.name), scope, key, block_bytes)

    def write(self, name: str, parts: Sequence[bytes | memoryview], parent: str = "") -> int:
        """Write a block's file; then delete the least recently used files if the budget is exceeded.

        Returns the number of files deleted. Raises OSError if the file cannot be written or evict() fails, and NoRoom
        if the budget is still exceeded after that. After an error nothing is left of the file.

        Args:
            name: name of the block.
            parts: contents of the file, in pieces.
            parent: name of the block before it in the prompt; "": none. If the parent has a file, the new file gets a
                slightly older time of last use, so that it is evicted before the parent. Else it counts as used now.
        """
        if self.held is None:
            self.scan()
        file, size = self.file(name), sum(len(part) for part in parts)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{name[:16]}.{os.getpid()}.{next(NUMBERS)}{PARTIAL}")
        try:
            with partial.open("wb", buffering=0) as f:
                for part in parts:
                    rest = memoryview(part)
                    while rest:
                        rest = rest[f.write(rest) :]
            partial.replace(file)
            self._date(file, parent)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        self.held = (self.held or 0) + size
        self.written += size
        if self.held <= self.budget and self.written <= self.budget // RESCAN:
            return 0
        try:
            deleted = self.evict()
        except OSError:
            self.remove(name)
            self.held -= size
            raise
        if self.held > self.budget and self.has(name):
            self.remove(name)
            self.held -= size
            raise NoRoom(f"{size} bytes do not fit into {self.budget}, of which pinned blocks have {self.held}")
        return deleted

    def remove(self, name: str) -> None:
        """Delete a block's file. Does nothing if the file does not exist or the file system refuses. Returns nothing.

        Leases are not looked at.
        """
        with suppress(OSError):
            self.file(name).unlink()

    def touch(self, names: Sequence[str]) -> None:
        """Mark the files of blocks as just used, by their modification times, so that others are evicted first.

        A child gets an older time than its parent, so it is evicted first. Files that are not there are skipped. names:
        the names of the blocks, each the parent of the next.
        """
        now = time.time_ns()
        for depth, name in enumerate(names):
            with suppress(OSError):
                os.utime(self.file(name), ns=(now, now - DEPTH * depth))

    def _date(self, file: Path, parent: str) -> None:
        """Make a block's new file look a little older than that of its parent, so that the new file is evicted first.

        parent: name of the block before it in the prompt. If the parent has no file, nothing changes. Returns nothing.
        """
        with suppress(OSError):  # no parent, or deleted meanwhile
            used = os.stat(self.file(parent)).st_mtime_ns - DEPTH
            os.utime(file, ns=(used, used))

    def scan(self) -> list[HeldFile]:
        """Look at all files and delete old partial ones. Returns a list with a HeldFile for each block."""
        found, now = list[HeldFile](), time.time()
        for folder in [entry.path for entry in entries(self.folder) if len(entry.name) == 2]:
            for entry in entries(folder):
                with suppress(OSError):  # deleted meanwhile
                    facts = entry.stat()
                    if entry.name.endswith(SUFFIX):
                        found.append(HeldFile(facts.st_mtime_ns, entry.path, facts.st_size))
                    elif entry.name.endswith(PARTIAL) and now - facts.st_mtime > PARTIAL_SECONDS:
                        os.unlink(entry.path)
        self.held, self.written = sum(f.size for f in found), 0
        return found

    def evict(self) -> int:
        """If all files together exceed the budget, delete the least recently used, but none that a lease protects.

        It stops when 1 / ROOM of the budget is free. Returns the number of files deleted. Raises OSError if the folder
        of leases cannot be locked: TimeoutError if others lock it for LOCK_WAIT seconds, such as a process that was
        stopped while it evicted.
        """
        with self.leases.locked():
            return self._evict()

    def _evict(self) -> int:
        files, deleted = sorted(self.scan(), key=lambda f: (f.used, f.path)), 0
        assert self.held is not None
        if self.held > self.budget:
            pinned = self.leases.pinned()
            for file in files:
                if self.held <= self.budget - self.budget // ROOM:
                    break
                if Path(file.path).stem in pinned:
                    continue
                try:
                    os.unlink(file.path)
                    deleted += 1
                except FileNotFoundError:
                    pass  # another process deleted it
                except OSError:
                    continue  # the file system refuses: the file still takes its bytes
                self.held -= file.size
        return deleted


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """The files and folders in a folder, as a list of os.DirEntry; [] if the folder cannot be read."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []
