"""Guesses by looking up: the longest and latest earlier match decides, asked once or after every token."""

from __future__ import annotations

import random

from intaglio.runtime import draft
from intaglio.runtime.draft import LONGEST, SHORTEST, Lookup


def by_definition(tokens: list[int], most: int) -> list[int]:
    """Try the longest run that ends the list first, and its latest earlier end."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if n < len(tokens) and tokens[end - n : end] == tokens[-n:]:
                return tokens[end : end + most]
    return []


def test_guesses_are_the_definitions_asked_at_once_or_as_tokens_come() -> None:
    rng = random.Random()
    found = 0
    for _ in range(60):
        tokens, growing = [rng.randrange(4) for _ in range(rng.randint(1, 60))], Lookup()
        for n in range(1, len(tokens) + 1):
            want = by_definition(tokens[:n], 5)
            assert Lookup().propose(tokens[:n], 5) == want
            if rng.random() < 0.7:  # now and then a step passes in which nobody asks
                assert growing.propose(tokens[:n], 5) == want
            found += bool(want)
    assert found > 100


def test_a_text_that_repeats_itself_is_guessed_to_its_end() -> None:
    assert Lookup().propose([5, 1, 2, 3, 4, 9, 9, 1, 2, 3], 2) == [4, 9]
    assert Lookup().propose([7] * 6, 3) == [7]  # as far as the text goes
    assert Lookup().propose([1, 2, 3], 4) == [] == Lookup().propose([1], 4)


def test_only_the_end_of_a_long_prompt_is_remembered() -> None:
    prompt = [1, 2, 3, 4, *range(100, 100 + draft.REACH), 1, 2, 3]
    lookup = Lookup()
    assert lookup.propose(prompt, 2) == []
    assert len(lookup.ends) <= draft.REACH * (LONGEST - SHORTEST + 1)
    assert lookup.propose([*prompt, 50, 1, 2, 3], 2) == [50, 1]
