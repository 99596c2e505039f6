"""Events of an engine's prefix cache, from which a router knows which K/V blocks the engine has.

A reader takes a snapshot once and then the events after it. Events are numbered without gaps. The last ones are kept;
a reader that is too late for them, or that finds another incarnation, takes a new snapshot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

EVENTS_KEPT = 16384


@dataclass(frozen=True)
class BlockEvent:
    """A change of the prefix cache.

    Attributes:
        sequence: number of the event, counted from 1 since the engine's start.
        kind: "stored": the block is in the prefix cache now; "removed": it was evicted; "cleared": all blocks are gone.
        name: name of the block; "" if cleared.
        parent: name of the block before it in the sequence; for a sequence's first block BlockNames.root() of the
            request's cache salt; "" unless stored.
    """

    sequence: int
    kind: Literal["stored", "removed", "cleared"]
    name: str = ""
    parent: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The event's fields as a dict that JSON can hold; fields that are "" are left out."""
        return {name: value for name, value in vars(self).items() if value}


@dataclass(frozen=True)
class BlockSnapshot:
    """The blocks in a prefix cache at one moment.

    Attributes:
        incarnation: text that is different for each start of an engine.
        sequence: number of the last event that the snapshot includes.
        scope: digest of the BlockScope; with `block_size` it makes the engine's BlockNames.
        block_size: tokens in a block.
        names: names of the blocks, in the order in which they were stored.
    """

    incarnation: str
    sequence: int
    scope: str
    block_size: int
    names: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The snapshot's fields as a dict that JSON can hold."""
        return {**vars(self), "names": list(self.names)}


class BlockEvents:
    """The last `kept` events of a prefix cache.

    Attributes:
        incarnation: text that is different for each start of an engine.
        sequence: number of the last event; 0 before the first.
    """

    def __init__(self, incarnation: str = "", kept: int = EVENTS_KEPT) -> None:
        self.incarnation, self.sequence = incarnation, 0
        self.last: deque[BlockEvent] = deque(maxlen=kept)

    def stored(self, name: str, parent: str) -> None:
        """Record that a block was added to the prefix cache.

        name: the block's key, a hash of its tokens and of all before them. parent: the key of the block before it; for
        a sequence's first block, the root key that its K/V scope and salt give.
        """
        self._add("stored", name, parent)

    def removed(self, name: str) -> None:
        """Record that a block was evicted."""
        self._add("removed", name)

    def cleared(self) -> None:
        """Record that the prefix cache was emptied."""
        self._add("cleared")

    def after(self, sequence: int) -> list[BlockEvent] | None:
        """A list of the events after event number `sequence`, oldest first; [] if there are none yet.

        Returns None if some of these events are not kept any more, or no event has had the number `sequence` since the
        engine started. The reader then needs a new snapshot.
        """
        missing = self.sequence - sequence
        if not 0 <= missing <= len(self.last):
            return None
        return [self.last[i] for i in range(len(self.last) - missing, len(self.last))]

    def snapshot(self, scope: str, block_size: int, names: Iterable[str]) -> BlockSnapshot:
        """A BlockSnapshot: which blocks a prefix cache holds now, with the number of the last event.

        Args:
            scope: digest of the engine's BlockScope; with `block_size` it determines the block names.
            block_size: tokens in a block.
            names: names of the blocks that the cache holds.
        """
        return BlockSnapshot(self.incarnation, self.sequence, scope, block_size, tuple(names))

    def _add(self, kind: Literal["stored", "removed", "cleared"], name: str = "", parent: str = "") -> None:
        self.sequence += 1
        self.last.append(BlockEvent(self.sequence, kind, name, parent))
