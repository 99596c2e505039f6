"""Topologies: which chips and switches are linked, how fast and how far. Knows no algorithm."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


class TopologyError(ValueError):
    """Links that make no network."""


@dataclass(frozen=True)
class Link:
    """One direction of a wire: bytes per second, and seconds until the first byte arrives."""

    src: int
    dst: int
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Topology:
    """Directed links between vertices: ranks are 0..ranks - 1, switches are numbered from there on.

    Raises TopologyError if a rank cannot be reached, or a link is none."""

    name: str
    ranks: int
    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        for link in self.links:
            if link.src == link.dst or min(link.src, link.dst) < 0 or link.bandwidth <= 0 or link.latency < 0:
                raise TopologyError(f"{self.name}: {link} is no link: two ends, bandwidth above 0, latency 0 or more")
        for rank in range(self.ranks):
            lost = [other for other in range(self.ranks) if other not in self._steps_to(rank)]
            if lost:
                raise TopologyError(f"{self.name}: there is no way from rank {lost[0]} to rank {rank}; add links")

    @cached_property
    def _from(self) -> dict[int, list[Link]]:
        found: dict[int, list[Link]] = {}
        for link in self.links:
            found.setdefault(link.src, []).append(link)
        return found

    @cached_property
    def _distances(self) -> dict[int, dict[int, int]]:
        return {}

    @cached_property
    def _routes(self) -> dict[tuple[int, int], tuple[Link, ...]]:
        return {}

    def _steps_to(self, goal: int) -> dict[int, int]:
        """Links between each vertex and `goal`."""
        if goal not in self._distances:
            into: dict[int, list[int]] = {}
            for link in self.links:
                into.setdefault(link.dst, []).append(link.src)
            steps, rest = {goal: 0}, deque([goal])
            while rest:
                at = rest.popleft()
                for before in into.get(at, []):
                    if before not in steps:
                        steps[before] = steps[at] + 1
                        rest.append(before)
            self._distances[goal] = steps
        return self._distances[goal]

    def route(self, src: int, dst: int) -> tuple[Link, ...]:
        """The links from one rank to another: fewest, and among equals one that differs from pair to pair."""
        if (src, dst) not in self._routes:
            steps, at, path = self._steps_to(dst), src, list[Link]()
            while at != dst:
                nearer = [link for link in self._from[at] if steps.get(link.dst, len(steps)) == steps[at] - 1]
                path.append(nearer[(src + dst) % len(nearer)])
                at = path[-1].dst
            self._routes[src, dst] = tuple(path)
        return self._routes[src, dst]


def _links(pairs: Iterable[tuple[int, int]], bandwidth: float, latency: float) -> tuple[Link, ...]:
    """Both directions of each pair, once."""
    ends = dict.fromkeys(end for a, b in pairs for end in ((a, b), (b, a)))
    return tuple(Link(a, b, bandwidth, latency) for a, b in ends)


def ring(ranks: int, bandwidth: float, latency: float) -> Topology:
    """Each rank linked to the next, the last to the first."""
    pairs = [(i, (i + 1) % ranks) for i in range(ranks if ranks > 2 else ranks - 1)]
    return Topology(f"ring({ranks})", ranks, _links(pairs, bandwidth, latency))


def full(ranks: int, bandwidth: float, latency: float) -> Topology:
    """A link between any two ranks; `bandwidth` of one link."""
    pairs = [(i, j) for i in range(ranks) for j in range(i)]
    return Topology(f"full({ranks})", ranks, _links(pairs, bandwidth, latency))


def bipartite(ranks: int, bandwidth: float, latency: float) -> Topology:
    """K n,n: each rank of the first half linked to each of the second; `bandwidth` of one link."""
    half = ranks // 2
    pairs = [(i, j) for i in range(half) for j in range(half, ranks)]
    return Topology(f"bipartite({half}, {ranks - half})", ranks, _links(pairs, bandwidth, latency))


def torus(rows: int, columns: int, bandwidth: float, latency: float) -> Topology:
    """A grid whose edges meet; a rank is row * columns + column."""
    at = [[i * columns + j for j in range(columns)] for i in range(rows)]
    across = [(at[i][j], at[i][(j + 1) % columns]) for i in range(rows) for j in range(columns if columns > 1 else 0)]
    down = [(at[i][j], at[(i + 1) % rows][j]) for i in range(rows if rows > 1 else 0) for j in range(columns)]
    return Topology(f"torus({rows}, {columns})", rows * columns, _links(across + down, bandwidth, latency))


def switch(ranks: int, bandwidth: float, latency: float) -> Topology:
    """Each rank with one port to a switch that never blocks; `latency` from rank to rank."""
    return Topology(f"switch({ranks})", ranks, _links([(i, ranks) for i in range(ranks)], bandwidth, latency / 2))


def nodes(count: int, ranks: int, inside: tuple[float, float], across: tuple[float, float]) -> Topology:
    """`count` nodes of `ranks` ranks, each node with a switch, and one port a rank to a switch for all nodes.

    inside, across: (bandwidth, latency from rank to rank) in a node and between nodes.
    """
    total = count * ranks
    local = _links([(i, total + 1 + i // ranks) for i in range(total)], inside[0], inside[1] / 2)
    wide = _links([(i, total) for i in range(total)], across[0], across[1] / 2)
    return Topology(f"nodes({count}, {ranks})", total, local + wide)
