"""Guessing what comes next from what came before: if the last few tokens stood here once, so may what followed them.

Prompt lookup (Saxena 2023). A guess costs a row of a step and is only ever kept if it is what would have been drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must agree before a guess is made; longer matches are believed first
REACH = 4096  # tokens of a prompt's end that are remembered: some 600 bytes each, in tuples


class Lookup:
    """Where each short run of tokens was last seen to end, in one growing list of tokens."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}
        self.read = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that followed the latest earlier match of the end of `tokens`."""
        first = self.read + 1 if self.read else max(1, len(tokens) - REACH)
        for end in range(first, len(tokens)):  # the run that ends the list itself is only looked up
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self.ends[tuple(tokens[end - n : end])] = end
        self.read = max(self.read, len(tokens) - 1)
        for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            found = self.ends.get(tuple(tokens[-n:]))
            if found is not None:
                return list(tokens[found : found + most])
        return []
