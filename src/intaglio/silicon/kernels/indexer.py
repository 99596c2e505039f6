"""Chip kernel of the op `choose_keys`: the indexer of sparse attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import Target
from intaglio.ops import ChooseKeys, Op
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.core_loop import Move, Step, TilesInL2, steps_seconds
from intaglio.silicon.isa.cycles import choose_cycles, matmul_cycles, vector_cycles
from intaglio.silicon.isa.vector import map_cycles
from intaglio.silicon.kernels.attend_tiles import deal
from intaglio.silicon.kernels.chip_memory import ChipMemory, load, rows_of, shifted, slices
from intaglio.silicon.kernels.kernel import WIDE, Tensors, WorkKernel, chip_kernel
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import ALIGN, Stream, StreamBuilder
from intaglio.silicon.timing import Timing

ROWS = 128  # query heads of a tile, at most, if a token has no more


@dataclass(frozen=True)
class ChoosePlan:
    """Tile sizes of the streams of an indexer, which scores keys for sparse attention and chooses the best.

    Attributes:
        tokens: largest number of tokens that are processed together.
        keys: number of keys in a tile.
        scores: number of a token's scores that are merged into its list of best keys at a time, a multiple of `keys`.
    """

    tokens: int
    keys: int
    scores: int


@dataclass(frozen=True)
class IndexJob:
    """One unit of work of an indexer: choose keys for some neighbouring tokens of one sequence.

    Attributes:
        sequence: number of the sequence in the batch.
        rows: the tokens, as a slice of the sequence's new tokens.
        position: position of the first token in the sequence.
        entries: number of keys among which the last token can choose.
    """

    sequence: int
    rows: slice
    position: int
    entries: int

    @property
    def place(self) -> tuple[int, int]:
        """The tuple (sequence, position), which identifies the job."""
        return self.sequence, self.position


@chip_kernel(ChooseKeys)
@dataclass(frozen=True)
class ChooseKeysKernel(WorkKernel):
    """Chip kernel of the op `choose_keys`, the indexer that scores all keys for sparse attention.

    With a vendor's library, the time is the longer of two: the FLOPs at the rate of the matrix array in bf16, and the
    bytes at the rate of HBM. The kernel of DeepSeek-V3.2 multiplies in FP8, so it may be faster than modelled here.

    In the simulated streams, a core processes a few tokens of one sequence at a time. It multiplies the heads of these
    tokens by tiles of keys, adds the weighted scores of the heads, and merges the sums into each token's list of best
    keys. For tokens that can choose among no more than `top` keys, all keys are chosen and no scores are computed.
    """

    engine: ClassVar[str] = "MXU"

    @classmethod
    def of(cls, op: Op, t: Tensors) -> Self:
        made = super().of(op, t)
        return cls(made.op, made.tensors)

    @property
    def sizes(self) -> tuple[int, int, float]:
        """A tuple (number of indexer heads, columns of a head, bytes of a value in the key cache)."""
        assert isinstance(self.op, ChooseKeys)
        cache = next(t for t in self.tensors if t.name == self.op.cache)
        return self.op.heads, int(cache.shape[3]), formats.bits(cache.format) / 8

    def plan(self, target: Target) -> ChoosePlan:
        """Returns a ChoosePlan whose tiles fit SRAM and accumulators.

        The largest tiles are tried first. If they do not fit, `tokens` is halved down to 1, then `keys` is halved.
        """
        assert isinstance(self.op, ChooseKeys)
        heads, d, width = self.sizes
        tokens, keys = max(1, ROWS // heads), target.library.key_tile
        while True:
            scores = keys * -(-self.op.top // keys)
            rows = tokens * heads
            sram = 2 * rows * (d + 1) * WIDE + 2 * keys * d * width + rows * keys * WIDE
            sram += tokens * (scores + 4 * self.op.top) * WIDE + 16 * ALIGN
            fits = sram <= target.chip.sram_bytes and 2 * rows * keys * WIDE + 2 * ALIGN <= target.chip.acc_bytes
            if fits or tokens * keys == 1:
                return ChoosePlan(tokens, keys, scores)
            tokens, keys = (tokens // 2, keys) if tokens > 1 else (tokens, keys // 2)

    def jobs(self, target: Target, plan: ChoosePlan, sequences: list[tuple[int, int]]) -> list[list[IndexJob]]:
        """Returns a list with one inner list for each core with work: the IndexJobs of that core.

        The jobs of all sequences are dealt to the cores.

        sequences: (new tokens, keys) of each sequence; the keys include those of its new tokens.
        """
        assert isinstance(self.op, ChooseKeys)
        jobs = [
            IndexJob(s, rows, keys - q + rows.start, (keys - q + rows.stop) // self.op.every)
            for s, (q, keys) in enumerate(sequences) for rows in slices(q, plan.tokens)
        ]  # fmt: skip
        seconds = [float(job.entries if job.entries > self.op.top else 1) for job in jobs]
        return [[jobs[i] for i in mine] for mine in deal(seconds, target.chip.cores)]

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        timing = super().time(target, sizes, prefetched)
        if target.library.activation_bytes < WIDE:
            return timing
        plan, sequences = self.plan(target), [(q, keys) for q, keys, n in sizes.sequences for _ in range(n)]
        l2 = TilesInL2.of(target)
        dealt = self.jobs(target, plan, sequences)
        for job in sorted((job for mine in dealt for job in mine), key=lambda job: (job.sequence, job.position)):
            for move in self.query_loads(job):
                l2.hold(move.place, move.bytes)
        cores = [[step for job in mine for step in self.steps(target, plan, job)] for mine in dealt]
        seconds = target.library.launch_s + steps_seconds(target.chip, l2, cores, depth=2)
        return Timing(seconds, timing.busy, timing.hbm_bytes, timing.l2_bytes, flops=timing.flops)

    def query_loads(self, job: IndexJob) -> list[Move]:
        """Returns a list of two loads: the job's queries, and their weights."""
        heads, d, _ = self.sizes
        n = job.rows.stop - job.rows.start
        return [Move(float(n * heads * size * WIDE), (size, *job.place)) for size in (d, 1)]

    def steps(self, target: Target, plan: ChoosePlan, job: IndexJob) -> Iterator[Step]:
        """Yields the Steps of a job for the time model, one for each tile of keys.

        If all keys are chosen, no key is loaded; there is then one Step for each `plan.scores` keys.
        """
        assert isinstance(self.op, ChooseKeys)
        chip, (heads, d, width), top = target.chip, self.sizes, self.op.top
        n, hz = job.rows.stop - job.rows.start, target.chip.clock_hz
        fill = n * top * 8 / chip.sram_bytes_per_cycle / hz
        scored = job.entries > top
        first, last = self.query_loads(job) if scored else [], Move(n * top * 4.0, ("chosen", *job.place))
        if not job.entries:
            yield Step(stores=(last,), fill_s=fill, begins=True)
        for part in slices(job.entries, plan.scores):
            choose = float(choose_cycles(chip, n, part.stop - part.start, top)) / hz
            zeros = 0.0 if scored else n * (part.stop - part.start) * 4 / chip.sram_bytes_per_cycle / hz
            for keys in slices(part.stop - part.start, plan.keys if scored else plan.scores):
                count, ends = keys.stop - keys.start, part.start + keys.stop == part.stop
                values = n * heads * count
                drain = map_cycles(chip, postfix(f"relu(a * {self.op.scale!r})"), values)
                lanes = drain + float(vector_cycles(chip, 2 * values))
                tile = Move(count * d * width, ("keys", job.sequence, part.start + keys.start))
                yield Step(
                    (*first, tile) if scored else (),
                    float(matmul_cycles(target, n * heads, count, d, "f32")) / hz if scored else 0.0,
                    (lanes / hz if scored else 0.0) + choose * ends,
                    (last,) if ends and part.stop == job.entries else (),
                    fill,
                    early=len(first),
                    begins=fill > 0,
                    late_fill_s=zeros,
                    drain_s=drain / hz if scored else 0.0,
                )
                first, fill = [], 0.0

    @classmethod
    def unsupported(cls, op: ChooseKeys, t: Tensors) -> str | None:
        known = t[op.cache].format in formats.PLAIN
        return None if known else f"{op.site}: chip kernels do not choose among keys in {t[op.cache].format}"

    @classmethod
    def streams(cls, mem: ChipMemory, op: ChooseKeys, t: Tensors, batch: Batch) -> list[Stream]:
        kernel = cls.of(op, t)
        plan, (heads, d, _) = kernel.plan(mem.target), kernel.sizes
        q, weights, out, cache = (mem.region(name) for name in (op.q, op.weights, op.chosen, op.cache))
        sequences, streams = list(zip(batch.q_len.tolist(), batch.context_len.tolist(), strict=True)), []
        relu = postfix(f"relu(a * {op.scale!r})")
        for mine in kernel.jobs(mem.target, plan, sequences):
            k, rows = StreamBuilder(op.site), plan.tokens * heads
            queries, factors = k.ring(2, plan.tokens, heads * d), k.ring(2, plan.tokens, heads)
            keys, products = k.ring(2, plan.keys, d, cache.format), k.ring(2, rows, plan.keys, "f32", "acc")
            parts, scores = k.tile(rows, plan.keys), k.tile(plan.tokens, plan.scores)
            ids, best = k.ring(2, plan.tokens, op.top, "i32"), k.ring(2, plan.tokens, op.top)
            for job in mine:
                n, own = job.rows.stop - job.rows.start, shifted(job.rows, int(batch.first_row[job.sequence]))
                listed, held = ids.next().shaped(n, op.top), best.next().shaped(n, op.top)
                k.emit(isa.Fill(dst=listed, value=-1.0))
                k.emit(isa.Fill(dst=held, value=float("-inf")))
                if job.entries > op.top:
                    a, w = load(k, queries.next(), q.part(own)), load(k, factors.next(), weights.part(own))
                for part in slices(job.entries, plan.scores):
                    found = scores.shaped(n, part.stop - part.start)
                    if job.entries <= op.top:
                        k.emit(isa.Fill(dst=found, value=0.0))
                    else:
                        for span in slices(found.cols, plan.keys):
                            count = span.stop - span.start
                            tile = keys.next().shaped(count, d)
                            at = entry_rows(op, batch, job.sequence, shifted(span, part.start))
                            for some, region in rows_of(cache, at, 1, 0):
                                k.emit(isa.Load(dst=tile.part(some), src=region))
                            acc, y = products.next().shaped(n * heads, count), parts.shaped(n * heads, count)
                            k.emit(isa.Matmul(acc=acc, a=a.shaped(n * heads, d), b=tile))
                            k.emit(isa.Map(dst=y, a=acc, steps=relu))
                            k.emit(isa.Combine(dst=found.part(cols=span), parts=y, weights=w))
                    where: dict[str, Any] = {"first": part.start, "query": job.position, "every": op.every}
                    k.emit(isa.Choose(ids=listed, best=held, scores=found, **where))
                k.emit(isa.Store(dst=out.part(own), src=listed))
            streams.append(k.stream())
        return streams


def entry_rows(op: ChooseKeys, batch: Batch, sequence: int, span: slice) -> np.ndarray:
    """Returns an int array: the row numbers of a sequence's entries `span` in the key cache.

    An entry is the key of `op.every` tokens. sequence: number of the sequence in the batch.
    """
    size, last = batch.block_size, (np.arange(span.start, span.stop, dtype=np.int64) + 1) * op.every - 1
    pages = batch.block_table[sequence, last // size].astype(np.int64)
    return np.asarray(pages * -(-size // op.every) + last % size // op.every)
