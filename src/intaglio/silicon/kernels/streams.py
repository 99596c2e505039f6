"""Chip kernel of hyper-connections (sinkhorn, mix_streams), for timing only, by the ops' FLOPs and bytes.

It cannot be executed: no instruction of the simulated chips multiplies each row by a value of its own from another
tensor.
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
