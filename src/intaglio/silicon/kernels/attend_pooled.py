"""Chip kernel of the op `attend_pooled`: attention over a window of keys and over pooled entries, of DeepSeek-V4.

A job is one token and some of its query heads; see gathered.py. Keys are their own values.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import Target
from intaglio.ops import AttendPooled, Op
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.isa.vector import map_cycles
from intaglio.silicon.kernels.attend_chosen import HIDDEN, ListTiles
from intaglio.silicon.kernels.attend_tiles import deal
from intaglio.silicon.kernels.chip_memory import ChipMemory, load, slices
from intaglio.silicon.kernels.gathered import AHEAD, GatherJob, GatherPlan, GatherTiles, gathered_seconds
from intaglio.silicon.kernels.kernel import WIDE, Tensors, WorkKernel, chip_kernel
from intaglio.silicon.memory import MachineError, Region
from intaglio.silicon.sizes import BLOCK, BatchSizes
from intaglio.silicon.stream import Stream, StreamBuilder
from intaglio.silicon.timing import Timing


@dataclass(frozen=True)
class PooledJob:
    """One job of a core: attention of one token for some query heads.

    The token attends to its window of keys and to pooled entries.

    Attributes:
        sequence: number of the token's sequence.
        row: number of the token among the sequence's new tokens, from 0.
        head: the first query head of the job.
        position: position of the token in its sequence.
        near: number of keys in the token's window.
        far: number of pooled entries that the job reads. If the token has a list of chosen entries, it is the number of
            places in the list that can hold an entry.
    """

    sequence: int
    row: int
    head: int
    position: int
    near: int
    far: int


@chip_kernel(AttendPooled)
@dataclass(frozen=True)
class AttendPooledKernel(WorkKernel):
    """Kernel of the op `attend_pooled` on simulated chips: its modelled time, and its instruction streams.

    For a vendor's library, the time is the longer of two times: that of the op's FLOPs on the matrix array in bf16, and
    that of its bytes at HBM's rate (see WorkKernel). The instruction streams load the keys and entries of each
    token by their row numbers.
    """

    engine: ClassVar[str] = "MXU"

    @classmethod
    def of(cls, op: Op, t: Tensors) -> Self:
        made = super().of(op, t)
        return cls(made.op, made.tensors)

    def tensor(self, name: str) -> tuple[int, int]:
        """Returns (number of columns, bits of one value) of the op's tensor `name`."""
        found = next(t for t in self.tensors if t.name == name)
        return int(found.shape[-1]), formats.bits(found.format)

    def dealt(self, target: Target, sequences: list[tuple[int, int]]) -> tuple[GatherPlan, list[list[PooledJob]]]:
        """Distributes the op's work to the cores. Returns (tile sizes, a list of jobs for each core with work).

        sequences: (number of new tokens, context length) of each sequence.
        """
        op = self.op
        assert isinstance(op, AttendPooled)
        (d, bits), most = self.tensor(op.cache), max(keys for _, keys in sequences)
        places = min(op.window, most) + (most // op.every if op.chosen is None else self.tensor(op.chosen)[0])
        plan = GatherPlan.of(target, op.heads, d, d, (d,), bits, places)
        jobs = []
        for s, (q, keys) in enumerate(sequences):
            for row in range(q):
                at = keys - q + row
                far = (at + 1) // op.every
                far = far if op.chosen is None else min(far, self.tensor(op.chosen)[0])
                heads = range(0, op.heads, plan.rows)
                jobs += [PooledJob(s, row, head, at, min(op.window, at + 1), far) for head in heads]
        mine = deal([float(job.near + job.far) for job in jobs], target.chip.cores)
        return plan, [[jobs[i] for i in own] for own in mine]

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        timing, op = super().time(target, sizes, prefetched), self.op
        sequences = [(q, keys) for q, keys, n in sizes.sequences for _ in range(n)]
        if target.library.activation_bytes < WIDE or not sequences:
            return timing
        assert isinstance(op, AttendPooled)
        plan, dealt = self.dealt(target, sequences)
        held: dict[Hashable, float] = {}

        def made(job: PooledJob) -> GatherJob:
            parts, prepare = [(job.near, False), (job.far, op.chosen is not None)], 0.0
            static = job.near + (job.far if op.chosen is None else 0)
            lists: list[tuple[float, Hashable | None]] = [(4.0 * static, None)]
            if op.chosen is not None and job.far:
                place = "list", job.sequence, job.row
                held[place] = 4.0 * self.tensor(op.chosen)[0]
                lists += [(4.0 * job.far, place), (4.0 * (job.position // BLOCK + 1), None)]
                prepare = float(vector_cycles(target.chip, 4 * job.far)) + map_cycles(target.chip, HIDDEN, job.far)
            if op.sinks is not None:
                held["sinks", job.head] = self.tensor(op.sinks)[1] / 8 * plan.rows
                lists.append((held["sinks", job.head], ("sinks", job.head)))
            tiles = [(t.stop - t.start, masked) for n, masked in parts for t in slices(n, plan.keys)]
            return GatherJob((job.sequence, job.row, job.head), tuple(lists), prepare, tuple(tiles), indexed=True)

        cores = [[made(job) for job in mine] for mine in dealt]
        seconds = gathered_seconds(target, plan, cores, list(held.items()))
        return Timing(seconds + target.library.launch_s, timing.busy, timing.hbm_bytes, timing.l2_bytes)

    @classmethod
    def streams(cls, mem: ChipMemory, op: AttendPooled, t: Tensors, batch: Batch) -> list[Stream]:
        """Returns a list of Streams (instruction sequences) that compute the op: one for each core with work.

        Raises MachineError if the op has lists of chosen entries and the cache's block size is not a multiple of
        op.every tokens.
        """
        if op.chosen is not None and batch.block_size % op.every:
            raise MachineError(f"{op.site}: chosen entries of {op.every} tokens in blocks of {batch.block_size}")
        kernel, size, per = cls.of(op, t), batch.block_size, -(-batch.block_size // op.every)
        q, out, cache, entries = (mem.region(name) for name in (op.q, op.out, op.cache, op.entries))
        chosen, sinks, streams = mem.optional_region(op.chosen), mem.optional_region(op.sinks), list[Stream]()
        sequences = list(zip(batch.q_len.tolist(), batch.context_len.tolist(), strict=True))
        plan, dealt = kernel.dealt(mem.target.with_library(activation_bytes=WIDE), sequences)
        near_table, rows, d = batch.of_windows.block_table, plan.rows, plan.d
        static = max(job.near + (job.far if chosen is None else 0) for mine in dealt for job in mine)
        for mine in dealt:
            k = StreamBuilder(op.site)
            tiles, index = GatherTiles(k, plan, cache.format), k.ring(AHEAD, 1, static, "i32")
            lists = ListTiles(mem, k, chosen, batch.block_table.shape[1]) if chosen is not None else None
            extra = k.ring(AHEAD, 1, rows, sinks.format) if sinks is not None else None
            ready = list[tuple[Region, list[tuple[list[Region], Region, Region | None]], Region | None]]()
            for number in range(-1, len(mine)):
                for job in mine[number + 1 : number + 2]:  # the next job is prepared
                    row = int(batch.first_row[job.sequence]) + job.row
                    at = np.arange(job.position + 1 - job.near, job.position + 1)
                    numbers = near_table[job.sequence, at // size].astype(np.int64) * size + at % size
                    if lists is None:
                        last = (np.arange(job.far) + 1) * op.every - 1
                        pages = batch.block_table[job.sequence, last // size].astype(np.int64)
                        numbers = np.concatenate([numbers, pages * per + last % size // op.every])
                    found = load(k, index.next(), mem.put_indices(numbers))
                    parts: list[tuple[list[Region], Region, Region | None]] = [
                        ([cache], found.part(cols=slice(0, job.near)), None)
                    ]
                    if lists is None:
                        parts.append(([entries], found.part(cols=slice(job.near, None)), None))
                    elif job.far:
                        places = lists.chosen.cols
                        blocks = batch.block_table[job.sequence, : job.position // size + 1].tolist()
                        listed = slice(places - job.far, places)
                        parts.append(([entries], *lists.locate(row, listed, job.position, blocks, per, 1, 0)))
                    sink = None
                    if extra is not None and sinks is not None:
                        sink = load(k, extra.next(), sinks.part(cols=slice(job.head, job.head + rows)))
                    a = tiles.queries.next()
                    source = q.part(slice(row, row + 1), slice(job.head * d, (job.head + rows) * d))
                    load(k, a.shaped(1, rows * d), source)
                    ready.append((a, parts, sink))
                if number < 0:
                    continue
                job, (a, parts, sink) = mine[number], ready[number]
                how: dict[str, Any] = {"scale": op.scale, "query": job.position}
                y = tiles.attend(a, parts, sink, how)
                row = int(batch.first_row[job.sequence]) + job.row
                to = out.part(slice(row, row + 1), slice(job.head * d, (job.head + rows) * d))
                k.emit(isa.Store(dst=to, src=y.shaped(1, rows * d)))
            streams.append(k.stream())
        return streams
