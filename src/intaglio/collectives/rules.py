"""What must hold of a schedule, found without running it: transfers paired, nothing stuck, each contribution once.

Chunks are followed as expressions of what ranks brought, so the order of every sum is known too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from intaglio.collectives.schedule import KINDS, Schedule, ScheduleError, Slot

Sum = int | tuple["Sum", "Sum"]  # a rank's contribution, or left + right


def kinds_known(s: Schedule) -> Iterator[str]:
    """Each step is of a known kind, names ranks and chunks there are, and has the slots its kind needs."""
    needs = {"copy": (True, False, True), "reduce": (True, True, True), "send": (True, False, False),
             "recv": (False, False, True)}  # fmt: skip
    for step in s.steps:
        if step.kind not in KINDS:
            yield f"{step} is of kind {step.kind!r}; use one of {', '.join(KINDS)}"
        elif (step.src is not None, step.add is not None, step.dst is not None) != needs[step.kind]:
            yield f"{step} lacks a slot, or has one too many"
        if not (0 <= step.rank < s.ranks and 0 <= step.chunk < s.chunks):
            yield f"{step} is outside {s.ranks} ranks and {s.chunks} chunks"
        if step.dst and step.dst.buffer == "in":
            yield f"{step} writes into what a rank brought"


def transfers_paired(s: Schedule) -> Iterator[str]:
    """Each send has one recv: same tag and chunk, each other's peer, the send first, and in order between two ranks."""
    sends, recvs = ({}, {})  # type: tuple[dict[int, int], dict[int, int]]
    last: dict[tuple[int, int], int] = {}
    for i, step in enumerate(s.steps):
        if step.kind not in ("send", "recv"):
            continue
        side = sends if step.kind == "send" else recvs
        if step.tag in side:
            yield f"{step} has tag {step.tag}, as has {s.steps[side[step.tag]]}"
        side[step.tag] = i
        if step.kind == "recv":
            pair = s.steps[sends[step.tag]] if step.tag in sends else None
            if not pair:
                yield f"{step}: no send with tag {step.tag} stands before it"
            elif (pair.rank, pair.peer, pair.chunk) != (step.peer, step.rank, step.chunk):
                yield f"{step} does not match {pair}"
            elif last.get((pair.rank, pair.peer), -1) > sends[step.tag]:
                yield f"{step} overtakes an earlier one between the same ranks"
            if pair:
                last[pair.rank, pair.peer] = sends[step.tag]
    for tag in sends.keys() - recvs.keys():
        yield f"{s.steps[sends[tag]]} is never received"


def nothing_stuck(s: Schedule) -> Iterator[str]:
    """Steps end, even if every send waits for its recv to be ready: who waits for whom has no circle."""
    pair: dict[int, int] = {}
    node = list(range(len(s.steps)))  # a send and its recv are one
    for i, step in enumerate(s.steps):
        if step.kind in ("send", "recv"):
            node[i] = pair.setdefault(step.tag, i)
    waits: dict[int, set[int]] = {n: set() for n in node}
    then: dict[int, set[int]] = {n: set() for n in node}
    for i, step in enumerate(s.steps):
        for j in step.after:
            waits[node[i]].add(node[j])
            then[node[j]].add(node[i])
    free = [n for n, others in waits.items() if not others]
    while free:
        n = free.pop()
        del waits[n]
        for other in then[n]:
            waits[other].discard(n)
            if not waits[other]:
                free.append(other)
    for n, others in waits.items():
        yield f"{s.steps[n]} waits for {s.steps[min(others)]}, and in the end for itself"


def hazards_ordered(s: Schedule) -> Iterator[str]:
    """A step waits for the write it reads, and a write for what was read or written there before."""
    writes: dict[tuple[int, Slot], int] = {}
    reads: dict[tuple[int, Slot], list[int]] = {}
    for i, step in enumerate(s.steps):
        needed: set[int] = set()
        for slot in step.reads():
            key = (step.rank, slot)
            if key in writes:
                needed.add(writes[key])
            elif slot.buffer != "in" or slot.number not in s.brings(step.rank):
                yield f"{step} reads {slot}, which nothing has written"
            reads.setdefault(key, []).append(i)
        if step.dst:
            key = (step.rank, step.dst)
            needed.update([writes[key]] if key in writes else [], reads.pop(key, []))
            writes[key] = i
        for j in sorted(needed - {i} - set(step.after)):
            yield f"{step} does not wait for {s.steps[j]}"
        for j in step.after:
            if s.steps[j].rank != step.rank or j >= i:
                yield f"{step} waits for {s.steps[j]}, which is not an earlier step of its rank"


