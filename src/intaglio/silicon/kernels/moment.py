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
    """Chip kernel of a moment of rows: timed by its operations on the vector lanes and its bytes."""
