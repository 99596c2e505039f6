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
    """A K/V block's file in the directory.

    Attributes:
        used: time of last use, in ns since the epoch.
        path: path of the file.
        size: its size in bytes.
    """

    used: int
    path: str
    size: int


class NoRoom(Exception):
    """Raised when a K/V block is not stored, because blocks that may not be evicted take up the budget."""


class BlockDirectory:
    """A folder with the files of K/V blocks. If they together exceed the budget, the least recently used are deleted.

    One thread may write; any thread may read. The folder is made at the first write, with access for this user only.
    The attribute `leases` (a Leases) protects blocks from eviction for a time.

    Args:
        folder: the folder; several processes may use the same one.
        budget: largest number of bytes of all files together. A process notices what other processes have written only
            when it looks at the sizes of all files, which it does after writing 1/16 of the budget. So for a while the
            files may exceed the budget by 1/16 for each process.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget, self.leases, self.where = folder, budget, Leases(folder), str(folder)
        self.held: int | None = None  # bytes of all files, as far as known; None: not looked yet
        self.written = 0  # bytes since all files were looked at

    def file(self, name: str) -> Path:
        """Returns the path of the file of the block `name`, whether or not the file exists."""
        return self.folder / name[:2] / f"{name}{SUFFIX}"

    def has(self, name: str) -> bool:
        """Returns True if the folder has a file for the block `name`. The file's contents are not checked."""
        return os.path.exists(self.file(name))

    def read(self, scope: BlockScope, key: BlockKey, block_bytes: int) -> np.ndarray:
        """Returns the contents of the block `key`, uint8 [block_bytes].

        Raises FileNotFoundError if the block has no file, BlockFileError if the file is damaged or holds another block,
        OSError if it cannot be read.
        """
        return read_block(self.file(key.name), scope, key, block_bytes)

    def write(self, name: str, parts: Sequence[bytes | memoryview], parent: str = "") -> int:
        """Write a block's file. If the budget is exceeded, delete the least recently used files.

        Returns the number of files deleted. Raises OSError if the file cannot be written or evict() fails. Raises
        NoRoom if the budget is still exceeded after evict(). After an error the new file does not exist.

        Args:
            name: name of the block.
            parts: contents of the file, in pieces.
            parent: name of the block before it in the prompt; "": none. If the parent has a file, the new file gets a
                slightly older time of last use, so that it is evicted before the parent. Otherwise it counts as used
                now.
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
        """Delete the file of the block `name`, even if a lease protects it. Returns nothing.

        Does nothing if the file does not exist or the file system refuses.
        """
        with suppress(OSError):
            self.file(name).unlink()

    def touch(self, names: Sequence[str]) -> None:
        """Mark the files of some blocks as just used, so that other files are evicted first. Returns nothing.

        The modification time of a file is its time of last use. A child gets an older time than its parent, so that it
        is evicted before the parent. Names without a file are skipped. names: names of the blocks, each the parent of
        the next.
        """
        now = time.time_ns()
        for depth, name in enumerate(names):
            with suppress(OSError):
                os.utime(self.file(name), ns=(now, now - DEPTH * depth))

    def _date(self, file: Path, parent: str) -> None:
        """Make a block's new file count as used just before its parent's file, so that the new file is evicted first.

        Returns nothing. If the parent has no file, nothing is changed. parent: name of the parent, the block before
        this one in the prompt.
        """
        with suppress(OSError):  # no parent, or deleted meanwhile
            used = os.stat(self.file(parent)).st_mtime_ns - DEPTH
            os.utime(file, ns=(used, used))

    def scan(self) -> list[HeldFile]:
        """Read the sizes of all files, and delete old partial files. Returns a list with a HeldFile for each block."""
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
        """Delete the least recently used files if all together exceed the budget. Returns the number of files deleted.

        It stops when 1 / ROOM of the budget is free. Files that a lease protects are not deleted. Raises OSError if the
        folder of leases cannot be locked; TimeoutError if others hold the lock for LOCK_WAIT seconds, such as a process
        that was stopped while it evicted.
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
    """Returns a list with one os.DirEntry for each file and folder in `folder`.

    The list is empty if the folder cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []
