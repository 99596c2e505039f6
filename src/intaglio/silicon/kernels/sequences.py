"""SequenceKernel: timing and jobs shared by the kernels of ops that advance a state, such as short_conv and rg_lru.

A job is a range of columns of one sequence. The core loads the job's state. Then it computes the sequence's rows in
blocks of up to BLOCK rows, in order, and stores the results of each block; the next block is loaded meanwhile. At the
end it stores the new state.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from intaglio.batch import Batch
from intaglio.chips import ChipSpec, Target
from intaglio.ops import Op
from intaglio.silicon.cache import LINE
from intaglio.silicon.core_loop import Move, Step, TilesInL2, steps_seconds
from intaglio.silicon.kernels.attend_tiles import deal
from intaglio.silicon.kernels.chip_memory import ChipMemory, slices
from intaglio.silicon.kernels.kernel import WIDE, Tensors, WorkKernel
from intaglio.silicon.kernels.rows import ring_depth
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import StreamBuilder
from intaglio.silicon.timing import Timing

BLOCK = 16  # rows that are computed together, at most
MOST_COLUMNS, LEAST_COLUMNS = 1024, 32  # of a job; fewer than the least if the op, or SRAM, has no more


@dataclass(frozen=True)
class SequenceJob:
    """Unit of work of one core: a range of columns of one sequence.

    Attributes:
        rows: the sequence's rows in the step.
        columns: the range of columns.
        before: number of the slot from which the state is read; -1: the state is zero.
        after: number of the slot to which the new state is written.
        start: position of the first row in the sequence.
    """

    rows: range
    columns: slice
    before: int
    after: int
    start: int

    def blocks(self) -> list[slice]:
        """Returns the job's rows in blocks of up to BLOCK rows, as a list of slices of the step's rows."""
        return [slice(self.rows.start + s.start, self.rows.start + s.stop) for s in slices(len(self.rows), BLOCK)]


@dataclass(frozen=True)
class SequenceKernel(WorkKernel):
    """Base class of chip kernels of recurrent ops, which advance a state along each sequence, column by column.

    Time is modelled in two ways. If the library's activations are FP32, as in the simulated instruction streams, the
    steps of each core's loop are modelled (see steps()). For any other library, time follows from the op's FLOPs and
    bytes (see WorkKernel).

    Attributes:
        width: columns of the operands and of the result.
        operands: number of matrices [T, width] that the op reads.
        vectors: number of values that a job loads for each column, such as those of a bias.
        state_rows: rows of a sequence's state, which is [state_rows, width].
        overlap: number of rows, just before a block of rows, that are loaded a second time together with the block.
        cold: how many of `vectors` are values of a weight with several rows. The L2 does not have these values yet, so
            they are loaded from HBM.
        shared: number of values of a row that every job of a sequence loads, whatever the job's columns are.
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
        """Returns the kernel of an op. `fields` are the values of the attributes that WorkKernel does not have."""
        base = WorkKernel.of(op, t)
        return cls(op=base.op, tensors=base.tensors, **fields)

    def cycles(self, chip: ChipSpec, rows: float, columns: float) -> float:
        """Returns the cycles in which one core's vector lanes compute a block of `rows` rows and `columns` columns."""
        raise NotImplementedError(f"{type(self).__name__} must define cycles()")

    def first_cycles(self, chip: ChipSpec, columns: float) -> float:
        """Returns the cycles that one core's vector lanes need before the first block of a job with `columns` columns.

        The base class returns 0.
        """
        return 0.0

    def columns(self, target: Target, sequences: int) -> int:
        """Returns the largest number of columns of a job.

        It is chosen so small that every core has a job, but at least LEAST_COLUMNS. It is at most MOST_COLUMNS,
        self.width, and the number for which the tiles of two jobs fit SRAM.

        sequences: number of sequences in the step.
        """
        shared = -(-self.width * sequences // target.chip.cores)
        fit = (target.chip.sram_bytes - 8 * BLOCK * self.shared) // (10 * self.tile_rows())
        return max(1, min(self.width, MOST_COLUMNS, max(shared, LEAST_COLUMNS), fit))

    def tile_rows(self, block: int = BLOCK) -> int:
        """Returns the total number of rows of all SRAM tiles of a job: operands, result, vectors and state.

        block: number of rows of a block.
        """
        return self.operands * (block + self.overlap) + block + self.vectors + self.state_rows

    def depth(self, target: Target, columns: int, longest: int) -> int:
        """Returns the number of tiles in each ring (circular SRAM buffer) of a core.

        It is chosen so that loads in flight hide HBM's latency, as far as SRAM has room (see ring_depth()).

        columns: columns of a job. longest: number of rows of the longest sequence.
        """
        block = min(BLOCK, longest)
        values = self.tile_rows(block) * columns + block * self.shared + 16 * (self.vectors + 8)  # room for alignment
        return ring_depth(target, (values,), 4.0 * self.operands * block * columns)

    def dealt(self, target: Target, lengths: Sequence[int]) -> list[list[tuple[int, slice]]]:
        """Deal the jobs to the cores, the longest first. Returns for each core with work a list of (sequence, columns).

        A job is a range of columns of one sequence: `sequence` is its number, `columns` a slice. lengths: number of
        rows of each sequence.
        """
        parts = slices(self.width, -(-self.width // -(-self.width // self.columns(target, len(lengths)))))
        jobs = [(s, columns) for s in range(len(lengths)) for columns in parts]
        seconds = [float(lengths[s] * (columns.stop - columns.start)) for s, columns in jobs]
        return [[jobs[i] for i in mine] for mine in deal(seconds, target.chip.cores)]

    def jobs(self, mem: ChipMemory, site: str, batch: Batch) -> Iterator[tuple[StreamBuilder, list[SequenceJob]]]:
        """Yields one pair for each core with work: (StreamBuilder, list of the core's SequenceJobs).

        site: name of the op's place in the model, for the streams.
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

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        """Returns the modelled Timing of the op in a step.

        If the library's activations are FP32, as in the simulated instruction streams, its seconds follow from the
        steps of each core's loop (see steps()). Otherwise they follow from the op's FLOPs and bytes.
        """
        work = super().time(target, sizes, prefetched)
        sequences = [(q, keys > q) for q, keys, n in sizes.sequences for _ in range(n)]
        if target.library.activation_bytes < WIDE or not sequences:
            return work
        dealt, l2 = self.dealt(target, [q for q, _ in sequences]), TilesInL2.of(target)
        for s, columns in sorted((job for mine in dealt for job in mine), key=lambda job: (job[0], job[1].start)):
            for block in slices(sequences[s][0], BLOCK):
                for move in self.block_loads(s, columns, block):
                    l2.hold(move.place, move.bytes)
            l2.hold(("vectors", columns.start), 4.0 * (self.vectors - self.cold) * (columns.stop - columns.start))
        cores = [[step for s, c in mine for step in self.steps(target, s, c, *sequences[s])] for mine in dealt]
        most = max(c.stop - c.start for mine in dealt for _, c in mine)
        depth = self.depth(target, most, max(q for q, _ in sequences))
        return replace(work, seconds=target.library.launch_s + steps_seconds(target.chip, l2, cores, depth))

    def block_loads(self, sequence: int, columns: slice, block: slice) -> list[Move]:
        """Returns a list of the loads of one block of rows.

        block: the rows, counted from the sequence's first row. columns: the job's columns.
        """
        rows, at = block.stop - block.start, (sequence, block.start)
        overlap = self.overlap if block.start else 0
        size = 4.0 * self.operands * (rows + overlap) * (columns.stop - columns.start)
        shared = [Move(4.0 * self.shared * rows, ("shared", *at))] if self.shared else []
        return [Move(size, ("x", *at, columns.start)), *shared]

    def steps(self, target: Target, sequence: int, columns: slice, rows: int, kept: bool) -> Iterator[Step]:
        """Yields the Steps of a job for the time model, one for each block of rows.

        Args:
            target: the chip and its kernel library.
            sequence: number of the sequence.
            columns: the job's columns.
            rows: number of rows of the sequence.
            kept: True if the sequence has a state, which is then loaded; False if its state starts at zero.
        """
        chip, n, blocks = target.chip, columns.stop - columns.start, slices(rows, BLOCK)
        hz, state = chip.clock_hz, 4.0 * self.state_rows * n
        loads = by_columns(n, self.cold, ("weights", columns.start))
        warm = 4.0 * (self.vectors - self.cold) * n
        loads += [Move(warm, ("vectors", columns.start))] if warm else []
        early = len(loads)
        if kept:
            loads += self.state_moves(columns, sequence, "state")
        fill = 0.0 if kept else state / chip.sram_bytes_per_cycle / hz
        first_s, begins = self.first_cycles(chip, n) / hz, True
        for block in blocks:
            m = block.stop - block.start
            stores = [Move(4.0 * m * n, ("y", sequence, block.start, columns.start))]
            if block.stop == rows:
                stores += self.state_moves(columns, sequence, "new state")
            loads += self.block_loads(sequence, columns, block)
            lanes_s = float(self.cycles(chip, m, n)) / hz
            yield Step(tuple(loads), 0.0, lanes_s, tuple(stores), fill, len(blocks) == 1, first_s, early, begins, early)
            loads, early, first_s, fill, begins = [], 0, 0.0, 0.0, False

    def state_moves(self, columns: slice, sequence: int, which: str) -> list[Move]:
        """Returns a list of the Moves (loads or stores) that transfer a job's part of a sequence's state.

        In HBM the states of all sequences are stored one after the other. A kernel whose state is not stored as
        [state_rows, width] overrides this or state_starts().

        columns: the job's columns. sequence: number of the sequence. which: name for the L2 model, "state" for the
        state before the step, "new state" for the state after it.
        """
        n, place = columns.stop - columns.start, (which, sequence, columns.start)
        inner, edges = 0, list[Hashable]()
        for start in self.state_starts(columns, sequence):
            first, last = start // LINE, (start + 4 * n - 1) // LINE
            shared = {first} if start % LINE else set()
            shared |= {last} if (start + 4 * n) % LINE else set()
            inner += last + 1 - first - len(shared)
            edges += [(which, line) for line in sorted(shared)]
        return [Move(4.0 * self.state_rows * n, place, float(LINE * inner), edges)]

    def state_starts(self, columns: slice, sequence: int) -> list[int]:
        """Returns the offset in bytes of each row of a job's part of a sequence's state, as a list.

        Offsets are counted from the start of the first sequence's state. columns: the job's columns. sequence: number
        of the sequence.
        """
        first = sequence * self.state_rows
        return [4 * (row * self.width + columns.start) for row in range(first, first + self.state_rows)]


def by_columns(rows: int, columns: int, place: Hashable) -> list[Move]:
    """Returns a list of the Moves (loads or stores) that transfer an FP32 matrix [rows, columns] column by column.

    The matrix is stored row by row without gaps, so a line of the L2 holds values of several neighbouring columns. The
    first of these columns moves all lines of the group between the L2 and HBM. The other columns of the group find the
    lines in the L2.

    place: key of the matrix in the L2 model.
    """
    moves, together = list[Move](), LINE // 4
    for first in range(0, columns, together):
        count = min(together, columns - first)
        key, lines = (place, first), 4.0 * rows * count
        moves += [Move(4.0 * rows, key, lines), *([Move(4.0 * rows * (count - 1), key, lines)] * (count > 1))]
    return moves
