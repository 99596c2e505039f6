"""The offload stage of the engine: K/V blocks loaded from a tier, late and aborted loads, device failures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.serving import oracle_engine, request, run_checked, truth

from intaglio.devices import DeviceError, DeviceLost
from intaglio.runtime import BlockKey, Engine, TierCounts, check_invariants

SIZE = 4


class Shelf:
    """A Connector that keeps blocks in a dict. ready: whether loads have ended."""

    def __init__(self) -> None:
        self.counts, self.held, self.said = TierCounts(), dict[str, tuple[BlockKey, np.ndarray]](), list[str]()
        self.ready, self.loads, self.touched, self.cancelled = True, 0, list[str](), 0
        self.contents: list[np.ndarray] = []
        self.most = 1 << 20  # blocks
        self.arrived = 0  # blocks of a load that has not ended

    def lookup(self, names: Sequence[str]) -> int:
        return next((at for at, name in enumerate(names) if name not in self.held), len(names))

    def stored(self, names: Sequence[str]) -> int:
        return self.lookup(names)

    def load(self, keys: Sequence[BlockKey], block_bytes: int) -> Shelf:
        self.loads += 1
        self.contents = [self.held[key.name][1] for key in keys]
        return self

    def wait(self, seconds: float) -> bool:
        return self.ready

    def blocks(self) -> list[np.ndarray]:
        return self.contents[: None if self.ready else self.arrived]

    def cancel(self) -> None:
        self.cancelled += 1

    def save(self, key: BlockKey, content: np.ndarray) -> bool:
        assert key.name not in self.held, "saved twice"
        if len(self.held) < self.most:
            self.held[key.name] = (key, content)
            return True
        self.counts.dropped += 1
        return False

    def touch(self, names: Sequence[str]) -> None:
        self.touched = list(names)

    def say(self, kind: str, what: str) -> None:
        self.said.append(what)


def engine_on(shelf: Shelf, **options: Any) -> Engine:
    return oracle_engine(pages=40, page_tokens=SIZE, connector=shelf, **options)


def filled() -> Shelf:
    """A shelf with the blocks of a prompt of 30 tokens and its answer."""
    shelf = Shelf()
    ask(engine_on(shelf), list(range(30)))
    assert len(shelf.held) == 8 and not shelf.said
    return shelf


def ask(engine: Engine, prompt: list[int], id: str = "r", **options: Any) -> int:
    """Run a request to its end and check its output. Returns its cached tokens."""
    [s] = engine.add(request(id, prompt, **{"max_tokens": 5, **options}))
    run_checked(engine)
    assert s.output == truth(s) and s.finish_reason == "length"
    return s.cached_tokens


def test_blocks_after_those_in_the_pool_are_loaded() -> None:
    shelf = filled()
    engine = engine_on(shelf)
    ask(engine, [*range(9), 80], "first", max_tokens=1)
    assert engine.block_snapshot().names == tuple(engine.block_names.of(range(8)))
    hits = shelf.counts.hits
    assert ask(engine, list(range(30)), "second") == 28
    assert (hits, shelf.counts.hits) == (2, 7) and shelf.loads == 2
    assert shelf.touched[:7] == engine.block_names.of(range(28))


def test_logits_of_the_prompt_and_last_token_are_computed() -> None:
    shelf = filled()
    assert ask(engine_on(shelf), list(range(30)), prompt_logprobs=1) == 0 and shelf.loads == 0
    assert ask(engine_on(shelf), list(range(28))) == 24  # not the block that the last token completes


def test_running_sequences_go_on_during_a_load_and_a_late_one_is_computed() -> None:
    shelf = filled()
    engine = engine_on(shelf)
    engine.offload.timeout = 60.0  # the clock advances by 1 at each reading
    [running] = engine.add(request("running", [90, 91], max_tokens=40))
    engine.step()
    shelf.ready = False
    [waiting] = engine.add(request("waiting", range(30), max_tokens=5))
    before = len(running.output)
    for _ in range(6):
        engine.step()
        check_invariants(engine)
    assert len(running.output) == before + 6 and waiting.state == "waiting" and shelf.loads == 1
    run_checked(engine)
    assert (shelf.counts.late, shelf.counts.hits) == (7, 0) and len(shelf.said) == 1 and "no K/V block" in shelf.said[0]
    assert [running.output, waiting.output] == [truth(running), truth(waiting)] and waiting.cached_tokens == 0
    assert shelf.cancelled == 1  # else a slow disk would go on reading what nobody waits for


def test_blocks_that_have_come_when_a_load_is_given_up_are_kept_and_each_gives_it_more_time() -> None:
    """Blocks come one in each few steps, and stop coming at one chosen at random: those before it are used."""
    seed = random.randrange(2**32)
    print(f"{seed=}")
    rng, blocks = random.Random(seed), filled()
    for _ in range(10):
        shelf, ends = Shelf(), rng.randrange(7)
        shelf.held, shelf.ready = dict(blocks.held), False
        engine = engine_on(shelf)
        engine.offload.timeout = 30.0  # the clock advances by 1 at each reading, by a few in a step
        [s] = engine.add(request("r", range(30), max_tokens=5))
        for shelf.arrived in range(ends + 1):
            for _ in range(4):
                engine.step()
            assert s.state == "waiting"  # though the load takes longer in all than the timeout
        run_checked(engine)
        assert s.output == truth(s) and s.cached_tokens == SIZE * ends
        assert (shelf.counts.hits, shelf.counts.late, shelf.counts.misses) == (ends, 7 - ends, 0)
        assert shelf.cancelled == 1 and len(shelf.said) == 1


def test_blocks_in_the_pool_that_the_tier_has_lost_are_saved_again() -> None:
    for length in (30, 28):  # of the second the last block ends with the prompt and is computed again
        shelf = Shelf()
        engine, prompt = engine_on(shelf), list(range(length))
        ask(engine, prompt, "first")
        saved, names = dict(shelf.held), engine.block_names.of(prompt)
        for lost in (names, names[:3], names[-1:], []):
            for name in lost:
                del shelf.held[name]
            assert ask(engine, prompt, "again") == (length - 1) // SIZE * SIZE
            assert shelf.held.keys() == saved.keys()
            assert all(np.array_equal(content, saved[name][1]) for name, (_, content) in shelf.held.items())


def test_no_more_blocks_are_read_than_the_tier_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(2**32)
    print(f"{seed=}")
    rng, read = random.Random(seed), list[int]()
    for _ in range(20):
        shelf = Shelf()
        engine, prompt = engine_on(shelf), list(range(30))
        ask(engine, prompt, "first", max_tokens=1)
        portion, saved = rng.randint(1, 8), dict(shelf.held)
        monkeypatch.setattr("intaglio.runtime.offload.PORTION", portion * engine.executable.block_bytes)
        read_blocks = engine.executable.read_blocks
        monkeypatch.setattr(engine.executable, "read_blocks", lambda b, f=read_blocks: (read.append(len(b)), f(b))[1])
        shelf.held, shelf.most = {}, rng.randrange(10)
        read.clear()
        ask(engine, prompt, "again", max_tokens=1)
        assert list(shelf.held) == list(saved)[: shelf.most] and shelf.counts.dropped == max(0, 7 - shelf.most)
        assert all(np.array_equal(content, saved[name][1]) for name, (_, content) in shelf.held.items())
        assert max(read) <= portion and sum(read) == min(7, (shelf.most // portion + 1) * portion)


def test_load_of_an_aborted_request_is_not_given_to_another() -> None:
    shelf = filled()
    engine = engine_on(shelf)
    shelf.ready = False
    engine.add(request("gone", range(30), max_tokens=5))
    engine.step()
    engine.abort("gone")
    shelf.ready = True
    assert ask(engine, [50, *range(29)], "other") == 0
    assert engine.pool.held == 0 and shelf.cancelled == 1


def test_device_that_refuses_loaded_blocks_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = filled()
    engine = engine_on(shelf)

    def refuse(*_: object) -> None:
        raise DeviceError("no room")

    monkeypatch.setattr(engine.executable, "write_blocks", refuse)
    assert ask(engine, list(range(30))) == 0
    assert shelf.counts.errors == 1 and shelf.counts.hits == 0 and "no room" in shelf.said[0]


@pytest.mark.parametrize("call", ["read_blocks", "write_blocks"])
def test_device_lost_while_blocks_are_moved_is_replaced_and_blames_nobody(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    shelf = filled()
    engine = engine_on(shelf)
    engine.recovery.restart = lambda: engine.executable
    real, left = getattr(engine.executable, call), [3]

    def lose(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise DeviceLost("planted")
        return real(*arguments)

    monkeypatch.setattr(engine.executable, call, lose)
    prompt = list(range(30)) if call == "write_blocks" else list(range(40, 70))
    [s] = engine.add(request("r", prompt, max_tokens=12))
    run_checked(engine)
    assert s.output == truth(s) and s.finish_reason == "length" and s.device_losses == 0
    assert engine.counts.restarts == engine.counts.faults["worker"] == 3 and engine.pool.held == 0
