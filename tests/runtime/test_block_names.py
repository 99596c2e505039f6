"""Names of K/V blocks, and the block events from which a router knows which blocks an engine has."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from support.serving import add, oracle_engine, request, run_checked, truth

from intaglio.devices import DeviceLost, StepRequest
from intaglio.runtime import BlockEvents, BlockNames, BlockScope, Engine

SIZE = 4


def test_name_is_a_function_of_scope_salt_and_all_tokens_so_far() -> None:
    names, tokens = BlockNames("scope", SIZE), list(range(13))
    chain = names.of(tokens)
    assert len(chain) == len(set(chain)) == 3 and all(len(name) == 64 for name in chain)
    assert names.of(tokens[:8]) == chain[:2] and names.of(tokens[:3]) == []
    assert names.of([99, *tokens[1:]])[2] != chain[2]  # the third block depends on the first token
    others = [names.of(tokens, ""), names.of(tokens, "a"), BlockNames("other", SIZE).of(tokens)]
    assert len({chain[0], *(other[0] for other in others)}) == 4
    assert names.of([4, 5, 6, 7])[0] != chain[1]  # the same tokens at another place


def test_every_field_of_the_scope_changes_the_name() -> None:
    scope = BlockScope("p", "w", "bf16", "host avx2", 32, "1.0")
    changed = [replace(scope, **{f.name: 7 if f.type == "int" else "x"}) for f in fields(scope)]
    assert len({scope.digest, *(c.digest for c in changed)}) == 1 + len(fields(scope))
    moved = replace(scope, program="pw", weights="")
    assert moved.digest != replace(scope, program="p", weights="w").digest


def test_names_are_the_same_in_another_process() -> None:
    script = "from intaglio.runtime import BlockNames; print(*BlockNames('s', 4).of(range(9), 'salt'))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.split() == BlockNames("s", 4).of(range(9), "salt")


class Mirror:
    """What a reader of the events knows."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        first = engine.block_snapshot()
        self.sequence, self.blocks = first.sequence, set(first.names)

    def update(self) -> None:
        events = self.engine.block_events(self.sequence)
        assert events is not None
        for event in events:
            assert event.sequence == self.sequence + 1
            self.sequence = event.sequence
            if event.kind == "stored":
                assert event.name not in self.blocks
                self.blocks.add(event.name)
            elif event.kind == "removed":
                self.blocks.remove(event.name)
            else:
                self.blocks.clear()


@pytest.mark.parametrize("seed", range(5))
def test_reader_of_the_events_knows_the_blocks_at_all_times(seed: int) -> None:
    """With evictions, preemption and a lost device; and what it finds by names is what the engine finds."""
    rng = random.Random(seed)
    engine = oracle_engine(pages=14, incarnation="first", max_batch_tokens=16)
    engine.recovery.restart = lambda: engine.executable
    mirror, lose = Mirror(engine), [False]
    run = engine.executable.run  # type: ignore[attr-defined]

    def step(r: StepRequest) -> object:
        if lose[0]:
            lose[0] = False
            raise DeviceLost("planted")
        return run(r)

    engine.executable.run = step  # type: ignore[attr-defined]
    heads = [[rng.randrange(90) for _ in range(12)] for _ in range(3)]
    for i in range(25):
        lose[0] = i == 20
        prompt, salt = [*rng.choice(heads)[: rng.randint(1, 12)], rng.randrange(90)], rng.choice((None, "a"))
        known = 0
        for name in engine.block_names.chain(prompt[:-1], salt):
            if name not in mirror.blocks:
                break
            known += SIZE
        [s] = add(engine, request(f"r{i}", prompt, max_tokens=6, salt=salt))
        run_checked(engine)
        mirror.update()
        assert s.output == truth(s) and (s.cached_tokens == known or i == 20)
        assert mirror.blocks == set(engine.block_snapshot().names) == set(engine.pool.index)
    assert {e.kind for e in engine.block_events(0) or ()} == {"stored", "removed", "cleared"}


def test_late_reader_and_reader_of_another_incarnation_are_told_to_take_a_snapshot() -> None:
    events = BlockEvents("second", kept=3)
    for name in "abcde":
        events.stored(name, "root")
    assert [e.name for e in events.after(2) or ()] == ["c", "d", "e"] and events.after(5) == []
    assert events.after(1) is None and events.after(6) is None and events.after(-1) is None
    shot = json.loads(json.dumps(events.snapshot("scope", SIZE, ["a"]).as_dict()))
    assert shot == {"incarnation": "second", "sequence": 5, "scope": "scope", "block_size": SIZE, "names": ["a"]}
    [last] = events.after(4) or ()
    assert last.as_dict() == {"sequence": 5, "kind": "stored", "name": "e", "parent": "root"}
