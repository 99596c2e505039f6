"""RowsKernel: timing and streams shared by the kernels that work row by row, such as norm, rope and map.

A job is one row. Its operands are loaded while the row before is computed, and its results stored while the next one
is. The closed form is the time of that loop (tile_loop.py) with the bytes and cycles of the streams' instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar, Self

from intaglio import formats
from intaglio.chips import ChipSpec, KernelLibrary, Target
from intaglio.ops import Op, Tensor
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, deal_jobs, load, slices
from intaglio.silicon.kernels.kernel import ChipKernel, Tensors
from intaglio.silicon.l2 import BY_INDEX, Source
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import ALIGN, Stream, StreamBuilder
from intaglio.silicon.tile_loop import TileLoop
from intaglio.silicon.timing import Timing

INDEX_BYTES = 4
MOST_TILES = 16  # of a ring
INDICES_SRAM = 4096  # bytes of SRAM that is left to the indices of a core's rows, which are gathered
ROWS = 16  # rows of a tile of other kernels that load rows, at most


def loop_timing(target: Target, loop: TileLoop, source: Source = "l2") -> Timing:
    """Returns the Timing of a kernel that runs a TileLoop on all cores, including the launch.

    source: where the operands are before the loop, see the class L2. On a chip without an L2 all operands and results
    are in HBM.
    """
    chip, lib, moved = target.chip, target.library, loop.jobs * (loop.load + loop.store)
    if chip.l2_bytes * lib.l2_usable:
        seconds, hbm = loop.through_l2(target, source)
    else:
        seconds, hbm = replace(loop, load_missed=1.0, store_missed=1.0).seconds(target), moved
    seconds += lib.launch_s
    if source in BY_INDEX and not chip.l2_bytes:  # the indices come from HBM, and then the rows
        seconds += chip.constants.hbm_latency_s
    busy = {"VEC": loop.jobs * loop.work_s / chip.cores, "L2": moved / chip.l2_rate, "HBM": hbm / chip.hbm_rate}
    return Timing(seconds, {k: s for k, s in busy.items() if s or k == "VEC"}, hbm, moved)


def ring_depth(target: Target, columns: Sequence[int], load: float, held: float = 0.0) -> int:
    """Returns the number of tiles in each circular buffer of a core, chosen so that loads in flight hide HBM's latency.

    It is at least 2 and at most MOST_TILES. If SRAM has no room for so many tiles, it is the number of tiles for which
    SRAM has room, but at least 1.

    Args:
        target: the chip.
        columns: for each buffer, the columns of its tiles; a tile is one row of FP32 values.
        load: bytes that a core loads for one tile of each buffer.
        held: bytes of SRAM already in use.
    """
    chip = target.chip
    in_flight = chip.constants.hbm_latency_s * min(chip.port_rate, chip.hbm_rate / chip.cores)
    wanted = max(2, min(MOST_TILES, 1 + ceil(in_flight / max(1.0, load))))
    row = sum(-(-4 * c // ALIGN) * ALIGN for c in columns)
    return max(1, min(wanted, int((chip.sram_bytes - held) // row)))


@dataclass(frozen=True)
class RowsKernel(ChipKernel):
    """Base class of chip kernels that process one row of a matrix at a time. Subclasses override cycles() and others.

    Attributes:
        rows: number of rows of each matrix, or the symbol that stands for it.
        width: columns of each matrix.
        operands: number of matrices [rows, width] that the op uses. One is written; the others are read. A count of 1
            stands for one read and one write.
        vector_bytes: bytes of operands with one row, such as a norm's weight, which every core loads once.
        source: where the operands are before the op, and whether their rows are read by index; see the class L2.
        in_place: True if a row is stored from the SRAM tile into which it was loaded.
    """

    rows: int | str
    width: int
    operands: int
    vector_bytes: float = 0.0

    by_sequence: ClassVar[bool] = False
    source: ClassVar[Source] = "l2"
    in_place: ClassVar[bool] = False

    @classmethod
    def of(cls, op: Op, t: Tensors) -> Self:
        shape = t[(*op.outputs, *op.inputs)[0]].shape
        used = [t[n] for n in dict.fromkeys((*op.inputs, *op.outputs))]
        matrices = sum(x.role in ("temp", "output") or (x.role == "weight" and len(x.shape) > 1) for x in used)
        vectors = [x for x in used if x.role in ("weight", "const") and len(x.shape) == 1]
        width = int(shape[-1]) if len(shape) > 1 else 1
        return cls(shape[0], width, matrices, sum(map(vector_bytes, vectors)))

    def columns(self) -> tuple[int, ...]:
        """Returns the widths of the SRAM tiles that a core needs to process one row, as a tuple of ints.

        A width is a number of FP32 values. Unless a subclass overrides this, there is one tile of self.width values for
        each operand, and at least two tiles.
        """
        return (self.width,) * max(2, self.operands)

    def parts(self) -> int:
        """Returns the number of equal column ranges into which a row is divided. Each range is one job of a core."""
        return 1

    def pieces(self) -> tuple[float, ...]:
        """Returns the sizes of the pieces in which a core loads and stores the columns of one job.

        Sizes are fractions of these columns; their sum is 1. The base class returns one piece.
        """
        return (1.0,)

    def loaded(self) -> tuple[float, ...]:
        """Returns a tuple with one number for each piece: the fraction of a job's bytes that the piece loads.

        The base class returns (), which means that each piece loads the fraction that pieces() gives for it.
        """
        return ()

    def worked(self, chip: ChipSpec) -> tuple[float, ...]:
        """Returns a tuple with one number for each piece: the fraction of a job's cycles() that the piece takes.

        The base class returns (), which means that each piece takes all of the cycles().
        """
        return ()

    def in_runs(self) -> bool:
        """True if each core gets consecutive rows, False if rows are dealt to the cores in turn.

        A core with consecutive rows first loads their indices. The base class returns True if the op reads rows by
        index.
        """
        return self.source in BY_INDEX

    def wait_s(self, target: Target) -> float:
        """Returns the minimum seconds between the end of a row's loads and the start of its computation.

        The base class returns 0. An op returns HBM's latency if some of its bytes are never in the L2.
        """
        return 0.0

    def held_bytes(self) -> float:
        """Returns the bytes of SRAM for operands that a core keeps for all its rows.

        Examples are a norm's weight and, if in_runs() is True, the indices of the rows.
        """
        return self.vector_bytes + (INDICES_SRAM if self.in_runs() else 0)

    def depth(self, target: Target) -> int:
        """Returns the number of tiles in each circular buffer of a core.

        It is large enough that loads in flight hide HBM's latency, as far as SRAM has room (see ring_depth()).
        """
        parts = self.parts()
        columns = [-(-c // parts) for c in self.columns()]
        return ring_depth(target, columns, self.load_bytes(target.library) / parts, self.held_bytes())

    def cycles(self, chip: ChipSpec, n: int) -> float:
        """Returns the cycles in which the vector lanes of one core compute `n` values of a row.

        The base class counts one operation per value. Subclasses whose ops need more override this method.
        """
        return float(vector_cycles(chip, n))

    def read_cycles(self, chip: ChipSpec, n: int) -> float:
        """Returns the cycles from the start of a row's computation until its input tiles are free for the next loads.

        The base class returns all cycles() of the row. n: number of values of a row.
        """
        return self.cycles(chip, n)

    def load_bytes(self, library: KernelLibrary) -> float:
        """Returns the bytes that a core loads for one row of the op.

        The base class counts `width` activations for each operand that is read. Subclasses may override this.
        """
        return float(max(1, self.operands - 1) * self.width * library.activation_bytes)

    def store_bytes(self, library: KernelLibrary) -> float:
        """Returns the bytes that a core stores for one row of the op. The base class counts `width` activations."""
        return float(self.width * library.activation_bytes)

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        rows, lib, parts = sizes.rows_of(self.rows), target.library, self.parts()
        if not rows * self.width:
            return Timing(0.0)
        load, store = self.load_bytes(lib), self.store_bytes(lib)
        cycles, read = (f(target.chip, -(-self.width // parts)) for f in (self.cycles, self.read_cycles))
        gathers = -(-rows // target.chip.cores) if self.in_runs() else 0
        loop = TileLoop(
            jobs=rows * parts, load=load / parts, store=store / parts, work_s=cycles / target.chip.clock_hz,
            read_s=read / target.chip.clock_hz, depth=self.depth(target), in_place=self.in_place,
            once=self.vector_bytes + gathers * INDEX_BYTES, pieces=self.pieces(), wait_s=self.wait_s(target),
            loaded=self.loaded(), worked=self.worked(target.chip),
            loads=max(1, (self.operands - 1) // len(self.pieces())),
        )  # fmt: skip
        return loop_timing(target, loop, self.source)


@dataclass(frozen=True)
class CopyKernel(RowsKernel):
    """Base class of row kernels that only copy rows.

    Each row is stored from the SRAM tile into which it was loaded.
    """

    in_place = True

    def columns(self) -> tuple[int, ...]:
        return (self.width,)

    def cycles(self, chip: ChipSpec, n: int) -> float:
        return 0.0

    def load_bytes(self, library: KernelLibrary) -> float:
        return self.store_bytes(library)


def vector_bytes(t: Tensor) -> float:
    """Returns the bytes that an operand with one row, such as a norm's weight, takes in SRAM.

    The operand is kept in its own format if this is a plain one (formats.PLAIN), and in FP32 if it is quantised.
    """
    bits = formats.bits(t.format) if t.format in formats.PLAIN else 32
    return float(-(-int(t.shape[-1]) * bits // 8))


def by_jobs(mem: ChipMemory, op: Op, kernel: RowsKernel, rows: int, columns: Sequence[int], body: Any) -> list[Stream]:
    """Returns a list of Streams that process `rows` rows one at a time: one Stream for each core with work.

    A job is one row, or one of the kernel.parts() column ranges into which a row is divided.

    Args:
        mem: the chip's memory.
        op: the op.
        kernel: the op's kernel, which gives the number of column ranges and the number of tiles in a ring.
        rows: number of rows.
        columns: for each ring (circular SRAM buffer of f32 tiles), the number of columns of a whole row. The last
            number is the width that is divided into column ranges. No tile is wider than a range.
        body: function that emits the instructions of one job. It is called as body(builder, list of rings, slice of one
            row, slice of the job's columns). The last argument is slice(None) if kernel.in_runs().
    """
    parts = kernel.parts()
    step = -(-columns[-1] // parts)
    depth = kernel.depth(mem.target)
    jobs = [(r, c) for r in slices(rows, 1) for c in slices(columns[-1], step)]
    streams = []
    if kernel.in_runs():
        dealt = [(StreamBuilder(op.site), [(slice(r, r + 1), slice(None)) for r in run]) for run in runs(mem, rows)]
    else:
        dealt = list(deal_jobs(mem.chip, jobs, op.site))
    for k, mine in dealt:
        rings = [k.ring(depth, 1, min(c, step) if parts > 1 else c) for c in columns]
        for row, cols in mine:
            body(k, rings, row, cols)
        streams.append(k.stream())
    return streams


def by_rows(mem: ChipMemory, site: str, rows: int, widths: Sequence[int], body: Any) -> list[Stream]:
    """Returns a list of Streams that process `rows` rows in tiles: one Stream for each core with work.

    A tile has up to ROWS rows.

    Args:
        mem: the chip's memory.
        site: name of the op's place in the model.
        rows: number of rows; they are cut into tiles, which are dealt to the cores.
        widths: numbers of columns. For each of them a core has a ring (circular SRAM buffer) of two f32 tiles.
        body: function that emits the instructions of one tile. It is called as body(builder, list of rings, slice of
            rows).
    """
    step = max(1, min(ROWS, mem.chip.sram_bytes // (3 * 4 * max(1, sum(widths)))))
    streams = []
    for k, mine in deal_jobs(mem.chip, slices(rows, step), site):
        rings = [k.ring(2, step, width) for width in widths]
        for piece in mine:
            body(k, rings, piece)
        streams.append(k.stream())
    return streams


def runs(mem: ChipMemory, rows: int) -> list[range]:
    """Divide `rows` rows among the cores. Returns a list with a range of consecutive rows for each core that has any.

    The lengths of the ranges differ by at most one; longer ranges come first.
    """
    cores = min(rows, mem.chip.cores)
    ends = [(i + 1) * (rows // cores) + min(i + 1, rows % cores) for i in range(cores)]
    return [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def load_indices(
    k: StreamBuilder, mem: ChipMemory, held: dict[StreamBuilder, tuple[Region, int]], ids: Region, row: int
) -> Region:
    """Returns an SRAM region i32 [1, 1] with the index that `ids` [1, rows] holds for row number `row`.

    The first call for a core emits the load of the indices of all rows of the core into one SRAM tile. Later calls use
    this tile.

    Args:
        k: stream builder of the core.
        mem: the chip's memory.
        held: {builder: (SRAM tile with the core's indices, number of the core's first row)}. The caller keeps this dict
            between calls; the first call for a core adds an item.
        ids: HBM region with the indices of all rows.
        row: a row of this core.
    """
    if k not in held:
        mine = next(run for run in runs(mem, ids.cols) if row in run)
        held[k] = load(k, k.tile(1, len(mine), "i32"), ids.part(cols=slice(mine.start, mine.stop))), mine.start
    tile, first = held[k]
    return tile.part(cols=slice(row - first, row - first + 1))


def load_once(
    k: StreamBuilder, mem: ChipMemory, held: dict[StreamBuilder, list[Region | None]], names: Sequence[str | None]
) -> list[Region | None]:
    """Returns the SRAM tiles of operands that a core loads as a whole, as a list.

    The first call for a core emits the loads. Later calls for the core return the same list.

    Args:
        k: stream builder of the core.
        mem: the chip's memory.
        held: {builder: list of tiles}. The caller keeps this dict between calls; the first call for a core adds an
            item.
        names: names of the operands; None gives None in the list.
    """
    if k not in held:
        regions = [mem.optional_region(name) for name in names]
        held[k] = [r and load(k, k.tile(r.rows, r.cols, r.format), r) for r in regions]
    return held[k]
