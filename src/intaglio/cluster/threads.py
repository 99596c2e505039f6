"""Default number of threads of a replica, so that all replicas fit on the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Sequence


def threads_that_fit(nodes: Sequence[float], replicas: int) -> int:
    """Returns how many CPUs each replica can get at most, if all replicas must fit on the nodes.

    The CPUs of a replica must be on one node. The result is 1 if the replicas do not even fit with one CPU each.

    Args:
        nodes: number of CPUs of each node; a fraction of a CPU is not used.
        replicas: number of replicas, which all get the same number of CPUs.
    """
    fitting = (t for t in range(int(max(nodes, default=0.0)), 1, -1) if sum(int(n) // t for n in nodes) >= replicas)
    return next(fitting, 1)
