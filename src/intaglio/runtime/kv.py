"""The pool of KV blocks, and the prefix cache: which blocks are free, held or kept, and what tokens they hold.

Knows numbers and token ids; the K/V itself is the device's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Name = tuple[int | str | None, tuple[int, ...]]  # the node before it (the first: the salt), and its own tokens


class KvError(RuntimeError):
    """The pool was asked for what it does not have, or given what is not held."""


class BlockPool:
    """`total` blocks numbered from 0, of `block_tokens` each. A block is free, held by as many as its refcount says, or
    cached: held by nobody, its content kept until its place is needed.

    The prefix cache is a tree: a full block is filed under the node of the block before it and its own token ids. The
    index compares those ids themselves, and nodes are numbered once and for all, so nothing but the very same tokens
    from the very same start finds a block. The start is the salt: other salts, other trees.
    """

    def __init__(self, total: int, block_tokens: int) -> None:
        if total < 1:
            raise KvError(f"a pool of {total} blocks holds nothing; give it at least 1")
        self.block_tokens = block_tokens
        self.refcounts = [0] * total
        self.free = list(range(total - 1, -1, -1))  # a stack: block 0 goes first, the last one freed goes next
        self.cached: dict[int, None] = {}  # in order of release: the first is evicted first
        self.index: dict[Name, int] = {}
        self.filed: dict[int, tuple[int, Name]] = {}  # block: its node, and its name in the index
        self.nodes = 0

    @property
    def total(self) -> int:
        return len(self.refcounts)

    @property
    def held(self) -> int:
        return self.total - self.available

    @property
    def available(self) -> int:
        """Blocks that can be had at once: free, or cached."""
        return len(self.free) + len(self.cached)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def allocate(self, n: int) -> list[int]:
        """`n` blocks, each with one holder. Raises KvError, taking none, if fewer can be had."""
        if n > self.available:
            raise KvError(f"{n} blocks wanted, {self.available} of {self.total} can be had")
        blocks = [self.free.pop() if self.free else self._evict() for _ in range(n)]
        for block in blocks:
            self.refcounts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of `blocks`, all of them held or cached."""
        for block in blocks:
            if block in self.cached:
                del self.cached[block]
            else:
                self._must_be_held(block)
            self.refcounts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder fewer for each of `blocks`. Those with none left are cached if they were filed, else free; the
        last of a sequence is the first to be evicted, so that no node outlives the one before it in the tree."""
        for block in reversed(blocks):
            self._must_be_held(block)
            self.refcounts[block] -= 1
            if self.refcounts[block] == 0:
                if block in self.filed:
                    self.cached[block] = None
                else:
                    self.free.append(block)

    def find(self, tokens: Sequence[int], salt: str | None) -> list[int]:
        """The blocks that hold the longest known beginning of `tokens`, whole blocks only. Takes none of them."""
        blocks: list[int] = []
        parent: int | str | None = salt
        for at in range(0, len(tokens) - self.block_tokens + 1, self.block_tokens):
            block = self.index.get((parent, tuple(tokens[at : at + self.block_tokens])))
            if block is None:
                break
            blocks.append(block)
            parent = self.filed[block][0]
        return blocks

    def file(self, block: int, parent: int | str | None, tokens: Sequence[int]) -> int:
        """Make a full block known, as what follows `parent`; returns its node. If another block holds the same tokens
        already, that one stays, and its node is the answer."""
        self._must_be_held(block)
        name = (parent, tuple(tokens))
        if name in self.index:
            return self.filed[self.index[name]][0]
        self.nodes += 1
        self.index[name] = block
        self.filed[block] = (self.nodes, name)
        return self.nodes

    def node(self, block: int) -> int:
        """The node of a block that find() returned."""
        return self.filed[block][0]

    def forget(self) -> None:
        """Drop the prefix cache: cached blocks become free, and held ones will, for their content is lost."""
        self.free += self.cached
        self.cached, self.index, self.filed = {}, {}, {}

    def _evict(self) -> int:
        block = next(iter(self.cached))
        del self.cached[block]
        del self.index[self.filed.pop(block)[1]]
        return block

    def _must_be_held(self, block: int) -> None:
        if not 0 <= block < self.total or self.refcounts[block] == 0:
            raise KvError(f"block {block} is not held: released twice, or not from this pool of {self.total}")
