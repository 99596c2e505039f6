"""The algorithms, each written once. Every reduction folds in an order that the schedule fixes.

Blocks scatter sums or gather chunks among a group of ranks; collectives are made of blocks. Knows no topology: which
algorithm suits which is the clock's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

from intaglio.collectives.schedule import COLLECTIVES, Schedule, ScheduleError, Slot, Writer

Own = Callable[[int], Sequence[int]]  # the chunks of the group's i-th rank
Place = Callable[[int, int], Slot]  # where a chunk lies on a rank


def bring(rank: int, chunk: int) -> Slot:
    return Slot("in", chunk)


def out(rank: int, chunk: int) -> Slot:
    return Slot("out", chunk)


def scatter_direct(w: Writer, group: Sequence[int], own: Own, at: Place, to: Place) -> None:
    """Everyone sends each owner its chunks; the owner folds them in the group's order."""
    for i, owner in enumerate(group):
        for c in own(i):
            got: dict[int, Slot] = {}
            for k in range(1, len(group)):
                giver = group[(i + k) % len(group)]
                w.move(c, giver, at(giver, c), owner, got.setdefault(giver, w.temp(owner)))
            got[owner] = at(owner, c)
            fold(w, owner, c, [got[r] for r in group], to(owner, c))


def fold(w: Writer, rank: int, chunk: int, parts: Sequence[Slot], to: Slot) -> None:
    """to = ((parts[0] + parts[1]) + parts[2]) + ..."""
    if len(parts) == 1:
        w.copy(rank, chunk, to, parts[0])
    left = parts[0]
    for i, part in enumerate(parts[1:], start=2):
        into = to if i == len(parts) else w.temp(rank)
        w.reduce(rank, chunk, into, left, part)
        left = into


def gather_direct(w: Writer, group: Sequence[int], own: Own, at: Place, to: Place) -> None:
    """Everyone sends its chunks to everyone, each in turn from the next on: no one is sent to by all at once."""
    for k in range(1, len(group)):
        for i, giver in enumerate(group):
            taker = group[(i + k) % len(group)]
            for c in own(i):
                w.move(c, giver, at(giver, c), taker, to(taker, c))
    keep(w, group, own, at, to)


def keep(w: Writer, group: Sequence[int], own: Own, at: Place, to: Place) -> None:
    """What a rank has of its own goes where the rest will be, unless it is there."""
    for i, rank in enumerate(group):
        for c in own(i):
            if at(rank, c) != to(rank, c):
                w.copy(rank, c, to(rank, c), at(rank, c))


def scatter_ring(w: Writer, group: Sequence[int], own: Own, at: Place, to: Place) -> None:
    """P - 1 rounds to the next rank. A chunk starts at its owner's successor and ends at its owner."""
    n = len(group)
    held: dict[tuple[int, int], Slot] = {}
    for k in range(1, n):
        for i, giver in enumerate(group):
            taker = group[(i + 1) % n]
            for c in own((i - k) % n):
                came, into = w.temp(taker), to(taker, c) if k == n - 1 else w.temp(taker)
                w.move(c, giver, held.get((giver, c), at(giver, c)), taker, came)
                w.reduce(taker, c, into, came, at(taker, c))
                held[taker, c] = into
    if n == 1:
        keep(w, group, own, at, to)


def gather_ring(w: Writer, group: Sequence[int], own: Own, at: Place, to: Place) -> None:
    """P - 1 rounds to the next rank, each handing on what came in the round before."""
    n = len(group)
    for k in range(n - 1):
        for i, giver in enumerate(group):
            taker = group[(i + 1) % n]
            for c in own((i - k) % n):
                w.move(c, giver, to(giver, c) if k else at(giver, c), taker, to(taker, c))
    keep(w, group, own, at, to)


def scatter_halving(w: Writer, group: Sequence[int], own: Own, at: Place, to: Place) -> None:
    """log2 P rounds: partners at half the distance each time swap the halves they will not own, lower rank first."""
    n = len(group)
    held: dict[tuple[int, int], Slot] = {}

    def mine(i: int, distance: int) -> list[int]:
        """Chunks that end in the block of `distance` ranks that i stands in."""
        first = i // distance * distance
        return [c for j in range(first, first + distance) for c in own(j)]

    distance = n // 2
    while distance:
        before = dict(held)
        for i, taker in enumerate(group):
            giver = group[i ^ distance]
            for c in mine(i, distance):
                came, into = w.temp(taker), to(taker, c) if distance == 1 else w.temp(taker)
                w.move(c, giver, before.get((giver, c), at(giver, c)), taker, came)
                had = before.get((taker, c), at(taker, c))
                w.reduce(taker, c, into, *((came, had) if i & distance else (had, came)))
                held[taker, c] = into
        distance //= 2
    if n == 1:
        keep(w, group, own, at, to)


