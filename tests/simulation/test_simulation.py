"""Seeds without a violation, planted bugs that are found, and one seed, one history to the byte."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from simulation.history import failure, play
from simulation.mutants import MUTANTS, Mutant
from simulation.rules import Rules
from simulation.world import World

TESTS = Path(__file__).parent.parent
PARTS, EACH = 8, 50
PATIENCE = 300  # seeds within which a mutant must be caught; the slowest takes some 40


@pytest.mark.parametrize("part", range(PARTS))
def test_no_seed_breaks_a_rule(part: int) -> None:
    assert [line for seed in range(part * EACH, (part + 1) * EACH) if (line := failure(seed))] == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_a_planted_bug_is_caught(mutant: Mutant) -> None:
    assert any(play(seed, mutant)[1] for seed in range(PATIENCE)), f"{mutant.__name__} lives"


def test_the_seeds_go_where_it_hurts() -> None:
    """A simulation in which nothing is preempted, shared, guessed, lost or refused proves nothing about those."""
    seen: Counter[str] = Counter()
    for seed in range(200):
        world = World(seed, None, Rules)
        world.run()
        c = world.engine.counts
        seen += c.finished + c.refused + Counter({f"{kind} fault": n for kind, n in c.faults.items()})
        seen += Counter({
            "preemptions": c.preemptions, "hits": c.cached_tokens, "restarts": c.restarts, "healed": world.healed,
            "right guesses": c.accepted_tokens, "wrong guesses": c.draft_tokens - c.accepted_tokens,
            "engine failed": world.engine.failed is not None,
        })  # fmt: skip
    wanted = {
        "stop", "length", "abort", "deadline", "error", "full", "late", "draining", "invalid", "request fault",
        "step fault", "worker fault", "preemptions", "hits", "restarts", "right guesses", "wrong guesses", "healed",
        "engine failed",
    }  # fmt: skip
    assert wanted - {k for k, n in seen.items() if n} == set()
    assert min(seen[k] for k in wanted - {"engine failed"}) >= 20


def test_a_seed_is_a_history_to_the_byte() -> None:
    """In other processes, with other hash seeds: no set or address decides anything."""

    def told(hash_seed: str) -> bytes:
        environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "simulation", "--seed", "37"]
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout

    assert told("1") == told("2")
    assert len(told("1").splitlines()) > 50
    assert play(37)[0] == play(37)[0] != play(38)[0]


def test_a_failing_seed_is_one_line_that_shows_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rules, "after_abort", lambda self, id: self.world.engine.nobody_knows_this)
    line = next(line for seed in range(100) if (line := failure(seed)))
    assert line.startswith("AttributeError: 'Engine' object has no") and "\n" not in line
    seed = int(line.rsplit(" ", 1)[1])
    assert line.endswith(f"PYTHONPATH=tests python -m simulation --seed {seed}") and failure(seed) == line
