"""The prefix cache: a hit has the same tokens and salt, and was not evicted."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving import VOCABULARY, add, oracle_engine, request, run_checked, truth

from intaglio.runtime import BlockPool, KvError, check_invariants

SIZE = 3


@given(st.integers(2, 12), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_prefix_hits_have_equal_tokens_from_the_start(total: int, rng: random.Random) -> None:
    """Compared with a plain record of each block's content, under random sequences of two letters and two salts."""
    pool = BlockPool(total, SIZE)
    holds: dict[int, tuple[str | None, list[int]]] = {}  # block: the salt, and every token up to its end
    held: list[list[int]] = []
    for _ in range(60):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        tokens, salt = rng.choices((1, 2), k=rng.randrange(SIZE * 4)), rng.choice((None, "a"))
        known = pool.find_prefix(tokens, salt)
        for at, block in enumerate(known):
            assert holds[block] == (salt, tokens[: (at + 1) * SIZE])
        pool.share(known)
        fresh = len(tokens) // SIZE - len(known)
        if fresh > pool.available:
            pool.release(known)
            continue
        blocks = known + pool.allocate(fresh)
        parent = pool.name(known[-1]) if known else pool.names.root(salt)
        for at in range(len(known), len(blocks)):
            holds[blocks[at]] = (salt, tokens[: (at + 1) * SIZE])
            parent = pool.add_to_prefix_cache(blocks[at], parent, tokens[at * SIZE : (at + 1) * SIZE])
        held.append(blocks)
        assert pool.find_prefix(tokens, salt)[: len(blocks)] or not blocks
        assert len(pool.free) + len(pool.evictable) + sum(c > 0 for c in pool.refcounts) == total
    for blocks in held:
        pool.release(blocks)
    assert pool.available == total and pool.held == 0


