"""ExpertLoad: tokens routed to each expert of a layer, and the experts of each rank; merge_loads() merges ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from intaglio.program.expert_placement import Ranks


@dataclass(frozen=True)
class ExpertLoad:
    """Token counts of all experts of one layer, and the numbers of the experts that each rank holds.

    Attributes:
        tokens: for each expert, the number of tokens routed to it since the Program was loaded, i64 [experts].
        held: for each expert-parallel rank, a tuple of the numbers of its experts; () for a rank whose experts are not
            known. `held` itself is () if the layout has no redundant experts, because then no expert can be moved.
    """

    tokens: np.ndarray
    held: Ranks = ()

    def facts(self) -> list[object]:
        """Return this load as a list [tokens, held], which can be written as JSON. of_facts() reads the list.

        `tokens` is a list with the number of tokens of each expert. `held` has, for each rank, the list of its experts.
        """
        return [self.tokens.tolist(), [list(own) for own in self.held]]

    @classmethod
    def of_facts(cls, facts: Sequence[Sequence[object]]) -> ExpertLoad:
        """Return the ExpertLoad described by the list [tokens, held] that facts() returned.

        The list may have been converted to JSON and back.
        """
        tokens, held = facts
        return cls(np.array(tokens, np.int64), tuple(tuple(own) for own in held))  # type: ignore[arg-type]

    def imbalance(self) -> float:
        """Return the largest number of tokens of a rank divided by the mean of all ranks. 1.0 means perfect balance.

        The tokens of an expert are divided evenly among the ranks that hold it. If the experts of some rank are not
        known, the tokens of experts are compared instead of those of ranks. The result is 1 if there are no tokens.
        """
        tokens = self.tokens.astype(np.float64)
        if all(self.held) and self.held:
            copies = np.bincount([e for own in self.held for e in own], minlength=len(tokens))
            share = tokens / np.maximum(copies, 1)
            tokens = np.array([share[list(own)].sum() for own in self.held])
        return float(tokens.max() / tokens.mean()) if tokens.any() else 1.0


def merge_loads(ranks: Sequence[Mapping[str, ExpertLoad]]) -> dict[str, ExpertLoad]:
    """Merge the expert loads that the ranks of a mesh report. Returns {name of a layer's experts op: ExpertLoad}.

    Every rank counts all tokens of a layer, so the token counts of one rank are taken. `held` is put together from all
    ranks.

    `ranks` has each rank's dict {name of a layer's experts op: ExpertLoad}.
    """
    found: dict[str, ExpertLoad] = {}
    for loads in ranks:
        for site, load in loads.items():
            if site in found:
                held = tuple(a or b for a, b in zip(found[site].held, load.held, strict=True))
                load = ExpertLoad(found[site].tokens, held)
            found[site] = load
    return found
