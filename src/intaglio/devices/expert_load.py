"""ExpertLoad: tokens routed to each expert of a layer, and the experts of each rank; merge_loads() merges ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from intaglio.program.expert_placement import Ranks


@dataclass(frozen=True)
class ExpertLoad:
    """The load of one layer's experts.

    Attributes:
        tokens: tokens routed to each expert since the Program was loaded, i64 [experts].
        held: for each expert-parallel rank, a tuple of the experts that it holds; () for a rank whose experts are not
            known. `held` itself is () if the layout has no redundant experts, so that no expert can be moved.
    """

    tokens: np.ndarray
    held: Ranks = ()

    def facts(self) -> list[object]:
        """The load as a list [tokens, held] of values for JSON; of_facts() reads it.

        tokens: how many tokens went to each expert. held: for each rank, the list of experts that it holds.
        """
        return [self.tokens.tolist(), [list(own) for own in self.held]]

    @classmethod
    def of_facts(cls, facts: Sequence[Sequence[object]]) -> ExpertLoad:
        """The ExpertLoad from which facts() made the list [tokens, held]. The list may have been through JSON."""
        tokens, held = facts
        return cls(np.array(tokens, np.int64), tuple(tuple(own) for own in held))  # type: ignore[arg-type]

    def imbalance(self) -> float:
        """The largest number of tokens of a rank over the mean of all ranks. 1 means that all are equal.

        An expert's tokens are divided evenly among the ranks that hold it. If the experts of some rank are not known,
        experts are compared instead of ranks. Without any tokens the result is 1, too.
        """
        tokens = self.tokens.astype(np.float64)
        if all(self.held) and self.held:
            copies = np.bincount([e for own in self.held for e in own], minlength=len(tokens))
            share = tokens / np.maximum(copies, 1)
            tokens = np.array([share[list(own)].sum() for own in self.held])
        return float(tokens.max() / tokens.mean()) if tokens.any() else 1.0


def merge_loads(ranks: Sequence[Mapping[str, ExpertLoad]]) -> dict[str, ExpertLoad]:
    """Load of the experts on all ranks of a mesh, as {site (name of a layer's op): ExpertLoad}.

    Every rank of a layer counts all of the layer's tokens, so the counts of one rank are taken. `held` is put together
    from all ranks.

    ranks: each rank's loads by site.
    """
    found: dict[str, ExpertLoad] = {}
    for loads in ranks:
        for site, load in loads.items():
            if site in found:
                held = tuple(a or b for a, b in zip(found[site].held, load.held, strict=True))
                load = ExpertLoad(found[site].tokens, held)
            found[site] = load
    return found
