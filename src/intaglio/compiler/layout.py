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
    """Raised for a text that does not describe a layout, and for a layout that does not fit a Program."""


@dataclass(frozen=True)
class Layout:
    """How the ranks of a deployment share a model: degrees of tensor, expert and pipeline parallelism.

    A lane is one of the tp * ep ranks of a pipeline stage, which all have the same layers. The number of a rank is
    stage * tp * ep + lane, so the ranks of a stage are neighbours. The number of a lane is expert group * tp + place in
    its group.

    Attributes:
        tp: number of lanes among which attention heads, the heads or channels of recurrent blocks, and the columns of
            each expert are divided. Dense MLPs, the embedding and the output head are divided among all tp * ep lanes.
        ep: number of groups of lanes among which experts are divided.
        pp: number of pipeline stages.
        sp: True for sequence parallelism: norms and other ops between two all_reduces are divided by tokens.
        redundant: number of redundant experts: further copies of some of a layer's experts. Each of the ep groups then
            holds ceil((experts + redundant) / ep) experts, and results do not depend on which experts a group holds.
            None: there are no copies, and each group holds consecutive experts.
        placement: says which experts each group holds. None: experts are placed by ExpertPlacement.even() if
            `redundant` is not None.
        sums: if above 1, the number of parts in which each sum that is divided among lanes is computed, a multiple of
            `tp`. The parts are added in the order in which `sums` lanes would add them, so that the results are those
            of a layout with tp = `sums`, bit for bit. 1: each lane computes one part.

    Raises LayoutError in these cases: `sp` with tp 1 or with ep; redundant experts without ep; `sums` above 1 that is
    no multiple of `tp`; `sums` above 1 with ep or `sp`.
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
        """The Layout that a text describes, such as tp4, pp2, tp4pp2 or tp2ep4.

        The text may end with "r8" for 8 redundant experts in all (ep4r8), or with "sp" for sequence parallelism
        (tp4sp). tp1sums4 is a layout with tp 1 that gives the bits of tp4. Raises LayoutError for any other text, and
        for a combination that the class does not allow.
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
        """A copy of this layout with the placement of experts that is read from the file `path`.

        If there is no such file, the copy has no placement. Raises LayoutError if the layout has no redundant experts
        (`redundant` is None), and PlacementError for a file that does not hold a placement.
        """
        if self.redundant is None:
            raise LayoutError(
                f"layout {self} has no placement of experts to be read from {path}; use one such as ep2r0 or ep4r8"
            )
        return replace(self, placement=ExpertPlacement.read(path))

    def check_moves_experts(self) -> None:
        """Check that experts can be moved between ranks while the model runs. Raises LayoutError if they cannot.

        They can be moved if `redundant` is set, even to 0. If it is None, each group of lanes holds fixed, consecutive
        experts. Returns nothing.
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
        """The simplest layout whose results have the same bits, as text such as "tp4".

        The text is "" if the bits are those of a single rank. For tp4, tp4pp2, tp4sp and tp1sums4 the text is tp4:
        pipeline stages and sequence parallelism change no bits. Layouts with the same text compute the same K/V, bit
        for bit.
        """
        alike = replace(self, tp=max(self.tp, self.sums), pp=1, sums=1, sp=False, placement=None)
        return "" if alike == Layout() else str(alike)

    def rank(self, stage: int, lane: int) -> int:
        """The number of the rank that is lane number `lane` of pipeline stage number `stage`. All count from 0."""
        return stage * self.lanes + lane

    def __str__(self) -> str:
        ways = "".join(f"{way}{n}" for way in WAYS if (n := getattr(self, way)) > 1 or (way == "tp" and self.sums > 1))
        return ways + "sp" * self.sp + (f"r{self.redundant}" if self.redundant is not None else "") or "tp1"
