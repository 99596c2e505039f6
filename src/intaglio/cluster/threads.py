"""Default number of threads of a replica, so that all replicas fit on the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Sequence


def threads_that_fit(nodes: Sequence[float], replicas: int) -> int:
    """Most CPUs that each of `replicas` equal replicas can have if each has them on one node; at least 1.

    nodes: CPUs of each node.
    """
    fitting = (t for t in range(int(max(nodes, default=0.0)), 1, -1) if sum(int(n) // t for n in nodes) >= replicas)
    return next(fitting, 1)
