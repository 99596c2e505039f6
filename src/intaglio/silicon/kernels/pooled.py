"""Chip kernels of compressed attention. They model the time by the ops' work, and cannot be executed.

No instruction of the simulated chips reads a page that has one row for a run of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from intaglio.ops import AttendPooled, PoolKeys
from intaglio.silicon.kernels.kernel import WorkKernel, chip_kernel


@chip_kernel(AttendPooled)
@dataclass(frozen=True)
class AttendPooledKernel(WorkKernel):
    """Chip kernel of the op `attend_pooled`. For timing only: the simulator cannot execute the op.

    Like any WorkKernel it is timed by the longer of two times: its FLOPs on the matrix array in bf16, and its HBM
    bytes.
    """

    engine: ClassVar[str] = "MXU"


@chip_kernel(PoolKeys)
@dataclass(frozen=True)
class PoolKeysKernel(WorkKernel):
    """Chip kernel of the op `pool_keys`. For timing only: the simulator cannot execute the op.

    Like any WorkKernel it is timed by the longer of two times: its operations on the vector lanes, and its HBM bytes.
    """
