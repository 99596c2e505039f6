"""Timing and streams shared by the kernels that work row by row: norm, rope, map, embed, select, route, permute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from intaglio.chips import ChipSpec, Target
from intaglio.ops import Op
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, deal_jobs, load, slices
from intaglio.silicon.kernels.kernel import ChipKernel, Tensors
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Stream, StreamBuilder
from intaglio.silicon.timing import Timing, fraction_held

ROWS = 16  # of an elementwise tile, at most; fewer if rows are long


def elementwise(target: Target, rows: int, width: int, operands: int, cycles: float) -> Timing:
    """The Timing of a kernel that moves `operands` matrices [rows, width] once and computes for `cycles` core cycles.

    cycles: total over all cores. The matrices are in the L2 as far as they fit, see fraction_held(), otherwise in
    HBM.
    """
    chip, library = target.chip, target.library
    moved = float(rows * width * operands * library.activation_bytes)
    missed = 1 - fraction_held(moved, chip.l2_bytes * library.l2_usable)
    lanes = cycles / chip.cores / chip.clock_hz
    transfer = {"L2": (1 - missed) * moved / chip.l2_rate, "HBM": missed * moved / chip.hbm_rate}
    seconds = library.launch_s + missed * chip.constants.hbm_latency_s + max(lanes, sum(transfer.values()))
    return Timing(seconds, {"VEC": lanes, **{k: s for k, s in transfer.items() if s}}, missed * moved, moved)


@dataclass(frozen=True)
class RowsKernel(ChipKernel):
    """Base class of chip kernels that read or write each of several matrices [rows, width] once.

    Attributes:
        rows: number of rows, or a symbol such as "T".
        width: columns of a matrix.
        operands: number of matrices that are inputs, outputs or weights.

    A subclass may define cycles().
    """

    by_sequence: ClassVar[bool] = False
    rows: int | str
    width: int
    operands: int

    @classmethod
    def of(cls, op: Op, t: Tensors) -> Self:
        shape = t[(*op.outputs, *op.inputs)[0]].shape
        operands = sum(t[n].role in ("temp", "output", "weight") for n in (*op.inputs, *op.outputs))
        return cls(shape[0], int(shape[-1]) if len(shape) > 1 else 1, operands)

    def cycles(self, chip: ChipSpec, n: int) -> float:
        """Number of cycles of one core's vector lanes for n values; by default one operation per value."""
        return float(vector_cycles(chip, n))

    def time(self, target: Target, sizes: BatchSizes, resident: bool) -> Timing:
        rows = sizes.rows_of(self.rows)
        if not rows * self.width:
            return Timing(0.0)
        cycles = self.cycles(target.chip, rows * self.width)
        return elementwise(target, rows, self.width, max(1, self.operands), cycles)


def by_rows(mem: ChipMemory, site: str, rows: int, widths: Sequence[int], body: Any) -> list[Stream]:
    """A list of Streams that process `rows` rows in tiles dealt to the cores.

    body(builder, rings, rows): emits the instructions of one tile. `rings` has a ring of two f32 tiles for each of
    `widths` columns.
    """
    step = max(1, min(ROWS, mem.chip.sram_bytes // (3 * 4 * max(1, sum(widths)))))
    streams = []
    for k, mine in deal_jobs(mem.chip, slices(rows, step), site):
        rings = [k.ring(2, step, width) for width in widths]
        for piece in mine:
            body(k, rings, piece)
        streams.append(k.stream())
    return streams


def load_once(
    k: StreamBuilder, mem: ChipMemory, held: dict[StreamBuilder, list[Region | None]], names: Sequence[str | None]
) -> list[Region | None]:
    """A list of the tiles with the small operands `names`, None for a missing one.

    They are loaded at a core's first call and kept in `held`.
    """
    if k not in held:
        regions = [mem.optional_region(name) for name in names]
        held[k] = [r and load(k, k.tile(r.rows, r.cols, r.format), r) for r in regions]
    return held[k]
