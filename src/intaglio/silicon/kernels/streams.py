"""Chip kernels of hyper-connections. They model the time by the ops' work, and cannot be executed.

No instruction of the simulated chips scales a row by a value that another tensor has for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.ops import MixStreams, Sinkhorn
from intaglio.silicon.kernels.kernel import WorkKernel, chip_kernel


@chip_kernel(MixStreams, Sinkhorn)
@dataclass(frozen=True)
class StreamsKernel(WorkKernel):
    """Chip kernel of the ops that mix several residual streams. For timing only: the simulator cannot execute them.

    Like any WorkKernel it is timed by the longer of two times: operations on the vector lanes, and HBM bytes.
    """
