"""Static verification of schedules: paired transfers, no deadlock, no data hazards, each contribution summed once.

A rule is a function that yields one message for each violation it finds in a schedule, and nothing for a valid one;
check() runs them all. Chunks are traced symbolically, as sums of the ranks' inputs, which also gives the order of every
sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from intaglio.collectives.schedule import KINDS, Schedule, ScheduleError, Slot

Sum = int | tuple["Sum", "Sum"]  # a rank's contribution, or left + right


def steps_well_formed(s: Schedule) -> Iterator[str]:
    """Yield a message for each malformed step of a schedule.

    A step is malformed in these cases: its kind is unknown; its rank or chunk number is out of range; it lacks an
    operand of its kind (`src`, `add` or `dst`); it has an operand that its kind does not use; it writes to an input
    slot.
    """
    needs = {"copy": (True, False, True), "reduce": (True, True, True), "send": (True, False, False),
             "recv": (False, False, True)}  # fmt: skip
    for step in s.steps:
        if step.kind not in KINDS:
            yield f"{step} has unknown kind {step.kind!r}; use one of {', '.join(KINDS)}"
        elif (step.src is not None, step.add is not None, step.dst is not None) != needs[step.kind]:
            yield f"{step} lacks a slot, or has one that its kind does not use"
        if not (0 <= step.rank < s.ranks and 0 <= step.chunk < s.chunks):
            yield f"{step} is outside {s.ranks} ranks and {s.chunks} chunks"
        if step.dst and step.dst.buffer == "in":
            yield f"{step} writes to an input slot"


def transfers_paired(s: Schedule) -> Iterator[str]:
    """Check the sends and recvs of a schedule. Yields a text for each one that breaks a rule below.

    The rules:

    - No two sends have the same tag. No two recvs have the same tag.
    - Each send has a recv with the same tag later in the schedule. Each recv has a send with the same tag before it.
    - A send and the recv with its tag have the same chunk, and each names the other's rank as its peer.
    - A rank receives the chunks of another rank in the order in which that rank sends them.
    """
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
                yield f"{step}: no send with tag {step.tag} comes before it"
            elif (pair.rank, pair.peer, pair.chunk) != (step.peer, step.rank, step.chunk):
                yield f"{step} does not match {pair}"
            elif last.get((pair.rank, pair.peer), -1) > sends[step.tag]:
                yield f"{step} overtakes an earlier transfer between the same ranks"
            if pair:
                last[pair.rank, pair.peer] = sends[step.tag]
    for tag in sends.keys() - recvs.keys():
        yield f"{s.steps[sends[tag]]} is never received"


def no_deadlock(s: Schedule) -> Iterator[str]:
    """Yield a message for each step of a schedule that can never run.

    The dependencies of such a step form a cycle or follow one. A send and its recv count as one step here. A schedule
    without such steps therefore runs to its end even if every send blocks until its recv is ready.
    """
    pair: dict[int, int] = {}
    node = list(range(len(s.steps)))  # a send and its recv share a node
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
        yield f"{s.steps[n]} waits for {s.steps[min(others)]}, in a cycle"


def hazards_ordered(s: Schedule) -> Iterator[str]:
    """Yield a message, as text, for each step of a schedule that breaks one of the rules below.

    The rules order reads and writes of a slot:

    - A step that reads a slot waits for the last write of the slot.
    - A step that writes a slot waits for the last write of the slot, and for all reads since that write.
    - A slot that is read holds an input of the rank, or has been written.
    - A step waits only for earlier steps of its own rank.
    """
    writes: dict[tuple[int, Slot], int] = {}
    reads: dict[tuple[int, Slot], list[int]] = {}
    for i, step in enumerate(s.steps):
        needed: set[int] = set()
        for slot in step.reads():
            key = (step.rank, slot)
            if key in writes:
                needed.add(writes[key])
            elif slot.buffer != "in" or slot.number not in s.inputs(step.rank):
                yield f"{step} reads {slot}, which no step has written"
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


def every_contribution_summed_once(s: Schedule) -> Iterator[str]:
    """Yield a message, as text, for each wrong output chunk of a rank.

    A chunk is wrong in these cases: the rank does not get it; it does not have the contribution of each rank in
    contributors() exactly once; another rank sums it in another order.
    """
    held = trace(s)
    alike: dict[int, Sum] = {}
    for rank in range(s.ranks):
        for chunk in s.outputs(rank):
            got = held.get((rank, Slot("out", chunk)))
            if got is None or got[0] != chunk:
                yield f"rank {rank} does not get chunk {chunk}"
                continue
            count, wanted = Counter(leaves(got[1])), Counter(contributors(s, chunk))
            if count != wanted:
                yield f"rank {rank} gets chunk {chunk} as the sum of {dict(count)}; expected {dict(wanted)}"
            if alike.setdefault(chunk, got[1]) != got[1]:
                yield f"chunk {chunk} is summed as {got[1]} on rank {rank}, as {alike[chunk]} on another"


def contributors(s: Schedule, chunk: int) -> range:
    """Numbers of the ranks whose inputs make up the output chunk `chunk`, as a range.

    If the collective sums (all_reduce, reduce_scatter), these are all ranks. Otherwise the range has one number: the
    rank that has the chunk at the start.
    """
    if s.collective in ("all_reduce", "reduce_scatter"):
        return range(s.ranks)
    owner = next(r for r in range(s.ranks) if chunk in s.inputs(r))
    return range(owner, owner + 1)


def trace(s: Schedule) -> dict[tuple[int, Slot], tuple[int, Sum]]:
    """Run a schedule symbolically. Returns what each slot holds after the last step: {(rank, slot): (chunk, sum)}.

    A sum is the number of a rank, which stands for the rank's input, or a pair (left, right) of two sums that are
    added. chunk is the number of the chunk; -1 if different chunks were added.
    """
    held: dict[tuple[int, Slot], tuple[int, Sum]] = {}
    in_flight: dict[int, tuple[int, Sum]] = {}
    for rank in range(s.ranks):
        held |= {(rank, Slot("in", c)): (c, rank) for c in s.inputs(rank)}
    for step in s.steps:
        if step.kind == "recv":
            value = in_flight.pop(step.tag)
        else:
            chunk, value_sum = held[step.rank, step.src]  # type: ignore[index]
            if step.kind == "reduce":
                other, more = held[step.rank, step.add]  # type: ignore[index]
                value_sum = (value_sum, more)
                chunk = chunk if chunk == other else -1
            value = (chunk, value_sum)
        if step.kind == "send":
            in_flight[step.tag] = value
        else:
            held[step.rank, step.dst] = value  # type: ignore[index]
    return held


def leaves(sum: Sum) -> list[int]:
    """Numbers of the ranks whose inputs a symbolic sum adds, as a list from left to right.

    sum: the number of a rank, or a pair (left, right) of two sums, see trace().
    """
    found, rest = [], [sum]
    while rest:
        top = rest.pop()
        if isinstance(top, tuple):
            rest += [top[1], top[0]]
        else:
            found.append(top)
    return found


RULES: tuple[Callable[[Schedule], Iterator[str]], ...] = (
    steps_well_formed,
    transfers_paired,
    no_deadlock,
    hazards_ordered,
    every_contribution_summed_once,
)


def check(s: Schedule) -> None:
    """Check that a schedule is valid. Raises ScheduleError with the messages of the first broken rule if it is not.

    Rules are checked in the order of RULES, since later rules assume the earlier ones. Returns nothing.
    """
    for rule in RULES:
        wrong = list(rule(s))
        if wrong:
            title = f"{s.collective} by {s.algorithm} for {s.ranks} ranks breaks rule {rule.__name__}"
            more = f"\n  ... and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ScheduleError(title + ":\n  " + "\n  ".join(wrong[:8]) + more)


def order(s: Schedule) -> str:
    """The order in which a schedule sums the ranks' contributions: "rank", "tree" or "chunk".

    - rank: all chunks are summed as ((0 + 1) + 2) + ... by number of the rank. A collective without sums is "rank" too.
    - tree: all chunks are summed by the same binary tree, but not in the order of the ranks.
    - chunk: different chunks are summed by different trees, so the bits of a sum depend on the value's position in the
      payload.
    """
    held = trace(s)
    sums = {held[rank, Slot("out", c)][1] for rank in range(s.ranks) for c in s.outputs(rank)}
    if s.collective not in ("all_reduce", "reduce_scatter"):
        return "rank"  # nothing is summed
    left: Sum = 0
    for rank in range(1, s.ranks):
        left = (left, rank)
    return "rank" if sums == {left} else "tree" if len(sums) == 1 else "chunk"
