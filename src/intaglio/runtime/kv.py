"""The pool of KV blocks: which are free, and how many hold each of the others. Knows numbers, not content."""

from __future__ import annotations

from collections.abc import Iterable


class KvError(RuntimeError):
    """The pool was asked for what it does not have, or given what is not held."""


class BlockPool:
    """`total` blocks numbered from 0. A block is free, or held by as many as its refcount says."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise KvError(f"a pool of {total} blocks holds nothing; give it at least 1")
        self.refcounts = [0] * total
        self.free = list(range(total - 1, -1, -1))  # a stack: block 0 goes first, the last one freed goes next

    @property
    def total(self) -> int:
        return len(self.refcounts)

    @property
    def held(self) -> int:
        return sum(count > 0 for count in self.refcounts)

    def allocate(self, n: int) -> list[int]:
        """`n` free blocks, each with one holder. Raises KvError, taking none, if there are fewer."""
        if n > len(self.free):
            raise KvError(f"{n} blocks wanted, {len(self.free)} of {self.total} are free")
        blocks = [self.free.pop() for _ in range(n)]
        for block in blocks:
            self.refcounts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of `blocks`."""
        for block in blocks:
            self._must_be_held(block)
            self.refcounts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder fewer for each of `blocks`; those with none left are free again."""
        for block in blocks:
            self._must_be_held(block)
            self.refcounts[block] -= 1
            if self.refcounts[block] == 0:
                self.free.append(block)

    def _must_be_held(self, block: int) -> None:
        if not 0 <= block < self.total or self.refcounts[block] == 0:
            raise KvError(f"block {block} is not held: released twice, or not from this pool of {self.total}")
