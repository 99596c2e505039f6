"""Schedule of a collective: the copy, send, recv and reduce steps of every rank, with their dependencies. Plain data.

interpreter.py executes schedules, clock.py estimates their time. Algorithms build them with a ScheduleBuilder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
KINDS = ("copy", "send", "recv", "reduce")


class ScheduleError(ValueError):
    """Raised for an invalid schedule, and where no algorithm supports a number of ranks."""


class Slot(NamedTuple):
    """Storage for one chunk on one rank.

    Attributes:
        buffer: `in`, `out` or `tmp`.
        number: number of the slot in its buffer. In `in` and `out` it is the chunk's number; slots of `tmp` are
            numbered from 0 as they are allocated.
    """

    buffer: str
    number: int

    def __str__(self) -> str:
        return f"{self.buffer}[{self.number}]"


class Step(NamedTuple):
    """One operation of one rank on one chunk.

    Attributes:
        kind: copy (dst = src), reduce (dst = src + add, in this order), send (src goes to `peer`) or recv (dst comes
            from `peer`).
        rank: the rank that runs it.
        chunk: number of the chunk.
        src: slot that is read; None for recv.
        add: second slot that is read by a reduce; None for other kinds.
        dst: slot that is written; None for send.
        peer: the other rank of a send or recv, else -1.
        tag: number that a send and its recv have in common, else -1.
        after: indices of steps of this rank that must end before this one begins.
    """

    kind: str
    rank: int
    chunk: int
    src: Slot | None = None
    add: Slot | None = None
    dst: Slot | None = None
    peer: int = -1
    tag: int = -1
    after: tuple[int, ...] = ()

    def reads(self) -> Iterator[Slot]:
        """Yield each Slot that the step reads: its fields `src` and `add`, in this order, without those that are None.

        So a reduce (dst = src + add) yields two slots, a copy or send one, and a recv none.
        """
        yield from (slot for slot in (self.src, self.add) if slot)

    def __str__(self) -> str:
        what = {"copy": f"{self.dst} = {self.src}", "reduce": f"{self.dst} = {self.src} + {self.add}",
                "send": f"{self.src} to rank {self.peer}", "recv": f"{self.dst} from rank {self.peer}"}  # fmt: skip
        return f"rank {self.rank}: {self.kind} {what.get(self.kind, '?')} (chunk {self.chunk})"


@dataclass(frozen=True)
class Schedule:
    """One collective with one algorithm for `ranks` ranks, with its payload split into `chunks` chunks.

    `steps` are the steps of all ranks, `collective` and `algorithm` are names.

    A rank's own chunks are chunks / ranks consecutive ones: rank 0 has the first, rank 1 the next, and so on. What
    ranks have at the start and at the end:

    - all_reduce: every rank has every chunk, and gets the sum of each.
    - reduce_scatter: every rank has every chunk, and gets the sums of its own chunks.
    - all_gather: a rank has its own chunks, and gets all chunks.
    - all_to_all: chunks are ordered (sender, receiver, part). A rank has the chunks that it sends, and gets the chunks
      that it receives.
    - send: rank 0 has all chunks, and the last rank gets them.

    If sends do not block, every rank can run its own steps one by one in the order of `steps`.
    """

    collective: str
    algorithm: str
    ranks: int
    chunks: int
    steps: tuple[Step, ...]

    def inputs(self, rank: int) -> range:
        """Numbers of the chunks in the input slots of `rank` at the start, as a range."""
        return {"all_gather": self._own(rank), "all_to_all": self._own(rank),
                "send": range(self.chunks if rank == 0 else 0)}.get(self.collective, range(self.chunks))  # fmt: skip

    def outputs(self, rank: int) -> list[int]:
        """Numbers of the chunks in the output slots of `rank` at the end, as a list."""
        if self.collective == "reduce_scatter":
            return list(self._own(rank))
        if self.collective == "all_to_all":
            parts = self.chunks // self.ranks**2
            starts = range(rank * parts, self.chunks, self.ranks * parts)
            return [start + part for start in starts for part in range(parts)]
        return list(range(self.chunks if self.collective != "send" or rank == self.ranks - 1 else 0))

    def _own(self, rank: int) -> range:
        each = self.chunks // self.ranks
        return range(rank * each, (rank + 1) * each)


class ScheduleBuilder:
    """Builds a Schedule: copy(), reduce() and move() add steps, done() returns the schedule.

    A step reads and writes slots. A slot is storage for one chunk of the payload on one rank. The builder finds each
    step's dependencies (Step.after) by itself: a step waits for the earlier steps of its rank that wrote a slot it
    reads, or that read or wrote the slot it writes.

    Args:
        collective: name of the collective, such as "all_reduce".
        algorithm: name of the algorithm, such as "ring".
        ranks: number of ranks.
        chunks: number of chunks into which the payload is split.
    """

    def __init__(self, collective: str, algorithm: str, ranks: int, chunks: int) -> None:
        self.names = (collective, algorithm)
        self.ranks, self.chunks = ranks, chunks
        self.steps: list[Step] = []
        self.tags = 0
        self.temps = [0] * ranks
        self.touched: dict[tuple[int, Slot], tuple[list[int], list[int]]] = {}  # (last write, reads since) of a slot

    def temp(self, rank: int) -> Slot:
        """A new temporary Slot on `rank`, not used by any step yet."""
        self.temps[rank] += 1
        return Slot("tmp", self.temps[rank] - 1)

    def copy(self, rank: int, chunk: int, dst: Slot, src: Slot) -> None:
        """Add a step: on `rank`, copy a chunk from slot `src` to slot `dst`."""
        self._add(Step("copy", rank, chunk, src=src, dst=dst))

    def reduce(self, rank: int, chunk: int, dst: Slot, src: Slot, add: Slot) -> None:
        """Add a step: on `rank`, dst = src + add for a chunk, in this order of the operands."""
        self._add(Step("reduce", rank, chunk, src=src, add=add, dst=dst))

    def move(self, chunk: int, sender: int, src: Slot, receiver: int, dst: Slot) -> None:
        """Add two steps that move a chunk: a send of `src` on `sender`, and its recv into `dst` on `receiver`."""
        self._add(Step("send", sender, chunk, src=src, peer=receiver, tag=self.tags))
        self._add(Step("recv", receiver, chunk, dst=dst, peer=sender, tag=self.tags))
        self.tags += 1

    def done(self) -> Schedule:
        """The Schedule of all steps added so far."""
        return Schedule(*self.names, self.ranks, self.chunks, tuple(self.steps))

    def _add(self, step: Step) -> None:
        at, after = len(self.steps), set[int]()
        for slot in step.reads():
            writes, reads = self.touched.setdefault((step.rank, slot), ([], []))
            after.update(writes)
            reads.append(at)
        if step.dst:
            writes, reads = self.touched.get((step.rank, step.dst), ([], []))
            after.update(writes, reads)
            self.touched[step.rank, step.dst] = ([at], [])
        self.steps.append(step._replace(after=tuple(sorted(after - {at}))))
