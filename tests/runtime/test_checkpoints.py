"""Prefix caching and speculation of models with recurrent state, on the oracle device.

Which states are kept, reused and evicted, and how a state follows accepted and rejected drafts.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import pytest
from support.serving import VOCABULARY, add, oracle_engine, request, run_checked, truth

from intaglio.devices import StepRequest
from intaglio.devices.oracle import expected
from intaglio.runtime import Engine, RequestError, Sequence


def run(engine: Engine, id: str, prompt: Many[int], **options: Any) -> Sequence:
    """Run one request alone and check its tokens."""
    [s] = add(engine, request(id, prompt, **{"max_tokens": 2, **options}))
    run_checked(engine)
    assert s.output == truth(s)
    return s


def kept(engine: Engine, prompt: Many[int]) -> list[int]:
    """The positions in the prompt at which a state is kept."""
    size = engine.pool.block_size
    names = engine.block_names.of(prompt)
    return [(at + 1) * size for at, name in enumerate(names) if name in engine.slots.checkpoints]


def test_states_are_kept_at_regular_borders_and_at_the_last_one() -> None:
    engine, prompt = oracle_engine(slots=12, checkpoint_blocks=3), list(range(39))
    run(engine, "r", prompt)
    assert kept(engine, prompt) == [12, 24, 36]
    gauges = engine.gauges()
    assert (gauges.slots, gauges.slots_held, gauges.checkpoints) == (12, 0, 3)
    other = [*range(100, 122)]
    engine = oracle_engine(slots=12, checkpoint_blocks=3)
    run(engine, "r", [t % 90 for t in other])
    assert kept(engine, [t % 90 for t in other]) == [12, 20]


def test_a_sequence_starts_from_the_deepest_state_and_keeps_one_where_it_branches_off() -> None:
    engine, common = oracle_engine(pages=40, slots=12, checkpoint_blocks=100), list(range(22))
    first, second, third = ([*common, *range(i, i + 12)] for i in (40, 60, 80))
    assert run(engine, "1", first).cached_tokens == 0
    assert kept(engine, first) == [32]
    assert run(engine, "2", second).cached_tokens == 0  # K/V was there up to 20, and no state
    assert kept(engine, second) == [20, 32]
    assert run(engine, "3", third).cached_tokens == 20
    assert run(engine, "again", first).cached_tokens == 32


def test_a_conversation_goes_on_from_the_end_of_the_last_answer() -> None:
    engine, prompt = oracle_engine(pages=32, slots=12), list(range(10))
    s = run(engine, "1", prompt, max_tokens=24)
    assert kept(engine, [*prompt, *s.output]) == [8, 32]  # those of the answer replace one another
    assert run(engine, "2", [*prompt, *s.output, 5, 6, 7]).cached_tokens == 32


def test_states_of_another_salt_are_not_used() -> None:
    engine, prompt = oracle_engine(slots=12), list(range(22))
    run(engine, "1", prompt, salt="a")
    assert run(engine, "2", prompt, salt="b").cached_tokens == 0
    assert run(engine, "3", prompt, salt="a").cached_tokens == 20


def test_a_state_is_dropped_with_its_block_and_evicted_before_it() -> None:
    engine, prompt = oracle_engine(pages=10, slots=5, checkpoint_blocks=1), list(range(22))
    run(engine, "1", prompt, max_tokens=1)
    assert kept(engine, prompt) == [8, 12, 16, 20]  # of five slots, one is written next
    run(engine, "2", range(50, 88))
    assert kept(engine, prompt) == [] and not engine.slots.checkpoints.keys() - engine.pool.index.keys()


def test_choices_share_the_prompt() -> None:
    engine = oracle_engine(pages=40, slots=8)
    made = add(engine, request("r", range(20), max_tokens=5, n=3, temperature=1.0, seed=7))
    run_checked(engine)
    assert [s.output for s in made] == [truth(s) for s in made]
    assert [s.cached_tokens for s in made] == [0, 16, 16]


def test_without_checkpoints_nothing_is_shared_and_prompts_are_not_cut() -> None:
    engine = oracle_engine(pages=40, slots=8, checkpoint_blocks=0)
    for i in range(2):
        add(engine, request(f"r{i}", range(20), max_tokens=1, n=2))
        run_checked(engine)
    assert engine.counts.cached_tokens == 0 and not engine.pool.cached and engine.counts.steps == 2


def test_prompts_of_models_without_recurrent_state_are_not_cut() -> None:
    engine = oracle_engine(checkpoint_blocks=1)
    run(engine, "r", range(39), max_tokens=1)
    assert engine.counts.steps == 1


@pytest.mark.parametrize("name", ["max_drafts", "checkpoint_blocks"])
def test_a_negative_option_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is -1; allowed: 0 or more"):
        oracle_engine(slots=4, **{name: -1})


class Drafts:
    """Proposes the right tokens, except at some positions of the sequence."""

    def __init__(self, wrong: Many[int]) -> None:
        self.wrong = wrong

    def propose(self, tokens: Many[int], most: int) -> list[int]:
        found: list[int] = []
        for at in range(len(tokens), len(tokens) + most):
            found.append((expected([*tokens, *found], VOCABULARY) + (at in self.wrong)) % VOCABULARY)
        return found


def rows_of_steps(engine: Engine, wrong: Many[int], **options: Any) -> tuple[Sequence, list[int]]:
    """Run one request with drafts that are wrong at some positions. Returns it and the token rows of each step."""
    [s] = add(engine, request("r", [1, 2, 3, 4], **options))
    s.lookup = Drafts(wrong)  # type: ignore[assignment]
    run, rows = engine.executable.run, list[int]()  # type: ignore[attr-defined]

    def watched(step: StepRequest) -> Any:
        rows.append(len(step.batch.tokens))
        return run(step)

    engine.executable.run = watched  # type: ignore[attr-defined]
    run_checked(engine)
    assert s.output == truth(s)
    return s, rows


def test_accepted_drafts_move_the_state_on() -> None:
    engine = oracle_engine(slots=4, max_drafts=3)
    _, rows = rows_of_steps(engine, [], max_tokens=13)
    assert rows == [4, 4, 4, 4] or rows[:1] == [7], rows
    assert engine.counts.accepted_tokens == engine.counts.draft_tokens


def test_after_a_rejected_draft_the_accepted_tokens_are_computed_again() -> None:
    engine = oracle_engine(slots=4, max_drafts=3)
    s, rows = rows_of_steps(engine, [6], max_tokens=12)
    # the prompt and 3 drafts of which the one at 6 is wrong; the prompt, 2 accepted tokens and the right one again
    assert rows[:2] == [7, 7] and engine.counts.accepted_tokens == 8
    assert s.finish_reason == "length"


def test_rejected_drafts_are_not_computed_again_without_end() -> None:
    engine = oracle_engine(slots=4, max_drafts=2, pages=32)
    _, rows = rows_of_steps(engine, range(100), max_tokens=30)
    assert engine.counts.accepted_tokens == 0 and len(rows) == 30
    assert max(rows[1:]) == 5  # a token, 2 to compute again and 2 drafts
    assert engine.counts.draft_tokens > 30


def test_a_long_prompt_gets_no_drafts() -> None:
    """If they were rejected, it would be computed again."""
    engine = oracle_engine(slots=4, max_drafts=2)
    _, rows = rows_of_steps(engine, [], max_tokens=4)
    assert rows[0] == 4
