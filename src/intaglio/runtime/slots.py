"""Allocator of the slots of recurrent state, with checkpoints. Handles slot numbers only; the state is on the device.

A step reads the slot of a sequence's state before the step and writes another one, and the sequence's state moves to
the other slot only when the step has completed. So a step that fails, or is retried in halves, never advances a state
twice, and a slot that a sequence reads is never changed. A checkpoint is a slot that is kept under the name of a
K/V block: its state is that at the block's end, and any number of sequences may start from it.
"""

from __future__ import annotations

PER_SEQUENCE = 2  # slots of a running sequence: its state, and where the next step writes


class SlotError(RuntimeError):
    """Error of a SlotPool.

    The pool is too small for one sequence, no slot is available, or a slot is not held by any sequence.
    """


class SlotPool:
    """Allocator of `total` slots of recurrent state, with reference counts and checkpoints.

    Slots are numbered from 0. A checkpoint is a state that is saved for the prefix cache: the state at the end of a K/V
    block, saved under the block's name. A slot is in one of three states. It is free, or it is held by as many
    sequences as its reference count says, or it is evictable. An evictable slot is held by no sequence, but keeps its
    checkpoint until the slot is needed.

    A model without recurrent state has a pool of 0 slots. Raises SlotError if `total` is above 0 and too small for one
    sequence.

    Attributes:
        refcounts: for each slot, the number of sequences that hold it.
        free: numbers of the free slots, as a stack. Its last item is allocated next: at the beginning slot 0, later the
            slot that was freed most recently.
        evictable: numbers of the evictable slots in order of release; the first is evicted first.
        checkpoints: dict from a block's name (see BlockNames) to the slot with the state at the block's end.
        named: dict from a slot to the block's name, the reverse of `checkpoints`.
    """

    def __init__(self, total: int) -> None:
        if total and total < PER_SEQUENCE:
            raise SlotError(f"{total} slots of recurrent state; give {PER_SEQUENCE} or more for each running sequence")
        self.refcounts = [0] * total
        self.free = list(range(total - 1, -1, -1))
        self.evictable: dict[int, None] = {}
        self.checkpoints: dict[str, int] = {}
        self.named: dict[int, str] = {}

    @property
    def total(self) -> int:
        """Returns the number of slots in the pool."""
        return len(self.refcounts)

    @property
    def held(self) -> int:
        """Returns the number of slots that sequences hold."""
        return self.total - len(self.free) - len(self.evictable)

    @property
    def sequences(self) -> int:
        """Returns the number of sequences that can run at the same time."""
        return self.total // PER_SEQUENCE

    def allocate(self) -> int:
        """Allocate a slot with a reference count of 1. Returns its number; -1 if the model has no recurrent state.

        If no slot is free, the evictable slot that was released earliest loses its checkpoint and is allocated. Raises
        SlotError if sequences hold all slots.
        """
        if not self.total:
            return -1
        if not self.free:
            if not self.evictable:
                raise SlotError(f"a slot is requested, and sequences hold all {self.total}")
            self.drop(self.named[next(iter(self.evictable))])
        slot = self.free.pop()
        self.refcounts[slot] = 1
        return slot

    def share(self, slot: int) -> None:
        """Increase the reference count of a slot by 1. Raises SlotError if the slot is neither held nor evictable."""
        if slot in self.evictable:
            del self.evictable[slot]
        else:
            self._check_held(slot)
        self.refcounts[slot] += 1

    def release(self, slot: int) -> None:
        """Decrease the reference count of a slot by 1. Returns nothing.

        If the count becomes 0, the slot is evictable if it has a checkpoint (see keep()), else free. Does nothing for
        -1, which stands for no slot. Raises SlotError for a slot that is not held.
        """
        if slot == -1:
            return
        self._check_held(slot)
        self.refcounts[slot] -= 1
        if self.refcounts[slot] == 0:
            if slot in self.named:
                self.evictable[slot] = None
            else:
                self.free.append(slot)

    def keep(self, slot: int, name: str) -> bool:
        """Save the recurrent state in a slot for the prefix cache, under the block name `name`.

        Returns True if it was saved. It must be the state at the end of the K/V block with this name. Nothing is
        copied: the slot is not reused until the saved state is dropped or evicted. Returns False if a state is already
        saved under `name`, or if the slot already has a name. Raises SlotError if the slot is not held.
        """
        self._check_held(slot)
        if name in self.checkpoints or slot in self.named:
            return False
        self.checkpoints[name], self.named[slot] = slot, name
        return True

    def drop(self, name: str) -> None:
        """Forget the recurrent state that is saved under the block name `name`. Does nothing if there is none.

        The slot of the state becomes free if no sequence holds it.
        """
        slot = self.checkpoints.pop(name, None)
        if slot is not None:
            del self.named[slot]
            if slot in self.evictable:
                del self.evictable[slot]
                self.free.append(slot)

    def _check_held(self, slot: int) -> None:
        if not 0 <= slot < self.total or self.refcounts[slot] == 0:
            raise SlotError(f"slot {slot} is not held: released twice, or not from this pool of {self.total}")
