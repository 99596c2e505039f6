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
    """Raised for a pool without blocks, a request for more blocks than are available, or a block that is not held."""


@dataclass(frozen=True)
class CachedBlock:
    """Entry of a block in the prefix cache.

    Attributes:
        name: the block's name (see BlockNames).
        parent: the name of the block before it.
        tokens: the block's token ids.
    """

    name: str
    parent: str
    tokens: tuple[int, ...]


class BlockPool:
    """`total` blocks of `block_size` tokens, numbered from 0, with reference counts and a prefix cache.

    A block is free; held, by as many sequences as its refcount says; or evictable: held by none, its content kept in
    the prefix cache until the block is needed.

    The prefix cache is a tree: a full block is a child of the block before it. Blocks are found by their names, 256-bit
    hashes over all tokens from the start of the sequence and the salt (see BlockNames). So a block is found only for
    exactly the same tokens, and sequences of different salts share none.

    Args:
        total: number of blocks.
        block_size: tokens in a block.
        scope: digest of the BlockScope for the names.
        events: records what is added to and removed from the prefix cache.

    Attributes:
        dropped: called with the name of each block that leaves the prefix cache.
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
        """Number of blocks."""
        return len(self.refcounts)

    @property
    def held(self) -> int:
        """Number of blocks that sequences hold."""
        return self.total - self.available

    @property
    def available(self) -> int:
        """Number of blocks that can be allocated: free or evictable."""
        return len(self.free) + len(self.evictable)

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks needed for `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        """Take `n` blocks, with a refcount of 1 each, and return a list of their numbers.

        Raises KvError, taking none, if fewer are available.
        """
        if n > self.available:
            raise KvError(f"{n} blocks requested, {self.available} of {self.total} are available")
        blocks = [self.free.pop() if self.free else self._evict() for _ in range(n)]
        for block in blocks:
            self.refcounts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Increment the refcount of each of `blocks`. Raises KvError for a block that is neither held nor evictable."""
        for block in blocks:
            if block in self.evictable:
                del self.evictable[block]
            else:
                self._check_held(block)
            self.refcounts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Decrement the refcount of each of a sequence's `blocks`. Raises KvError for a block that is not held.

        At 0 a block becomes evictable if it is in the prefix cache, else free. Later blocks are evicted first, so a
        block is never evicted before its children.
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
        """The longest prefix of `tokens` that is in the prefix cache, as a list of block numbers; [] if there is none.

        Only whole blocks count. No refcount is changed: share() the blocks to hold them.

        Args:
            tokens: token ids of the sequence.
            salt: the request's cache salt; None: none. Blocks of another salt are not found.
        """
        blocks: list[int] = []
        for name in self.names.chain(tokens, salt):
            block = self.index.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def add_to_prefix_cache(self, block: int, parent: str, tokens: TokenIds) -> str:
        """Add a full block of `tokens` to the prefix cache, as a child of the block named `parent`. Returns its name.

        parent: `names.root()` for a first block. If another block of the same name is already in the cache, that block
        stays and `block` is not added. Raises KvError if the block is not held.
        """
        self._check_held(block)
        name = self.names.child(parent, tokens)
        if name not in self.index:
            self.index[name] = block
            self.cached[block] = CachedBlock(name, parent, tuple(tokens))
            self.events.stored(name, parent)
        return name

    def name(self, block: int) -> str:
        """The name (see BlockNames) of a block in the prefix cache. Raises KeyError if the block is not in it."""
        return self.cached[block].name

    def snapshot(self) -> BlockSnapshot:
        """The BlockSnapshot of the blocks that are in the prefix cache now."""
        return self.events.snapshot(self.names.scope, self.block_size, self.index)

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache: evictable blocks become free at once, held blocks when they are released."""
        self.free += self.evictable
        names, self.evictable, self.index, self.cached = list(self.index), {}, {}, {}
        self.events.cleared()
        for name in names:
            self.dropped(name)

    def _evict(self) -> int:
        """Remove the evictable block that was released earliest from the prefix cache, and return its number."""
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
