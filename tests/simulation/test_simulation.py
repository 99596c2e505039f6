"""The simulation: seeds pass, planted bugs are found, and a seed determines its history to the byte."""

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
SEEDS_PER_MUTANT = 300  # seeds within which a mutant must be found; the slowest needs about 100


@pytest.mark.parametrize("part", range(PARTS))
def test_no_seed_violates_a_rule(part: int) -> None:
    assert [line for seed in range(part * EACH, (part + 1) * EACH) if (line := failure(seed))] == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_a_planted_bug_is_caught(mutant: Mutant) -> None:
    assert any(play(seed, mutant)[1] for seed in range(SEEDS_PER_MUTANT)), f"{mutant.__name__} lives"


def test_seeds_cover_all_outcomes() -> None:
    """A simulation without preemption, sharing, drafts, losses or refusals would prove nothing about them."""
    wanted = {
        "stop", "length", "abort", "deadline", "error", "full", "late", "draining", "invalid", "request fault",
        "step fault", "worker fault", "preemptions", "hits", "restarts", "accepted drafts", "rejected drafts", "healed",
        "engine failed", "pipelines", "kept", "suspensions", "state hits",
        "accepted beside state", "rejected beside state", "window hits", "window drafts",
        "tier hits", "tier misses", "tier corrupt", "tier late",
    }  # fmt: skip
    seen: Counter[str] = Counter()
    for seed in range(800):
        if seen["engine failed"] and min(seen[k] for k in wanted - {"engine failed"}) >= 8:
            return
        world = World(seed, None, Rules)
        world.run()
        c = world.engine.counts
        seen += c.finished + c.refused + Counter({f"{kind} fault": n for kind, n in c.faults.items()})
        seen += Counter({
            "preemptions": c.preemptions, "hits": c.cached_tokens, "restarts": c.restarts, "healed": world.healed,
            "pipelines": world.options.depth > 1, "kept": sum(" with its K/V" in line for line in world.lines),
            "suspensions": c.suspended,
            "accepted drafts": c.accepted_tokens, "rejected drafts": c.draft_tokens - c.accepted_tokens,
            "engine failed": world.engine.failed is not None,
        })  # fmt: skip
        if world.options.slots:
            seen += Counter({
                "state hits": c.cached_tokens, "accepted beside state": c.accepted_tokens,
                "rejected beside state": c.draft_tokens - c.accepted_tokens,
            })  # fmt: skip
        if world.engine.windows.on:
            seen += Counter({"window hits": c.cached_tokens, "window drafts": c.accepted_tokens})
        if world.tier:
            t = world.tier.counts
            seen += Counter({f"tier {name}": getattr(t, name) for name in ("hits", "misses", "corrupt", "late")})
    pytest.fail(f"rare or never seen: {[k for k in wanted if seen[k] < 8]}")


def test_seed_determines_the_history_to_the_byte() -> None:
    """In other processes with other hash seeds: no order of a set and no address matters."""

    def output(hash_seed: str) -> bytes:
        environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "simulation", "--seed", "39"]
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout

    assert output("1") == output("2")
    assert len(output("1").splitlines()) > 50
    assert play(39)[0] == play(39)[0] != play(38)[0]


def test_failure_is_reported_as_one_line_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rules, "after_abort", lambda self, id: self.world.engine.no_such_attribute)
    line = next(line for seed in range(100) if (line := failure(seed)))
    assert line.startswith("AttributeError: 'RecordedEngine' object has no") and "\n" not in line
    seed = int(line.rsplit(" ", 1)[1])
    assert line.endswith(f"PYTHONPATH=tests python -m simulation --seed {seed}") and failure(seed) == line
