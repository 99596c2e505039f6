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
    """Chip kernel of an indexer, which scores all keys for sparse attention. For timing only.

    Like any WorkKernel it is timed by the longer of two times: its FLOPs and its HBM bytes. The FLOPs are those of the
    matrix array in bf16. Published kernels use the matrix array too. The kernel of DeepSeek-V3.2 multiplies in FP8, so
    it may be faster than modelled here.
    """

    engine: ClassVar[str] = "MXU"
