"""SequenceKernel: timing and jobs shared by the kernels of ops that advance a state, such as short_conv and rg_lru.

A job is a range of columns of one sequence. The core loads the job's state. Then it computes the sequence's rows in
blocks of up to BLOCK rows, in order, and stores the results of each block; the next block is loaded meanwhile. At the
end it stores the new state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from intaglio.batch import Batch
from intaglio.chips import ChipSpec, Target
from intaglio.ops import Op
from intaglio.silicon.kernels.attend_tiles import deal
from intaglio.silicon.kernels.chip_memory import ChipMemory, slices
from intaglio.silicon.kernels.kernel import WIDE, Tensors, WorkKernel
from intaglio.silicon.kernels.rows import ring_depth
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import StreamBuilder
from intaglio.silicon.tile_loop import TileLoop
from intaglio.silicon.timing import Timing

BLOCK = 16  # rows that are computed together, at most
MOST_COLUMNS, LEAST_COLUMNS = 1024, 32  # of a job; fewer than the least if the op, or SRAM, has no more


@dataclass(frozen=True)
class SequenceJob:
    """A range of columns of one sequence, which one core computes.

    Attributes:
        rows: the sequence's rows among those of the step.
        columns: the columns.
        before: slot from which the state is read; -1: the state is zero.
        after: slot to which the new state is written.
        start: position of the first row in the sequence.
    """

    rows: range
    columns: slice
    before: int
    after: int
    start: int

    def blocks(self) -> list[slice]:
        """A list of the job's blocks of rows, in order, as slices of the rows of the step."""
        return [slice(self.rows.start + s.start, self.rows.start + s.stop) for s in slices(len(self.rows), BLOCK)]