def test_eviction_is_lru_and_takes_children_before_parents() -> None:
    pool = BlockPool(4, SIZE)

    def keep(tokens: list[int]) -> list[int]:
        blocks, parent = pool.allocate(len(tokens) // SIZE), pool.names.root()
        for at, block in enumerate(blocks):
            parent = pool.add_to_prefix_cache(block, parent, tokens[at * SIZE : (at + 1) * SIZE])
        return blocks

    old, new = [1] * 6, [2] * 3
    first, second = keep(old), keep(new)
    pool.release(first)
    pool.release(second)
    assert (pool.free, list(pool.evictable)) == ([3], [first[1], first[0], second[0]])
    assert pool.find_prefix([*old, 9], None) == first and pool.find_prefix(new, None) == second
    assert pool.allocate(2) == [3, first[1]]
    assert pool.find_prefix(old, None) == first[:1]
    pool.share(first[:1])  # used again: now the other is the oldest
    pool.release(first[:1])
    assert pool.allocate(1) == second and pool.find_prefix(new, None) == []


def test_duplicate_block_keeps_the_first_and_both_can_be_extended() -> None:
    pool = BlockPool(4, SIZE)
    a, b, c = pool.allocate(3)
    root = pool.names.root()
    name = pool.add_to_prefix_cache(a, root, [1, 2, 3])
    assert pool.add_to_prefix_cache(b, root, [1, 2, 3]) == name and pool.find_prefix([1, 2, 3], None) == [a]
    pool.add_to_prefix_cache(c, name, [4, 5, 6])
    assert pool.find_prefix([1, 2, 3, 4, 5, 6, 7], None) == [a, c] and pool.find_prefix([4, 5, 6], None) == []
    pool.release([b])
    assert b in pool.free
    pool.release([a, c])
    pool.reset_prefix_cache()
    assert pool.available == len(pool.free) == 4 and pool.find_prefix([1, 2, 3], None) == []
    with pytest.raises(KvError, match="not held"):
        pool.add_to_prefix_cache(a, root, [1, 2, 3])


def test_sequences_that_compute_the_same_block_share_it_from_then_on() -> None:
    """Both sample the same tokens after the same prompt. Before, the block that was cached first was evicted first."""
    engine = oracle_engine(pages=32)
    first, second = add(engine, *(request(id, list(range(6)), max_tokens=20) for id in "ab"))
    shared = 0
    while not engine.idle:
        engine.step()
        check_invariants(engine)
        full = min(s.computed for s in (first, second)) // engine.pool.block_size
        if first.state == second.state == "running":
            assert first.blocks[:full] == second.blocks[:full]
            shared = max(shared, full)
    assert shared == 5 and first.output == truth(first) == second.output


def test_blocks_of_another_salt_are_not_found() -> None:
    engine = oracle_engine(pages=32)
    prompt = list(range(17))
    for salt, hit in (("a", 0), ("b", 0), (None, 0), ("a", 16), ("b", 16), (None, 16), ("c", 0)):
        [s] = engine.add(request("r", prompt, max_tokens=2, salt=salt))
        run_checked(engine)
        assert s.cached_tokens == hit and s.output == truth(s)


def test_next_turn_finds_the_previous_answer() -> None:
    engine = oracle_engine(pages=32)
    [first] = engine.add(request("r", range(6), max_tokens=11))
    run_checked(engine)
    [second] = engine.add(request("r", [*range(6), *first.output, 5, 6], max_tokens=3))
    run_checked(engine)
    assert second.cached_tokens == 16  # 6 + 11 tokens, the last of which was never fed back: 16 computed, four blocks
    assert second.output == truth(second)


def test_choices_share_one_prefill() -> None:
    engine = oracle_engine(pages=32, max_batch_tokens=7)
    choices = engine.add(request("r", range(30), max_tokens=5, n=3, temperature=1.0, seed=11))
    events = run_checked(engine)
    assert [s.cached_tokens for s in choices] == [0, 28, 28]
    assert [s.seed for s in choices] == [11, 12, 13] and all(s.output == truth(s) for s in choices)
    assert len({tuple(s.output) for s in choices}) == 3
    assert [sum(e.finish_reason is not None for e in events if e.index == i) for i in range(3)] == [1, 1, 1]


def test_a_prompt_that_another_request_computes_is_not_computed_twice() -> None:
    engine = oracle_engine(pages=64, max_batch_tokens=40)
    first, second, other, salted = (
        engine.add(request(id, prompt, max_tokens=5, salt=salt))[0]
        for id, prompt, salt in (
            ("first", range(30), None), ("second", [*range(28), 50, 51, 52], None),
            ("other", [*range(4), *range(60, 70)], None), ("salted", range(30), "a"),
        )
    )  # fmt: skip
    engine.step()
    assert first.computed == 30 and second.state == "waiting"
    run_checked(engine)
    assert [s.cached_tokens for s in (first, second, other, salted)] == [0, 28, 4, 0]
    assert all(s.output == truth(s) for s in (first, second, other, salted))


def test_a_prompt_that_shares_little_with_another_does_not_wait() -> None:
    engine = oracle_engine(pages=64, max_batch_tokens=60)
    [first] = engine.add(request("first", range(30), max_tokens=5))
    [second] = engine.add(request("second", [*range(8), *range(60, 80)], max_tokens=5))
    engine.step()
    assert (first.computed, second.computed) == (30, 28)


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_prompts_with_common_beginnings_all_end(rng: random.Random) -> None:
    engine = oracle_engine(pages=rng.randrange(24, 64), max_batch_tokens=rng.randrange(4, 40))
    stems = [rng.choices(range(VOCABULARY), k=rng.randrange(4, 30)) for _ in range(2)]
    made = []
    for i in range(10):
        prompt = [*rng.choice(stems)[: rng.randrange(1, 30)], *rng.choices(range(VOCABULARY), k=rng.randrange(6))]
        priority = rng.randrange(-1, 2)
        made += engine.add(
            request(f"r{i}", prompt, max_tokens=rng.randrange(1, 9), n=rng.choice((1, 1, 2)), priority=priority)
        )
        for _ in range(rng.randrange(3)):
            engine.step()
    run_checked(engine)
    assert all(s.output == truth(s) and s.finish_reason == "length" for s in made)


def test_cached_blocks_are_evicted_for_running_sequences() -> None:
    engine = oracle_engine(pages=8)
    rng = random.Random(5)
    for i in range(12):
        [s] = add(engine, request(f"r{i}", rng.choices(range(VOCABULARY), k=20), max_tokens=9))
        run_checked(engine)
        assert s.output == truth(s) and s.preemptions == 0
    assert engine.pool.held == 0 and len(engine.pool.evictable) > 0
