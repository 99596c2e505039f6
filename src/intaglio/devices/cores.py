"""Number of CPU cores that this process may keep busy: its affinity mask, and the CPU limit of its container."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the number of CPU cores that this process may keep busy. It is the default number of threads.

    The result is the number of cores in the process's affinity mask, or the CPU limit of its control groups (cgroups)
    if that is less, rounded up. With more threads than that, the kernel would stop the process for a part of each
    period.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        membership = MEMBERSHIP.read_text()
    except OSError:
        return cores
    return min(cores, math.ceil(min(cpu_limit(membership, CGROUPS), cores)))


def cpu_limit(membership: str, root: Path) -> float:
    """Return the CPU limit of a process, in cores, as a float; infinity if there is none.

    The result is the lowest limit of the process's control groups (cgroups) and of all groups above them. Reads
    `cpu.max` (version 2), or `cpu.cfs_quota_us` and `cpu.cfs_period_us` (version 1). Within a container, `membership`
    may name a path that exists only outside the container. The limit of the group at `root`, which is the container's
    own group, then applies.

    Args:
        membership: the text of /proc/PID/cgroup, lines of "number:controllers:path".
        root: where the control groups are mounted.
    """
    return min((limit for folder in _groups(membership, root) if (limit := _limit(folder)) > 0), default=math.inf)


def _groups(membership: str, root: Path) -> Iterator[Path]:
    """Yield the folders of all control groups (cgroups) that may limit a process's CPU time, parent groups included.

    Folders that do not exist are yielded too.

    Args:
        membership: the text of /proc/PID/cgroup of the process.
        root: where the control groups are mounted.
    """
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mounts = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / controllers, root / "cpu"]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in dict.fromkeys(mounts):
            yield from (mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def _limit(folder: Path) -> float:
    """Return the CPU limit of the control group (cgroup) at `folder`, in cores.

    The result is infinity if the group has no limit or does not exist.
    """
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        micros = int((folder / "cpu.cfs_quota_us").read_text())
        return math.inf if micros < 0 else micros / int((folder / "cpu.cfs_period_us").read_text())
    return math.inf
