"""Chip kernel of the op `moment`. It models the time by the op's work, and cannot be executed.

No instruction of the simulated chips reduces a row to one number and stores it.
"""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.ops import Moment
from intaglio.silicon.kernels.kernel import WorkKernel, chip_kernel


@chip_kernel(Moment)
@dataclass(frozen=True)
class MomentKernel(WorkKernel):
    """Chip kernel of the op `moment`, which computes each row's mean, root mean square or standard deviation.

    For timing only: it has no instruction streams, so the simulator cannot execute the op. Like any WorkKernel it is
    timed by the longer of two times: its operations on the vector lanes, and its HBM bytes.
    """
