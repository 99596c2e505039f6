"""Prompt lookup: the longest and latest earlier match decides, whether asked once or after every token."""

from __future__ import annotations

import random

from intaglio.runtime import draft
from intaglio.runtime.draft import NGRAM_MAX, NGRAM_MIN, PromptLookup


def by_definition(tokens: list[int], most: int) -> list[int]:
    """The definition: the longest n-gram at the end of the list, and its latest earlier end."""
    for n in range(NGRAM_MAX, NGRAM_MIN - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if n < len(tokens) and tokens[end - n : end] == tokens[-n:]:
                return tokens[end : end + most]
    return []


def test_drafts_equal_the_definition_at_once_and_incrementally() -> None:
    rng = random.Random()
    found = 0
    for _ in range(60):
        tokens, growing = [rng.randrange(4) for _ in range(rng.randint(1, 60))], PromptLookup()
        for n in range(1, len(tokens) + 1):
            want = by_definition(tokens[:n], 5)
            assert PromptLookup().propose(tokens[:n], 5) == want
            if rng.random() < 0.7:  # sometimes a step proposes nothing
                assert growing.propose(tokens[:n], 5) == want
            found += bool(want)
    assert found > 100


def test_repetitive_text_is_proposed_to_its_end() -> None:
    assert PromptLookup().propose([5, 1, 2, 3, 4, 9, 9, 1, 2, 3], 2) == [4, 9]
    assert PromptLookup().propose([7] * 6, 3) == [7]  # up to the end of the text
    assert PromptLookup().propose([1, 2, 3], 4) == [] == PromptLookup().propose([1], 4)


def test_only_the_end_of_a_long_prompt_is_indexed() -> None:
    prompt = [1, 2, 3, 4, *range(100, 100 + draft.PROMPT_TOKENS_INDEXED_MAX), 1, 2, 3]
    lookup = PromptLookup()
    assert lookup.propose(prompt, 2) == []
    assert len(lookup.ends) <= draft.PROMPT_TOKENS_INDEXED_MAX * (NGRAM_MAX - NGRAM_MIN + 1)
    assert lookup.propose([*prompt, 50, 1, 2, 3], 2) == [50, 1]
