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
    """One change of the prefix cache: a K/V block was stored or evicted, or the cache was emptied.

    Attributes:
        sequence: number of the event, counted from 1 since the engine's start.
        kind: "stored" (the block is in the prefix cache now), "removed" (the block was evicted) or "cleared" (all
            blocks were removed).
        name: name of the block; "" for "cleared".
        parent: for "stored", the name of the block before this one in the sequence. For the first block of a sequence,
            it is BlockNames.root() for the request's cache salt. Else "".
    """

    sequence: int
    kind: Literal["stored", "removed", "cleared"]
    name: str = ""
    parent: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Returns the event's fields as a dict that can be written as JSON. Fields with the value "" are left out."""
        return {name: value for name, value in vars(self).items() if value}


@dataclass(frozen=True)
class BlockSnapshot:
    """The names of the blocks in a prefix cache at one moment.

    Attributes:
        incarnation: text that is different for each start of an engine.
        sequence: number of the last event before the snapshot.
        scope: digest of the engine's BlockScope. Together with `block_size`, it determines how blocks are named (see
            BlockNames).
        block_size: tokens in a block.
        names: names of the blocks, in the order in which they were stored.
    """

    incarnation: str
    sequence: int
    scope: str
    block_size: int
    names: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the snapshot's fields as a dict that can be written as JSON."""
        return {**vars(self), "names": list(self.names)}


class BlockEvents:
    """Numbered log of the changes of a prefix cache. It keeps the last `kept` events.

    Attributes:
        incarnation: text that is different for each start of an engine.
        sequence: number of the last event; 0 before the first.
        last: the events that are kept, oldest first.
    """

    def __init__(self, incarnation: str = "", kept: int = EVENTS_KEPT) -> None:
        self.incarnation, self.sequence = incarnation, 0
        self.last: deque[BlockEvent] = deque(maxlen=kept)

    def stored(self, name: str, parent: str) -> None:
        """Record that a block was added to the prefix cache.

        name: name of the block (see BlockNames). parent: name of the block before it in the sequence; for the first
        block of a sequence, BlockNames.root() for the request's cache salt.
        """
        self._add("stored", name, parent)

    def removed(self, name: str) -> None:
        """Record that the block `name` was evicted from the prefix cache."""
        self._add("removed", name)

    def cleared(self) -> None:
        """Record that the prefix cache was emptied."""
        self._add("cleared")

    def after(self, sequence: int) -> list[BlockEvent] | None:
        """Returns a list of the events with numbers above `sequence`, oldest first; [] if there are none yet.

        Returns None if some of these events are no longer kept, or if `sequence` is above the number of the last event.
        The caller then needs a new snapshot.
        """
        missing = self.sequence - sequence
        if not 0 <= missing <= len(self.last):
            return None
        return [self.last[i] for i in range(len(self.last) - missing, len(self.last))]

    def snapshot(self, scope: str, block_size: int, names: Iterable[str]) -> BlockSnapshot:
        """Returns a BlockSnapshot: the block names `names`, with the number of the last event.

        Args:
            scope: digest of the engine's BlockScope, which is part of every block's name.
            block_size: tokens in a block.
            names: names of all blocks that the prefix cache holds now.
        """
        return BlockSnapshot(self.incarnation, self.sequence, scope, block_size, tuple(names))

    def _add(self, kind: Literal["stored", "removed", "cleared"], name: str = "", parent: str = "") -> None:
        self.sequence += 1
        self.last.append(BlockEvent(self.sequence, kind, name, parent))
