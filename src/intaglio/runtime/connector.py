"""The connector interface: how an engine keeps K/V blocks outside its own pool and gets them back.

Close to vLLM's KVConnector, and smaller: look up, load, save. An implementation is a tier: it keeps blocks in files,
in memory that engines share, or on another machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class BlockKey:
    """A K/V block's name, and what the name is computed from.

    Attributes:
        name: its name (see BlockNames).
        parent: its parent's name.
        tokens: its token ids.
    """

    name: str
    parent: str
    tokens: tuple[int, ...]


@dataclass
class TierCounts:
    """Total counts of a tier, a store of K/V blocks outside the engine.

    The engine computes blocks that are missing, corrupt or late.

    Attributes:
        hits: blocks that were loaded into an engine's pool.
        misses: blocks that an engine looked for and the tier did not have.
        corrupt: blocks that the tier had but that failed a check: checksum, length, name, or another model's.
        late: blocks that were given up because no further block came in time.
        saved: blocks that were written.
        dropped: blocks that were not saved because earlier ones were still being written, or writing had just failed.
        evicted: blocks that were deleted to make room for others.
        refused: blocks that were not saved because pinned blocks leave no room.
        expired: times that a lease (which pins blocks for another replica) had already run out when it was renewed or
            its blocks were handed over.
        errors: reads and writes that the operating system refused, such as writes to a full disk.
        loaded_bytes: bytes of the hits.
        saved_bytes: bytes of the blocks that were written.
        held_bytes: bytes in the tier, as last seen; a gauge.
    """

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    late: int = 0
    saved: int = 0
    dropped: int = 0
    evicted: int = 0
    refused: int = 0
    expired: int = 0
    errors: int = 0
    loaded_bytes: int = 0
    saved_bytes: int = 0
    held_bytes: int = 0


class Load(Protocol):
    """Interface of a load in progress: K/V blocks that a tier is reading."""

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the load to end. Returns True if it has ended."""

    def blocks(self) -> list[np.ndarray]:
        """The contents of the blocks loaded so far: a new list of uint8 [block_bytes], in the order of the keys.

        The list ends before the first block that the tier did not have, or that failed a check.
        """

    def cancel(self) -> None:
        """Stop the load, as no further blocks are wanted: what has not been read yet is not read."""


class Connector(Protocol):
    """Interface of a tier, a store of K/V blocks outside the engine.

    Its methods do not wait for a disk or a network, and raise nothing.

    counts: the tier's TierCounts. The engine adds hits, loaded bytes, misses, late blocks, blocks dropped because it
    stopped saving, and errors of the device. The tier counts everything else.
    """

    counts: TierCounts

    def lookup(self, names: Sequence[str]) -> int:
        """Number of leading blocks of `names` that the tier holds; counting ends at the first one that it lacks.

        A quick look without reading the blocks, so a later load() may find fewer. names: the names of the blocks, each
        the parent of the next.
        """

    def stored(self, names: Sequence[str]) -> int:
        """Number of blocks, from the first of `names` on, that the tier itself holds, and that need not be saved.

        lookup() also counts blocks that the tier would fetch from elsewhere.
        """

    def load(self, keys: Sequence[BlockKey], block_bytes: int) -> Load:
        """Begin to load the blocks of `keys`, of `block_bytes` bytes each, and return the Load without waiting."""

    def save(self, key: BlockKey, content: np.ndarray) -> bool:
        """Save a block, now or later. Returns True, or False if the tier drops the block.

        After a False the caller stops saving, since the tier would drop the next blocks too.

        Args:
            key: the block's name, its parent's name and its tokens.
            content: uint8 [block_bytes], which belongs to the tier from now on.
        """

    def touch(self, names: Sequence[str]) -> None:
        """Mark blocks as just used, so that the tier evicts other blocks first. Returns nothing.

        names: the names of the blocks, each the parent of the next.
        """

    def say(self, kind: str, what: str) -> None:
        """Tell the operator a message about the tier. Only the first of each kind is told; later ones are dropped.

        Args:
            kind: a word for the kind of message.
            what: the message.
        """
