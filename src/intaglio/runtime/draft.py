"""Prompt-lookup speculative decoding (Saxena 2023).

Proposes the tokens that followed the latest earlier match of the current n-gram. A draft token costs one row of a step.
It is accepted only if sampling at its position gives the same token, so outputs do not change.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM_MAX, NGRAM_MIN = 4, 2  # tokens that must match; the longest match is used
PROMPT_TOKENS_INDEXED_MAX = 4096  # from the end of the prompt; the index takes about 600 bytes a token


class PromptLookup:
    """Index of the n-grams of one growing list of tokens, which proposes draft tokens for speculative decoding.

    For each n-gram, the index has the position after its latest occurrence.
    """

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}
        self.indexed = 0  # tokens of the list that are in the index

    def propose(self, tokens: Sequence[int], max_drafts: int) -> list[int]:
        """Returns up to `max_drafts` draft tokens, a guess of the tokens that follow `tokens`, as a list of ints.

        The drafts are the tokens that followed the latest earlier occurrence of the last n tokens in the list. n is
        the largest number from NGRAM_MIN to NGRAM_MAX for which the last n tokens occur earlier in the list. If there
        is no such n, the result is [].
        """
        first = self.indexed + 1 if self.indexed else max(1, len(tokens) - PROMPT_TOKENS_INDEXED_MAX)
        for end in range(first, len(tokens)):  # not those at the end: they would match themselves
            for n in range(NGRAM_MIN, min(NGRAM_MAX, end) + 1):
                self.ends[tuple(tokens[end - n : end])] = end
        self.indexed = max(self.indexed, len(tokens) - 1)
        for n in range(min(NGRAM_MAX, len(tokens)), NGRAM_MIN - 1, -1):
            found = self.ends.get(tuple(tokens[-n:]))
            if found is not None:
                return list(tokens[found : found + max_drafts])
        return []
