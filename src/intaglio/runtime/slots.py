"""Allocator of the slots of recurrent state, with checkpoints. Handles slot numbers only; the state is on the device.

A step reads the slot of a sequence's state before the step and writes another one, and the sequence's state moves to
the other slot only when the step has completed. So a step that fails, or is retried in halves, never advances a state
twice, and a slot that a sequence reads is never changed. A checkpoint is a slot that is kept under the name of a
K/V block: its state is that at the block's end, and any number of sequences may start from it.
"""

from __future__ import annotations

PER_SEQUENCE = 2  # slots of a running sequence: its state, and where the next step writes


class SlotError(RuntimeError):
    """Raised for a pool too small for one sequence, for a slot that is not held, or if none is available."""


class SlotPool:
    """Pool of `total` slots of recurrent state, numbered from 0, with reference counts and checkpoints.

    A checkpoint is a state that is saved for the prefix cache, under the name of the K/V block at whose end it stood. A
    slot is free; held, by as many sequences as its refcount says; or evictable: held by none, its checkpoint kept until
    the slot is needed. A model without recurrent state has a pool of 0 slots. Raises SlotError if `total` is too small
    for one sequence.

    Attributes:
        refcounts: number of sequences that hold each slot.
        free: the free slots, a stack; slot 0 is allocated first, then the slot freed last.
        evictable: slots held by none that are checkpoints, in order of release; the first is evicted first.
        checkpoints: block name (see BlockNames) to the slot with the state at that block's end.
        named: slot to block name, the reverse of `checkpoints`.
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
        """Number of slots."""
        return len(self.refcounts)

    @property
    def held(self) -> int:
        """Number of slots that sequences hold."""
        return self.total - len(self.free) - len(self.evictable)

    @property
    def sequences(self) -> int:
        """Number of sequences that can run at once."""
        return self.total // PER_SEQUENCE

    def allocate(self) -> int:
        """Take a slot, with a refcount of 1, and return its number; -1 if the model has no recurrent state.

        If no slot is free, the saved state that was released earliest is evicted from the prefix cache, and its slot is
        taken. Raises SlotError if sequences hold all slots.
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
        """Increment the refcount of a slot. Raises SlotError if it is neither held nor evictable."""
        if slot in self.evictable:
            del self.evictable[slot]
        else:
            self._check_held(slot)
        self.refcounts[slot] += 1

    def release(self, slot: int) -> None:
        """Decrement the refcount of a slot. Returns nothing.

        At 0 the slot becomes evictable if its recurrent state is saved for the prefix cache, see keep(); else it
        becomes free. -1 stands for no slot and does nothing. Raises SlotError for a slot that is not held.
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
        """Save the recurrent state in a slot for the prefix cache, as the state at the end of the K/V block `name`.

        Nothing is copied: the slot is not reused until the saved state is dropped or evicted. Returns True; False if a
        state is already saved under that name, or if the slot's state is already saved under another. Raises SlotError
        if the slot is not held.
        """
        self._check_held(slot)
        if name in self.checkpoints or slot in self.named:
            return False
        self.checkpoints[name], self.named[slot] = slot, name
        return True

    def drop(self, name: str) -> None:
        """Forget the recurrent state that is saved under block `name`, if there is one.

        Its slot becomes free if no sequence holds it.
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
