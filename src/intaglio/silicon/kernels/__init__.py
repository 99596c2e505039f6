"""Chip kernels: for each op a class that times the op on a chip and, for most ops, writes its instruction streams.

A file is named after its op; collectives.py has several ops, indexer.py has `choose_keys`. kernel.py has the base class
and the registry. attend_plan.py, chip_memory.py, grouped.py, nodes.py, product.py, rows.py, sequences.py and
tiled.py are parts of kernels. Importing this package imports every module in it, so that each registers its kernel.
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
