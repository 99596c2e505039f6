"""The oracle device: tokens follow its definition, and every planted K/V bug gives a wrong token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from simulation.mutants import skip_recomputation_after_preemption
from support.serving import VOCABULARY, add, oracle_engine, request, run_checked, smallest_program, truth

from intaglio.batch import Chunk, Sampling, bind
from intaglio.devices import ArrayWeights, DeviceError, Executable, PendingStep, StateSpec, StepRequest, open_device
from intaglio.devices.oracle import expected
from intaglio.runtime import Engine, Sequence


def load(pages: int = 8, page_tokens: int = 4) -> Executable:
    return open_device("oracle").load(smallest_program(), ArrayWeights({}), StateSpec(pages, page_tokens))


def test_tokens_follow_the_definition_with_any_chunking() -> None:
    ids = list(range(3, 17))
    wanted = [expected(ids[: i + 1], VOCABULARY) for i in range(len(ids))]
    for size in (1, 3, 4, 14):
        device = load()
        got: list[int] = []
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            step = device.step(StepRequest(bind([Chunk(part, start, [5, 0, 7, 2], range(len(part)))], 4), logits=True))
            assert step.logits is not None and (step.logits.argmax(axis=1) == step.tokens).all()
            got += step.tokens.tolist()
        assert got == wanted


def test_a_token_depends_on_all_tokens_their_positions_and_the_seed() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1 << 16, 20).tolist()
    whole = expected(ids, 1 << 30)
    assert all(expected([*ids[:i], ids[i] ^ 1, *ids[i + 1 :]], 1 << 30) != whole for i in range(len(ids)))
    assert expected(ids[::-1], 1 << 30) != whole
    hot = [expected(ids, 1 << 30, Sampling(temperature=1.0, seed=s)) for s in range(8)]
    assert len({whole, *hot}) == 9


def test_a_batch_out_of_range_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"token id 97 is outside 0\.\.96"):
        load().step(StepRequest(bind([Chunk([97], 0, [0])], 4)))


def hands_out_a_held_block(engine: Engine) -> None:
    pool, allocate = engine.pool, engine.pool.allocate

    def broken(n: int) -> list[int]:
        blocks = allocate(n)
        other = next((b for r in engine.scheduler.running for b in r.blocks), None)
        return blocks if other is None or not blocks else [other, *blocks[1:]]

    pool.allocate = broken  # type: ignore[method-assign]
    pool.release = lambda blocks: None  # type: ignore[method-assign]


def frees_a_block_early(engine: Engine) -> None:
    launch = engine.executable.launch

    def broken(request: StepRequest) -> PendingStep:
        for r in engine.scheduler.running:
            if len(r.output) == 2 and engine.pool.refcounts[r.blocks[0]] == 1:
                engine.pool.release([r.blocks[0]])
        return launch(request)

    engine.executable.launch = broken  # type: ignore[method-assign]


def swaps_two_blocks(engine: Engine) -> None:
    allocate = engine.scheduler.allocate

    def broken(r: Sequence) -> bool:
        if len(r.output) == 3 and len(r.blocks) > 1:
            r.blocks[0], r.blocks[1] = r.blocks[1], r.blocks[0]
        return allocate(r)

    engine.scheduler.allocate = broken  # type: ignore[method-assign]


def writes_to_another_slot(engine: Engine) -> None:
    launch = engine.executable.launch

    def broken(request: StepRequest) -> PendingStep:
        other = replace(request.batch, numbers=request.batch.numbers.copy())
        other.slots[other.positions == 5] -= 1
        return launch(replace(request, batch=other))

    engine.executable.launch = broken  # type: ignore[method-assign]


def workload(plant: Callable[[Engine], None] | None) -> list[Sequence]:
    engine = oracle_engine(pages=7, page_tokens=4)
    if plant:
        plant(engine)
    requests = [request(f"r{i}", range(i, i + 3 + i), max_tokens=12) for i in range(4)]
    made = add(engine, *requests)
    if plant is None:
        run_checked(engine)
        assert any(s.preemptions for s in made)
    for _ in range(200):
        try:
            engine.step()
        except Exception:  # a planted bug may also fail a check of the block pool; this test looks only at tokens
            break
    return made


@pytest.mark.parametrize(
    "plant",
    [
        hands_out_a_held_block,
        frees_a_block_early,
        swaps_two_blocks,
        skip_recomputation_after_preemption,
        writes_to_another_slot,
    ],
)
def test_a_planted_bug_gives_wrong_tokens(plant: Callable[[Engine], None]) -> None:
    assert any(r.output != truth(r) for r in workload(plant))


def test_without_a_bug_all_tokens_are_right() -> None:
    assert all(r.output == truth(r) and len(r.output) == 12 for r in workload(None))
