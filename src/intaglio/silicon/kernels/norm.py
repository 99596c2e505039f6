"""Chip kernel of the op `norm`: RMS, layer or L2 norm of rows, or of equal groups of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intaglio.batch import Batch
from intaglio.chips import ChipSpec
from intaglio.ops import Norm
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import norm_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_jobs, load_once
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder


@chip_kernel(Norm)
@dataclass(frozen=True)
class NormKernel(RowsKernel):
    """Chip kernel of `norm`. It processes one row of x after the other; each core loads weight and bias once."""

    def cycles(self, chip: ChipSpec, n: int) -> float:
        return float(norm_cycles(chip, n))

    @classmethod
    def unsupported(cls, op: Norm, t: Tensors) -> str | None:
        if op.group and op.weight and t[op.weight].shape != (op.group,):
            return f"{op.site}: a norm by groups with a weight for each column is not supported on a chip"
        return None

    @classmethod
    def streams(cls, mem: ChipMemory, op: Norm, t: Tensors, batch: Batch) -> list[Stream]:
        x, out = mem.region(op.x), mem.region(op.out)
        held: dict[StreamBuilder, list[Region | None]] = {}

        def body(k: StreamBuilder, rings: list[Ring], rows: slice, columns: slice) -> None:
            weight, bias = load_once(k, mem, held, (op.weight, op.bias))
            a = load(k, rings[0].next(), x.part(rows))
            residual = load(k, rings[2].next(), mem.region(op.residual).part(rows)) if op.residual else None
            y = rings[1].next().shaped(a.rows, a.cols)
            how: dict[str, Any] = {"norm": op.norm, "eps": op.eps, "offset": op.offset, "span": op.group or x.cols}
            k.emit(isa.Norm(dst=y, x=a, weight=weight, bias=bias, residual=residual, **how))
            k.emit(isa.Store(dst=out.part(rows), src=y))

        columns = [x.cols] * (3 if op.residual else 2)
        return by_jobs(mem, op, cls.of(op, t), x.rows, columns, body)
