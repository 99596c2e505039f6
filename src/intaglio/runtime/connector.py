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
    """The name of a K/V block, with the parent and the tokens from which the name is computed.

    Attributes:
        name: name of the block (see BlockNames).
        parent: name of the block before it in the sequence.
        tokens: token ids of the block.
    """

    name: str
    parent: str
    tokens: tuple[int, ...]


@dataclass
class TierCounts:
    """Metrics of a tier (a store of K/V blocks outside the engine): numbers of blocks, bytes and errors so far.

    Blocks that are missing, corrupt or late are computed by the engine instead of loaded.

    Attributes:
        hits: blocks that were loaded into an engine's pool.
        misses: blocks that an engine looked for and the tier did not have.
        corrupt: blocks that the tier had, but that failed a check: wrong checksum, length or name, or of another model.
        late: blocks that had not arrived when an engine gave up a transfer. It gives up if no block arrives for a time.
        saved: blocks that were written to the tier.
        dropped: blocks that were not saved, because earlier blocks were still being written or writing had just failed.
        evicted: blocks that were deleted to make room for others.
        refused: blocks that were not saved, because pinned blocks left no room.
        expired: number of times that a lease had already run out when it was to be renewed or its blocks were to be
            handed over. A lease pins blocks for another replica.
        errors: reads and writes that the operating system refused, such as writes to a full disk.
        loaded_bytes: bytes of the blocks in `hits`.
        saved_bytes: bytes of the blocks in `saved`.
        held_bytes: bytes in the tier when last measured; a gauge.
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
    """Interface of a transfer in progress: a tier reads K/V blocks for an engine."""

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` seconds for the transfer to end. Returns True if it has ended."""

    def blocks(self) -> list[np.ndarray]:
        """Returns the contents of the blocks loaded so far, a new list of uint8 [block_bytes], in the order requested.

        The list ends before the first block that the tier did not have or that failed a check.
        """

    def cancel(self) -> None:
        """Stop the transfer, because no further blocks are wanted. Blocks that have not been read yet are not read."""


class Connector(Protocol):
    """Interface of a tier, which is a store of K/V blocks outside the engine.

    Its methods do not wait for a disk or a network, and raise no errors.

    `counts` is the tier's TierCounts. The engine counts hits, loaded bytes, misses, late blocks, the blocks that it
    stopped saving, and errors of the device. The tier counts everything else.
    """

    counts: TierCounts

    def lookup(self, names: Sequence[str]) -> int:
        """Returns the number of blocks in `names` before the first block that the tier cannot load.

        The blocks are not read, so a later load() may find fewer.

        names: names of consecutive blocks of a sequence, in order.
        """

    def stored(self, names: Sequence[str]) -> int:
        """Returns the number of blocks in `names` before the first block that the tier itself does not hold.

        These blocks need not be saved. lookup() also counts blocks that the tier would fetch from elsewhere. names:
        names of consecutive blocks, in order.
        """

    def load(self, keys: Sequence[BlockKey], block_bytes: int) -> Load:
        """Begin to load blocks. Returns a Load, which is the transfer in progress, without waiting.

        keys: name, parent and tokens of each block. block_bytes: bytes of a block.
        """

    def save(self, key: BlockKey, content: np.ndarray) -> bool:
        """Save a block at once or later. Returns True, or False if the tier drops the block.

        After False, the caller stops saving for now, since the tier would drop the next blocks, too.

        Args:
            key: the block's name, its parent's name and its tokens.
            content: the block's bytes, uint8 [block_bytes]. The caller must not change this array afterwards.
        """

    def touch(self, names: Sequence[str]) -> None:
        """Mark blocks as just used, so that the tier evicts other blocks first. Returns nothing.

        names: names of consecutive blocks of a sequence, in order.
        """

    def say(self, kind: str, what: str) -> None:
        """Show the operator a message about the tier. Only the first message of each kind is shown.

        kind: a word that identifies the kind of message. what: the message.
        """