def gather_doubling(w: Writer, group: Sequence[int], own: Own, at: Place, to: Place) -> None:
    """log2 P rounds: partners at twice the distance each time swap all they have."""
    keep(w, group, own, at, to)
    distance = 1
    while distance < len(group):
        for i, giver in enumerate(group):
            first, taker = i // distance * distance, group[i ^ distance]
            for c in (c for j in range(first, first + distance) for c in own(j)):
                w.move(c, giver, to(giver, c), taker, to(taker, c))
        distance *= 2


def scatter_two_step(w: Writer, group: Sequence[int], own: Own, at: Place, to: Place) -> None:
    """Two sides of h ranks, links between sides only. A share has h chunks: the k-th rank opposite its owner folds what
    the owner's side brings to the k-th chunk, adds its own and sends it on; the mirror image of gather_two_step."""
    h = len(group) // 2
    sides = (group[:h], group[h:])
    sums: dict[tuple[int, int], Slot] = {}
    for i, owner in enumerate(group):  # first what is to be handed on: it has two links to go
        for part, c in enumerate(own(i)):
            relay, came = sides[i < h][part], list[Slot]()
            for giver in sides[i >= h]:
                if giver != owner:
                    came.append(w.temp(relay))
                    w.move(c, giver, at(giver, c), relay, came[-1])
            sums[relay, c] = w.temp(relay)
            fold(w, relay, c, [*came, at(relay, c)], sums[relay, c])
    for i, owner in enumerate(group):
        for c in own(i):
            got = [at(owner, c)]
            for giver in sides[i < h]:
                got.append(w.temp(owner))
                w.move(c, giver, sums.get((giver, c), at(giver, c)), owner, got[-1])
            fold(w, owner, c, got, to(owner, c))


def gather_two_step(w: Writer, group: Sequence[int], own: Own, at: Place, to: Place) -> None:
    """Everyone sends its share to the h ranks opposite; the k-th hands the k-th chunk on to the share's side."""
    h = len(group) // 2
    sides = (group[:h], group[h:])
    for i, giver in enumerate(group):
        for relay in sides[i < h]:
            for c in own(i):
                w.move(c, giver, at(giver, c), relay, to(relay, c))
    for i, giver in enumerate(group):
        for part, c in enumerate(own(i)):
            relay = sides[i < h][part]
            for taker in sides[i >= h]:
                if taker != giver:
                    w.move(c, relay, to(relay, c), taker, to(taker, c))
    keep(w, group, own, at, to)


BLOCKS = {
    "direct": (scatter_direct, gather_direct),
    "ring": (scatter_ring, gather_ring),
    "halving": (scatter_halving, gather_doubling),
    "two_step": (scatter_two_step, gather_two_step),
}


def _by_block(w: Writer, algorithm: str, node: int) -> None:
    """all_reduce, reduce_scatter or all_gather among all ranks at once."""
    scatter, gather = BLOCKS[algorithm]
    group, each = range(w.ranks), w.chunks // w.ranks

    def own(i: int) -> range:
        return range(i * each, (i + 1) * each)

    collective = w.names[0]
    if collective != "all_gather":
        scatter(w, group, own, bring, out)
    if collective != "reduce_scatter":
        gather(w, group, own, bring if collective == "all_gather" else out, out)


def _one_shot(w: Writer, algorithm: str, node: int) -> None:
    """Everyone sends everyone all it brings; each rank folds it for itself, in order of rank."""
    for taker in range(w.ranks):
        got = [bring(taker, 0) if giver == taker else w.temp(taker) for giver in range(w.ranks)]
        for k in range(1, w.ranks):
            giver = (taker + k) % w.ranks
            w.move(0, giver, bring(giver, 0), taker, got[giver])
        fold(w, taker, 0, got, out(taker, 0))


def _hierarchical(w: Writer, algorithm: str, node: int) -> None:
    """Nodes of `node` ranks: scatter sums inside each, across them among ranks of one place, gather the other way."""
    count = w.ranks // node
    inside = [range(n * node, (n + 1) * node) for n in range(count)]
    across = [range(place, w.ranks, node) for place in range(node)]
    temps: dict[tuple[int, int], Slot] = {}

    def halfway(rank: int, chunk: int) -> Slot:
        if (rank, chunk) not in temps:
            temps[rank, chunk] = w.temp(rank)
        return temps[rank, chunk]

    def of_place(place: int) -> range:
        return range(place, w.ranks, node)  # chunk c is rank c's own

    collective = w.names[0]
    if collective != "all_gather":
        for group in inside:
            scatter_direct(w, group, of_place, bring, halfway)
        for group in across:
            scatter_direct(w, group, _itself(group), halfway, out)
    if collective != "reduce_scatter":
        first = bring if collective == "all_gather" else out
        for group in across:
            gather_direct(w, group, _itself(group), first, out)
        for group in inside:
            gather_direct(w, group, of_place, out, out)


