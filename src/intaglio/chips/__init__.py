"""Chips as data: ChipSpec, presets, and replace() to make another. Knows nothing of ops, kernels or time."""

from intaglio.chips.presets import CHIPS, chip
from intaglio.chips.spec import ChipError, ChipSpec, Constants, Energy, Links, replace

__all__ = ["CHIPS", "ChipError", "ChipSpec", "Constants", "Energy", "Links", "chip", "replace"]