@dataclass(frozen=True)
class SequenceKernel(WorkKernel):
    """Base class of chip kernels of ops that advance a state along each sequence, each column by itself.

    A library's kernel is timed as any WorkKernel, by the op's FLOPs and bytes. The instruction streams, whose values
    are FP32, are timed by the loop() over their blocks.

    Attributes:
        width: columns of the operands and of the result.
        operands: number of matrices [T, width] that the op reads.
        vectors: number of values that a job loads for each column, such as those of a bias.
        state_rows: rows of a sequence's state, which is [state_rows, width].
        overlap: rows before a block that are loaded again with it.
        cold: how many of `vectors` come from HBM: those of a weight with several rows, which is not in the L2 before.
        shared: values of a row that every job of a sequence loads, whatever its columns.
    """

    width: int
    operands: int
    vectors: int
    state_rows: int
    overlap: int = 0
    cold: int = 0
    shared: int = 0

    @classmethod
    def made(cls, op: Op, t: Tensors, **fields: Any) -> Self:
        """The kernel of an op, from the values of the attributes that WorkKernel does not have."""
        base = WorkKernel.of(op, t)
        return cls(op=base.op, tensors=base.tensors, **fields)

    def cycles(self, chip: ChipSpec, rows: float, columns: float) -> float:
        """Cycles of one core's vector lanes for a block of `rows` rows and `columns` columns."""
        raise NotImplementedError(f"{type(self).__name__} must define cycles()")

    def first_cycles(self, chip: ChipSpec, columns: float) -> float:
        """Cycles of one core's vector lanes for what a job of `columns` columns computes before its first block.

        The base class returns 0.
        """
        return 0.0

    def columns(self, target: Target, sequences: int) -> int:
        """The largest number of columns of a job.

        So few that every core has a job, but at least LEAST_COLUMNS; at most MOST_COLUMNS, self.width, and the number
        for which SRAM holds the tiles of two jobs.

        sequences: number of sequences in the step.
        """
        shared = -(-self.width * sequences // target.chip.cores)
        fit = (target.chip.sram_bytes - 8 * BLOCK * self.shared) // (10 * self.tile_rows())
        return max(1, min(self.width, MOST_COLUMNS, max(shared, LEAST_COLUMNS), fit))

    def tile_rows(self, block: int = BLOCK) -> int:
        """Rows of all tiles together that a job has in SRAM: operands, result, vectors and state.

        block: rows of a block.
        """
        return self.operands * (block + self.overlap) + block + self.vectors + self.state_rows

    def depth(self, target: Target, columns: int, longest: int) -> int:
        """Number of tiles in each of a core's rings (circular buffers), see ring_depth().

        columns: columns of a job. longest: rows of the longest sequence.
        """
        block = min(BLOCK, longest)
        values = self.tile_rows(block) * columns + block * self.shared + 16 * (self.vectors + 8)  # room for alignment
        return ring_depth(target, (values,), 4.0 * self.operands * block * columns)

    def dealt(self, target: Target, lengths: Sequence[int]) -> list[list[tuple[int, slice]]]:
        """Deal the jobs to the cores, the longest first. Returns for each core with work a list of (sequence, columns).

        lengths: number of rows of each sequence.
        """
        parts = slices(self.width, -(-self.width // -(-self.width // self.columns(target, len(lengths)))))
        jobs = [(s, columns) for s in range(len(lengths)) for columns in parts]
        seconds = [float(lengths[s] * (columns.stop - columns.start)) for s, columns in jobs]
        return [[jobs[i] for i in mine] for mine in deal(seconds, target.chip.cores)]

    def jobs(self, mem: ChipMemory, site: str, batch: Batch) -> Iterator[tuple[StreamBuilder, list[SequenceJob]]]:
        """Yield (StreamBuilder, list of SequenceJobs) for each core that has any.

        site: the op's place in the model, for the streams.
        """
        first, lengths = batch.first_row.tolist(), batch.q_len.tolist()
        before, after, context = batch.state_from.tolist(), batch.state_to.tolist(), batch.context_len.tolist()
        for mine in self.dealt(mem.target, lengths):
            rows = [range(first[s], first[s] + lengths[s]) for s, _ in mine]
            yield (
                StreamBuilder(site),
                [
                    SequenceJob(own, columns, before[s], after[s], context[s] - lengths[s])
                    for own, (s, columns) in zip(rows, mine, strict=True)
                ],
            )

    def loop(
        self, target: Target, dealt: list[list[tuple[int, slice]]], lengths: Sequence[int], kept: float
    ) -> TileLoop:
        """The loop over blocks of the core with the most rows. Other cores have as many blocks, or one less.

        dealt: the jobs of each core, as of dealt(). lengths: number of rows of each sequence. kept: fraction of the
        sequences that read a state.
        """
        chip, act, latency_s = target.chip, target.library.activation_bytes, target.chip.constants.hbm_latency_s
        mine = max(dealt, key=lambda mine: sum(lengths[s] * (c.stop - c.start) for s, c in mine))
        jobs, columns = len(mine), sum(c.stop - c.start for _, c in mine) / len(mine)
        rows, blocks = (sum(f(lengths[s]) for s, _ in mine) for f in (int, lambda n: -(-n // BLOCK)))
        every = sum(-(-lengths[s] // BLOCK) for own in dealt for s, _ in own)  # blocks of all cores
        state = 4.0 * self.state_rows * columns * jobs * kept
        first = 4.0 * self.vectors * columns * jobs + state  # loaded before a job's blocks
        waits, once = kept > 0 or self.cold > 0, first if jobs == 1 < blocks else 0.0
        load = act * (columns * (self.operands * rows + self.overlap * (blocks - jobs)) + self.shared * rows)
        load += first - once
        cycles = self.cycles(chip, rows / blocks, columns) + self.first_cycles(chip, columns) * jobs / blocks
        # Cores that read states at the same time wait for HBM; others load at the L2's rate meanwhile. Half of each:
        rate, missed = min(chip.port_rate, chip.l2_rate / len(dealt)), state + 4.0 * self.cold * self.width / len(dealt)
        share = chip.hbm_rate / len(dealt)
        together = missed / min(rate, share) + (load - missed) / rate
        seconds = (together + max(missed / share, load / rate)) / 2
        last = (load - first) / blocks / rate  # seconds of a job's own loads, while its state is on its way
        return TileLoop(
            jobs=every if -(-every // len(dealt)) == blocks else len(dealt) * blocks,
            load=load / blocks, once=once, work_s=float(cycles) / chip.clock_hz,
            store=columns * (act * rows + 4.0 * self.state_rows * jobs) / blocks,
            depth=self.depth(target, max(c.stop - c.start for _, c in mine), max(lengths)),
            load_missed=(not once) * (missed > 0) * min(1.0, share * seconds / load) if chip.l2_bytes else 1.0,
            store_missed=float(not chip.l2_bytes), wait_s=max(0.0, latency_s - last) * (waits and jobs == blocks),
            ready_s=latency_s if waits else 0.0,
        )  # fmt: skip

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        """The Timing by FLOPs and bytes; with FP32 activations, as in the streams, that of the loop()."""
        chip, lib, work = target.chip, target.library, super().time(target, sizes, prefetched)
        sequences = [(q, keys > q) for q, keys, n in sizes.sequences for _ in range(n)]
        if lib.activation_bytes < WIDE or not sequences:
            return work
        lengths, kept = [q for q, _ in sequences], sum(has for _, has in sequences) / len(sequences)
        dealt = self.dealt(target, lengths)
        loop, active = self.loop(target, dealt, lengths, kept), target.with_chip(cores=len(dealt))
        values, states = 4.0 * self.width * sum(lengths), 4.0 * self.width * len(sequences) * self.state_rows
        reads = self.operands * values + 4.0 * self.width * self.vectors + states * kept
        reads += 4.0 * self.shared * sum(lengths)
        writes, capacity = values + states, chip.l2_bytes * lib.l2_usable
        evicted = max(0.0, reads + writes - capacity) if capacity else 0.0
        if evicted and kept:  # states come from HBM, and stored ones go there as far as they are evicted
            seconds = replace(loop, store_missed=evicted / (reads + writes)).seconds(active)
        elif evicted:
            seconds = max(loop.seconds(active), loop.through_l2(active, "l2")[0])
        else:
            seconds = loop.seconds(active)
        return replace(work, seconds=seconds + lib.launch_s)
