"""StoreTier: a Connector that keeps K/V blocks in a BlockStore, read by some threads and written by another.

BlockStore is the protocol of such a store. Its classes are BlockDirectory (directory.py), used by DiskTier, and
BlockMemory (memory.py), used by PeerTier.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np

from intaglio.runtime import BlockKey, BlockScope, TierCounts
from intaglio.tiers.block_file import BlockFileError, file_bytes
from intaglio.tiers.block_order import BlockOrder
from intaglio.tiers.directory import NoRoom

QUEUE_BYTES = 256 << 20  # of blocks that wait to be written; more are not saved
RETRY = 30.0  # seconds without writing after the system refused to write


class StoreLoad:
    """A load in progress: a thread reads K/V blocks, and this object holds those that have been read."""

    def __init__(self) -> None:
        self.ended, self.cancelled, self.contents = threading.Event(), threading.Event(), list[np.ndarray]()

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the load to end. Returns True if it has ended."""
        return self.ended.wait(seconds)

    def blocks(self) -> list[np.ndarray]:
        """Returns the contents of the blocks read so far, in order, as a new list of uint8 [block_bytes].

        The list ends before the first block that is missing or failed a check.
        """
        return list(self.contents)  # the reader appends to it

    def cancel(self) -> None:
        """Stop the load: no further block is read. Returns nothing."""
        self.cancelled.set()


L = TypeVar("L", bound=StoreLoad)


class BlockLeases(Protocol):
    """Interface of the leases of a BlockStore. A lease protects some blocks from eviction until a given time."""

    def take(self, names: Sequence[str], seconds: float) -> str:
        """Take a lease: protect the blocks `names` from eviction for `seconds` seconds. Returns the lease's id, a str.

        Names of blocks that are not stored yet are allowed. Raises ValueError unless 0 < seconds <= leases.LONGEST, and
        OSError if the lease cannot be written.
        """

    def renew(self, lease: str, seconds: float) -> bool:
        """Extend a lease, so that it ends `seconds` seconds from now. Returns True if the lease was extended.

        Returns False if it has ended already or cannot be changed. Raises ValueError unless 0 < seconds <=
        leases.LONGEST, and TimeoutError if others lock the leases for too long. lease: id of the lease.
        """

    def release(self, lease: str) -> None:
        """End a lease, so that it no longer protects its blocks from eviction. Does nothing if it has ended already.

        lease: id of the lease, as take() returned it.
        """

    def names(self, lease: str) -> frozenset[str] | None:
        """Returns a frozenset of the names of the blocks that a lease protects, or None.

        None: the lease has ended or never existed.
        """


class BlockStore(Protocol):
    """Interface of a store of K/V blocks, such as a folder or this process's memory.

    The store holds each block as the bytes of its file (see block_file.py).

    Attributes:
        where: name of the store in messages.
        held: bytes of all stored blocks, as far as known; None: not known yet.
    """

    where: str
    held: int | None

    @property
    def leases(self) -> BlockLeases:
        """The BlockLeases of the store, with which blocks are protected from eviction for a time."""

    def has(self, name: str) -> bool:
        """Returns True if the store has the block `name`. The block's contents are not checked."""

    def read(self, scope: BlockScope, key: BlockKey, block_bytes: int) -> np.ndarray:
        """Returns the contents of the block `key`, uint8 [block_bytes].

        Raises FileNotFoundError if the store does not have the block, BlockFileError if the stored bytes are damaged or
        belong to another block, OSError if they cannot be read.
        """

    def write(self, name: str, parts: Sequence[bytes | memoryview], parent: str = "") -> int:
        """Store a block's bytes. Returns the number of blocks that were deleted to make room for it.

        Raises OSError if the block cannot be written, and NoRoom if protected blocks leave no room for it. After an
        error the block is not stored.

        Args:
            name: name of the block.
            parts: the bytes of its file, in pieces.
            parent: name of the block before it. If the store has the parent, the new block counts as used just before
                the parent was, so that it is deleted first: without its parent it could not be used. Otherwise it
                counts as used now.
        """

    def remove(self, name: str) -> None:
        """Delete the block `name`. Does nothing if the store does not have it or cannot delete it."""

    def touch(self, names: Sequence[str]) -> None:
        """Mark some blocks as just used, so that others are evicted first. Blocks that are not stored are skipped.

        names: names of the blocks, each the parent of the next.
        """


