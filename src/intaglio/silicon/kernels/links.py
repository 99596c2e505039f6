"""Kernels over the links: what the chips of a group do together, each chip its own steps of a schedule.

Schedules that sum in order of rank are taken, so that results are the op's own bit for bit. One chip alone has no
kernel of a collective: who calls has the operands of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from intaglio import collectives
from intaglio.batch import shared
from intaglio.chips import ChipSpec
from intaglio.collectives import Schedule, Slot, Step
from intaglio.ops import AllGather, AllReduce, AllToAll, Grouped, ReduceScatter, Send
from intaglio.silicon import instructions as do
from intaglio.silicon.kernel import Kernel, Ring, Stream
from intaglio.silicon.kernels.board import Board, pieces
from intaglio.silicon.machine import Machine, Run
from intaglio.silicon.memory import Region

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "recv")
ROWS, COLS = 16, 256  # of a tile, at most
SUM = (("operand", "a"), ("operand", "b"), ("binary", "+"))


@dataclass(frozen=True)
class Places:
    """Where a chip has each chunk that it brings, and where it wants each that it gets, in HBM."""

    brings: Mapping[int, Region]
    gets: Mapping[int, Region]


@dataclass(frozen=True)
class Job:
    """A piece of one chunk, the same on every chip; `first` is the number of its first message."""

    chunk: int
    rows: slice
    cols: slice
    first: int


class Writer:
    """One core's stream under way: a ring of tiles for each slot that a job of the schedule uses, in turn."""

    def __init__(self, spec: ChipSpec, op: Grouped | Send, chip: int, places: Places, tile: tuple[int, int]) -> None:
        self.kernel = Kernel(spec, op.site, chip)
        self.wire, self.places, self.tile = op.wire, places, tile
        self.rings: dict[tuple[int, str], Ring] = {}
        self.used = 0
        self.held: dict[Slot, Region] = {}

    def fresh(self, rows: int, cols: int, format: str) -> Region:
        """The next tile of this job, of as many as the job before it had."""
        self.used += 1
        key = self.used, format
        if key not in self.rings:
            self.rings[key] = self.kernel.ring(2, *self.tile, format)
        return self.rings[key].next().shaped(rows, cols)

    def carried(self, tile: Region) -> Region:
        """The tile as it travels, and as it arrives."""
        if tile.format == self.wire:
            return tile
        short = self.fresh(tile.rows, tile.cols, self.wire)
        self.kernel.do(do.Convert(dst=short, src=tile))
        return short

    def value(self, slot: Slot, job: Job) -> Region:
        """What a slot holds: a chunk that is brought is loaded when it is first wanted."""
        if slot not in self.held:
            src = self.places.brings[slot.number].part(job.rows, job.cols)
            tile = self.fresh(src.rows, src.cols, src.format)
            self.kernel.do(do.Load(dst=tile, src=src))
            self.held[slot] = self.carried(tile)
        return self.held[slot]

    def keep(self, slot: Slot, tile: Region, job: Job) -> None:
        """A slot's new value, stored at once if it is one that the chip gets."""
        self.held[slot] = self.carried(tile) if slot.buffer == "out" else tile
        if slot.buffer == "out":
            dst = self.places.gets[slot.number].part(job.rows, job.cols)
            self.kernel.do(do.Store(dst=dst, src=self.held[slot]))

    def run(self, steps: Sequence[Step], job: Job) -> None:
        """This chip's steps for a job."""
        self.used, self.held = 0, {}
        shape = job.rows.stop - job.rows.start, job.cols.stop - job.cols.start
        for step in steps:
            tag = job.first + step.tag
            if step.kind == "send" and step.src:
                self.kernel.do(do.Send(src=self.value(step.src, job), peer=step.peer, tag=tag))
            elif step.kind == "recv" and step.dst:
                tile = self.fresh(*shape, self.wire)
                self.kernel.do(do.Receive(dst=tile, peer=step.peer, tag=tag))
                self.keep(step.dst, tile, job)
            elif step.kind == "copy" and step.src and step.dst:
                self.keep(step.dst, self.value(step.src, job), job)
            elif step.src and step.add and step.dst:
                a, b = self.value(step.src, job), self.value(step.add, job)
                total = self.fresh(*shape, "f32")
                self.kernel.do(do.Map(dst=total, a=a, b=b, steps=SUM))
                self.keep(step.dst, total, job)


