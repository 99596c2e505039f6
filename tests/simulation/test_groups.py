"""The simulation of groups of ranks: seeds pass, planted bugs are found, and a seed determines its history."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from simulation.group_mutants import GROUP_MUTANTS, GroupMutant
from simulation.groups import KINDS
from simulation.history import group_failure, play_group

TESTS = Path(__file__).parent.parent
PARTS, EACH = 4, 50
SEEDS_PER_MUTANT = 400


@pytest.mark.parametrize("part", range(PARTS))
def test_no_seed_violates_a_rule(part: int) -> None:
    assert [line for seed in range(part * EACH, (part + 1) * EACH) if (line := group_failure(seed))] == []


@pytest.mark.parametrize("mutant", GROUP_MUTANTS, ids=lambda m: m.title)
def test_a_planted_bug_is_caught(mutant: GroupMutant) -> None:
    with mutant.planted():
        assert any(play_group(seed)[1] for seed in range(SEEDS_PER_MUTANT)), f"nobody notices that {mutant.title}"


def test_seeds_cover_all_faults_and_outcomes() -> None:
    seen: Counter[str] = Counter()
    wanted = {*KINDS, "lost", "length", "losses"}
    for seed in range(300):
        for line in play_group(seed)[0]:
            seen.update(word for word in wanted if f" {word}" in line)
        if min(seen[word] for word in wanted) >= 5:
            return
    pytest.fail(f"rare or never seen: {[word for word in wanted if seen[word] < 5]}")


def test_seed_determines_the_history_to_the_byte() -> None:
    def output(hash_seed: str) -> bytes:
        environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "simulation", "--groups", "--seed", "22"]
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout

    assert output("1") == output("2")
    assert len(output("1").splitlines()) > 15
    assert play_group(22)[0] == play_group(22)[0] != play_group(21)[0]