class StoreTier:
    """A Connector that keeps K/V blocks in a BlockStore. Some threads read blocks from it, and one thread writes them.

    Errors, and blocks that fail a check, are counted, and the first of each kind is reported. A block that fails a
    check is deleted.

    The store has blocks in the order of the whole model. If the engine's blocks are in another order, the attribute
    `order` (a BlockOrder) must be set before the first load or save.

    Args:
        store: the store that keeps the blocks.
        scope: BlockScope of the engine's blocks; blocks of another scope are never returned.
        report: function that is called with a message for the operator. Only the first message of each kind is
            reported.
        readers: number of threads that read.
    """

    def __init__(self, store: BlockStore, scope: BlockScope, report: Callable[[str], None], readers: int = 1) -> None:
        self.store, self.scope, self.report, self.counts = store, scope, report, TierCounts()
        self.reader = ThreadPoolExecutor(readers, "intaglio-kv-reader")
        self.writer = ThreadPoolExecutor(1, "intaglio-kv-writer")
        self.queued = 0  # bytes
        self.closed, self.loads = False, set[StoreLoad]()  # loads: those that have not ended
        self.writes_from = 0.0  # time.monotonic() before which nothing is written
        self.said, self.lock = set[str](), threading.Lock()
        self.order: BlockOrder | None = None

    def lookup(self, names: Sequence[str]) -> int:
        """Returns the number of blocks in `names` before the first block that load() cannot get from the store.

        A later load() may get fewer, since blocks may be evicted.

        names: names of the blocks, each the parent of the next.
        """
        return self.stored(names)

    def stored(self, names: Sequence[str]) -> int:
        """Returns the number of blocks in `names` before the first block that the store does not have.

        If the store has all of them, this is the length of `names`. names: names of the blocks, each the parent of the
        next.
        """
        return next((at for at, name in enumerate(names) if not self.store.has(name)), len(names))

    def load(self, keys: Sequence[BlockKey], block_bytes: int) -> StoreLoad:
        """Begin to read the blocks `keys` in another thread. Returns a StoreLoad, which collects the blocks.

        After close() nothing is read: the StoreLoad has ended and has no blocks. block_bytes: bytes of each block.
        """
        return self._begin(StoreLoad(), keys, block_bytes)

    def _begin(self, load: L, keys: Sequence[BlockKey], block_bytes: int) -> L:
        with self.lock:  # close() may be called in another thread
            if self.closed:
                load.ended.set()
            else:
                self.loads.add(load)
                stored_bytes = self.order.block_bytes if self.order else block_bytes
                self.reader.submit(self._read, load, list(keys), stored_bytes)
        return load

    def save(self, key: BlockKey, content: np.ndarray) -> bool:
        """Queue a block to be written by another thread. Returns True, or False if the block is not queued.

        A block is not queued if too many bytes wait to be written, if the tier is closed, and for RETRY seconds after a
        failed write. key: the block. content: its contents.
        """
        with self.lock:
            if self.closed or self.queued + content.nbytes > QUEUE_BYTES or time.monotonic() < self.writes_from:
                self.counts.dropped += 1
                return False
            self.queued += content.nbytes
            self.writer.submit(self._write, key, content)
        return True

    def touch(self, names: Sequence[str]) -> None:
        """Mark some blocks as just used, so that others are evicted first. Blocks that are not stored are skipped.

        names: names of the blocks, each the parent of the next.
        """
        with self.lock:
            if not self.closed:
                self.writer.submit(self.store.touch, list(names))

    def pin(self, names: Sequence[str], seconds: float) -> str:
        """Take a lease: protect the blocks `names` from eviction for `seconds` seconds. Returns the lease's id.

        The blocks may be stored already, or be stored later. The lease ends by itself unless it is renewed. Returns ""
        if the lease could not be taken. Raises ValueError unless 0 < seconds <= leases.LONGEST.
        """
        try:
            return self.store.leases.take(names, seconds)
        except OSError as e:
            self.counts.errors += 1
            self.say("pin", f"K/V blocks in {self.store.where} cannot be pinned: {e.strerror}")
            return ""

    def renew(self, lease: str, seconds: float) -> bool:
        """Extend a lease, so that it ends `seconds` seconds from now. Returns True if the lease was extended.

        Returns False if it has ended already or cannot be changed; then the counter counts.expired grows by 1. Raises
        TimeoutError if others lock the leases for too long; this counts as an error, and the lease goes on as before.
        Raises ValueError unless 0 < seconds <= leases.LONGEST. lease: id of the lease.
        """
        try:
            renewed = self.store.leases.renew(lease, seconds)
        except TimeoutError as e:
            self.counts.errors += 1
            self.say("renew", f"leases on K/V blocks in {self.store.where} are not renewed: {e.strerror}")
            raise
        self.counts.expired += not renewed
        return renewed

    def release(self, lease: str) -> None:
        """End a lease, so that its blocks may be evicted. lease: id of the lease, as pin() returned it."""
        self.store.leases.release(lease)

    def handed(self, lease: str, names: Sequence[str]) -> int:
        """Returns the number of blocks in `names` before the first that is not stored, or not protected by `lease`.

        A prefill replica calls this when it has saved a prompt's blocks: the replica that generates can rely on this
        number of blocks. Returns 0 if the lease has ended, and then adds 1 to the counter counts.expired.

        lease: id of the lease. names: names of the blocks, each the parent of the next.
        """
        pinned = self.store.leases.names(lease)
        if pinned is None:
            self.counts.expired += 1
            return 0
        there = self.stored(names)
        return next((at for at, name in enumerate(names[:there]) if name not in pinned), there)

    def say(self, kind: str, what: str) -> None:
        """Report a message to the operator, unless one of the same kind has been reported already. Returns nothing.

        Args:
            kind: a word for the kind of message.
            what: the message.
        """
        with self.lock:
            if kind in self.said:
                return
            self.said.add(kind)
        self.report(what)

    def damaged(self, error: BlockFileError) -> None:
        """Count a block that failed a check, and report the first such block to the operator. Returns nothing.

        error: what the check found.
        """
        self.counts.corrupt += 1
        self.say("corrupt", f"a K/V block cannot be used and is computed: {error}; further ones are only counted")

    def flush(self) -> None:
        """Wait until all blocks that save() has queued so far are written. Returns nothing."""
        with self.lock:
            written = None if self.closed else self.writer.submit(lambda: None)
        if written:
            written.result()

    def close(self) -> None:
        """Cancel all loads, write the blocks that are queued, and end the threads. Returns nothing.

        It must not be called during a step of the engine.
        """
        with self.lock:
            self.closed, loads = True, list(self.loads)
        for load in loads:
            load.cancel()
        self.reader.shutdown()
        self.writer.shutdown()

    def _read(self, load: StoreLoad, keys: list[BlockKey], block_bytes: int) -> None:
        try:
            for content in self._contents(load, keys, block_bytes):
                load.contents.append(self.order.to_own(content) if self.order else content)
        finally:
            with self.lock:
                self.loads.discard(load)
            load.ended.set()

    def _contents(self, load: StoreLoad, keys: Sequence[BlockKey], block_bytes: int) -> Iterator[np.ndarray]:
        """Yields the contents of the blocks `keys` in order, as uint8 [block_bytes].

        It ends before the first block that is missing or fails a check, and when `load` is cancelled.
        """
        for key in keys:
            if load.cancelled.is_set() or (content := self._read_one(key, block_bytes)) is None:
                return
            yield content

    def _read_one(self, key: BlockKey, block_bytes: int) -> np.ndarray | None:
        """Read the block `key`. Returns its contents, uint8 [block_bytes]; None if missing, damaged or unreadable.

        A damaged block is counted and deleted.
        """
        try:
            return self.store.read(self.scope, key, block_bytes)
        except FileNotFoundError:
            return None  # deleted since the lookup
        except BlockFileError as e:
            self.store.remove(key.name)
            self.damaged(e)
        except OSError as e:
            self.counts.errors += 1
            self.say("read", f"K/V blocks in {self.store.where} cannot be read and are computed: {e.strerror}")
        return None

    def _write(self, key: BlockKey, content: np.ndarray) -> None:
        try:
            if time.monotonic() >= self.writes_from and not self.store.has(key.name):
                stored = self.order.to_whole(content) if self.order else content
                self.counts.evicted += self.store.write(key.name, file_bytes(self.scope, key, stored), key.parent)
                self.counts.saved += 1
                self.counts.saved_bytes += stored.nbytes
        except NoRoom as e:
            self.counts.refused += 1
            self.say("room", f"a K/V block is not kept in {self.store.where}: {e}; further ones are only counted")
        except OSError as e:
            self.counts.errors += 1
            self.writes_from = time.monotonic() + RETRY
            self.say(
                "write",
                f"K/V blocks cannot be saved in {self.store.where}: {e.strerror}; the engine goes on without, and "
                f"tries again every {RETRY:g} s",
            )
        finally:
            self.counts.held_bytes = self.store.held or 0
            with self.lock:
                self.queued -= content.nbytes