class Links:
    """A collective of some chips: x and out on the board of each of them."""

    def __init__(self, op: Grouped | Send, spec: ChipSpec, parts: Sequence[np.ndarray]) -> None:
        self.op, self.spec, self.n = op, spec, len(parts)
        self.boards = [Board(spec) for _ in parts]
        for board, part in zip(self.boards, parts, strict=True):
            board.put("x", part.astype(np.float32))

    @cached_property
    def schedule(self) -> Schedule:
        return collectives.schedule(self.op.kind, "one_shot" if isinstance(self.op, AllReduce) else "direct", self.n)

    @cached_property
    def places(self) -> list[Places]:
        """Chunks of each chip, as the schedule numbers them."""
        n, x = self.n, [board.at("x") for board in self.boards]
        total, runs = x[0].rows, [shared(x[0].rows, i, n) for i in range(n)]
        rows = [slice(run.start, run.stop) for run in runs]
        match self.op:
            case AllReduce():
                outs = [board.room("out", total, x[0].cols, "f32") for board in self.boards]
                return [Places({0: a}, {0: b}) for a, b in zip(x, outs, strict=True)]
            case Send():
                out = self.boards[-1].room("out", total, x[0].cols, "f32")
                return [Places({0: x[0]}, {}), Places({}, {0: out})]
            case ReduceScatter():
                outs = [b.room("out", len(run), x[0].cols, "f32") for b, run in zip(self.boards, runs, strict=True)]
                return [Places({c: a.part(rows[c]) for c in range(n)}, {i: outs[i]}) for i, a in enumerate(x)]
            case AllToAll():
                ends = np.cumsum([0, *(a.cols for a in x)]).tolist()
                outs = [b.room("out", len(run), ends[-1], "f32") for b, run in zip(self.boards, runs, strict=True)]
                return [
                    Places(
                        {i * n + to: a.part(rows[to]) for to in range(n)},
                        {g * n + i: outs[i].part(cols=slice(ends[g], ends[g + 1])) for g in range(n)},
                    )
                    for i, a in enumerate(x)
                ]
            case AllGather(tokens=along):
                ends = np.cumsum([0, *(a.rows if along else a.cols for a in x)]).tolist()
                tall, wide = (ends[-1], x[0].cols) if along else (total, ends[-1])
                outs = [board.room("out", tall, wide, "f32") for board in self.boards]
                cuts = [slice(a, b) for a, b in pairwise(ends)]
                return [
                    Places({i: a}, {c: outs[i].part(s) if along else outs[i].part(cols=s) for c, s in enumerate(cuts)})
                    for i, a in enumerate(x)
                ]

    def jobs(self) -> list[Job]:
        """Pieces of all chunks, small enough for two of each tile of a job in SRAM."""
        found: list[Job] = []
        messages = sum(step.kind == "send" for step in self.schedule.steps)
        chunks = {c: r for p in self.places for c, r in p.brings.items()}
        for c, region in sorted(chunks.items()):
            for rows in pieces(region.rows, self.tile[0]):
                for cols in pieces(region.cols, self.tile[1]):
                    found.append(Job(c, rows, cols, len(found) * messages))
        return found

    @cached_property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of all tiles."""
        widest, rows = max(p.cols for place in self.places for p in place.brings.values()), ROWS
        cols = min(COLS, max(1, widest))
        while rows > 1 and rows * cols * 4 * 2 * (3 * self.n + 2) > self.spec.sram_bytes:  # parts, sums, each short too
            rows //= 2
        return rows, cols

    def streams(self) -> list[Stream]:
        """Every chip's: jobs in turn to its cores, core by core the same on all of them."""
        jobs, mine = self.jobs(), dict[tuple[int, int], list[Step]]()
        for step in self.schedule.steps:
            mine.setdefault((step.rank, step.chunk), []).append(step)
        out = []
        for chip, places in enumerate(self.places):
            for core in range(min(len(jobs), self.spec.cores)):
                writer = Writer(self.spec, self.op, chip, places, self.tile)
                for job in jobs[core :: self.spec.cores]:
                    writer.run(mine.get((chip, job.chunk), []), job)
                out.append(writer.kernel.stream())
        return out

    def run(self) -> tuple[list[np.ndarray], Run]:
        """As `exchange` says."""
        streams = self.streams()
        memories = {chip: board.memory for chip, board in enumerate(self.boards)}
        ran = Machine(self.spec, memories).run(streams)
        got = [board.get("out") for board, p in zip(self.boards, self.places, strict=True) if p.gets]
        return got, ran


def exchange(spec: ChipSpec, op: Grouped | Send, parts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], Run]:
    """What each chip gets from what each brings, by instructions of all of them on one machine, and how that ran.

    parts: f32 [rows, width] of each rank of the group; of a send, what the giver brings, and an empty one.
    """
    return Links(op, spec, parts).run()
