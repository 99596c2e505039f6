"""Simulated chips: instruction set, chip kernels in tiles, a simulator that executes and times them, and timing plans.

`chip_kernel` registers the kernel class of an op; other packages register kernels for their own ops with it. See
docs/adding-an-op.md.
"""

from intaglio.silicon.kernels import ChipKernel, WorkKernel, chip_kernel

__all__ = ["ChipKernel", "WorkKernel", "chip_kernel"]
