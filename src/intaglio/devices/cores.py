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
    """Cores that this process may keep busy: the default number of threads.

    It is the number of cores in the process's affinity mask, or the CPU limit of its control groups, rounded up, if
    that is less: more threads than the limit would be stopped by the kernel for a part of each period.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        membership = MEMBERSHIP.read_text()
    except OSError:
        return cores
    return min(cores, math.ceil(min(cpu_limit(membership, CGROUPS), cores)))


def cpu_limit(membership: str, root: Path) -> float:
    """CPU limit in cores of a process's control groups and of all groups above them; infinity if there is none.

    Reads `cpu.max` (version 2), and `cpu.cfs_quota_us` with `cpu.cfs_period_us` (version 1). Within a container,
    `membership` may state a path that exists only outside it; then the limit of the group at `root` is taken, which is
    the container's own.

    Args:
        membership: the text of /proc/PID/cgroup, lines of "number:controllers:path".
        root: where the control groups are mounted.
    """
    return min((limit for folder in _groups(membership, root) if (limit := _limit(folder)) > 0), default=math.inf)


def _groups(membership: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the groups that may limit the CPU, and of the groups above them.

    membership: the text of /proc/PID/cgroup. root: where the control groups are mounted. Folders that do not exist are
    yielded too.
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
    """CPU limit in cores of the control group (cgroup) at `folder`; infinity if it has none or does not exist."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        micros = int((folder / "cpu.cfs_quota_us").read_text())
        return math.inf if micros < 0 else micros / int((folder / "cpu.cfs_period_us").read_text())
    return math.inf
