"""Chips and kernel libraries as data: ChipSpec (hardware), KernelLibrary (software) and Target (the two together).

They are read from TOML files. Nothing in this package depends on ops or computes a time; intaglio.silicon does.
"""

from intaglio.chips.engine_kernels import engine_library, engine_names
from intaglio.chips.files import read_chip, read_library
from intaglio.chips.library import KernelLibrary, Protocol, replace_library
from intaglio.chips.presets import CHIPS, DEFAULT_LIBRARY, LIBRARIES, chip, chip_with_library, library
from intaglio.chips.spec import ChipError, ChipSpec, Constants, Energy, Links, replace
from intaglio.chips.target import Target, register_chip, target

__all__ = [
    "CHIPS", "DEFAULT_LIBRARY", "LIBRARIES", "ChipError", "ChipSpec", "Constants", "Energy", "KernelLibrary", "Links",
    "Protocol", "Target", "chip", "chip_with_library", "engine_library", "engine_names", "library", "read_chip",
    "read_library", "register_chip", "replace", "replace_library", "target",
]  # fmt: skip
