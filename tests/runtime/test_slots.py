"""Slots of recurrent state: the allocator, and an engine whose sequences hold them, on the oracle device."""

from __future__ import annotations

from typing import Any

import pytest
from support.serving import add, fail_after_work, oracle_engine, request, run_checked, truth

from intaglio.runtime import Engine, Sequence
from intaglio.runtime.slots import SlotError, SlotPool


def test_pool_hands_out_slots_and_refuses_what_it_lacks() -> None:
    pool = SlotPool(3)
    assert pool.sequences == 1 and [pool.allocate() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(SlotError, match="a slot is requested, and sequences hold all 3"):
        pool.allocate()
    pool.share(1)
    pool.release(1)
    assert not pool.free
    pool.release(1)
    assert pool.allocate() == 1


@pytest.mark.parametrize("slot", [0, 7, -2])
def test_pool_refuses_to_release_what_is_not_held(slot: int) -> None:
    with pytest.raises(SlotError, match=rf"slot {slot} is not held"):
        SlotPool(4).release(slot)


def test_pool_of_one_slot_is_refused_and_an_empty_one_gives_none() -> None:
    with pytest.raises(SlotError, match="1 slots of recurrent state; give 2 or more"):
        SlotPool(1)
    assert SlotPool(0).allocate() == -1


def test_checkpoints_are_evicted_in_order_of_their_release() -> None:
    pool = SlotPool(3)
    for name in "abc":
        assert pool.keep(pool.allocate(), name)
    for slot in (1, 0, 2):
        pool.release(slot)
    assert pool.checkpoints == {"a": 0, "b": 1, "c": 2} and not pool.free
    pool.share(1)
    assert [pool.allocate(), pool.allocate()] == [0, 2]
    assert pool.checkpoints == {"b": 1}
    with pytest.raises(SlotError):
        pool.allocate()


def test_a_dropped_checkpoint_is_free_once_nobody_holds_it() -> None:
    pool = SlotPool(2)
    slot = pool.allocate()
    assert pool.keep(slot, "a") and not pool.keep(slot, "b")
    pool.drop("a")
    pool.drop("unknown")
    assert not pool.checkpoints and slot not in pool.free
    pool.release(slot)
    assert slot in pool.free
    assert pool.keep(pool.allocate(), "a") and not pool.keep(pool.allocate(), "a")


def requests(engine: Engine) -> list[Sequence]:
    return add(engine, *(request(f"r{i}", range(i, 3 * i + 4), max_tokens=9, n=1 + i % 2) for i in range(6)))


def test_no_more_sequences_run_than_have_slots() -> None:
    engine = oracle_engine(pages=40, slots=5)
    made = requests(engine)
    seen = set[int]()
    while not engine.idle:
        engine.step()
        seen.add(len(engine.scheduler.running))
    run_checked(engine)
    assert max(seen) == 2 and [s.output for s in made] == [truth(s) for s in made]


@pytest.mark.parametrize("options", [{}, {"pages": 12}, {"max_batch_tokens": 3}, {"pages": 9, "max_batch_tokens": 5}])
def test_tokens_are_right_under_preemption_and_chunking(options: dict[str, Any]) -> None:
    engine = oracle_engine(**{"pages": 60, **options}, slots=12)
    made = requests(engine)
    run_checked(engine)
    assert [s.output for s in made] == [truth(s) for s in made]
    assert (engine.counts.preemptions > 0) == ("pages" in options)


def test_tokens_are_right_if_every_second_step_fails_after_its_work() -> None:
    engine = oracle_engine(pages=60, slots=12)
    made, steps = requests(engine), iter(range(10**6))
    fail_after_work(engine, lambda step: next(steps) % 2)
    run_checked(engine)
    assert engine.counts.faults["step"] > 5
    assert [s.output for s in made] == [truth(s) for s in made]
