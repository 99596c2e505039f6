"""Default number of threads of a replica, so that all replicas fit on the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Sequence


def threads_that_fit(nodes: Sequence[float], replicas: int) -> int:
    """The largest number of CPUs that each replica can get so that all replicas fit on the nodes, as an int.

    The CPUs of a replica must be on one node. The result is 1 if even replicas of one CPU do not all fit.

    Args:
        nodes: number of CPUs of each node; fractions do not count.
        replicas: number of replicas, all of equal size.
    """
    fitting = (t for t in range(int(max(nodes, default=0.0)), 1, -1) if sum(int(n) // t for n in nodes) >= replicas)
    return next(fitting, 1)
