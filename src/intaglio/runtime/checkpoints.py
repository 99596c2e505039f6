"""Prefix caching of recurrent state: at which block borders it is kept, and from which one a sequence starts.

The K/V blocks before a border can be used only together with the state at it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from intaglio.runtime.kv import BlockPool
from intaglio.runtime.sequence import Sequence
from intaglio.runtime.slots import SlotPool

CHECKPOINT_BLOCKS = 32  # blocks between the checkpoints of a long prompt


class Checkpoints:
    """Keeps recurrent states at block borders as checkpoints, for the prefix cache, and finds them again.

    A state exists only at the end of a step, so the steps of a prompt are made to end at its borders. These are:

    1. every `every` blocks, counted from position 0;
    2. where another sequence branched off: the end of the K/V blocks found in the prefix cache, if no state was kept
       there (Pan et al. 2024, Marconi);
    3. the last border before the prompt's last token.

    While a sequence decodes, steps are not cut. If a step happens to end at a border, the state is kept. It replaces
    the sequence's previous checkpoint from decoding, unless that one is at a border of the first kind.

    Args:
        pool: the K/V blocks. Dropping a block from the prefix cache drops the checkpoint at its end.
        slots: the slots of recurrent state.
        every: blocks between checkpoints; 0: no state is kept or found.
    """

    def __init__(self, pool: BlockPool, slots: SlotPool, every: int) -> None:
        self.pool, self.slots, self.every = pool, slots, every
        pool.dropped = slots.drop

    @property
    def on(self) -> bool:
        """True if states are kept: the model has recurrent state, and `every` is above 0."""
        return bool(self.slots.total and self.every)

    def usable(self, known: Many[int]) -> int:
        """How many of the blocks `known`, from the first on, a new sequence can reuse.

        known: numbers of the sequence's leading blocks that are in the prefix cache. Returns their number if the model
        has no recurrent state. Else returns the number of blocks up to the last one with a checkpoint at its end; 0 if
        no block has one.
        """
        if not self.slots.total:
            return len(known)
        deepest = (at for at in range(len(known), 0, -1) if self.pool.name(known[at - 1]) in self.slots.checkpoints)
        return next(deepest, 0)

    def start(self, sequence: Sequence, found: int) -> None:
        """Give a sequence its two state slots and plan the borders of its prompt at which steps end.

        One slot is the checkpoint after its cached blocks, if there are any. The other is the slot that its first step
        writes. The sequence's `computed` and `prefix_name` must be set before. found: number of leading blocks that are
        in the prefix cache, with or without a checkpoint.
        """
        size = self.pool.block_size
        if sequence.prefix_name and self.slots.total:
            sequence.state_slot = self.slots.checkpoints[sequence.prefix_name]
            self.slots.share(sequence.state_slot)
        sequence.next_state_slot = self.slots.allocate()
        last = (sequence.length - 1) // size
        sequence.borders = {found * size, last * size} if self.on else set()
        sequence.prefill_end = sequence.length

    def cut(self, sequence: Sequence, tokens: int) -> int:
        """Number of the sequence's next `tokens` tokens that a step may compute: up to its prompt's next border."""
        start, stop = sequence.computed, sequence.computed + tokens
        if not self.on or start >= sequence.prefill_end:
            return tokens
        step = self.every * self.pool.block_size
        borders = [b for b in sequence.borders if start < b < stop]
        regular = (start // step + 1) * step
        if regular < min(stop, sequence.prefill_end):
            borders.append(regular)
        return min([*borders, stop]) - start

    def keep(self, sequence: Sequence) -> None:
        """Keep the sequence's state as a checkpoint, if the step that has just ended stands at a border."""
        at, size = sequence.computed, self.pool.block_size
        name = sequence.prefix_name
        if (
            not self.on
            or at % size
            or name is None
            or name not in self.pool.index
            or at != sequence.indexed_blocks * size
        ):
            return
        regular = at % (self.every * size) == 0
        decoded = at >= sequence.prefill_end
        if not (regular or decoded or at in sequence.borders):
            return
        if self.slots.keep(sequence.state_slot, name) and decoded and not regular:
            if sequence.checkpoint:
                self.supersede(sequence.checkpoint)
            sequence.checkpoint = name

    def supersede(self, name: str) -> None:
        """Drop the checkpoint `name` unless a sequence holds it. A later one of the same sequence replaces it."""
        slot = self.slots.checkpoints.get(name)
        if slot in self.slots.evictable:
            self.slots.drop(name)
