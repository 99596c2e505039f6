"""K/V blocks of layers with a window: given back, shared and reserved, on the oracle and on real devices."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.serving import add, oracle_engine, request, run_checked, truth

from intaglio.devices import DeviceError, StepRequest
from intaglio.runtime import Engine, Sequence
from intaglio.runtime.kv import KvError
from intaglio.runtime.windows import most_blocks


def made(engine: Engine, seed: int, count: int = 12) -> list[Sequence]:
    """Requests of random lengths, about half of which share a prefix with others."""
    rng = random.Random(seed)
    common = [rng.randrange(97) for _ in range(40)]
    prompts = [
        [*common[: rng.choice((0, 9, 24, 40))], *(rng.randrange(97) for _ in range(rng.randrange(1, 20)))]
        for _ in range(count)
    ]
    several = [
        request(f"r{i}", p, max_tokens=rng.randrange(1, 30), n=rng.choice((1, 1, 2)), priority=rng.randrange(2))
        for i, p in enumerate(prompts)
    ]
    return add(engine, *several)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"pages": 20}, {"max_batch_tokens": 5}, {"max_drafts": 3}, {"pages": 20, "max_drafts": 2, "slots": 7},
        {"slots": 9, "checkpoint_blocks": 2}, {"window": 1}, {"window": 9, "window_pages": 12, "max_batch_tokens": 9},
    ],
)  # fmt: skip
def test_tokens_are_right_with_blocks_given_back(options: dict[str, Any]) -> None:
    """Preemption, chunks, drafts, the prefix cache, recurrent state: all tokens are those of the whole cache."""
    seed = random.randrange(2**40)
    window, pages = options.pop("window", 7), options.pop("window_pages", 30)
    options = {"pages": 120, "max_batch_tokens": 16, **options}
    engine = oracle_engine(**options, windows=(pages, window))
    sequences = made(engine, seed)
    run_checked(engine)
    assert [s.output for s in sequences] == [truth(s) for s in sequences], seed
    assert engine.windows.reserved == engine.windows.pool.held == 0
    again = made(engine, seed + 1, 3)
    run_checked(engine)
    assert [s.output for s in again] == [truth(s) for s in again], seed


def test_a_sequence_holds_only_its_window() -> None:
    engine = oracle_engine(pages=60, windows=(20, 6), max_batch_tokens=8)
    [s] = add(engine, request("r", range(44), max_tokens=20))
    held = []
    while not engine.idle:
        engine.step()
        held.append((engine.pool.held, engine.windows.pool.held))
    assert s.output == truth(s)
    assert max(full for full, _ in held) == 16
    assert max(window for _, window in held) <= most_blocks(6, 8, 4) and held[-2][1] <= most_blocks(6, 2, 4)


def test_a_prefix_is_shared_only_with_the_blocks_of_its_window() -> None:
    engine = oracle_engine(pages=60, windows=(40, 6), max_batch_tokens=8)
    prompt = list(range(41))
    add(engine, request("a", prompt, max_tokens=1))
    run_checked(engine)
    [b] = add(engine, request("b", [*prompt[:40], 3, 4], max_tokens=4))
    run_checked(engine)
    assert b.cached_tokens == 40 and b.output == truth(b)
    windows = engine.windows
    windows.pool.reset_prefix_cache()
    [c] = add(engine, request("c", [*prompt[:40], 5, 6], max_tokens=4))
    run_checked(engine)
    assert c.cached_tokens == 0 and c.output == truth(c)


def test_a_step_that_fails_after_its_work_changes_no_token() -> None:
    engine = oracle_engine(pages=120, windows=(30, 7), max_batch_tokens=16, max_drafts=2)
    sequences, run, steps = made(engine, 5), engine.executable.run, iter(range(10**6))  # type: ignore[attr-defined]

    def late(step: StepRequest) -> Any:
        result = run(step)
        if next(steps) % 2:
            raise DeviceError("planted")
        return result

    engine.executable.run = late  # type: ignore[attr-defined]
    run_checked(engine)
    assert [s.output for s in sequences] == [truth(s) for s in sequences]


def test_blocks_given_back_too_early_are_noticed() -> None:
    """The oracle reads every block of a query's window: one given back a token too early is a wrong token."""
    engine = oracle_engine(pages=60, windows=(20, 6), max_batch_tokens=8)
    windows, first = engine.windows, engine.windows.first_block
    windows.first_block = lambda position: first(position + 1)  # type: ignore[method-assign]
    sequences = add(engine, *(request(f"r{i}", range(i, 30 + i), max_tokens=20) for i in range(2)))
    while not engine.idle:
        engine.step()
    assert [s.output for s in sequences] != [truth(s) for s in sequences]


def test_too_few_window_pages_are_refused() -> None:
    with pytest.raises(KvError, match="5 window pages; a sequence with a window of 6 tokens in steps of 8 needs 6"):
        oracle_engine(pages=60, windows=(5, 6), max_batch_tokens=8)
