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
    """Keeps copies of recurrent state at block borders for the prefix cache, and finds them again.

    Such a copy is called a checkpoint. A block border is a position at which a K/V block ends. A state exists only at
    the end of a step. So steps of a prompt are made to end at these block borders, and a checkpoint is kept at each:

    1. every `every` blocks, counted from position 0;
    2. where another sequence branched off: the end of the K/V blocks found in the prefix cache, if no state was kept
       there (Pan et al. 2024, Marconi);
    3. the last block border before the prompt's last token.

    While a sequence decodes, its steps are not made to end at borders. If a step ends at any block border, the state is
    kept. This checkpoint replaces the sequence's previous one from decoding, unless the previous one is of the first
    kind.

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
        """Number of leading K/V blocks in the prefix cache that a new sequence can reuse, an int.

        A model without recurrent state can reuse all of them. Any other needs the recurrent state at the end of the
        last block it reuses. So the result is the longest prefix with a saved copy of the state at its end; 0 if there
        is none.

        known: numbers of the sequence's leading blocks that are in the prefix cache.
        """
        if not self.slots.total:
            return len(known)
        deepest = (at for at in range(len(known), 0, -1) if self.pool.name(known[at - 1]) in self.slots.checkpoints)
        return next(deepest, 0)

    def start(self, sequence: Sequence, found: int) -> None:
        """Prepare the recurrent state of a sequence that begins to run: two slots, and where to save the state.

        `sequence.state_slot` becomes the slot with the saved state at the end of the sequence's cached blocks. It stays
        -1 if no cached blocks are used: the recurrence then starts from zero. `sequence.next_state_slot` becomes the
        slot that the first step writes. Without recurrent state both stay -1. Steps of the prompt end at certain
        positions so that the state can be saved there: every `self.every` blocks, and at `sequence.borders`, which this
        method sets to the end of the cached blocks and the prompt's last block border.

        Args:
            sequence: the sequence. Its `computed` and `prefix_name` must already be set.
            found: number of its leading K/V blocks in the prefix cache, with or without a saved state.
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
        """Number of a sequence's next tokens that one step may compute, an int, at most `tokens`.

        A step of a prompt ends at the next position at which the recurrent state is to be saved. All `tokens` are
        returned once the sequence decodes, and if no states are saved.
        """
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
        """Save a sequence's recurrent state for the prefix cache, if its position is one to save at.

        Called after a step. A state is saved only at the end of a block that is in the prefix cache. While the sequence
        decodes, it is saved at every such position; in its prompt, only at the positions that the docstring of the
        class lists.
        """
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
        """Free the saved recurrent state at the end of block `name`, because the same sequence has saved a later one.

        Does nothing if a sequence still holds the saved state, or if there is none.
        """
        slot = self.slots.checkpoints.get(name)
        if slot in self.slots.evictable:
            self.slots.drop(name)
