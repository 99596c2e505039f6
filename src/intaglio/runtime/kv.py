"""Block allocator of the paged K/V cache, with prefix caching.

Handles block numbers and token ids only; the K/V data is on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from intaglio.runtime.request import TokenIds

Parent = int | str | None  # the node of the block before; for the first block of a sequence, the salt
Key = tuple[Parent, tuple[int, ...]]  # a block in the prefix tree: its parent, and its own tokens


class KvError(RuntimeError):
    """Raised for an allocation larger than what is available, or a release of a block that is not held."""


class BlockPool:
    """`total` blocks of `block_size` tokens, numbered from 0, with reference counts and a prefix cache.

    A block is free; held, by as many sequences as its refcount says; or evictable: held by none, its content kept in
    the prefix cache until the block is needed.

    The prefix cache is a tree: a full block is a node under the node of the block before it, by its own token ids. The
    index compares the token ids themselves, not hashes, and node numbers are never reused, so a block is found only for
    exactly the same tokens from the start of the sequence. Sequences of different salts have different trees.
    """

    def __init__(self, total: int, block_size: int) -> None:
        if total < 1:
            raise KvError(f"a pool of {total} blocks holds nothing; give it at least 1")
        self.block_size = block_size
        self.refcounts = [0] * total
        self.free = list(range(total - 1, -1, -1))  # a stack: block 0 is allocated first, then the block freed last
        self.evictable: dict[int, None] = {}  # in order of release: the first is evicted first
        self.index: dict[Key, int] = {}  # the prefix tree: the block at each key
        self.nodes: dict[int, tuple[int, Key]] = {}  # by block in the prefix tree: its node and its key
        self.last_node = 0

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
        """Take `n` blocks, with a refcount of 1 each, and return their numbers.

        Raises KvError, taking none, if fewer are available.
        """
        if n > self.available:
            raise KvError(f"{n} blocks requested, {self.available} of {self.total} are available")
        blocks = [self.free.pop() if self.free else self._evict() for _ in range(n)]
        for block in blocks:
            self.refcounts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Increment the refcount of each of `blocks`, all of them held or evictable."""
        for block in blocks:
            if block in self.evictable:
                del self.evictable[block]
            else:
                self._check_held(block)
            self.refcounts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Decrement the refcount of each of a sequence's `blocks`.

        At 0 a block becomes evictable if it is in the prefix cache, else free. Later blocks are evicted first, so a
        node is never evicted before its children.
        """
        for block in reversed(blocks):
            self._check_held(block)
            self.refcounts[block] -= 1
            if self.refcounts[block] == 0:
                if block in self.nodes:
                    self.evictable[block] = None
                else:
                    self.free.append(block)

    def find_prefix(self, tokens: TokenIds, salt: str | None) -> list[int]:
        """The numbers of the blocks of the longest cached prefix of `tokens`, whole blocks only.

        Changes no refcount.
        """
        blocks: list[int] = []
        parent: Parent = salt
        for at in range(0, len(tokens) - self.block_size + 1, self.block_size):
            block = self.index.get((parent, tuple(tokens[at : at + self.block_size])))
            if block is None:
                break
            blocks.append(block)
            parent = self.nodes[block][0]
        return blocks

    def add_to_prefix_cache(self, block: int, parent: Parent, tokens: TokenIds) -> int:
        """Add a full block to the tree as a child of the node `parent` (or of the salt, for a first block).

        Returns the number of its node. If another block is already there with the same tokens, that block stays
        and its node is returned.
        """
        self._check_held(block)
        key = (parent, tuple(tokens))
        if key in self.index:
            return self.nodes[self.index[key]][0]
        self.last_node += 1
        self.index[key] = block
        self.nodes[block] = (self.last_node, key)
        return self.last_node

    def node(self, block: int) -> int:
        """Number of the prefix-cache node of a block that find_prefix() returned."""
        return self.nodes[block][0]

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache: evictable blocks become free at once, held blocks when they are released."""
        self.free += self.evictable
        self.evictable, self.index, self.nodes = {}, {}, {}

    def _evict(self) -> int:
        """Remove the evictable block that was released earliest from the prefix cache, and return its number."""
        block = next(iter(self.evictable))
        del self.evictable[block]
        del self.index[self.nodes.pop(block)[1]]
        return block

    def _check_held(self, block: int) -> None:
        if not 0 <= block < self.total or self.refcounts[block] == 0:
            raise KvError(f"block {block} is not held: released twice, or not from this pool of {self.total}")
