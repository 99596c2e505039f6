"""BlockOrder: converts the contents of K/V blocks between the order of an engine's ranks and that of the whole model.

A tier keeps blocks in the order of the whole model, so engines with unlike tensor or pipeline parallelism can load each
other's blocks, if their layouts compute the same bits (see Layout.numerics).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from intaglio.program import Program


class BlockOrder:
    """Converts the bytes of a K/V block between two orders: the engine's own order, and the order of the whole model.

    In the engine's order, the parts of the ranks follow one another; heads that several ranks hold are repeated. In the
    order of the whole model, each K/V cache of the model is there once, with all its heads.

    Args:
        whole: the Program of the whole model.
        ranks: the Programs of the engine's ranks, in order.
        tp: degree of tensor parallelism: the number of ranks among which heads are divided.
        parts: the executable's block_parts.

    Raises ValueError if the parts do not match the ranks' K/V caches, or if the ranks together do not hold all heads.
    """

    def __init__(self, whole: Program, ranks: Sequence[Program], tp: int, parts: Sequence[int]) -> None:
        held = [(name, heads) for rank in ranks for name, heads in caches(rank)]
        if len(held) != len(parts) or any(size % heads for (_, heads), size in zip(held, parts, strict=False)):
            raise ValueError(f"the ranks have {len(held)} K/V caches, and the device blocks of {list(parts)} bytes")
        each = {name: size // heads for (name, heads), size in zip(held, parts, strict=True)}  # bytes of a head
        of, starts, seen, at = dict(caches(whole)), dict[str, int](), dict[str, int](), 0
        if of.keys() != each.keys():
            raise ValueError(f"the ranks have K/V caches {sorted(each)}, the whole model {sorted(of)}")
        self.block_bytes = 0
        for name, heads in of.items():
            starts[name] = self.block_bytes
            self.block_bytes += heads * each[name]
        self.runs: list[tuple[int, int, int]] = []  # (first byte in the engine's order, in the whole, number of bytes)
        for (name, heads), size in zip(held, parts, strict=True):
            lane = seen[name] = seen.get(name, -1) + 1
            first = of[name] * (lane % tp) // tp if heads < of[name] else 0
            self._add(at, starts[name] + first * each[name], size)
            at += size
        self.own_bytes = at
        covered = np.zeros(self.block_bytes, bool)
        for _, to, size in self.runs:
            covered[to : to + size] = True
        if not covered.all():
            raise ValueError(f"{len(ranks)} ranks with tp{tp} do not hold all heads of the K/V caches")

    def _add(self, own: int, whole: int, size: int) -> None:
        if self.runs:
            a, b, n = self.runs[-1]
            if (a + n, b + n) == (own, whole):
                self.runs[-1] = a, b, n + size
                return
        self.runs.append((own, whole, size))

    def to_whole(self, own: np.ndarray) -> np.ndarray:
        """Returns a block's bytes in the order of the whole model, uint8 [block_bytes].

        own: the block's bytes in the engine's order, uint8 [own_bytes].
        """
        whole = np.empty(self.block_bytes, np.uint8)
        for at, to, size in self.runs:
            whole[to : to + size] = own[at : at + size]
        return whole

    def to_own(self, whole: np.ndarray) -> np.ndarray:
        """Returns a block's bytes in the engine's order, uint8 [own_bytes].

        whole: the block's bytes in the order of the whole model, uint8 [block_bytes].
        """
        own = np.empty(self.own_bytes, np.uint8)
        for at, to, size in self.runs:
            own[at : at + size] = whole[to : to + size]
        return own


def caches(program: Program) -> Iterator[tuple[str, int]]:
    """Yields (name, number of heads) of each K/V cache of a Program, in order. A cache without heads counts as 1."""
    for t in program.of_role("state"):
        if t.shape[0] == "P":
            yield t.name, int(t.shape[2]) if len(t.shape) == 4 else 1
