"""Chip kernels of hyper-connections: `sinkhorn`, which works row by row, and `mix_streams`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from intaglio.batch import Batch
from intaglio.chips import ChipSpec, KernelLibrary
from intaglio.ops import MixStreams, Sinkhorn
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import sinkhorn_cycles
from intaglio.silicon.isa.instruction import Steps
from intaglio.silicon.isa.vector import SCALED, map_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, deal_jobs, load, slices
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_jobs
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder

COLUMNS = 2048  # of a stream in a job of mix_streams, at most
ADDED: Steps = (*SCALED, ("operand", "c"), ("binary", "+"))


@chip_kernel(Sinkhorn)
@dataclass(frozen=True)
class SinkhornKernel(RowsKernel):
    """Chip kernel of `sinkhorn`, with one Sinkhorn instruction for each row. A row holds a matrix.

    iterations: the field `iterations` of the op.
    """

    iterations: int = 20

    @classmethod
    def of(cls, op: Sinkhorn, t: Tensors) -> Self:  # type: ignore[override]
        return replace(super().of(op, t), iterations=op.iterations)

    def cycles(self, chip: ChipSpec, n: int) -> float:
        return float(sinkhorn_cycles(chip, n, self.iterations))

    @classmethod
    def streams(cls, mem: ChipMemory, op: Sinkhorn, t: Tensors, batch: Batch) -> list[Stream]:
        x, out = mem.region(op.x), mem.region(op.out)

        def body(k: StreamBuilder, rings: list[Ring], rows: slice, columns: slice) -> None:
            a = load(k, rings[0].next(), x.part(rows))
            y = rings[1].next().shaped(a.rows, a.cols)
            k.emit(isa.Sinkhorn(dst=y, x=a, iterations=op.iterations, eps=op.eps))
            k.emit(isa.Store(dst=out.part(rows), src=y))

        return by_jobs(mem, op, cls.of(op, t), x.rows, [x.cols, x.cols], body)


@chip_kernel(MixStreams)
@dataclass(frozen=True)
class MixStreamsKernel(RowsKernel):
    """Chip kernel of `mix_streams`, which mixes residual streams.

    A job is one row and up to COLUMNS columns of each stream. Each stream of the result is a sum of terms. Each
    term has one Map instruction.

    Attributes:
        width: columns of one stream.
        streams_in: number of streams of the operand.
        streams_out: number of streams of the result.
        branch: True if the op adds a branch.
    """

    streams_in: int = 1
    streams_out: int = 1
    branch: bool = False

    @classmethod
    def of(cls, op: MixStreams, t: Tensors) -> Self:  # type: ignore[override]
        rows, columns = t[op.x].shape
        n, weights = op.streams, int(t[op.weights].shape[1])
        return cls(rows, int(columns) // n, 3, 0.0, n, weights // n, op.branch is not None)

    @property
    def factors(self) -> int:
        """The number of factors (weights and gains) of one row."""
        return self.streams_out * (self.streams_in + self.branch)

    def columns(self) -> tuple[int, ...]:
        return self.width * self.streams_in, self.width * self.streams_out, self.width * self.branch

    def held_bytes(self) -> float:
        return 16 * 4.0 * self.factors  # of as many rows as a ring has tiles, at most

    def parts(self) -> int:
        return -(-self.width // COLUMNS)

    def cycles(self, chip: ChipSpec, n: int) -> float:
        later = self.streams_in - 1 + self.branch
        return self.streams_out * (map_cycles(chip, SCALED, n) + later * map_cycles(chip, ADDED, n))

    def load_bytes(self, library: KernelLibrary) -> float:
        values = (self.streams_in + self.branch) * self.width + self.parts() * self.factors
        return float(values * library.activation_bytes)

    def store_bytes(self, library: KernelLibrary) -> float:
        return float(self.streams_out * self.width * library.activation_bytes)

    @classmethod
    def streams(cls, mem: ChipMemory, op: MixStreams, t: Tensors, batch: Batch) -> list[Stream]:
        kernel = cls.of(op, t)
        n, m, width = kernel.streams_in, kernel.streams_out, kernel.width
        x, out, weights = mem.region(op.x), mem.region(op.out), mem.region(op.weights)
        branch, gains = mem.optional_region(op.branch), mem.optional_region(op.gains)
        depth, step = kernel.depth(mem.target), -(-width // kernel.parts())
        jobs = [(row, columns) for row in range(x.rows) for columns in slices(width, step)]
        streams = []
        for k, mine in deal_jobs(mem.chip, jobs, op.site):
            factors = [k.ring(depth, 1, m * n), k.ring(depth, 1, m)]
            rings = [k.ring(depth, count, step) for count in (n, m, 1)]
            for row, columns in mine:
                one = slice(row, row + 1)
                w = load(k, factors[0].next(), weights.part(one))
                terms = [[w.part(cols=slice(j * m + i, j * m + i + 1)) for j in range(n)] for i in range(m)]
                if gains is not None:
                    g = load(k, factors[1].next(), gains.part(one))
                    terms = [[*those, g.part(cols=slice(i, i + 1))] for i, those in enumerate(terms)]
                a = load(k, rings[0].next(), side_by_side(x, row, n).part(cols=columns))
                values = [a.part(slice(j, j + 1)) for j in range(n)]
                if branch is not None:
                    values.append(load(k, rings[2].next(), branch.part(one, columns)))
                y = rings[1].next().shaped(m, a.cols)
                for i, those in enumerate(terms):
                    to = y.part(slice(i, i + 1))
                    for j, (value, factor) in enumerate(zip(values, those, strict=True)):
                        k.emit(isa.Map(dst=to, a=value, b=factor, c=to if j else None, steps=ADDED if j else SCALED))
                k.emit(isa.Store(dst=side_by_side(out, row, m).part(cols=columns), src=y))
            streams.append(k.stream())
        return streams


def side_by_side(x: Region, row: int, n: int) -> Region:
    """Returns a view of row number `row` of `x` as a Region with `n` rows. Row i is stream i.

    In `x` the `n` streams are consecutive column ranges of equal width.
    """
    one = x.part(slice(row, row + 1))
    width = x.cols // n
    return replace(one, rows=n, cols=width, stride=one.row_bytes // n)
