"""Block allocator of the paged K/V cache, with prefix caching.

Handles block numbers and token ids only; the K/V data is on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from intaglio.runtime.block_events import BlockEvents, BlockSnapshot
from intaglio.runtime.block_names import BlockNames
from intaglio.runtime.request import TokenIds


class KvError(RuntimeError):
    """Raised if a pool has too few blocks, if too few are available, or if a block that must be held is not held."""


@dataclass(frozen=True)
class CachedBlock:
    """Entry of the prefix cache for one K/V block.

    Attributes:
        name: name of the block (see BlockNames).
        parent: name of the block before it in the sequence.
        tokens: token ids of the block.
    """

    name: str
    parent: str
    tokens: tuple[int, ...]


class BlockPool:
    """Allocator of `total` K/V blocks of `block_size` tokens, with reference counts and a prefix cache.

    Blocks are numbered from 0. Each block is free, held or evictable. A held block is used by one or more sequences,
    and its reference count is their number. An evictable block is used by no sequence, but it stays in the prefix cache
    until its room is needed.

    The prefix cache finds a full block by its name, a hash of all tokens from the sequence's start to the block's end
    and of the request's cache salt (see BlockNames). So a block is found only for exactly the same tokens and the same
    salt. The block before it in the sequence is called its parent.

    Args:
        total: number of blocks.
        block_size: tokens in a block.
        scope: digest of the engine's BlockScope, which is part of every block's name.
        events: log to which changes of the prefix cache are added; None for a new one.

    Attributes:
        dropped: function that is called with the name of each block that leaves the prefix cache.
    """

    def __init__(self, total: int, block_size: int, scope: str = "", events: BlockEvents | None = None) -> None:
        if total < 1:
            raise KvError(f"a pool of {total} blocks holds nothing; give it at least 1")
        self.block_size, self.names = block_size, BlockNames(scope, block_size)
        self.events = events or BlockEvents()
        self.dropped: Callable[[str], None] = lambda name: None
        self.refcounts = [0] * total
        self.free = list(range(total - 1, -1, -1))  # a stack: block 0 is allocated first, then the block freed last
        self.evictable: dict[int, None] = {}  # in order of release: the first is evicted first
        self.index: dict[str, int] = {}  # block in the prefix cache, by name
        self.cached: dict[int, CachedBlock] = {}  # by block in the prefix cache

    @property
    def total(self) -> int:
        """Returns the number of blocks in the pool."""
        return len(self.refcounts)

    @property
    def held(self) -> int:
        """Returns the number of blocks that sequences hold."""
        return self.total - self.available

    @property
    def available(self) -> int:
        """Returns the number of blocks that can be allocated, because they are free or evictable."""
        return len(self.free) + len(self.evictable)

    def blocks_for(self, tokens: int) -> int:
        """Returns the number of blocks that `tokens` tokens need."""
        return -(-tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        """Allocate `n` blocks, each with a reference count of 1. Returns a list of their numbers.

        Raises KvError if fewer than `n` blocks are available; none is allocated then.
        """
        if n > self.available:
            raise KvError(f"{n} blocks requested, {self.available} of {self.total} are available")
        blocks = [self.free.pop() if self.free else self._evict() for _ in range(n)]
        for block in blocks:
            self.refcounts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Increase the reference count of each of the blocks by 1.

        Raises KvError for a block that is neither held nor evictable.
        """
        for block in blocks:
            if block in self.evictable:
                del self.evictable[block]
            else:
                self._check_held(block)
            self.refcounts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Decrease the reference count of each of the blocks by 1. Raises KvError for a block that is not held.

        A block whose count becomes 0 is evictable if it is in the prefix cache, else free. Later blocks of a sequence
        are evicted first, so that no block is evicted before the blocks that follow it.

        blocks: numbers of a sequence's blocks, in order.
        """
        for block in reversed(blocks):
            self._check_held(block)
            self.refcounts[block] -= 1
            if self.refcounts[block] == 0:
                if block in self.cached:
                    self.evictable[block] = None
                else:
                    self.free.append(block)

    def find_prefix(self, tokens: TokenIds, salt: str | None) -> list[int]:
        """Returns a list of the numbers of the cached blocks that hold the beginning of a sequence; [] for none.

        The list ends before the first whole block that is not in the prefix cache. Reference counts do not change: call
        share() to hold the blocks.

        tokens: token ids of the sequence. salt: the request's cache salt; None if it has none. Blocks with another salt
        are not found.
        """
        blocks: list[int] = []
        for name in self.names.chain(tokens, salt):
            block = self.index.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def add_to_prefix_cache(self, block: int, parent: str, tokens: TokenIds) -> str:
        """Add the full block number `block` to the prefix cache. Returns the block's name.

        If another block with the same name is already in the cache, that block stays there and `block` is not added.

        Args:
            block: number of the block. Raises KvError if it is not held.
            parent: name of the block before it in the sequence; `names.root()` for the first block.
            tokens: token ids of the block.
        """
        self._check_held(block)
        name = self.names.child(parent, tokens)
        if name not in self.index:
            self.index[name] = block
            self.cached[block] = CachedBlock(name, parent, tuple(tokens))
            self.events.stored(name, parent)
        return name

    def name(self, block: int) -> str:
        """Returns the name (see BlockNames) of the block number `block`.

        Raises KeyError if the block is not in the prefix cache.
        """
        return self.cached[block].name

    def snapshot(self) -> BlockSnapshot:
        """Returns the names of all blocks that are in the prefix cache now, as a BlockSnapshot."""
        return self.events.snapshot(self.names.scope, self.block_size, self.index)

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache.

        Evictable blocks become free at once; held blocks become free when they are released.
        """
        self.free += self.evictable
        names, self.evictable, self.index, self.cached = list(self.index), {}, {}, {}
        self.events.cleared()
        for name in names:
            self.dropped(name)

    def _evict(self) -> int:
        """Remove one evictable block from the prefix cache: the block that was released earliest.

        Returns its number.
        """
        block = next(iter(self.evictable))
        del self.evictable[block]
        name = self.cached.pop(block).name
        del self.index[name]
        self.events.removed(name)
        self.dropped(name)
        return block

    def _check_held(self, block: int) -> None:
        if not 0 <= block < self.total or self.refcounts[block] == 0:
            raise KvError(f"block {block} is not held: released twice, or not from this pool of {self.total}")
