"""Slots of recurrent state: the allocator, and an engine whose sequences hold them, on the oracle device."""

from __future__ import annotations

from typing import Any

import pytest
from support.serving import add, oracle_engine, request, run_checked, truth

from intaglio.devices import DeviceError, StepRequest
from intaglio.runtime import Engine, RequestError, Sequence
from intaglio.runtime.slots import SlotError, SlotPool


def test_pool_hands_out_pairs_and_refuses_what_it_lacks() -> None:
    pool = SlotPool(5)
    first, second = pool.allocate(), pool.allocate()
    assert pool.sequences == 2 and sorted([*first, *second]) == [0, 1, 2, 3]
    with pytest.raises(SlotError, match="2 slots requested, 1 of 5 are free"):
        pool.allocate()
    pool.release(first)
    assert pool.allocate() == first[::-1]


@pytest.mark.parametrize("slots", [[0], [7], [-1]])
def test_pool_refuses_to_release_what_is_not_held(slots: list[int]) -> None:
    with pytest.raises(SlotError, match=rf"slot {slots[0]} is not held"):
        SlotPool(4).release(slots)


def test_pool_of_one_slot_is_refused_and_an_empty_one_gives_none() -> None:
    with pytest.raises(SlotError, match="1 slots of recurrent state; give 2 or more"):
        SlotPool(1)
    assert SlotPool(0).allocate() == []


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
    made, run, steps = requests(engine), engine.executable.run, iter(range(10**6))  # type: ignore[attr-defined]

    def late(step: StepRequest) -> Any:
        result = run(step)
        if next(steps) % 2:
            raise DeviceError("planted")
        return result

    engine.executable.run = late  # type: ignore[attr-defined]
    run_checked(engine)
    assert engine.counts.faults["step"] > 5
    assert [s.output for s in made] == [truth(s) for s in made]


def test_blocks_are_not_shared() -> None:
    engine = oracle_engine(pages=40, slots=8)
    for i in range(2):
        add(engine, request(f"r{i}", range(20), max_tokens=2, n=2))
        run_checked(engine)
    assert engine.counts.cached_tokens == 0 and not engine.pool.cached


def test_drafts_are_refused() -> None:
    with pytest.raises(RequestError, match=r"max_drafts is 2, but smallest has recurrent state.*allowed: 0"):
        oracle_engine(slots=4, max_drafts=2)
