"""Network topologies: links between chips and switches with bandwidth and latency, and routes over them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


class TopologyError(ValueError):
    """Raised for a link with invalid values, and if no route leads from one rank to another."""


@dataclass(frozen=True)
class Link:
    """A network link in one direction, between two ranks or switches.

    Attributes:
        src: number of the rank or switch at its start.
        dst: number of the rank or switch at its end.
        bandwidth: bytes per second.
        latency: seconds until the first byte arrives.
    """

    src: int
    dst: int
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Topology:
    """A network: ranks, switches, and the links between them.

    Raises TopologyError if no route leads from a rank to another, or if a link is invalid.

    Attributes:
        name: name for messages, such as ring(8).
        ranks: number of ranks. Ranks have the numbers 0 to ranks - 1, switches the numbers from `ranks` on.
        links: the links, one for each direction.
    """

    name: str
    ranks: int
    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        for link in self.links:
            if link.src == link.dst or min(link.src, link.dst) < 0 or link.bandwidth <= 0 or link.latency < 0:
                raise TopologyError(f"{self.name}: {link} is invalid; it needs two ends, bandwidth > 0, latency >= 0")
        for rank in range(self.ranks):
            lost = [other for other in range(self.ranks) if other not in self._steps_to(rank)]
            if lost:
                raise TopologyError(f"{self.name}: there is no route from rank {lost[0]} to rank {rank}; add links")

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
        """Distances to `goal`, as a dict {number of a rank or switch: number of links on its shortest path to `goal`}.

        Ranks and switches from which no path leads to `goal` are not in the dict.
        """
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
        """The links of a shortest route from rank `src` to rank `dst`, as a tuple in order; () if `src` equals `dst`.

        If the route can continue over n links that are equally close to `dst`, it takes the link with index (src + dst)
        % n, so that different pairs of ranks use different links.
        """
        if (src, dst) not in self._routes:
            steps, at, path = self._steps_to(dst), src, list[Link]()
            while at != dst:
                nearer = [link for link in self._from[at] if steps.get(link.dst, len(steps)) == steps[at] - 1]
                path.append(nearer[(src + dst) % len(nearer)])
                at = path[-1].dst
            self._routes[src, dst] = tuple(path)
        return self._routes[src, dst]


def _links(pairs: Iterable[tuple[int, int]], bandwidth: float, latency: float) -> tuple[Link, ...]:
    """A tuple of Links that connects each pair of ranks or switches in both directions.

    A pair that occurs twice gets its two Links once. bandwidth: bytes per second of a Link. latency: seconds.
    """
    ends = dict.fromkeys(end for a, b in pairs for end in ((a, b), (b, a)))
    return tuple(Link(a, b, bandwidth, latency) for a, b in ends)


def ring(ranks: int, bandwidth: float, latency: float) -> Topology:
    """A ring topology: links in both directions between each rank and the next.

    The last rank is linked to the first. bandwidth: bytes/s of a link, in each direction. latency: seconds per link.
    Raises TopologyError if a link would have bandwidth <= 0 or latency < 0. A single rank has no links.
    """
    pairs = [(i, (i + 1) % ranks) for i in range(ranks if ranks > 2 else ranks - 1)]
    return Topology(f"ring({ranks})", ranks, _links(pairs, bandwidth, latency))


def full(ranks: int, bandwidth: float, latency: float) -> Topology:
    """A fully connected topology: links in both directions between any two ranks.

    bandwidth: bytes/s of a link, in each direction. latency: seconds per link. Raises TopologyError if a link would
    have bandwidth <= 0 or latency < 0. A single rank has no links.
    """
    pairs = [(i, j) for i in range(ranks) for j in range(i)]
    return Topology(f"full({ranks})", ranks, _links(pairs, bandwidth, latency))


def bipartite(ranks: int, bandwidth: float, latency: float) -> Topology:
    """A complete bipartite topology: each rank of one half is linked to each of the other half.

    The links go in both directions. If the number of ranks is odd, the second half has one rank more. A single rank has
    no links.

    bandwidth: bytes/s of a link, in each direction. latency: seconds per link. Raises TopologyError if a link would
    have bandwidth <= 0 or latency < 0.
    """
    half = ranks // 2
    pairs = [(i, j) for i in range(half) for j in range(half, ranks)]
    return Topology(f"bipartite({half}, {ranks - half})", ranks, _links(pairs, bandwidth, latency))


def torus(rows: int, columns: int, bandwidth: float, latency: float) -> Topology:
    """A 2-D torus topology: a grid of ranks with wrap-around links in both directions.

    The rank at (row, column) has the number row * columns + column. A single rank has no links.

    Args:
        rows: number of rows of the grid.
        columns: number of columns of the grid.
        bandwidth: bytes/s of a link, in each direction.
        latency: seconds per link.

    Raises TopologyError if a link would have bandwidth <= 0 or latency < 0.
    """
    at = [[i * columns + j for j in range(columns)] for i in range(rows)]
    across = [(at[i][j], at[i][(j + 1) % columns]) for i in range(rows) for j in range(columns if columns > 1 else 0)]
    down = [(at[i][j], at[(i + 1) % rows][j]) for i in range(rows if rows > 1 else 0) for j in range(columns)]
    return Topology(f"torus({rows}, {columns})", rows * columns, _links(across + down, bandwidth, latency))


def switch(ranks: int, bandwidth: float, latency: float) -> Topology:
    """A topology with one non-blocking switch. Each rank has a port: links to and from the switch.

    bandwidth: bytes/s of a port, in each direction. latency: seconds from rank to rank. Raises TopologyError if
    bandwidth <= 0 or latency < 0.
    """
    return Topology(f"switch({ranks})", ranks, _links([(i, ranks) for i in range(ranks)], bandwidth, latency / 2))


def nodes(count: int, ranks: int, inside: tuple[float, float], across: tuple[float, float]) -> Topology:
    """A topology of `count` nodes with `ranks` ranks each, connected by switches.

    Each node has a switch, and one more switch connects all nodes. Each rank has two ports, to the switch of its node
    and to the switch between the nodes. inside: (bytes/s of a port in each direction, seconds of latency from rank to
    rank) of the switch in a node. across: the same two numbers of the switch between the nodes. Raises TopologyError
    for a bandwidth <= 0 or a latency < 0.
    """
    total = count * ranks
    local = _links([(i, total + 1 + i // ranks) for i in range(total)], inside[0], inside[1] / 2)
    wide = _links([(i, total) for i in range(total)], across[0], across[1] / 2)
    return Topology(f"nodes({count}, {ranks})", total, local + wide)
