"""Layouts: degrees of tensor, expert, pipeline and sequence parallelism, and the rank of each lane of each stage."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intaglio.program import ExpertPlacement, ProgramError

WAYS = {"tp": "tensor parallel", "ep": "experts", "pp": "pipeline", "sums": "the bits of a larger tp"}
REDUNDANT = re.compile(r"(?<=[0-9])r(\d+)$")


class LayoutError(ProgramError):
    """Raised for a text that is no layout, and for a layout that does not fit a Program."""


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. The ranks of one pipeline stage are its lanes, tp * ep of them, and hold the same layers.

    rank = stage * lanes + lane, so the ranks of a stage are neighbours; lane = expert index * tp + head index.

    Attributes:
        tp: number of lanes among which attention heads, the heads or channels of recurrent blocks, and the columns of
            each expert are divided. Dense MLPs, the embedding and the output head are divided among all tp * ep lanes.
        ep: number of groups of lanes among which experts are divided.
        pp: number of pipeline stages.
        sp: True for sequence parallelism: norms and other ops between two all_reduces are split along tokens.
        redundant: number of redundant experts, which are further copies of experts in a layer. Each of the ep groups
            then holds ceil((experts + redundant) / ep) experts, and results do not depend on which experts a group
            holds. None: there are no copies, and each group holds consecutive experts.
        sums: another tp, a multiple of this one, whose results this layout gives bit for bit. Every sum that tp divides
            among lanes is then computed in `sums` parts, added in the order in which `sums` lanes would add theirs. Not
            allowed with ep or sp. 1: each lane computes one part.
        placement: says which experts each group holds. None: ExpertPlacement.even() does if `redundant` is not None.

    Raises LayoutError for sp without tp or with ep, for redundant experts without ep, and for `sums` above 1 that is no
    multiple of tp, or with ep or sp.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    sp: bool = False
    redundant: int | None = None
    placement: ExpertPlacement | None = None
    sums: int = 1

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The Layout that a text such as tp4, pp2, tp4pp2 or tp2ep4 describes.

        After ep4, "r8" adds 8 redundant experts in all: ep4r8. At the end, "sp" means sequence parallelism: tp4sp.
        tp1sums4 gives the bits of tp4. Raises LayoutError for any other text, and as the class does.
        """
        extra = REDUNDANT.search(text)
        ways = REDUNDANT.sub("", text).removesuffix("sp")
        found = re.findall(r"([a-z]+)(\d+)", ways)
        sizes: dict[str, Any] = {way: int(n) for way, n in found}
        whole = "".join(way + n for way, n in found) == ways and len(sizes) == len(found) > 0
        if not whole or not sizes.keys() <= WAYS.keys() or 0 in sizes.values():
            known = ", ".join(f"{way}N ({what})" for way, what in WAYS.items())
            raise LayoutError(
                f"layout {text!r}; wanted some of {known} with N 1 or more, such as tp4pp2; then sp, or not"
            )
        return cls(**sizes, sp=text.endswith("sp"), redundant=int(extra[1]) if extra else None)

    def placed(self, path: Path) -> Layout:
        """A copy of this layout with the placement of experts that the file `path` holds.

        If there is no such file, the copy has no placement. Raises LayoutError for a layout without redundant experts,
        and PlacementError for a file that holds no placement.
        """
        if self.redundant is None:
            raise LayoutError(
                f"layout {self} has no placement of experts to be read from {path}; use one such as ep2r0 or ep4r8"
            )
        return replace(self, placement=ExpertPlacement.read(path))

    def check_moves_experts(self) -> None:
        """Raise LayoutError if experts cannot be moved between the ranks while the model runs. Returns nothing.

        They can be moved if `redundant` is set, even to 0. If it is None, each group holds fixed, consecutive experts.
        """
        if self.redundant is None:
            other = f"{self}r0, or {self}r2 with two redundant experts" if self.ep > 1 else "one such as ep2r0 or ep4r8"
            raise LayoutError(
                f"layout {self} has no redundant experts, so experts are never moved and rebalance_every has no "
                f"effect; use {other}, or leave rebalance_every out"
            )

    def __post_init__(self) -> None:
        if self.redundant is not None and self.ep == 1:
            raise LayoutError(f"layout '{self}': r{self.redundant} are redundant experts, which need ep2 or more")
        if self.sp and (self.tp == 1 or self.ep > 1):  # with ep, attention and experts sum over other groups of lanes
            raise LayoutError(
                f"layout '{self}': sp splits norms among lanes of tp; it goes with tp2 or more, without ep"
            )
        if self.sums > 1 and (self.sums % self.tp or self.ep > 1 or self.sp):
            raise LayoutError(
                f"layout '{self}': sums{self.sums} gives the bits of tp{self.sums}; it goes with a tp that divides "
                f"{self.sums}, without ep and sp, such as tp1sums{self.sums}"
            )

    @property
    def lanes(self) -> int:
        """Number of lanes, the ranks of one pipeline stage: tp * ep."""
        return self.tp * self.ep

    @property
    def ranks(self) -> int:
        """Number of ranks in all pipeline stages: tp * ep * pp."""
        return self.lanes * self.pp

    @property
    def numerics(self) -> str:
        """What decides the bits of results, such as tp4 for tp4, tp4pp2, tp4sp and tp1sums4; "" if nothing is divided.

        Pipeline stages and sequence parallelism change no bits. Layouts with the same text compute the same K/V, bit
        for bit.
        """
        alike = replace(self, tp=max(self.tp, self.sums), pp=1, sums=1, sp=False, placement=None)
        return "" if alike == Layout() else str(alike)

    def rank(self, stage: int, lane: int) -> int:
        """Number of the rank that is lane number `lane` of pipeline stage number `stage`, from 0."""
        return stage * self.lanes + lane

    def __str__(self) -> str:
        ways = "".join(f"{way}{n}" for way in WAYS if (n := getattr(self, way)) > 1 or (way == "tp" and self.sums > 1))
        return ways + "sp" * self.sp + (f"r{self.redundant}" if self.redundant is not None else "") or "tp1"
