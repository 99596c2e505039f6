"""min_tokens, allowed_token_ids and bad_words: the token ids that may be sampled, compared with their definitions."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from support.serving import VOCABULARY, oracle_engine, request, run_checked

from intaglio.runtime import RequestError, SamplingParams
from intaglio.runtime.sampling import score
from intaglio.runtime.token_filter import TokenFilter, pack


def allowed(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def test_a_mask_is_what_the_fields_say() -> None:
    rng = random.Random()
    for _ in range(60):
        ids = rng.sample(range(VOCABULARY), 30) if rng.random() < 0.5 else None
        words = [tuple(rng.randrange(8) for _ in range(rng.randint(1, 3))) for _ in range(rng.randrange(4))]
        stops, least = rng.sample(range(VOCABULARY), 3), rng.randrange(4)
        r = request("r", [1], max_tokens=9, allowed_token_ids=ids, stop_token_ids=stops, min_tokens=least)
        r = replace(r, bad_words=words, eos_ids=frozenset([5]))
        output, drafts = ([rng.randrange(8) for _ in range(rng.randrange(5))] for _ in range(2))
        wanted = set(ids if ids is not None else range(VOCABULARY))
        both = [*output, *drafts]
        if len(both) < least:
            wanted -= {*stops, 5}
        wanted -= {w[-1] for w in words if len(w) == 1 or both[-len(w) + 1 :] == list(w[:-1])}
        assert allowed(TokenFilter(r, VOCABULARY).mask(output, drafts, None)) == wanted


def test_the_end_of_a_grammar_comes_before_min_tokens() -> None:
    r = replace(request("r", [1], max_tokens=9, min_tokens=5), eos_ids=frozenset([7]))
    flags = np.zeros(-(-VOCABULARY // 32) * 32, bool)
    flags[7] = True
    only_end = pack(flags.copy())
    flags[9] = True
    assert allowed(TokenFilter(r, VOCABULARY).mask([], [], only_end)) == {7}
    assert allowed(TokenFilter(r, VOCABULARY).mask([], [], pack(flags))) == {9}


def test_sequences_keep_to_them_with_preemption_and_guesses() -> None:
    fields: dict[str, Any] = {"max_tokens": 18, "temperature": 1.0, "min_tokens": 12, "allowed_token_ids": range(9)}

    def outputs(**options: int) -> list[list[int]]:
        engine = oracle_engine(**options)
        made = []
        for i in range(4):
            r = request(f"r{i}", range(i, i + 6), **{**fields, "allowed_token_ids": list(range(9))}, seed=i)
            made += engine.add(replace(r, bad_words=[(3,), (1, 2)], eos_ids=frozenset([0, 4])))
        run_checked(engine)
        return [s.output for s in made]

    first = outputs(pages=100)
    assert first == outputs(pages=7, max_batch_tokens=3) == outputs(pages=100, max_drafts=4)
    for output in first:
        assert set(output) <= set(range(9)) - {3} and not {0, 4} & set(output[:12])
        assert (1, 2) not in pairwise(output)


def test_scores_of_ids_and_ranks() -> None:
    logits = np.random.default_rng().normal(size=40).astype(np.float32)
    scored = score(logits, 3, 5, (7, 1))
    whole = dict(score(logits, 3, 40).top)
    assert scored.top == ((7, whole[7]), (1, whole[1])) and scored.logprob == whole[3]
    assert scored.rank == 1 + int((logits > logits[3]).sum()) and score(logits, int(logits.argmax()), 1).rank == 1
    engine = oracle_engine()
    engine.add(request("r", [1, 2], max_tokens=3, logprob_token_ids=[4, 2]))
    assert all([i for i, _ in e.scored.top] == [4, 2] for e in run_checked(engine) if e.scored)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_tokens", -1), ("min_tokens", 17), ("allowed_token_ids", []), ("allowed_token_ids", [-1]),
        ("allowed_token_ids", 5), ("bad_words", "ab"), ("bad_words", [""]), ("logprob_token_ids", ["a"]),
        ("logprob_token_ids", list(range(129))),
    ],
)  # fmt: skip
def test_bad_values_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} .*; allowed: "):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_ids_outside_the_vocabulary_are_refused() -> None:
    engine = oracle_engine()
    for fields, what in (({"allowed_token_ids": [97]}, "allowed"), ({"logprob_token_ids": [97]}, "scored")):
        with pytest.raises(RequestError, match=f"{what} token id 97"):
            engine.add(request("r", [1], **fields))
    with pytest.raises(RequestError, match="forbidden token id 99"):
        engine.add(replace(request("r", [1]), bad_words=[(1, 99)]))
