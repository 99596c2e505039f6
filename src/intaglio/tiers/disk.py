"""DiskTier: keeps K/V blocks in a directory, which survives restarts and which several engines may share.

On a file system in memory (/dev/shm) it is a pool that all engines of a host share.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from intaglio.runtime import BlockKey, BlockScope, TierCounts
from intaglio.tiers.block_file import BlockFileError, file_bytes, read_block
from intaglio.tiers.directory import BlockDirectory, NoRoom

QUEUE_BYTES = 256 << 20  # of blocks that wait to be written; more are not saved
RETRY = 30.0  # seconds without writing after the system refused to write


class DiskLoad:
    """A load in progress: K/V blocks that a thread reads from a directory."""

    def __init__(self) -> None:
        self.ended, self.cancelled, self.contents = threading.Event(), threading.Event(), list[np.ndarray]()

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the load to end. Returns True if it has ended."""
        return self.ended.wait(seconds)

    def blocks(self) -> list[np.ndarray]:
        """The contents of the blocks read so far, in order, as a list of uint8 [block_bytes].

        The list ends before the first block that is missing or failed a check.
        """
        return self.contents

    def cancel(self) -> None:
        """Stop the load: no further block is read."""
        self.cancelled.set()


class DiskTier:
    """A Connector that keeps blocks as files, read by one thread and written by another.

    Errors, and blocks that fail a check, are counted, and the first of each kind is reported. A file that fails a check
    is deleted.

    Args:
        folder: the directory, made if it is not there.
        budget: bytes that all files there may have.
        scope: BlockScope of the engine's blocks; blocks of another scope are never given.
        report: called with a message for the operator, once for each kind; by default it issues a warning.
    """

    def __init__(
        self, folder: Path, budget: int, scope: BlockScope, report: Callable[[str], None] = warnings.warn
    ) -> None:
        self.directory, self.scope, self.report, self.counts = (
            BlockDirectory(folder, budget),
            scope,
            report,
            TierCounts(),
        )
        self.reader, self.writer = (ThreadPoolExecutor(1, f"intaglio-kv-{name}") for name in ("reader", "writer"))
        self.queued = 0  # bytes
        self.closed = False
        self.writes_from = 0.0  # time.monotonic() before which nothing is written
        self.said, self.lock = set[str](), threading.Lock()

    def lookup(self, names: Sequence[str]) -> int:
        """Number of blocks, from the first of `names` on, that have files. `names`: each the parent of the next."""
        for at, name in enumerate(names):
            if not self.directory.has(name):
                return at
        return len(names)

    def load(self, keys: Sequence[BlockKey], block_bytes: int) -> DiskLoad:
        """Begin to read blocks of `block_bytes` bytes each, and return the DiskLoad.

        After close() nothing is read: the DiskLoad has ended already.
        """
        load = DiskLoad()
        with self.lock:  # close() may be called in another thread
            if self.closed:
                load.ended.set()
            else:
                self.reader.submit(self._read, load, list(keys), block_bytes)
        return load

    def save(self, key: BlockKey, content: np.ndarray) -> None:
        """Queue a block to be written later. It is dropped if too many bytes wait, or if the tier is closed.

        It is also dropped during RETRY seconds after a write has failed.
        """
        with self.lock:
            if self.closed or self.queued + content.nbytes > QUEUE_BYTES or time.monotonic() < self.writes_from:
                self.counts.dropped += 1
                return
            self.queued += content.nbytes
            self.writer.submit(self._write, key, content)

    def touch(self, names: Sequence[str]) -> None:
        """Note that blocks are in use, so that other blocks are deleted first. names: each the parent of the next."""
        with self.lock:
            if not self.closed:
                self.writer.submit(self.directory.touch, list(names))

    def pin(self, names: Sequence[str], seconds: float) -> str:
        """Pin blocks, saved or still to be saved, for `seconds`. Returns the lease's id; "" if nothing could be pinned.

        Until the lease ends no engine that uses the directory evicts them. It ends by itself unless it is renewed.
        Raises ValueError unless 0 < seconds <= leases.LONGEST.
        """
        try:
            return self.directory.leases.take(names, seconds)
        except OSError as e:
            self.counts.errors += 1
            self.say("pin", f"K/V blocks in {self.directory.folder} cannot be pinned: {e.strerror}")
            return ""

    def renew(self, lease: str, seconds: float) -> bool:
        """Let a lease end in `seconds` from now. Returns True; False if it has run out already, which is counted.

        Raises TimeoutError, counted as an error, if others lock the leases for too long; the lease then goes on as
        before. Raises ValueError unless 0 < seconds <= leases.LONGEST.
        """
        try:
            renewed = self.directory.leases.renew(lease, seconds)
        except TimeoutError as e:
            self.counts.errors += 1
            self.say("renew", f"leases on K/V blocks in {self.directory.folder} are not renewed: {e.strerror}")
            raise
        self.counts.expired += not renewed
        return renewed

    def release(self, lease: str) -> None:
        """End a lease: its blocks may be evicted from now on."""
        self.directory.leases.release(lease)

    def handed(self, lease: str, names: Sequence[str]) -> int:
        """Number of blocks, from the first of `names` on, that have files and are pinned by a lease.

        names: the blocks, each the parent of the next. Returns 0 for a lease that has run out, and counts it as
        expired.
        """
        pinned = self.directory.leases.names(lease)
        if pinned is None:
            self.counts.expired += 1
            return 0
        there = self.lookup(names)
        return next((at for at, name in enumerate(names[:there]) if name not in pinned), there)

    def say(self, kind: str, what: str) -> None:
        """Report the message `what`, if it is the first of its `kind`."""
        with self.lock:
            if kind in self.said:
                return
            self.said.add(kind)
        self.report(what)

    def flush(self) -> None:
        """Wait until all blocks handed over so far are written."""
        with self.lock:
            written = None if self.closed else self.writer.submit(lambda: None)
        if written:
            written.result()

    def close(self) -> None:
        """Write the blocks that wait to be written, and end the threads. The engine must not be in a step."""
        with self.lock:
            self.closed = True
        self.reader.shutdown()
        self.writer.shutdown()

    def _read(self, load: DiskLoad, keys: list[BlockKey], block_bytes: int) -> None:
        try:
            for key in keys:
                if load.cancelled.is_set():
                    return
                content = self._read_one(key, block_bytes)
                if content is None:
                    return
                load.contents.append(content)
        finally:
            load.ended.set()

    def _read_one(self, key: BlockKey, block_bytes: int) -> np.ndarray | None:
        """Read a block's file. Returns the contents, uint8 [block_bytes]; None if it is missing, damaged or unreadable.

        A damaged file is counted and deleted.
        """
        try:
            return read_block(self.directory.file(key.name), self.scope, key, block_bytes)
        except FileNotFoundError:
            return None  # deleted since the lookup
        except BlockFileError as e:
            self.counts.corrupt += 1
            self.directory.remove(key.name)
            self.say("corrupt", f"a K/V block cannot be used and is computed: {e}; further ones are only counted")
        except OSError as e:
            self.counts.errors += 1
            self.say("read", f"K/V blocks in {self.directory.folder} cannot be read and are computed: {e.strerror}")
        return None

    def _write(self, key: BlockKey, content: np.ndarray) -> None:
        try:
            if time.monotonic() >= self.writes_from and not self.directory.has(key.name):
                self.counts.evicted += self.directory.write(key.name, file_bytes(self.scope, key, content))
                self.counts.saved += 1
                self.counts.saved_bytes += content.nbytes
        except NoRoom as e:
            self.counts.refused += 1
            self.say("room", f"a K/V block is not kept in {self.directory.folder}: {e}; further ones are only counted")
        except OSError as e:
            self.counts.errors += 1
            self.writes_from = time.monotonic() + RETRY
            self.say(
                "write",
                f"K/V blocks cannot be saved in {self.directory.folder}: {e.strerror}; the engine goes on without, and "
                f"tries again every {RETRY:g} s",
            )
        finally:
            self.counts.held_bytes = self.directory.held or 0
            with self.lock:
                self.queued -= content.nbytes