def contributed_once(s: Schedule) -> Iterator[str]:
    """Every rank gets its chunks, each made of every contribution once, summed alike on all ranks."""
    held = follow(s)
    alike: dict[int, Sum] = {}
    for rank in range(s.ranks):
        for chunk in s.gets(rank):
            got = held.get((rank, Slot("out", chunk)))
            if got is None or got[0] != chunk:
                yield f"rank {rank} does not get chunk {chunk}"
                continue
            count, wanted = Counter(leaves(got[1])), Counter(contributors(s, chunk))
            if count != wanted:
                yield f"rank {rank} gets chunk {chunk} made of {dict(count)}; wanted {dict(wanted)}"
            if alike.setdefault(chunk, got[1]) != got[1]:
                yield f"chunk {chunk} is summed as {got[1]} on rank {rank}, as {alike[chunk]} on another"


def contributors(s: Schedule, chunk: int) -> range:
    """The ranks whose contributions a chunk is made of."""
    if s.collective in ("all_reduce", "reduce_scatter"):
        return range(s.ranks)
    owner = next(r for r in range(s.ranks) if chunk in s.brings(r))
    return range(owner, owner + 1)


def follow(s: Schedule) -> dict[tuple[int, Slot], tuple[int, Sum]]:
    """Which chunk each slot of each rank holds at the end, and as which sum. Steps run in the order they stand."""
    held: dict[tuple[int, Slot], tuple[int, Sum]] = {}
    flying: dict[int, tuple[int, Sum]] = {}
    for rank in range(s.ranks):
        held |= {(rank, Slot("in", c)): (c, rank) for c in s.brings(rank)}
    for step in s.steps:
        if step.kind == "recv":
            value = flying.pop(step.tag)
        else:
            chunk, value_sum = held[step.rank, step.src]  # type: ignore[index]
            if step.kind == "reduce":
                other, more = held[step.rank, step.add]  # type: ignore[index]
                value_sum = (value_sum, more)
                chunk = chunk if chunk == other else -1
            value = (chunk, value_sum)
        if step.kind == "send":
            flying[step.tag] = value
        else:
            held[step.rank, step.dst] = value  # type: ignore[index]
    return held


def leaves(sum: Sum) -> list[int]:
    """The contributions a sum is made of, from left to right."""
    found, rest = [], [sum]
    while rest:
        top = rest.pop()
        if isinstance(top, tuple):
            rest += [top[1], top[0]]
        else:
            found.append(top)
    return found


RULES: tuple[Callable[[Schedule], Iterator[str]], ...] = (
    kinds_known,
    transfers_paired,
    nothing_stuck,
    hazards_ordered,
    contributed_once,
)


def check(s: Schedule) -> None:
    """Hold a schedule to every rule; raises ScheduleError with what is wrong. Later rules assume the earlier ones."""
    for rule in RULES:
        wrong = list(rule(s))
        if wrong:
            title = f"{s.collective} by {s.algorithm} for {s.ranks} ranks breaks rule {rule.__name__}"
            more = f"\n  ... and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ScheduleError(title + ":\n  " + "\n  ".join(wrong[:8]) + more)


def order(s: Schedule) -> str:
    """How sums are ordered: "rank" (every chunk as ((0 + 1) + 2) + ...), "tree" (every chunk by one tree), "chunk" (a
    chunk by its own). With "chunk", bits depend on where a value lies in the payload."""
    held = follow(s)
    sums = {held[rank, Slot("out", c)][1] for rank in range(s.ranks) for c in s.gets(rank)}
    if s.collective not in ("all_reduce", "reduce_scatter"):
        return "rank"  # nothing is summed
    left: Sum = 0
    for rank in range(1, s.ranks):
        left = (left, rank)
    return "rank" if sums == {left} else "tree" if len(sums) == 1 else "chunk"