def _itself(group: Sequence[int]) -> Own:
    """The i-th rank of the group owns the chunk of its own number."""
    return lambda i: (group[i],)


def _exchange(w: Writer, algorithm: str, node: int) -> None:
    """all_to_all. direct: each pair by itself. ring: hop by hop, the shorter way round. two_step: to the other side at
    once, to one's own side in h parts, the k-th by way of the k-th rank opposite."""
    n, parts = w.ranks, w.chunks // w.ranks**2
    h, paths = n // 2, list[tuple[int, list[int]]]()
    for k in range(n):
        for giver in range(n):
            taker = (giver + k) % n
            for part in range(parts):
                path = [giver, taker] if k else [giver]
                if algorithm == "ring":
                    step, hops = (1, k) if k <= h else (-1, n - k)
                    path = [(giver + step * j) % n for j in range(hops + 1)]
                elif algorithm == "two_step" and k and (giver < h) == (taker < h):
                    path = [giver, part + (h if giver < h else 0), taker]
                paths.append(((giver * n + taker) * parts + part, path))
    for chunk, path in sorted(paths, key=lambda row: -len(row[1])):  # first what has the longest way
        _relay(w, chunk, path)


def _relay(w: Writer, chunk: int, path: Sequence[int]) -> None:
    """A chunk from the first rank of `path` to the last."""
    at = bring(path[0], chunk)
    for a, b in pairwise(path):
        into = out(b, chunk) if b == path[-1] else w.temp(b)
        w.move(chunk, a, at, b, into)
        at = into
    if len(path) == 1:
        w.copy(path[0], chunk, out(path[0], chunk), at)


def _send(w: Writer, algorithm: str, node: int) -> None:
    _relay(w, 0, (0, w.ranks - 1) if w.ranks > 1 else (0,))


def _any(ranks: int, node: int) -> bool:
    return True


def _powers(ranks: int, node: int) -> bool:
    return ranks & (ranks - 1) == 0


def _sides(ranks: int, node: int) -> bool:
    return ranks >= 4 and ranks % 2 == 0


def _nodes(ranks: int, node: int) -> bool:
    return 1 < node < ranks and ranks % node == 0


Fits = Callable[[int, int], bool]
Parts = Callable[[int], int]  # chunks for so many ranks
TABLE: dict[str, dict[str, tuple[Callable[[Writer, str, int], None], Fits, Parts]]] = {
    "all_reduce": {
        "one_shot": (_one_shot, _any, lambda p: 1),
        "two_shot": (lambda w, _, n: _by_block(w, "direct", n), _any, lambda p: p),
        "ring": (_by_block, _any, lambda p: p),
        "halving": (_by_block, _powers, lambda p: p),
        "two_step": (_by_block, _sides, lambda p: p * (p // 2)),
        "hierarchical": (_hierarchical, _nodes, lambda p: p),
    },
    "all_to_all": {
        "direct": (_exchange, _any, lambda p: p * p),
        "ring": (_exchange, _any, lambda p: p * p),
        "two_step": (_exchange, _sides, lambda p: p * p * (p // 2)),
    },
    "send": {"direct": (_send, _any, lambda p: 1)},
}
for _collective in ("all_gather", "reduce_scatter"):
    TABLE[_collective] = {
        "direct": (_by_block, _any, lambda p: p),
        **{name: row for name, row in TABLE["all_reduce"].items() if name not in ("one_shot", "two_shot")},
    }


def algorithms(collective: str, ranks: int, node: int = 0) -> list[str]:
    """The algorithms there are for `collective` among `ranks` ranks, in nodes of `node` (0: no nodes)."""
    if collective not in TABLE:
        raise ScheduleError(f"no collective {collective!r}; there are {', '.join(COLLECTIVES)}")
    return [name for name, (_, fits, _) in TABLE[collective].items() if fits(ranks, node)]


@cache
def schedule(collective: str, algorithm: str, ranks: int, node: int = 0) -> Schedule:
    """The schedule of `collective` by `algorithm`. `node`: ranks a node, for hierarchical. Raises ScheduleError."""
    if ranks < 1:
        raise ScheduleError(f"ranks={ranks}; allowed: 1 or more")
    fitting = algorithms(collective, ranks, node)
    if algorithm not in fitting:
        nodes = f" in nodes of {node}" if node else ""
        raise ScheduleError(f"no {collective} by {algorithm!r} for {ranks} ranks{nodes}; there is {', '.join(fitting)}")
    write, _, chunks = TABLE[collective][algorithm]
    w = Writer(collective, algorithm, ranks, chunks(ranks))
    write(w, algorithm, node)
    return w.done()
