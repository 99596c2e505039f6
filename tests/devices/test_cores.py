"""usable_cores(): a container's CPU limit is found in its control groups, of version 1 and 2."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import pytest

from intaglio.devices import cores, usable_cores
from intaglio.devices.cores import cpu_limit


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"cpu.{name}").write_text(text + "\n")


def test_the_limit_of_version_2_is_the_least_of_the_groups_above(tmp_path: Path) -> None:
    membership = "0::/pod/own\n"
    assert cpu_limit(membership, tmp_path) == math.inf
    write(tmp_path / "pod" / "own", max="max 100000")
    assert cpu_limit(membership, tmp_path) == math.inf
    quota = random.randrange(1000, 10**6)
    write(tmp_path / "pod", max=f"{quota} 100000")
    assert cpu_limit(membership, tmp_path) == quota / 100000
    write(tmp_path / "pod" / "own", max=f"{quota // 2} 100000")
    assert cpu_limit(membership, tmp_path) == quota // 2 / 100000


def test_a_container_that_sees_the_hosts_path_finds_its_limit_at_the_root(tmp_path: Path) -> None:
    write(tmp_path, max="250000 100000")
    for path in ("/", "/system.slice/docker-1.scope", "/../../other"):
        assert cpu_limit(f"0::{path}\n", tmp_path) == 2.5


def test_the_limit_of_version_1(tmp_path: Path) -> None:
    write(tmp_path / "cpu,cpuacct" / "a", cfs_quota_us="150000", cfs_period_us="50000")
    write(tmp_path / "cpu,cpuacct", cfs_quota_us="-1", cfs_period_us="100000")
    write(tmp_path / "memory" / "b", cfs_quota_us="1", cfs_period_us="100000")  # not that of a group with CPU
    assert cpu_limit("5:memory:/b\n4:cpu,cpuacct:/a\n0::/\n", tmp_path) == 3.0
    write(tmp_path / "cpu" / "c", cfs_quota_us="50000", cfs_period_us="100000")
    assert cpu_limit("1:cpuacct,cpu:/c\n", tmp_path) == 0.5  # under the link to the other order of names


def test_what_cannot_be_read_limits_nothing(tmp_path: Path) -> None:
    write(tmp_path, max="a lot", cfs_quota_us="100", cfs_period_us="0")
    for membership in ("", "no group", "0::/\n1:cpu:/", "::::\n\n"):
        assert cpu_limit(membership, tmp_path) == math.inf


def test_cores_are_those_of_the_limit_rounded_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "membership"
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "MEMBERSHIP", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5, 7})
    assert usable_cores() == 4  # no control groups
    own.write_text("0::/\n")
    for text, expected in (("max 100000", 4), ("1000 100000", 1), ("100001 100000", 2), ("900000 100000", 4)):
        write(tmp_path, max=text)
        assert usable_cores() == expected
