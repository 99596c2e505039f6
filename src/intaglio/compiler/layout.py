"""Layouts: how many ranks share each layer, how many stages the layers make, and which rank is which."""

from __future__ import annotations

import re
from dataclasses import dataclass

from intaglio.program import ProgramError

WAYS = {"tp": "tensor parallel", "ep": "experts", "pp": "pipeline"}


class LayoutError(ProgramError):
    """A layout nobody understands, or one a Program cannot be cut by."""


@dataclass(frozen=True)
class Layout:
    """`pp` stages of layers, each shared by tp * ep lanes. Heads are dealt out `tp` ways, experts `ep` ways and each of
    those `tp` ways, all else among all lanes. Lane = expert way * tp + head way; rank = stage * lanes + lane: a stage's
    ranks are neighbours. `sp`: what lies between two sums over lanes, norms above all, is split among them along
    tokens."""

    tp: int = 1
    ep: int = 1
    pp: int = 1
    sp: bool = False

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From text such as tp4, pp2, tp4pp2, tp2ep4 or, with norms split along tokens, tp4sp. Raises LayoutError."""
        ways = text.removesuffix("sp")
        found = re.findall(r"([a-z]+)(\d+)", ways)
        sizes = {way: int(n) for way, n in found}
        whole = "".join(way + n for way, n in found) == ways and len(sizes) == len(found) > 0
        if not whole or not sizes.keys() <= WAYS.keys() or 0 in sizes.values():
            known = ", ".join(f"{way}N ({what})" for way, what in WAYS.items())
            raise LayoutError(
                f"layout {text!r}; wanted some of {known} with N 1 or more, such as tp4pp2; then sp, or not"
            )
        layout = cls(**sizes, sp=ways != text)
        if layout.sp and (
            layout.tp == 1 or layout.ep > 1
        ):  # with ways of experts, sums are over unlike groups of lanes
            raise LayoutError(
                f"layout {text!r}: sp splits norms among lanes of tp; it goes with tp2 or more, without ep"
            )
        return layout

    @property
    def lanes(self) -> int:
        return self.tp * self.ep

    @property
    def ranks(self) -> int:
        return self.lanes * self.pp

    def rank(self, stage: int, lane: int) -> int:
        return stage * self.lanes + lane

    def __str__(self) -> str:
        return "".join(f"{way}{n}" for way in WAYS if (n := getattr(self, way)) > 1) + "sp" * self.sp or "tp1"
