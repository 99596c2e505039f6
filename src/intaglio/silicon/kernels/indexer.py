"""Chip kernel of the op `choose_keys`. It models the time by the op's work, and cannot be executed.

No instruction of the simulated chips chooses positions of a K/V cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.ops import ChooseKeys
from intaglio.silicon.kernels.kernel import WorkKernel, chip_kernel


@chip_kernel(ChooseKeys)
@dataclass(frozen=True)
class ChooseKeysKernel(WorkKernel):
    """Chip kernel of an indexer: timed by its FLOPs on the vector lanes and its bytes."""
