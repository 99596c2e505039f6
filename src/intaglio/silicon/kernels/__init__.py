"""Chip kernels: one file for each op, with a class that times the op on a chip and writes its instruction streams.

kernel.py has their base class and registry; product.py, rows.py, tiled.py and chip_memory.py what several kernels
share. Importing this package imports every module in it, so that each registers its kernel.
"""

from importlib import import_module
from pkgutil import iter_modules

from intaglio.silicon.kernels.chip_memory import ChipMemory
from intaglio.silicon.kernels.kernel import (
    CHIP_KERNELS,
    ChipKernel,
    WorkKernel,
    chip_kernel,
    kernel_class,
    run_op,
    timing,
    unsupported_reason,
)  # fmt: skip

__all__ = [
    "CHIP_KERNELS",
    "ChipKernel",
    "ChipMemory",
    "WorkKernel",
    "chip_kernel",
    "kernel_class",
    "run_op",
    "timing",
    "unsupported_reason",
]  # fmt: skip

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
