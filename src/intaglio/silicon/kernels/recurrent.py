"""Chip kernel of the ops `linear_attention` and `selective_scan`, for timing only.

It cannot be executed: no instruction of the simulated chips does what these ops do.
"""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.ops import LinearAttention, SelectiveScan
from intaglio.silicon.kernels.kernel import WorkKernel, chip_kernel


@chip_kernel(LinearAttention, SelectiveScan)
@dataclass(frozen=True)
class RecurrentKernel(WorkKernel):
    """Chip kernel of an op with recurrent state. For timing only: the simulator cannot execute the op.

    Like any WorkKernel it is timed by the longer of two times: its FLOPs on the vector lanes, and its HBM bytes.
    """
