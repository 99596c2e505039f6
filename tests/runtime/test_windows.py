"""K/V blocks of layers with a sliding window: given back, shared and reserved, on the oracle and on real devices."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from support.serving import CONTEXT, add, fail_after_work, oracle_engine, request, run_checked, truth

from intaglio.devices import StateSpec
from intaglio.runtime import Engine, Sequence
from intaglio.runtime.kv import KvError
from intaglio.runtime.windows import Windows, reservations, with_windows


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
    assert max(window for _, window in held) == 2  # blocks of the 5 tokens before the next one


def by_default(window: int, pages: int, context: int, **options: int) -> StateSpec:
    """The StateSpec of a model with this window, with pages of 32 tokens, if the user asks for no window_tokens."""
    options = {"max_batch_tokens": 512, "max_sequences": 256, **options}
    programs: list[Any] = [SimpleNamespace(windows={"layers.0.k_cache": window})]
    return with_windows(StateSpec(pages, 32), programs, None, context=context, **options)


def test_default_window_pages_hold_all_sequences() -> None:
    """Window blocks are on by default only if as many sequences of any length can run as without them."""
    assert by_default(4096, 1024, 32768).window_pages == 0  # Mistral, Phi-3
    assert by_default(512, 1024, 32768).window_pages == 0  # Gemma 3 1B
    assert by_default(1024, 4096, 131072).window_pages == 0  # Gemma 3 4B
    assert by_default(1024, 4096, 131072, max_sequences=64).window_pages == 64 * 35 + 16 + 1
    assert by_default(128, 4096, 131072).window_pages == 256 * 7 + 16 + 1  # gpt-oss
    assert by_default(128, 4096, 131072, depth=4).window_pages == 256 * 7 + 4 * 16 + 1


@pytest.mark.parametrize("max_drafts", [0, 3])
def test_no_sequence_waits_for_default_window_pages(max_drafts: int) -> None:
    """With the default number of window pages, no sequence is kept from starting or preempted for one, at any load."""
    seed = random.randrange(2**40)
    rng = random.Random(seed)
    window, rows, most = rng.randrange(1, 20), rng.randrange(1, 40), rng.randrange(1, 16)
    kept, steps = reservations(window, 4, context=CONTEXT, max_batch_tokens=rows, depth=1)
    engine = oracle_engine(
        pages=rng.randrange(20, 200), windows=(most * kept + steps + 1, window), max_batch_tokens=rows,
        max_sequences=most, max_drafts=max_drafts,
    )  # fmt: skip
    windows, answers = engine.windows, list[bool]()
    fits, grow = windows.fits, windows.grow

    def noted(answer: bool, or_full: bool = False) -> bool:
        answers.append(answer or (or_full and len(engine.scheduler.running) == most))
        return answer

    windows.fits = lambda *of: noted(fits(*of), or_full=True)  # type: ignore[method-assign]
    windows.grow = lambda of: noted(grow(of))  # type: ignore[method-assign]
    sequences = made(engine, seed, 24)
    run_checked(engine)
    assert answers and all(answers), seed
    assert [s.output for s in sequences] == [truth(s) for s in sequences], seed


def test_short_sequences_reserve_only_their_tokens() -> None:
    """Short prompts start together though max_tokens is large; when they have grown, the last ones are preempted."""
    engine = oracle_engine(pages=300, windows=(23, 20), max_batch_tokens=40, max_sequences=16)
    assert engine.windows.limit == 12 and engine.windows.most == 8
    sequences = add(engine, *(request(f"r{i}", [i, 1, 2], max_tokens=50) for i in range(12)))
    engine.step()
    assert len(engine.scheduler.running) == 12 and engine.scheduler.preemptions == 0
    gauges = engine.gauges()
    assert (gauges.window_blocks, gauges.window_blocks_reserved, gauges.window_blocks_held) == (12, 12, 12)
    assert gauges.kv_usage == 1 > gauges.blocks_held / gauges.blocks
    run_checked(engine)
    assert engine.scheduler.preemptions > 0 and [s.output for s in sequences] == [truth(s) for s in sequences]
    assert engine.gauges().kv_usage == engine.gauges().window_blocks_reserved == 0


def test_figures_in_the_documentation() -> None:
    """The table of docs/runtime.md: a window of 512 tokens, blocks of 32, a sequence of 8,192 tokens."""
    state = StateSpec(1024, 32, window_pages=200, window=512)
    windows = Windows(state, "", context=32768, max_batch_tokens=512, max_drafts=0)
    [s] = add(oracle_engine(pages=300), request("r", [1], max_tokens=40))
    s.prompt = [1] * 8192
    windows.start(s, [])
    held = []
    for stop in [*range(512, 8192, 512), *range(8192, 8192 + 33)]:
        windows.extend(s, stop)
        held.append(windows.pool.held)
        s.computed = stop
        s.output = [1] * max(0, stop + 1 - 8192)
        windows.give_back(s)
    assert set(held[-32:]) == {16, 17} and max(held) == 32
    assert windows.pool.blocks_for(8192) == 256 and round(100 * (256 + 5 * 17) / (6 * 256)) == 22


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
    sequences, steps = made(engine, 5), iter(range(10**6))
    fail_after_work(engine, lambda step: next(steps) % 2)
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
    with pytest.raises(KvError, match="5 window pages; a sequence with a window of 6 tokens in steps of 8 needs 7"):
        oracle_engine(pages=60, windows=(5, 6), max_batch_tokens=8)
