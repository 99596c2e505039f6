"""Checks of one core's stream before it runs: instructions that the chip refuses, overflow, deadlock, races.

A race: two instructions access the same bytes, at least one writes, and no chain of waits orders them. On one engine
instructions start in order, each after the one before has ended, and their results become visible in order; but a
result is visible only once the engine's counter counts it. So a read of the same engine's earlier result needs a wait,
and a write needs none.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

from intaglio.chips import Target
from intaglio.silicon.isa import ENGINES, Instruction
from intaglio.silicon.isa.rules import refusal
from intaglio.silicon.memory import MachineError, Region
from intaglio.silicon.stream import Stream


def location(stream: Stream, i: Instruction) -> str:
    """Returns an instruction's site (the op's name), engine and class, as text for an error message."""
    return f"site {stream.site}, engine {i.engine}, instruction {type(i).__name__}"


def describe_waits(i: Instruction) -> str:
    """Returns the counters that an instruction waits for, as text for an error message, such as "DMA to finish 3".

    The text is "" if the instruction waits for nothing.
    """
    return ", ".join(f"{ENGINES[e]} to finish {n}" for e, n in enumerate(i.wait) if n)


def check(target: Target, stream: Stream) -> None:
    """Raise MachineError if an instruction stream has a fault. Returns nothing if it has none.

    1. The first instruction that the chip refuses, or that addresses bytes beyond the end of SRAM or accumulators, is a
       fault.
    2. If there is no such instruction, the instructions are followed in an order in which they can run. The first race
       is a fault: two accesses to the same bytes, at least one of them a write, that no wait orders. So is a deadlock,
       if no race comes before it.

    The message names the site (the op's place in the model), the engine and the instruction.
    """
    for i in stream.instructions:
        if why := refusal(i, target) or overflow(target, i):
            raise MachineError(f"{location(stream, i)}: {why}")
    # clocks[e][n][f]: instructions of engine f that have finished for certain when the n-th of engine e starts
    clocks: list[list[list[int]]] = [[[0] * len(ENGINES)] for _ in ENGINES]
    accesses = {"sram": Accesses(), "acc": Accesses(), "hbm": Accesses()}
    loads_stored_bytes = any(stored_and_loaded(stream))
    for step, (engine, number, i) in enumerate(ordered(stream)):
        known = list(clocks[engine][-1])
        for other, n in enumerate(i.wait):
            if n:
                known = [max(a, b) for a, b in zip(known, clocks[other][n], strict=True)]
                known[other] = max(known[other], n)
        touched = [
            (accesses[r.space].entry(r), writes)
            for writes in (False, True) for r in i.regions(writes) if r.space != "hbm" or loads_stored_bytes
        ]  # fmt: skip
        for entry, writes in touched:
            if found := entry.unordered(engine, writes, known):
                other, n, wrote = found
                verb, did = ("writes" if w else "reads" for w in (writes, wrote))
                raise MachineError(
                    f"{location(stream, i)}: race: it {verb} {entry.region}, which instruction {n} of {ENGINES[other]} "
                    f"{did}, and no wait orders the two; it waits for {describe_waits(i) or 'nothing'}"
                )
        for entry, writes in touched:
            entry.last[engine, writes] = number, step
        clocks[engine].append(known)


def overflow(target: Target, i: Instruction) -> str:
    """Returns an error text if a region of instruction `i` ends beyond the core's SRAM or accumulators, else ""."""
    limits = {"sram": target.chip.sram_bytes, "acc": target.chip.acc_bytes}
    for region in (*i.regions(False), *i.regions(True)):
        limit, end = limits.get(region.space), region.span[1]
        if limit is not None and end > limit:
            return (
                f"{region.space} overflow: {region} ends at byte {end:,}, {target.chip.name} has {limit:,} a core; "
                "use smaller tiles or fewer stages"
            )
    return ""


def stored_and_loaded(stream: Stream) -> Iterator[Region]:
    """Yield each region of HBM that an instruction stream writes and also reads, at least in part."""
    loaded = {r for i in stream.instructions for r in i.regions(False) if r.space == "hbm"}
    stored = {r for i in stream.instructions for r in i.regions(True) if r.space == "hbm"}
    if stored and loaded:
        low, high = min(r.span[0] for r in stored), max(r.span[1] for r in stored)
        near = [r for r in loaded if r.span[0] < high and low < r.span[1]]
        yield from (r for r in stored if any(r.overlaps(other) for other in near))


def ordered(stream: Stream) -> Iterator[tuple[int, int, Instruction]]:
    """Yield a stream's instructions in an order in which a core can run them.

    Each is yielded as (engine, number, instruction). Each instruction comes after all instructions that it waits for.
    If several instructions could come next, the first of them in the stream is yielded.

    engine: index into ENGINES. number: place of the instruction among those of its engine, from 1.

    Raises MachineError (deadlock) if all remaining instructions wait for each other, or if an instruction waits for a
    number that its engine's counter never reaches.
    """
    queues: list[list[tuple[int, Instruction]]] = [[] for _ in ENGINES]  # with each one's place in the stream
    for place, i in enumerate(stream.instructions):
        queues[ENGINES.index(i.engine)].append((place, i))
    done = [0] * len(ENGINES)
    while True:
        heads = [(*queue[done[e]], e) for e, queue in enumerate(queues) if done[e] < len(queue)]
        ready = [head for head in heads if all(n <= have for n, have in zip(head[1].wait, done, strict=True))]
        if not ready:
            break
        _, i, engine = min(ready, key=lambda head: head[0])
        done[engine] += 1
        yield engine, done[engine], i
    blocked: dict[Hashable, Blocked] = {}
    for _, i, engine in heads:
        other = next(e for e, n in enumerate(i.wait) if n > done[e])
        what = f"{location(stream, i)} waits for {ENGINES[other]} to finish {i.wait[other]}"
        if i.wait[other] > len(queues[other]):
            never = f"which never comes: the stream has {len(queues[other])} instructions of {ENGINES[other]}"
            raise MachineError(f"deadlock: {what}, {never}")
        blocked[engine] = Blocked(what, other)
    if blocked:
        raise MachineError(f"deadlock: {cycle(blocked)}")


@dataclass(frozen=True)
class Blocked:
    """An engine that cannot continue. The error text of a deadlock is made from such objects.

    what: text that says which instruction cannot start, and what it waits for. waits_for: key of the engine that must
    advance before this engine can continue; None if no engine can end the wait.
    """

    what: str
    waits_for: Hashable | None  # None: nothing could ever finish it


def cycle(blocked: Mapping[Hashable, Blocked]) -> str:
    """Returns an error text about a deadlock. It names engines that wait for each other in a cycle.

    The cycle is found by following the waits from the first engine of `blocked`, which must not be empty. If they lead
    to an engine whose wait no other engine can end, the text names only this engine. The end of the text gives the
    number of other blocked engines, if there are any.
    """
    node: Hashable | None = next(iter(blocked))
    path: list[Hashable] = []
    while node is not None and node not in path:
        path.append(node)
        node = blocked[node].waits_for
    round_trip = path[path.index(node) :] if node is not None else path[-1:]
    text = "; ".join(blocked[n].what for n in round_trip)
    if node is not None:
        text += ", which waits for itself" if len(round_trip) == 1 else ", which waits for the first"
    others = len(blocked) - len(round_trip)
    return text + (f" (engines that wait behind these: {others})" if others else "")


@dataclass
class Entry:
    """Record of the latest accesses to one region of memory. check() uses it to find races.

    Attributes:
        region: the region.
        overlapping: the Entries of all regions that share a byte with `region`, including this Entry.
        last: the latest read and the latest write of each engine. The key is (engine, True for a write). The value is
            (n, step): the access belongs to the engine's n-th instruction, counted from 1, and `step` is the place of
            this instruction, from 0, in the order in which check() follows the instructions of all engines.
    """

    region: Region
    overlapping: list[Entry] = field(default_factory=list)
    last: dict[tuple[int, bool], tuple[int, int]] = field(default_factory=dict)

    def unordered(self, engine: int, writes: bool, known: list[int]) -> tuple[int, int, bool] | None:
        """Returns the latest earlier access that races with a new access; None if there is no race.

        The earlier access is returned as (engine, number of the instruction on that engine, True if it is a write).

        engine: the engine of the new access. writes: True if the new access is a write. known: for each engine, how
        many of its instructions have certainly finished when the new access starts.
        """
        found = [
            (step, other, n, wrote)
            for entry in self.overlapping
            for (other, wrote), (n, step) in entry.last.items()
            if known[other] < n and (wrote and not writes if other == engine else wrote or writes)
        ]
        return max(found)[1:] if found else None


class Accesses:
    """The regions of one memory space that a stream has accessed so far."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, int, int, int], Entry] = {}

    def entry(self, region: Region) -> Entry:
        """Returns the Entry of a region, the record of the latest accesses to its bytes.

        check() uses the Entries to find races. Regions with the same bytes in the same rows share one Entry. The first
        call for such a region creates its Entry. The new Entry and the existing Entries of overlapping regions are then
        added to each other's `overlapping`.
        """
        key = (region.address, region.rows, region.row_bytes, region.stride)
        if key not in self.entries:
            new = Entry(region)
            new.overlapping.append(new)
            for other in self.entries.values():
                if region.overlaps(other.region):
                    new.overlapping.append(other)
                    other.overlapping.append(new)
            self.entries[key] = new
        return self.entries[key]
