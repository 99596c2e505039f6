"""Chip kernel of the op `rg_lru`: the real-gated linear recurrent unit of Griffin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from intaglio.batch import Batch
from intaglio.chips import ChipSpec
from intaglio.ops import RgLru
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import scan_cycles
from intaglio.silicon.isa.vector import map_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.sequences import BLOCK, SequenceKernel
from intaglio.silicon.stream import Stream

RATE, GATED = postfix("softplus(a) * -8.0"), postfix("sigmoid(a + b) * c")


@chip_kernel(RgLru)
@dataclass(frozen=True)
class RgLruKernel(SequenceKernel):
    """Chip kernel of `rg_lru`. It has two Map instructions (one per gate) and one Scan for each block of rows."""

    @classmethod
    def of(cls, op: RgLru, t: Tensors) -> Self:  # type: ignore[override]
        return cls.made(op, t, width=int(t[op.x].shape[1]), operands=3, vectors=3, state_rows=1)

    def cycles(self, chip: ChipSpec, rows: float, columns: float) -> float:
        return 2 * map_cycles(chip, GATED, rows * columns) + scan_cycles(chip, rows, columns, normalised=True)

    def first_cycles(self, chip: ChipSpec, columns: float) -> float:
        return map_cycles(chip, RATE, columns)

    @classmethod
    def streams(cls, mem: ChipMemory, op: RgLru, t: Tensors, batch: Batch) -> list[Stream]:
        kernel, streams, longest = cls.of(op, t), [], max(batch.q_len.tolist())
        operands = [mem.region(name) for name in (op.x, op.input_gate, op.decay_gate)]
        vectors = [mem.region(name) for name in (op.rate, op.input_bias, op.decay_bias)]
        state, out = mem.region(op.state), mem.region(op.out)
        for k, jobs in kernel.jobs(mem, op.site, batch):
            columns = max(job.columns.stop - job.columns.start for job in jobs)
            most, depth = min(BLOCK, max(len(job.rows) for job in jobs)), kernel.depth(mem.target, columns, longest)
            held = min(depth, len(jobs))
            once = [k.ring(held, 1, columns, r.format) for r in vectors]
            factors, states = k.ring(held, 1, columns), k.ring(held, 1, columns)
            rings, results = [k.ring(depth, most, columns) for _ in operands], k.ring(depth, most, columns)
            for job in jobs:
                n = job.columns.stop - job.columns.start
                rate, input_bias, decay_bias = (
                    load(k, ring.next(), r.part(cols=job.columns)) for ring, r in zip(once, vectors, strict=True)
                )
                factor, h = factors.next().shaped(1, n), states.next().shaped(1, n)
                k.emit(isa.Map(dst=factor, a=rate, steps=RATE))
                if job.before >= 0:
                    load(k, h, state.part(slice(job.before, job.before + 1), job.columns))
                else:
                    k.emit(isa.Fill(dst=h, value=0.0))
                for block in job.blocks():
                    gated, gate, log = (
                        load(k, ring.next(), r.part(block, job.columns))
                        for ring, r in zip(rings, operands, strict=True)
                    )
                    k.emit(isa.Map(dst=log, a=log, b=decay_bias, c=factor, steps=GATED))
                    k.emit(isa.Map(dst=gated, a=gate, b=input_bias, c=gated, steps=GATED))
                    y, first = results.next().shaped(gated.rows, n), job.start + block.start == job.rows.start
                    k.emit(isa.Scan(dst=y, h=h, decay=log, x=gated, normalised=True, first=first))
                    k.emit(isa.Store(dst=out.part(block, job.columns), src=y))
                k.emit(isa.Store(dst=state.part(slice(job.after, job.after + 1), job.columns), src=h))
            streams.append(k.stream())
        return streams
