"""The schedule: what each rank copies, sends, receives and reduces, and what each step waits for. Plain data.

Knows neither values nor time: those are the interpreter's and the clock's. Algorithms write one with a Writer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
KINDS = ("copy", "send", "recv", "reduce")


class ScheduleError(ValueError):
    """A schedule that cannot be had, or that breaks a rule."""


class Slot(NamedTuple):
    """Room for one chunk on one rank: `in` (what the rank brings) and `out` (what it gets) are numbered by chunk, `tmp`
    as it comes."""

    buffer: str
    number: int

    def __str__(self) -> str:
        return f"{self.buffer}[{self.number}]"


class Step(NamedTuple):
    """One thing one rank does to one chunk.

    copy: dst = src. reduce: dst = src + add, in this order. send: src goes to `peer`. recv: dst comes from `peer`.
    A send and its recv carry the same `tag`. `after`: steps of this rank, by their place in the schedule, that must
    have ended before this one begins.
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
        yield from (slot for slot in (self.src, self.add) if slot)

    def __str__(self) -> str:
        what = {"copy": f"{self.dst} = {self.src}", "reduce": f"{self.dst} = {self.src} + {self.add}",
                "send": f"{self.src} to rank {self.peer}", "recv": f"{self.dst} from rank {self.peer}"}  # fmt: skip
        return f"rank {self.rank}: {self.kind} {what.get(self.kind, '?')} (chunk {self.chunk})"


@dataclass(frozen=True)
class Schedule:
    """One collective by one algorithm for `ranks` ranks, its payload cut into `chunks`.

    all_reduce: every rank brings every chunk and gets the sum of each. reduce_scatter: every rank brings every chunk
    and gets the sums of its own. all_gather: a rank brings its own chunks and everyone gets all. all_to_all: chunks
    stand in the order (from, to, part); a rank brings those from it and gets those to it. send: rank 0 brings all, the
    last rank gets all. A rank's own chunks are an equal run of them, in order of rank.

    Steps stand in an order in which every rank may run its own one by one, if sends do not wait to be received.
    """

    collective: str
    algorithm: str
    ranks: int
    chunks: int
    steps: tuple[Step, ...]

    def brings(self, rank: int) -> range:
        """The chunks that `rank` has at the start, in `in`."""
        return {"all_gather": self._own(rank), "all_to_all": self._own(rank),
                "send": range(self.chunks if rank == 0 else 0)}.get(self.collective, range(self.chunks))  # fmt: skip

    def gets(self, rank: int) -> list[int]:
        """The chunks that `rank` has at the end, in `out`."""
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


class Writer:
    """A schedule being written. Dependencies follow from the slots that steps read and write."""

    def __init__(self, collective: str, algorithm: str, ranks: int, chunks: int) -> None:
        self.names = (collective, algorithm)
        self.ranks, self.chunks = ranks, chunks
        self.steps: list[Step] = []
        self.tags = 0
        self.temps = [0] * ranks
        self.touched: dict[tuple[int, Slot], tuple[list[int], list[int]]] = {}  # (last write, reads since) of a slot

    def temp(self, rank: int) -> Slot:
        """Fresh room on `rank`."""
        self.temps[rank] += 1
        return Slot("tmp", self.temps[rank] - 1)

    def copy(self, rank: int, chunk: int, dst: Slot, src: Slot) -> None:
        self._add(Step("copy", rank, chunk, src=src, dst=dst))

    def reduce(self, rank: int, chunk: int, dst: Slot, src: Slot, add: Slot) -> None:
        self._add(Step("reduce", rank, chunk, src=src, add=add, dst=dst))

    def move(self, chunk: int, giver: int, src: Slot, taker: int, dst: Slot) -> None:
        """A send and its recv."""
        self._add(Step("send", giver, chunk, src=src, peer=taker, tag=self.tags))
        self._add(Step("recv", taker, chunk, dst=dst, peer=giver, tag=self.tags))
        self.tags += 1

    def done(self) -> Schedule:
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
