"""Leases on blocks of the disk tier: pinned blocks are never evicted, and every lease ends, also a killed process's."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from intaglio.runtime import BlockScope
from intaglio.tiers import DiskTier
from intaglio.tiers.directory import BlockDirectory, NoRoom
from intaglio.tiers.leases import LONGEST, Leases

SEED = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
BLOCK = 100  # bytes


class Clock:
    """Virtual wall time, and the times that the system gives to files that are written."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = time.time_ns()
        patch.setattr("intaglio.tiers.leases.time.time_ns", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def names_of(*numbers: int) -> list[str]:
    return [f"{number:064x}" for number in numbers]


def test_pinned_blocks_stay_and_what_does_not_fit_is_refused(tmp_path: Path, clock: Clock) -> None:
    directory, other = (BlockDirectory(tmp_path, 10 * BLOCK) for _ in range(2))
    pinned = names_of(*range(8))
    lease = other.leases.take(pinned, 10.0)
    for name in [*pinned, *names_of(20, 21, 22, 23)]:
        directory.write(name, [bytes(BLOCK)])
    assert all(map(directory.has, pinned))
    more = other.leases.take(names_of(*range(30, 40)), 10.0)
    refused = 0
    for name in names_of(*range(30, 40)):
        try:
            directory.write(name, [bytes(BLOCK)])
        except NoRoom:
            refused += 1
            assert not directory.has(name)
    assert refused == 8 and all(map(directory.has, pinned))
    clock.now += 11 * 10**9
    directory.write(names_of(50)[0], [bytes(BLOCK)])
    assert directory.has(names_of(50)[0]) and not directory.has(pinned[0])
    assert not other.leases.renew(lease, 5.0) and not other.leases.renew(more, 5.0)  # deleted by then
    assert not list(other.leases.folder.glob("*.lease"))


def test_a_lease_that_has_run_out_cannot_be_renewed(tmp_path: Path, clock: Clock) -> None:
    leases = Leases(tmp_path)
    lease = leases.take(names_of(1, 2), 5.0)
    for _ in range(5):
        clock.now += 4 * 10**9
        assert leases.renew(lease, 5.0) and leases.names(lease) == set(names_of(1, 2)) == leases.pinned()
    clock.now += 5 * 10**9
    assert leases.names(lease) is None and not leases.renew(lease, 5.0) and not leases.pinned()


def test_a_lock_that_another_holds_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intaglio.tiers.leases.LOCK_WAIT", 0.02)
    said = list[str]()
    tier = DiskTier(tmp_path, 1000, BlockScope("p", "w", "n"), said.append)
    leases = Leases(tmp_path)
    lease = leases.take(names_of(1), 60.0)
    with leases.locked():
        for _ in range(2):
            assert tier.pin(names_of(2), 60.0) == ""
        with pytest.raises(TimeoutError, match="were locked for 0.02 s"):
            tier.renew(lease, 60.0)
        assert leases.pinned() == set(names_of(1))
    assert tier.counts.errors == 3 and tier.counts.expired == 0 and len(said) == 2
    assert tier.renew(lease, 60.0) and tier.pin(names_of(2), 60.0)
    tier.close()


def test_a_write_that_has_to_evict_does_not_wait_for_a_lock_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intaglio.tiers.leases.LOCK_WAIT", 0.02)
    directory, [first, second, third] = BlockDirectory(tmp_path, 2 * BLOCK), names_of(1, 2, 3)
    for name in (first, second):
        directory.write(name, [bytes(BLOCK)])
    with Leases(tmp_path).locked():
        for _ in range(2):
            with pytest.raises(TimeoutError, match="were locked for 0.02 s"):
                directory.write(third, [bytes(BLOCK)])
            assert not directory.has(third) and directory.held == 2 * BLOCK
    assert directory.write(third, [bytes(BLOCK)]) == 2 and directory.has(third)  # down to 1/32 below the budget


def test_what_a_killed_process_left_of_a_lease_is_deleted(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    leases.take(names_of(1), 60.0)
    old, new = leases.folder / f".{'a' * 32}", leases.folder / f".{'b' * 32}"
    old.write_bytes(b"")
    new.write_bytes(b"")
    then = time.time() - LONGEST - 60
    os.utime(old, (then, then))
    assert leases.pinned() == set(names_of(1))
    assert not old.exists() and new.exists()


def test_what_is_no_lease_pins_nothing(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    assert leases.take([], 5.0) and leases.pinned() == set()
    for text in ("", "../lock", "f" * 32, "F" * 32, "0" * 31):
        assert leases.names(text) is None and not leases.renew(text, 1.0)
        leases.release(text)
    for seconds in (0.0, -1.0, LONGEST + 1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="allowed: above 0"):
            leases.take(names_of(1), seconds)


def test_leases_of_killed_processes_end(tmp_path: Path, clock: Clock) -> None:
    code = (
        "import os, pathlib, sys; from intaglio.tiers.leases import Leases; leases = Leases(pathlib.Path(sys.argv[1]));"
        "leases.take(['ab' * 32], 60.0); lock = leases.locked(); lock.__enter__(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    leases = Leases(tmp_path)
    assert leases.pinned() == {"ab" * 32}
    clock.now += 62 * 10**9
    with leases.locked():  # that of the killed process is gone with it
        assert not leases.pinned()


def test_pinned_blocks_are_never_evicted_in_random_histories(tmp_path: Path, clock: Clock) -> None:
    print(f"TEST_SEED={SEED}")
    rng, budget = random.Random(SEED), 12 * BLOCK
    directories = [BlockDirectory(tmp_path, budget) for _ in range(2)]
    live: dict[str, tuple[list[str], int]] = {}  # by lease: names, end
    there: set[str] = set()  # pinned blocks that had files
    for _ in range(400):
        directory = rng.choice(directories)
        match rng.choice(("write", "write", "write", "take", "renew", "release", "wait")):
            case "write":
                name = names_of(rng.randrange(40))[0]
                try:
                    if not directory.has(name):
                        directory.write(name, [bytes(BLOCK)])
                except NoRoom:
                    assert not directory.has(name)
            case "take" if len(live) < 4:
                names = names_of(*rng.sample(range(40), rng.randint(1, 4)))
                live[directory.leases.take(names, 5.0)] = names, clock.now + 5 * 10**9
            case "renew" if live:
                lease = rng.choice(list(live))
                assert directory.leases.renew(lease, 5.0)
                live[lease] = live[lease][0], clock.now + 5 * 10**9
            case "release" if live:
                lease = rng.choice(list(live))
                directory.leases.release(lease)
                del live[lease]
            case "wait":
                clock.now += rng.choice((10**8, 10**9, 4 * 10**9))
        for lease in [lease for lease, (_, end) in live.items() if end <= clock.now]:
            assert directory.leases.names(lease) is None
            del live[lease]
        pinned = {name for names, _ in live.values() for name in names}
        assert directory.leases.pinned() == pinned
        there &= pinned
        assert all(map(directory.has, there))
        there |= {name for name in pinned if directory.has(name)}
