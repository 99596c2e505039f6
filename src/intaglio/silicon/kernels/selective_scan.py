"""Chip kernel of the op `selective_scan`: the selective state space of Mamba."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from intaglio.batch import Batch
from intaglio.chips import ChipSpec
from intaglio.ops import SelectiveScan
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.core_loop import Move
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.isa.vector import SCALED, map_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.sequences import BLOCK, SequenceKernel, by_columns
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Stream, StreamBuilder

RATE, STEP = postfix("exp(a) * -1.0"), postfix("softplus(a)")
KEPT, ADDED = postfix("exp(a * b) * c"), postfix("a + b * c")


@chip_kernel(SelectiveScan)
@dataclass(frozen=True)
class SelectiveScanKernel(SequenceKernel):
    """Chip kernel of `selective_scan`. For each token it has two Map instructions and one Combine over the state.

    In SRAM, the state has a column for each channel, and a row for each of the `state_rows` values of a channel. In HBM
    the state is transposed; each SRAM row is therefore loaded by itself.
    """

    @classmethod
    def of(cls, op: SelectiveScan, t: Tensors) -> Self:  # type: ignore[override]
        width, n = (int(d) for d in t[op.rate].shape)
        return cls.made(op, t, width=width, operands=2, vectors=n + 1, state_rows=n, cold=n, shared=2 * n)

    def cycles(self, chip: ChipSpec, rows: float, columns: float) -> float:
        values, states = rows * columns, rows * columns * self.state_rows
        block = sum(map_cycles(chip, steps, values) for steps in (STEP, SCALED, ADDED))
        kept = map_cycles(chip, KEPT, states) + map_cycles(chip, ADDED, states)
        return block + kept + float(vector_cycles(chip, 2 * states))

    def first_cycles(self, chip: ChipSpec, columns: float) -> float:
        return map_cycles(chip, RATE, self.state_rows * columns)

    def state_moves(self, columns: slice, sequence: int, which: str) -> list[Move]:
        return by_columns(columns.stop - columns.start, self.state_rows, (which, sequence, columns.start))

    @classmethod
    def streams(cls, mem: ChipMemory, op: SelectiveScan, t: Tensors, batch: Batch) -> list[Stream]:
        kernel, longest, streams = cls.of(op, t), max(batch.q_len.tolist()), []
        x, step, b, c = (mem.region(name) for name in (op.x, op.step, op.b, op.c))
        rate, skip, state, out = (mem.region(name) for name in (op.rate, op.skip, op.state, op.out))
        n = kernel.state_rows
        for k, jobs in kernel.jobs(mem, op.site, batch):
            columns = max(job.columns.stop - job.columns.start for job in jobs)
            most, depth = min(BLOCK, max(len(job.rows) for job in jobs)), kernel.depth(mem.target, columns, longest)
            held = min(depth, len(jobs))
            rates, skips = k.ring(held, n, columns, rate.format), k.ring(held, 1, columns, skip.format)
            factors, states = k.ring(held, n, columns), k.ring(held, n, columns)
            rings = [k.ring(depth, most, width) for width in (columns, columns, n, n)]
            results = k.ring(depth, most, columns)
            for job in jobs:
                width = job.columns.stop - job.columns.start
                raw, factor, h = (ring.next().shaped(n, width) for ring in (rates, factors, states))
                load_columns(k, raw, rate.part(job.columns))
                k.emit(isa.Map(dst=factor, a=raw, steps=RATE))
                skipped = load(k, skips.next(), skip.part(cols=job.columns))
                before, after = (
                    slice(slot * kernel.width + job.columns.start, slot * kernel.width + job.columns.stop)
                    for slot in (job.before, job.after)
                )
                if job.before >= 0:
                    load_columns(k, h, state.part(before))
                else:
                    k.emit(isa.Fill(dst=h, value=0.0))
                for block in job.blocks():
                    parts = [*(r.part(block, job.columns) for r in (x, step)), *(r.part(block) for r in (b, c))]
                    xs, dt, inputs, outputs = (load(k, ring.next(), r) for ring, r in zip(rings, parts, strict=True))
                    y = results.next().shaped(xs.rows, width)
                    k.emit(isa.Map(dst=dt, a=dt, steps=STEP))
                    k.emit(isa.Map(dst=y, a=dt, b=xs, steps=SCALED))  # until the sum replaces it
                    for i in range(xs.rows):
                        row = slice(i, i + 1)
                        k.emit(isa.Map(dst=h, a=factor, b=dt.part(row), c=h, steps=KEPT))
                        k.emit(isa.Map(dst=h, a=h, b=inputs.part(row).shaped(n, 1), c=y.part(row), steps=ADDED))
                        k.emit(isa.Combine(dst=y.part(row), parts=h, weights=outputs.part(row)))
                    k.emit(isa.Map(dst=y, a=y, b=xs, c=skipped, steps=ADDED))
                    k.emit(isa.Store(dst=out.part(block, job.columns), src=y))
                for i in range(n):
                    column = state.part(after, slice(i, i + 1))
                    k.emit(isa.Store(dst=column, src=h.part(slice(i, i + 1)).shaped(width, 1)))
            streams.append(k.stream())
        return streams


def load_columns(k: StreamBuilder, tile: Region, src: Region) -> None:
    """Emit loads that copy `src` [m, n] from HBM into the SRAM tile `tile` [n, m], transposed.

    There is one load for each column of `src`.
    """
    for i in range(src.cols):
        load(k, tile.part(slice(i, i + 1)), src.part(cols=slice(i, i + 1)))
