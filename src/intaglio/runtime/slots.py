"""Allocator of the slots of recurrent state. Handles slot numbers only; the state is on the device.

A running sequence holds two slots. A step reads the slot of its state before the step and writes the other one, and the
sequence's state moves to the other slot only when the step has completed. So a step that fails, or is retried in
halves, never advances a state twice.
"""

from __future__ import annotations

from collections.abc import Sequence

PER_SEQUENCE = 2  # slots of a running sequence


class SlotError(RuntimeError):
    """Raised for a pool too small for one sequence, if too few slots are free, or for a slot that is not held."""


class SlotPool:
    """Pool of `total` slots of recurrent state, numbered from 0, each free or held.

    A model without recurrent state has a pool of 0 slots.
    """

    def __init__(self, total: int) -> None:
        if total and total < PER_SEQUENCE:
            raise SlotError(f"{total} slots of recurrent state; give {PER_SEQUENCE} or more for each running sequence")
        self.total = total
        self.free = list(range(total - 1, -1, -1))  # a stack: slot 0 is allocated first

    @property
    def sequences(self) -> int:
        """Number of sequences that can run at once."""
        return self.total // PER_SEQUENCE

    def allocate(self) -> list[int]:
        """Take the slots of one more sequence and return a list of their numbers; [] if the model has no such state.

        Raises SlotError if too few are free.
        """
        if not self.total:
            return []
        if len(self.free) < PER_SEQUENCE:
            raise SlotError(f"{PER_SEQUENCE} slots requested, {len(self.free)} of {self.total} are free")
        return [self.free.pop() for _ in range(PER_SEQUENCE)]

    def release(self, slots: Sequence[int]) -> None:
        """Free the slots of a sequence."""
        for slot in slots:
            if not 0 <= slot < self.total or slot in self.free:
                raise SlotError(f"slot {slot} is not held: released twice, or not from this pool of {self.total}")
            self.free.append(slot)
