"""Kernels: how each op is done in tiles on a chip (board.KERNELS), and how long that takes (the *_timing functions)."""

from intaglio.silicon.kernels import dense, flash, links, routed
from intaglio.silicon.kernels.board import KERNELS, Board, execute, refusal

__all__ = ["KERNELS", "Board", "dense", "execute", "flash", "links", "refusal", "routed"]
