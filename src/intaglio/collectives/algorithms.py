"""Collective algorithms as schedules: ring, recursive halving, direct, two-step, hierarchical, one-shot.

Every reduction has a fixed order. The scatter_ and gather_ functions add a reduce-scatter or an all-gather within a
group of ranks to a ScheduleBuilder; schedule() composes collectives of them. This module knows no topology;
clock.choose() picks an algorithm for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

from intaglio.collectives.schedule import COLLECTIVES, Schedule, ScheduleBuilder, ScheduleError, Slot

Own = Callable[[int], Sequence[int]]  # the chunks owned by the group's i-th rank
Place = Callable[[int, int], Slot]  # (rank, chunk) -> slot of the chunk on that rank


def input_slot(rank: int, chunk: int) -> Slot:
    """The Slot of chunk number `chunk` before a collective starts: Slot("in", chunk) on every rank.

    `rank` is not used. It is there because functions such as scatter_ring() call src(rank, chunk) to find a chunk.
    """
    return Slot("in", chunk)


def output_slot(rank: int, chunk: int) -> Slot:
    """The Slot of chunk number `chunk` after a collective has ended: Slot("out", chunk) on every rank.

    `rank` is not used. It is there because functions such as scatter_ring() call dst(rank, chunk) to place a chunk.
    """
    return Slot("out", chunk)


def scatter_direct(w: ScheduleBuilder, group: Sequence[int], own: Own, src: Place, dst: Place) -> None:
    """Add a direct reduce-scatter to the schedule builder `w`. Returns nothing.

    Every rank sends its contribution to each chunk directly to the chunk's owner. The owner of a chunk is the rank that
    gets the chunk's sum. It adds the contributions in the order of the group.

    Args:
        w: builder of the schedule.
        group: numbers of the ranks that take part.
        own: function from i to the numbers of the chunks that the group's i-th rank owns.
        src: function (rank, chunk) -> the Slot with the rank's contribution to the chunk.
        dst: function (rank, chunk) -> the Slot for the chunk's sum on its owner.
    """
    for i, owner in enumerate(group):
        for c in own(i):
            got: dict[int, Slot] = {}
            for k in range(1, len(group)):
                sender = group[(i + k) % len(group)]
                w.move(c, sender, src(sender, c), owner, got.setdefault(sender, w.temp(owner)))
            got[owner] = src(owner, c)
            fold(w, owner, c, [got[r] for r in group], dst(owner, c))


def fold(w: ScheduleBuilder, rank: int, chunk: int, parts: Sequence[Slot], dst: Slot) -> None:
    """Add to `w` the steps with which one rank sums the slots `parts` into the slot `dst`. Returns nothing.

    The order of the sum is ((parts[0] + parts[1]) + parts[2]) + ... A single part is copied to `dst`.

    Args:
        w: builder of the schedule.
        rank: number of the rank.
        chunk: number of the chunk that is summed.
        parts: slots of the values to add, at least one. Each holds the contribution of one rank, or a sum of several
            contributions.
        dst: slot of the result.
    """
    if len(parts) == 1:
        w.copy(rank, chunk, dst, parts[0])
    left = parts[0]
    for i, part in enumerate(parts[1:], start=2):
        into = dst if i == len(parts) else w.temp(rank)
        w.reduce(rank, chunk, into, left, part)
        left = into


def gather_direct(w: ScheduleBuilder, group: Sequence[int], own: Own, src: Place, dst: Place) -> None:
    """Add to `w` a direct all-gather: every rank sends its own chunks to all other ranks. Returns nothing.

    Each rank sends first to the next rank in the group, then to the rank after it, and so on.

    Args:
        w: builder of the schedule.
        group: numbers of the ranks that take part.
        own: function from i to the numbers of the chunks that the group's i-th rank has at the start.
        src: function (rank, chunk) -> the Slot of one of the rank's own chunks at the start.
        dst: function (rank, chunk) -> the Slot of any chunk on the rank at the end.
    """
    for k in range(1, len(group)):
        for i, sender in enumerate(group):
            receiver = group[(i + k) % len(group)]
            for c in own(i):
                w.move(c, sender, src(sender, c), receiver, dst(receiver, c))
    copy_own(w, group, own, src, dst)


def copy_own(w: ScheduleBuilder, group: Sequence[int], own: Own, src: Place, dst: Place) -> None:
    """Add steps to the builder `w` that copy each rank's own chunks to other slots. Returns nothing.

    The copy is from slot src(rank, chunk) to slot dst(rank, chunk). If both are the same slot, no step is added. group:
    numbers of the ranks. own(i): numbers of the chunks that the group's i-th rank owns.
    """
    for i, rank in enumerate(group):
        for c in own(i):
            if src(rank, c) != dst(rank, c):
                w.copy(rank, c, dst(rank, c), src(rank, c))


def scatter_ring(w: ScheduleBuilder, group: Sequence[int], own: Own, src: Place, dst: Place) -> None:
    """Add to `w` a ring reduce-scatter: P - 1 rounds for P ranks. Returns nothing.

    The owner of a chunk is the rank that gets its sum. The sum starts at the rank after the owner and travels around
    the ring to the owner. Each rank on the way adds its contribution.

    Args:
        w: builder of the schedule.
        group: numbers of the ranks that take part, in the order of the ring.
        own: function from i to the numbers of the chunks that the group's i-th rank owns.
        src: function (rank, chunk) -> the Slot with the rank's contribution to the chunk.
        dst: function (rank, chunk) -> the Slot for the chunk's sum on its owner.
    """
    n = len(group)
    held: dict[tuple[int, int], Slot] = {}
    for k in range(1, n):
        for i, sender in enumerate(group):
            receiver = group[(i + 1) % n]
            for c in own((i - k) % n):
                came, into = w.temp(receiver), dst(receiver, c) if k == n - 1 else w.temp(receiver)
                w.move(c, sender, held.get((sender, c), src(sender, c)), receiver, came)
                w.reduce(receiver, c, into, came, src(receiver, c))
                held[receiver, c] = into
    if n == 1:
        copy_own(w, group, own, src, dst)


def gather_ring(w: ScheduleBuilder, group: Sequence[int], own: Own, src: Place, dst: Place) -> None:
    """Add to `w` a ring all-gather: P - 1 rounds for P ranks. Returns nothing.

    In the first round each rank sends its own chunks to the next rank. In each later round it forwards the chunks that
    it received in the previous round.

    Args:
        w: builder of the schedule.
        group: numbers of the ranks that take part, in the order of the ring.
        own: function from i to the numbers of the chunks that the group's i-th rank has at the start.
        src: function (rank, chunk) -> the Slot of one of the rank's own chunks at the start.
        dst: function (rank, chunk) -> the Slot of any chunk on the rank at the end.
    """
    n = len(group)
    for k in range(n - 1):
        for i, sender in enumerate(group):
            receiver = group[(i + 1) % n]
            for c in own((i - k) % n):
                w.move(c, sender, dst(sender, c) if k else src(sender, c), receiver, dst(receiver, c))
    copy_own(w, group, own, src, dst)


def scatter_halving(w: ScheduleBuilder, group: Sequence[int], own: Own, src: Place, dst: Place) -> None:
    """Add to `w` a recursive-halving reduce-scatter: log2 P rounds for P ranks, P a power of two. Returns nothing.

    At first every rank has its contributions to all chunks. In each round a rank keeps half of the chunks that it still
    has, and sends its partial sums of the other half to its partner. The partner of rank i is P / 2 ranks away in the
    first round, and half as far in each later round. In each addition the operand of the lower rank comes first.

    Args:
        w: builder of the schedule.
        group: numbers of the ranks that take part.
        own: function from i to the numbers of the chunks whose sums the group's i-th rank gets.
        src: function (rank, chunk) -> the Slot with the rank's contribution to the chunk.
        dst: function (rank, chunk) -> the Slot for the chunk's sum on its owner.
    """
    n = len(group)
    held: dict[tuple[int, int], Slot] = {}

    def block_chunks(i: int, distance: int) -> list[int]:
        """Numbers of the chunks that the i-th rank still sums in one round, as a list.

        distance: distance between partners in this round. The group is cut into blocks of `distance` consecutive ranks,
        and the rank still sums the chunks that the ranks of its block own.
        """
        first = i // distance * distance
        return [c for j in range(first, first + distance) for c in own(j)]

    distance = n // 2
    while distance:
        before = dict(held)
        for i, receiver in enumerate(group):
            sender = group[i ^ distance]
            for c in block_chunks(i, distance):
                came, into = w.temp(receiver), dst(receiver, c) if distance == 1 else w.temp(receiver)
                w.move(c, sender, before.get((sender, c), src(sender, c)), receiver, came)
                had = before.get((receiver, c), src(receiver, c))
                w.reduce(receiver, c, into, *((came, had) if i & distance else (had, came)))
                held[receiver, c] = into
        distance //= 2
    if n == 1:
        copy_own(w, group, own, src, dst)


def gather_doubling(w: ScheduleBuilder, group: Sequence[int], own: Own, src: Place, dst: Place) -> None:
    """Add to `w` a recursive-doubling all-gather: log2 P rounds for P ranks, P a power of two. Returns nothing.

    In each round, two partners send each other all the chunks that they have. Partners are 1 rank apart in the first
    round, and twice as far in each later round.

    Args:
        w: builder of the schedule.
        group: numbers of the ranks that take part.
        own: function from i to the numbers of the chunks that the group's i-th rank has at the start.
        src: function (rank, chunk) -> the Slot of one of the rank's own chunks at the start.
        dst: function (rank, chunk) -> the Slot of any chunk on the rank at the end.
    """
    copy_own(w, group, own, src, dst)
    distance = 1
    while distance < len(group):
        for i, sender in enumerate(group):
            first, receiver = i // distance * distance, group[i ^ distance]
            for c in (c for j in range(first, first + distance) for c in own(j)):
                w.move(c, sender, dst(sender, c), receiver, dst(receiver, c))
        distance *= 2


def scatter_two_step(w: ScheduleBuilder, group: Sequence[int], own: Own, src: Place, dst: Place) -> None:
    """Add to `w` a reduce-scatter for two sides of h ranks, where links connect only ranks of opposite sides.

    The owner of a chunk is the rank that gets its sum. Each rank owns h chunks. The relay of an owner's k-th chunk is
    the k-th rank of the other side. In step 1 the other ranks on the owner's side send their contributions to the
    relay, which adds its own. In step 2 the relay sends this sum to the owner, and the other ranks on the relay's side
    send their contributions. The owner adds all of these to its own contribution. Returns nothing.

    Args:
        w: builder of the schedule.
        group: numbers of the ranks, first those of one side, then those of the other.
        own: function from i to the numbers of the h chunks that the group's i-th rank owns.
        src: function (rank, chunk) -> the Slot with the rank's contribution to the chunk.
        dst: function (rank, chunk) -> the Slot for the chunk's sum on its owner.
    """
    h = len(group) // 2
    sides = (group[:h], group[h:])
    sums: dict[tuple[int, int], Slot] = {}
    for i, owner in enumerate(group):  # relayed contributions first: they cross two links
        for part, c in enumerate(own(i)):
            relay, came = sides[i < h][part], list[Slot]()
            for sender in sides[i >= h]:
                if sender != owner:
                    came.append(w.temp(relay))
                    w.move(c, sender, src(sender, c), relay, came[-1])
            sums[relay, c] = w.temp(relay)
            fold(w, relay, c, [*came, src(relay, c)], sums[relay, c])
    for i, owner in enumerate(group):
        for c in own(i):
            got = [src(owner, c)]
            for sender in sides[i < h]:
                got.append(w.temp(owner))
                w.move(c, sender, sums.get((sender, c), src(sender, c)), owner, got[-1])
            fold(w, owner, c, got, dst(owner, c))


def gather_two_step(w: ScheduleBuilder, group: Sequence[int], own: Own, src: Place, dst: Place) -> None:
    """Add to `w` an all-gather for two sides of h ranks, where links connect only ranks of opposite sides.

    In step 1 each rank sends its h chunks to all ranks of the other side. In step 2 the k-th rank of the other side
    forwards the k-th chunk to the other ranks of the sender's side. Returns nothing.

    Args:
        w: builder of the schedule.
        group: numbers of the ranks, first those of one side, then those of the other.
        own: function from i to the numbers of the h chunks that the group's i-th rank has at the start.
        src: function (rank, chunk) -> the Slot of one of the rank's own chunks at the start.
        dst: function (rank, chunk) -> the Slot of any chunk on the rank at the end.
    """
    h = len(group) // 2
    sides = (group[:h], group[h:])
    for i, sender in enumerate(group):
        for relay in sides[i < h]:
            for c in own(i):
                w.move(c, sender, src(sender, c), relay, dst(relay, c))
    for i, sender in enumerate(group):
        for part, c in enumerate(own(i)):
            relay = sides[i < h][part]
            for receiver in sides[i >= h]:
                if receiver != sender:
                    w.move(c, relay, dst(relay, c), receiver, dst(receiver, c))
    copy_own(w, group, own, src, dst)


BLOCKS = {
    "direct": (scatter_direct, gather_direct),
    "ring": (scatter_ring, gather_ring),
    "halving": (scatter_halving, gather_doubling),
    "two_step": (scatter_two_step, gather_two_step),
}


def _by_block(w: ScheduleBuilder, algorithm: str, node: int) -> None:
    """Add to `w` the steps of the collective w.names[0] over all ranks: all_reduce, reduce_scatter or all_gather.

    algorithm: a key of BLOCKS. An all_reduce is a reduce-scatter followed by an all-gather. `node` is not used. Returns
    nothing.
    """
    scatter, gather = BLOCKS[algorithm]
    group, each = range(w.ranks), w.chunks // w.ranks

    def own(i: int) -> range:
        return range(i * each, (i + 1) * each)

    collective = w.names[0]
    if collective != "all_gather":
        scatter(w, group, own, input_slot, output_slot)
    if collective != "reduce_scatter":
        gather(w, group, own, input_slot if collective == "all_gather" else output_slot, output_slot)


def _one_shot(w: ScheduleBuilder, algorithm: str, node: int) -> None:
    """Add a one-shot all_reduce to the schedule builder `w`. Returns nothing.

    Every rank sends its whole input to all others, and each rank adds all inputs in the order of the ranks.
    `algorithm` and `node` are not used.
    """
    for receiver in range(w.ranks):
        got = [input_slot(receiver, 0) if sender == receiver else w.temp(receiver) for sender in range(w.ranks)]
        for k in range(1, w.ranks):
            sender = (receiver + k) % w.ranks
            w.move(0, sender, input_slot(sender, 0), receiver, got[sender])
        fold(w, receiver, 0, got, output_slot(receiver, 0))


def _hierarchical(w: ScheduleBuilder, algorithm: str, node: int) -> None:
    """Add to `w` the steps of the collective w.names[0] in two levels: all_reduce, reduce_scatter or all_gather.

    There are nodes of `node` ranks each. A reduce-scatter runs first inside each node, then between the ranks that have
    the same place in their nodes. An all-gather runs first between these ranks, then inside each node. `algorithm` is
    not used. Returns nothing.
    """
    count = w.ranks // node
    inside = [range(n * node, (n + 1) * node) for n in range(count)]
    across = [range(place, w.ranks, node) for place in range(node)]
    temps: dict[tuple[int, int], Slot] = {}

    def halfway(rank: int, chunk: int) -> Slot:
        if (rank, chunk) not in temps:
            temps[rank, chunk] = w.temp(rank)
        return temps[rank, chunk]

    def of_place(place: int) -> range:
        return range(place, w.ranks, node)  # rank c owns chunk c

    collective = w.names[0]
    if collective != "all_gather":
        for group in inside:
            scatter_direct(w, group, of_place, input_slot, halfway)
        for group in across:
            scatter_direct(w, group, _itself(group), halfway, output_slot)
    if collective != "reduce_scatter":
        first = input_slot if collective == "all_gather" else output_slot
        for group in across:
            gather_direct(w, group, _itself(group), first, output_slot)
        for group in inside:
            gather_direct(w, group, of_place, output_slot, output_slot)


def _itself(group: Sequence[int]) -> Own:
    """Returns a function own(i) that gives the group's i-th rank one chunk.

    The chunk has the rank's own number: own(i) returns (group[i],).
    """
    return lambda i: (group[i],)


def _exchange(w: ScheduleBuilder, algorithm: str, node: int) -> None:
    """Add to `w` an all_to_all: every rank sends a chunk, or several, to every other rank. Returns nothing.

    The algorithm is one of:

    - direct: each rank sends its chunks straight to their receivers.
    - ring: a chunk goes from rank to rank along the ring, in the shorter direction.
    - two_step: the ranks are two sides of h ranks. Chunks for the other side go directly. Data for a rank of the same
      side is cut into h chunks; the k-th rank of the other side relays the k-th chunk.

    `node` is not used.
    """
    n, parts = w.ranks, w.chunks // w.ranks**2
    h, paths = n // 2, list[tuple[int, list[int]]]()
    for k in range(n):
        for sender in range(n):
            receiver = (sender + k) % n
            for part in range(parts):
                path = [sender, receiver] if k else [sender]
                if algorithm == "ring":
                    step, hops = (1, k) if k <= h else (-1, n - k)
                    path = [(sender + step * j) % n for j in range(hops + 1)]
                elif algorithm == "two_step" and k and (sender < h) == (receiver < h):
                    path = [sender, part + (h if sender < h else 0), receiver]
                paths.append(((sender * n + receiver) * parts + part, path))
    for chunk, path in sorted(paths, key=lambda row: -len(row[1])):  # longest paths first
        _relay(w, chunk, path)


def _relay(w: ScheduleBuilder, chunk: int, path: Sequence[int]) -> None:
    """Add to `w` the steps that move a chunk from rank to rank along `path`. Returns nothing.

    The chunk starts in the first rank's input slot and ends in the last rank's output slot.
    """
    at = input_slot(path[0], chunk)
    for a, b in pairwise(path):
        into = output_slot(b, chunk) if b == path[-1] else w.temp(b)
        w.move(chunk, a, at, b, into)
        at = into
    if len(path) == 1:
        w.copy(path[0], chunk, output_slot(path[0], chunk), at)


def _send(w: ScheduleBuilder, algorithm: str, node: int) -> None:
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
Parts = Callable[[int], int]  # number of ranks -> number of chunks
TABLE: dict[str, dict[str, tuple[Callable[[ScheduleBuilder, str, int], None], Fits, Parts]]] = {
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
    """The names of the algorithms that can run `collective` on `ranks` ranks, as a list.

    node: ranks per node, for algorithms with two levels; 0: no nodes. Raises ScheduleError for an unknown collective.
    """
    if collective not in TABLE:
        raise ScheduleError(f"unknown collective {collective!r}; supported: {', '.join(COLLECTIVES)}")
    return [name for name, (_, fits, _) in TABLE[collective].items() if fits(ranks, node)]


@cache
def schedule(collective: str, algorithm: str, ranks: int, node: int = 0) -> Schedule:
    """The Schedule (steps of all ranks) that runs `collective` with `algorithm` on `ranks` ranks. Results are cached.

    node: ranks per node, which only the algorithm "hierarchical" uses; 0: no nodes. Raises ScheduleError for `ranks`
    below 1, for an unknown collective, and for an algorithm that does not support so many ranks.
    """
    if ranks < 1:
        raise ScheduleError(f"ranks={ranks}; allowed: 1 or more")
    fitting = algorithms(collective, ranks, node)
    if algorithm not in fitting:
        nodes = f" in nodes of {node}" if node else ""
        raise ScheduleError(
            f"no {collective} algorithm {algorithm!r} for {ranks} ranks{nodes}; use one of {', '.join(fitting)}"
        )
    write, _, chunks = TABLE[collective][algorithm]
    w = ScheduleBuilder(collective, algorithm, ranks, chunks(ranks))
    write(w, algorithm, node)
    return w.done()
