"""Chip kernels of the ops with recurrent state: timed by their work. They do not execute: no instruction does that."""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.ops import Decay, LinearAttention, RgLru, SelectiveScan, ShortConv
from intaglio.silicon.kernels.kernel import WorkKernel, chip_kernel


@chip_kernel(Decay, LinearAttention, RgLru, SelectiveScan, ShortConv)
@dataclass(frozen=True)
class RecurrentKernel(WorkKernel):
    """Timing of an op with recurrent state by its FLOPs on the vector lanes and its bytes."""
