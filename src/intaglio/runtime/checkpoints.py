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
    """Saves copies of recurrent state for the prefix cache, and finds them again. Such a copy is called a checkpoint.

    A checkpoint is the state at a block border, a position at which a K/V block ends. A state exists only at the end of
    a step. So the steps of a prompt are made to end at certain block borders, and a checkpoint is saved at each of
    these:

    1. the end of every `every`-th block, counted from position 0;
    2. the end of the K/V blocks that were found in the prefix cache, if no state was saved there: it is the place where
       another sequence branched off (Pan et al. 2024, Marconi);
    3. the last block border before the prompt's last token.

    During decoding, steps are not made to end at borders. If a step happens to end at a border, a checkpoint is saved.
    It replaces the sequence's previous checkpoint from decoding, unless that is one of the first kind.

    Args:
        pool: the K/V blocks. When a block leaves the prefix cache, the checkpoint at its end is dropped.
        slots: the slots that hold recurrent state.
        every: number of blocks between checkpoints of the first kind; 0 to save and find no checkpoints.
    """

    def __init__(self, pool: BlockPool, slots: SlotPool, every: int) -> None:
        self.pool, self.slots, self.every = pool, slots, every
        pool.dropped = slots.drop

    @property
    def on(self) -> bool:
        """True if checkpoints are saved: the model has recurrent state, and `every` is above 0."""
        return bool(self.slots.total and self.every)

    def usable(self, known: Many[int]) -> int:
        """Returns the number of cached K/V blocks that a new sequence can reuse, counted from its first block, an int.

        Without recurrent state, it can reuse all of them. With recurrent state, it also needs a checkpoint at the end
        of the last reused block. The result is then the largest possible number; 0 if there is no such checkpoint.

        known: numbers of the K/V blocks at the sequence's beginning that are in the prefix cache, in order.
        """
        if not self.slots.total:
            return len(known)
        deepest = (at for at in range(len(known), 0, -1) if self.pool.name(known[at - 1]) in self.slots.checkpoints)
        return next(deepest, 0)

    def start(self, sequence: Sequence, found: int) -> None:
        """Set up the recurrent state of a sequence that starts to run. Returns nothing.

        It sets three fields of the sequence:

        - `state_slot`: the slot with the saved state at the end of the sequence's cached blocks. It stays -1 if no
          cached blocks are used, and the recurrence starts from zero.
        - `next_state_slot`: the slot that the first step writes.
        - `borders`: positions in the prompt at which the state will be saved, in addition to every `every` blocks.
          These are the end of the cached blocks and the last block border of the prompt.

        Without recurrent state, both slots stay -1.

        Args:
            sequence: the sequence. Its `computed` and `prefix_name` must already be set.
            found: number of K/V blocks at its beginning that are in the prefix cache, with or without a saved state.
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
        """Returns how many of a sequence's next tokens one step may compute, an int of at most `tokens`.

        A step of a prompt must end at the next position at which recurrent state is to be saved. If no state is to be
        saved, or if the sequence decodes, the result is `tokens`.
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
        """Save a sequence's recurrent state for the prefix cache, if a checkpoint is due at its present position.

        Returns nothing. Called after a step. A checkpoint is saved only at the end of a block that is in the prefix
        cache. During decoding, it is due at every such position; in the prompt, it is due only at the positions that
        the class docstring lists.
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
        """Drop the recurrent state that was saved at the end of block `name`. Returns nothing.

        Called when the same sequence has saved a later state. Does nothing if a sequence still uses the saved state, or
        if there is none.
        """
        slot = self.slots.checkpoints.get(name)
        if slot in self.slots.evictable:
            self.slots.drop(name)
