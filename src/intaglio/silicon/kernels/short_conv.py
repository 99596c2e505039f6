"""Chip kernel of the op `short_conv`: a causal convolution over the last few tokens of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from intaglio.batch import Batch
from intaglio.chips import ChipSpec
from intaglio.ops import ShortConv
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.isa.vector import SCALED, map_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.sequences import BLOCK, SequenceKernel
from intaglio.silicon.stream import Stream

ADDED = postfix("a * b + c")


@chip_kernel(ShortConv)
@dataclass(frozen=True)
class ShortConvKernel(SequenceKernel):
    """Chip kernel of `short_conv`. For each block of rows it has one Map instruction for each tap of the filters.

    The SRAM tile of a block also holds the taps - 1 rows before the block; for the first block they come from the
    state.

    Attributes:
        taps: number of rows that a filter combines.
        bias: True if the op adds a bias.
    """

    taps: int = 2
    bias: bool = False

    @classmethod
    def of(cls, op: ShortConv, t: Tensors) -> Self:  # type: ignore[override]
        width, taps = (int(d) for d in t[op.w].shape)
        bias = op.bias is not None
        past, vectors = taps - 1, taps + bias
        sizes = {"width": width, "operands": 1, "vectors": vectors, "state_rows": past, "overlap": past, "cold": taps}
        return cls.made(op, t, **sizes, taps=taps, bias=bias)

    def cycles(self, chip: ChipSpec, rows: float, columns: float) -> float:
        n = rows * columns
        first = ADDED if self.bias else SCALED
        return map_cycles(chip, first, n) + (self.taps - 1) * map_cycles(chip, ADDED, n)

    @classmethod
    def streams(cls, mem: ChipMemory, op: ShortConv, t: Tensors, batch: Batch) -> list[Stream]:
        kernel, longest = cls.of(op, t), max(batch.q_len.tolist())
        past = kernel.taps - 1
        x, w, state, out = (mem.region(name) for name in (op.x, op.w, op.state, op.out))
        bias, streams = mem.optional_region(op.bias), []
        for k, jobs in kernel.jobs(mem, op.site, batch):
            columns = max(job.columns.stop - job.columns.start for job in jobs)
            most, depth = min(BLOCK, max(len(job.rows) for job in jobs)), kernel.depth(mem.target, columns, longest)
            once = min(depth, len(jobs))
            taps, biases = k.ring(once, kernel.taps, columns, w.format), k.ring(once, 1, columns, (bias or x).format)
            seen, results = k.ring(depth, most + past, columns), k.ring(depth, most, columns)
            for job in jobs:
                n = job.columns.stop - job.columns.start
                filters = taps.next().shaped(kernel.taps, n)
                for j in range(kernel.taps):  # a column of w becomes a row
                    load(k, filters.part(slice(j, j + 1)), w.part(job.columns, slice(j, j + 1)))
                each = [filters.part(slice(j, j + 1)) for j in range(kernel.taps)]
                added = None if bias is None else load(k, biases.next(), bias.part(cols=job.columns))
                for block in job.blocks():
                    m, first = block.stop - block.start, block.start - job.rows.start
                    a, y = seen.next().shaped(m + past, n), results.next().shaped(m, n)
                    held = max(0, past - first)  # rows from before the step
                    if held and job.before >= 0:
                        slots = slice(job.before * past + past - held, (job.before + 1) * past)
                        load(k, a, state.part(slots, job.columns))
                    elif held:
                        k.emit(isa.Fill(dst=a.part(slice(held)), value=0.0))
                    load(
                        k, a.part(slice(held, None)), x.part(slice(block.start - past + held, block.stop), job.columns)
                    )
                    k.emit(isa.Map(dst=y, a=a.part(slice(past, None)), b=each[past], c=added,
                                   steps=SCALED if added is None else ADDED))  # fmt: skip
                    for j in range(past):
                        k.emit(isa.Map(dst=y, a=a.part(slice(j, j + m)), b=each[j], c=y, steps=ADDED))
                    k.emit(isa.Store(dst=out.part(block, job.columns), src=y))
                slots = slice(job.after * past, (job.after + 1) * past)
                k.emit(isa.Store(dst=state.part(slots, job.columns), src=a.part(slice(m, None))))
            streams.append(k.stream())
        return streams
