"""Chip kernels of compressed attention (pool_keys, attend_pooled), for timing only, by the ops' FLOPs and bytes.

They cannot be executed: no instruction of the simulated chips reads a cache page with one row for several tokens.
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
