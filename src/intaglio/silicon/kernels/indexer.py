"""Chip kernel of the op `choose_keys`. It models the time by the op's work, and cannot be executed.

No instruction of the simulated chips chooses positions of a K/V cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from intaglio.ops import ChooseKeys
from intaglio.silicon.kernels.kernel import WorkKernel, chip_kernel


@chip_kernel(ChooseKeys)
@dataclass(frozen=True)
class ChooseKeysKernel(WorkKernel):
    """Chip kernel of an indexer: timed by its FLOPs on the matrix array, in bf16, and its bytes.

    Published kernels multiply queries and index keys on the matrix array (DeepSeek-V3.2 in FP8).
    """

    engine: ClassVar[str] = "MXU"
