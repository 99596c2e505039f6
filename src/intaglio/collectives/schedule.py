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
    """Raised for an invalid schedule, and if no algorithm supports a collective on so many ranks."""


class Slot(NamedTuple):
    """The place of one chunk of data in the memory of a rank.

    Attributes:
        buffer: kind of the slot: "in" (inputs), "out" (outputs) or "tmp" (temporary values).
        number: number of the slot in its buffer. In "in" and "out" it is the chunk's number; slots of "tmp" are
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
        rank: number of the rank that runs the step.
        chunk: number of the chunk.
        src: Slot that the step reads; None for a recv.
        add: second Slot that a reduce reads; None for other kinds.
        dst: Slot that the step writes; None for a send.
        peer: number of the other rank of a send or recv; -1 for other kinds.
        tag: number that a send and its recv have in common; -1 for other kinds.
        after: indices in Schedule.steps of the steps of this rank that must end before this step begins.
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
        """Yield each Slot that the step reads: `src`, then `add`, if they are not None.

        A reduce (dst = src + add) reads two slots, a copy or a send reads one, and a recv reads none.
        """
        yield from (slot for slot in (self.src, self.add) if slot)

    def __str__(self) -> str:
        what = {"copy": f"{self.dst} = {self.src}", "reduce": f"{self.dst} = {self.src} + {self.add}",
                "send": f"{self.src} to rank {self.peer}", "recv": f"{self.dst} from rank {self.peer}"}  # fmt: skip
        return f"rank {self.rank}: {self.kind} {what.get(self.kind, '?')} (chunk {self.chunk})"


@dataclass(frozen=True)
class Schedule:
    """The steps with which `ranks` ranks run one collective by one algorithm. The payload is cut into `chunks` chunks.

    `steps` has the steps of all ranks. `collective` and `algorithm` are names, such as all_reduce and ring. Each rank
    owns chunks / ranks consecutive chunks: rank 0 the first of them, rank 1 the next, and so on. This is what a rank
    has at the start and gets by the end:

    - all_reduce: a rank has its contribution to every chunk, and gets the sums of all chunks.
    - reduce_scatter: a rank has its contribution to every chunk, and gets the sums of the chunks that it owns.
    - all_gather: a rank has the chunks that it owns, and gets all chunks.
    - all_to_all: chunks are ordered (sender, receiver, part). A rank has the chunks that it sends, and gets the chunks
      that it receives.
    - send: rank 0 has all chunks, and the last rank gets all chunks.

    If sends do not block, every rank can run its steps one by one in the order of `steps`.
    """

    collective: str
    algorithm: str
    ranks: int
    chunks: int
    steps: tuple[Step, ...]

    def inputs(self, rank: int) -> range:
        """Numbers of the chunks that rank `rank` has at the start of the collective, in its input slots, as a range."""
        return {"all_gather": self._own(rank), "all_to_all": self._own(rank),
                "send": range(self.chunks if rank == 0 else 0)}.get(self.collective, range(self.chunks))  # fmt: skip

    def outputs(self, rank: int) -> list[int]:
        """Numbers of the chunks that rank `rank` has at the end of the collective, in its output slots, as a list."""
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
    """Builds the Schedule of a collective: copy(), reduce() and move() add steps, done() returns the schedule.

    A step reads and writes slots. A slot is storage for one chunk of the payload on one rank. The builder fills in the
    dependencies of each step (Step.after). They are these steps of the same rank:

    - for each slot that the step reads, the last earlier step that wrote the slot,
    - for the slot that the step writes, the last earlier step that wrote the slot, and every step that has read the
      slot after that.

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
        """A new temporary Slot on rank `rank`, which no step uses yet."""
        self.temps[rank] += 1
        return Slot("tmp", self.temps[rank] - 1)

    def copy(self, rank: int, chunk: int, dst: Slot, src: Slot) -> None:
        """Add a step in which rank `rank` copies a chunk from slot `src` to slot `dst`. Returns nothing."""
        self._add(Step("copy", rank, chunk, src=src, dst=dst))

    def reduce(self, rank: int, chunk: int, dst: Slot, src: Slot, add: Slot) -> None:
        """Add a step in which rank `rank` computes dst = src + add for a chunk, with the operands in this order.

        Returns nothing.
        """
        self._add(Step("reduce", rank, chunk, src=src, add=add, dst=dst))

    def move(self, chunk: int, sender: int, src: Slot, receiver: int, dst: Slot) -> None:
        """Add two steps that move a chunk from slot `src` on rank `sender` to slot `dst` on rank `receiver`.

        The steps are a send on `sender` and a recv on `receiver`, with a tag of their own. Returns nothing.
        """
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
