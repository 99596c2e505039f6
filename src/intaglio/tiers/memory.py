"""BlockMemory: K/V blocks in this process's memory, with a budget in bytes, LRU eviction and leases."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence

import numpy as np

from intaglio.runtime import BlockKey, BlockScope
from intaglio.tiers.block_file import check_block
from intaglio.tiers.directory import ROOM, NoRoom
from intaglio.tiers.leases import check_seconds

USE = 1 << 32  # between two uses; more than the blocks of a sequence


class MemoryLeases:
    """Leases on K/V blocks, kept in this process's memory. A lease protects blocks from eviction until a given time.

    The class has the same methods as Leases, which keeps leases as files.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[float, frozenset[str]]] = {}  # by lease: its end, and the names of its blocks
        self._lock = threading.Lock()

    def take(self, names: Sequence[str], seconds: float) -> str:
        """Take a lease: protect the blocks `names` from eviction for `seconds`. Returns its id, 32 hexadecimal digits.

        A block that is not stored yet is protected too, if it is stored during that time. Raises ValueError unless 0 <
        seconds <= LONGEST.
        """
        check_seconds(seconds)
        lease = secrets.token_hex(16)
        with self._lock:
            self._held[lease] = time.monotonic() + seconds, frozenset(names)
        return lease

    def renew(self, lease: str, seconds: float) -> bool:
        """Extend a lease, so that it ends `seconds` seconds from now. Returns True, or False if it has ended already.

        Raises ValueError unless 0 < seconds <= LONGEST. lease: id of the lease.
        """
        check_seconds(seconds)
        with self._lock:
            ends, names = self._held.get(lease, (0.0, frozenset[str]()))
            if ends <= time.monotonic():
                return False
            self._held[lease] = time.monotonic() + seconds, names
        return True

    def release(self, lease: str) -> None:
        """End a lease, so that it no longer protects its blocks from eviction. Does nothing if it has ended already.

        lease: id of the lease, as take() returned it.
        """
        with self._lock:
            self._held.pop(lease, None)

    def names(self, lease: str) -> frozenset[str] | None:
        """Returns a frozenset of the names of the blocks that a lease protects, or None.

        None: the lease has ended or never existed. lease: id of the lease.
        """
        with self._lock:
            ends, names = self._held.get(lease, (0.0, None))
        return names if ends > time.monotonic() else None

    def pinned(self) -> set[str]:
        """Returns a set of the names of all blocks that leases protect. Forgets the leases that have ended."""
        with self._lock:
            now = time.monotonic()
            self._held = {lease: held for lease, held in self._held.items() if held[0] > now}
            return set[str]().union(*(names for _, names in self._held.values()))


class BlockMemory:
    """Store of K/V blocks in this process's memory. A block is held as the bytes of its file. Any thread may use it.

    If the budget is exceeded, the least recently used blocks are evicted, except those that the attribute `leases` (a
    MemoryLeases) protects for a time. budget: largest number of bytes of all blocks together.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.leases, self.where = budget, MemoryLeases(), "the memory of this server"
        self.held: int | None = 0
        self._blocks: dict[str, bytes] = {}
        self._used: dict[str, int] = {}  # by block: when it was last used, as a number that grows by USE
        self._uses = 0
        self._lock = threading.Lock()

    def has(self, name: str) -> bool:
        """Returns True if the store holds the block `name`."""
        return name in self._blocks

    def get(self, name: str) -> bytes | None:
        """Returns the bytes of the file of the block `name`; None if the store does not hold it."""
        with self._lock:
            return self._blocks.get(name)

    def read(self, scope: BlockScope, key: BlockKey, block_bytes: int) -> np.ndarray:
        """Returns the contents of the block `key`, uint8 [block_bytes].

        Raises FileNotFoundError if the store does not hold the block, BlockFileError if the stored bytes are damaged or
        belong to another block.
        """
        if (block := self.get(key.name)) is None:
            raise FileNotFoundError(f"{key.name} is not in {self.where}")
        held = np.frombuffer(block, np.uint8)
        return check_block(held, len(held), self.where, scope, key, block_bytes)

    def write(self, name: str, parts: Sequence[bytes | memoryview], parent: str = "") -> int:
        """Store a block's bytes, replacing a block of the same name. Returns the number of blocks deleted to make room.

        If the budget is exceeded, the least recently used blocks that no lease protects are deleted, until the new
        block fits and, where possible, 1 / ROOM of the budget is free. Raises NoRoom, and does not keep the new block,
        if all other blocks are protected or were used more recently than it.

        Args:
            name: the block's name.
            parts: the bytes of its file, in one or more pieces.
            parent: name of the block before this one in its sequence. If the store holds the parent, the new block
                counts as used just before the parent was. Otherwise it counts as used now.
        """
        block = b"".join(parts)
        with self._lock:
            held, deleted = self._forget(name) + len(block), 0
            self._blocks[name] = block
            self._used[name] = self._used[parent] - 1 if parent in self._used else self._now()
            if held > self.budget:
                pinned = self.leases.pinned()
                for other in sorted(self._blocks.keys() - pinned, key=lambda other: (self._used[other], other)):
                    if held <= self.budget - (0 if other == name else self.budget // ROOM):
                        break
                    held -= len(self._blocks.pop(other))
                    del self._used[other]
                    deleted += 1
            self.held = held
            if held > self.budget:
                self.held = self._forget(name)
            if name not in self._blocks:
                raise NoRoom(f"{len(block)} bytes do not fit into {self.budget}, of which others have {self.held}")
        return deleted

    def remove(self, name: str) -> None:
        """Delete the block `name`. Does nothing if the store does not hold it. Returns nothing."""
        with self._lock:
            self.held = self._forget(name)

    def touch(self, names: Sequence[str]) -> None:
        """Mark some blocks as just used, so that other blocks are evicted first. Returns nothing.

        Among these blocks, a child is evicted before its parent. Blocks that the store does not hold are skipped.
        names: names of the blocks, each the parent of the next.
        """
        with self._lock:
            now = self._now()
            for depth, name in enumerate(names):
                if name in self._used:
                    self._used[name] = now - depth

    def _now(self) -> int:
        self._uses += USE
        return self._uses

    def _forget(self, name: str) -> int:
        """Delete the block `name`, if the store holds it. Returns the number of bytes of all blocks that are left."""
        self._used.pop(name, None)
        return (self.held or 0) - len(self._blocks.pop(name, b""))
