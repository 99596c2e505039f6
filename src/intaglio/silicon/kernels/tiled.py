"""Instruction streams of a matrix product: one launch rounds x to the op's x_format, another multiplies the codes.

product_loop.py has the closed form of the second launch; it assumes that x is rounded already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from intaglio import formats
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import (
    ChipMemory,
    QuantisedRegion,
    codes_of,
    deal_jobs,
    group_of,
    load,
    shifted,
    slices,
)
from intaglio.silicon.kernels.rows import ROWS
from intaglio.silicon.kernels.tiling import Tiling, groups_in
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder

RowReader = Callable[
    [Region, slice, slice], Region
]  # loads rows and columns of x into a tile; returns the part it fills
ROUNDING = "rounding"  # label of the launch that rounds x


@dataclass(frozen=True)
class Codes:
    """The left operand x of a product, rounded to the number format in which it is multiplied.

    Attributes:
        x: region [m, k] of codes, or of values if x is not quantised.
        scales: region f32 [m, G] with the scales of each row of x; None: there are none.
        span: number of consecutive columns of x that share a scale.
    """

    x: Region
    scales: Region | None
    span: int


def rounded(
    mem: ChipMemory, site: str, x: Region, x_format: str, span: int, rows: int = -1,
    reader: Callable[[StreamBuilder, int], RowReader] | None = None,
) -> Codes:  # fmt: skip
    """Round x f32 [m, k] to `x_format` on the simulated chip. Returns the Codes: regions of codes and of scales.

    The kernel is executed during this call. int8 has one scale for every `span` columns of a row, fp8row one for each
    row; bf16 and f32 have none. For f32 without a reader the result is x itself, and no kernel is executed. For f32
    with a reader, the rows are copied in the reader's order.

    Args:
        mem: the chip's memory.
        site: name of the op's place in the model.
        x: the values.
        x_format: f32, bf16, int8 or fp8row.
        span: columns that share an int8 scale.
        rows: number of rows that the reader gives; not used without a reader.
        reader: None to round the rows of x in order. Otherwise a function, called once for each core with (stream
            builder, largest number of rows of a tile). It returns a RowReader, which emits the load of some rows and
            columns of x into a tile and decides in which order rows come. The codes are stored in that order.
    """
    if x_format == "f32" and reader is None:
        return Codes(x, None, span)
    count = x.rows if reader is None else rows
    scaled = x_format in ("int8", "fp8row")
    width = x.cols if x_format == "fp8row" else span
    codes = mem.heap.allocate(count, x.cols, formats.element(x_format))
    scales = mem.heap.allocate(count, -(-x.cols // width), "f32") if scaled else None
    sram = mem.chip.sram_bytes
    if scales is None:
        width = min(x.cols, sram // (3 * 8))
    step = max(1, min(ROWS, sram // (3 * 8 * width)))
    tiles = 2 if step * width * (4 + formats.bits(codes.format) / 8) * 2 < sram - 2048 else 1
    jobs = [(part, g, columns) for part in slices(count, step) for g, columns in enumerate(slices(x.cols, width))]
    streams = []
    for k, mine in deal_jobs(mem.chip, jobs, site):
        raw, results = k.ring(tiles, step, width), k.ring(tiles, step, width, codes.format)
        factors = k.ring(2, step, 1)
        read = reader(k, step) if reader else lambda tile, rows, columns, k=k: load(k, tile, x.part(rows, columns))
        for part, g, columns in mine:
            a = y = read(raw.next(), part, columns)
            if x_format != "f32":
                y = results.next().shaped(a.rows, a.cols)
            if scales is not None:
                factor = factors.next().shaped(a.rows, 1)
                k.emit(isa.Quantise(codes=y, scale=factor, x=a))
                k.emit(isa.Store(dst=scales.part(part, slice(g, g + 1)), src=factor))
            elif y is not a:
                k.emit(isa.Convert(dst=y, src=a))
            k.emit(isa.Store(dst=codes.part(part, columns), src=y))
        streams.append(k.stream())
    mem.run(streams, label=ROUNDING)
    return Codes(codes, scales, span)


@dataclass
class TileJob:
    """One job of a core in a matrix product: a tile of the result, summed over all of K or over one part of K.

    Attributes:
        rows: slice of the rows of x and of the result.
        w: a sequence of weight matrices: only one, or two (gate, up) for a GLU pair.
        columns: for each matrix of `w`, the slice of its rows that the tile multiplies.
        steps: slices of K; the tile is computed in these steps.
        out: slice of the columns of the result.
        first: column of x that is multiplied by the first column of `w`. It is above 0 only if x has the inputs of
            several heads.
        index: number of this job's part of K, expert or head, if the product has several of them; otherwise 0.
        accs: the accumulators, one for each item of `columns`; product_streams() sets them.
        factor: SRAM tile with the scales of x that were loaded last; None before the first load.
        held: scales of w that were loaded last: {index into `columns`: (slice of scale numbers along K, SRAM tile)}.
    """

    rows: slice
    w: Sequence[Region | QuantisedRegion]
    columns: Sequence[slice]
    steps: Sequence[slice]
    out: slice
    first: int = 0
    index: int = 0
    accs: Sequence[Region] = ()
    factor: Region | None = None
    held: dict[int, tuple[slice, Region]] = field(default_factory=dict)


class TiledProduct:
    """Emits the loads and matmuls of a product on one core, and owns the core's SRAM tiles for x, w and their scales.

    Tiles at the edge of the result are padded with zeros.

    Args:
        k: stream builder of the core.
        codes: the rounded x.
        w: weights of one of the jobs: one item, or two for a GLU pair (gate, up). Only their formats are used, which
            are the same for all jobs.
        cut: tile sizes.
        w_first: True to load tiles of w before tiles of x. Half of the cores do so, which spreads the loads of x from
            the L2 over time and keeps HBM busy.
    """

    def __init__(
        self, k: StreamBuilder, codes: Codes, w: Sequence[Region | QuantisedRegion], cut: Tiling, w_first: bool
    ) -> None:
        self.k, self.codes, self.cut, self.w_first = k, codes, cut, w_first
        self.started = False  # True from the first step on
        depth, group = cut.depth, group_of(w[0])
        # One scale a row stays while a tile is computed, with the scales of x
        groups = 1 if group >= codes.x.cols else groups_in(group, cut.depth)
        self.x_tiles = k.ring(cut.stages, cut.rows, depth, codes.x.format)
        self.w_tiles = [k.ring(cut.stages, cut.columns, depth, codes_of(side).format) for side in w]
        self.row_scales = k.ring(cut.scaled, cut.rows, 1) if codes.scales is not None else None
        self.column_scales = [k.ring(cut.scaled, groups, cut.columns) if groups else None for _ in w]

    def multiply(self, jobs: Sequence[TileJob]) -> None:
        """Emit the loads and matmuls that compute acc = x[rows] @ w[columns].T for each job.

        A job is computed in its steps of K. The jobs are interleaved: the first step of each job, then the second step
        of each, and so on.
        """
        for i in range(max(len(job.steps) for job in jobs)):
            for job in jobs:
                if i < len(job.steps):
                    self.step(job, job.steps[i], accumulate=i > 0)

    def step(self, job: TileJob, step: slice, accumulate: bool) -> None:
        """Emit the instructions of one step of a job: loads of x and w, and the Matmuls that multiply them.

        Returns nothing. step: slice of K. accumulate: True to add to the job's accumulators; False to overwrite them,
        as in a job's first step.
        """
        # Scales of w come from HBM, as w does: loaded first, they arrive with it
        groups = [self.groups(side, job, step) for side in range(len(job.w))]
        # A core's first weights have HBM's latency, during which x is loaded
        w_first = self.w_first or not self.started
        self.started = True
        a = None if w_first else self.load_x(job, step)
        sides = [
            load(self.k, tiles.next(), codes_of(w).part(part, step), self.cut.columns)
            for tiles, w, part in zip(self.w_tiles, job.w, job.columns, strict=True)
        ]
        a = a or self.load_x(job, step)
        for acc, b, parts in zip(job.accs, sides, groups, strict=True):
            for i, (cols, scale) in enumerate(parts):
                x, y = a.part(cols=cols), b.part(cols=cols)
                more = accumulate or i > 0
                self.k.emit(isa.Matmul(acc=acc, a=x, b=y, row_scale=job.factor, col_scale=scale, accumulate=more))

    def load_x(self, job: TileJob, step: slice) -> Region:
        """Emit the load of a tile of x: the job's rows, and the columns of one step. Returns the tile's Region in SRAM.

        If x has scales, the method also sets job.factor to an SRAM tile with the scales of these columns. It emits the
        load of the scales only where a new scale begins; in the steps between, job.factor stays as it is.

        step: slice of the job's columns of x, which begin at column job.first.
        """
        columns = shifted(step, job.first)
        a = load(self.k, self.x_tiles.next(), self.codes.x.part(job.rows, columns), self.cut.rows)
        scales, span = self.codes.scales, self.codes.span
        if scales is not None and self.row_scales is not None:
            g = step.start // span if scales.cols > 1 else 0
            if job.factor is None or (scales.cols > 1 and step.start % span == 0):
                part = scales.part(job.rows, slice(g, g + 1))
                job.factor = load(self.k, self.row_scales.next(), part, self.cut.rows)
        return a

    def groups(self, side: int, job: TileJob, step: slice) -> list[tuple[slice, Region | None]]:
        """Divide a step's columns of w where the scales change. Returns a list of (columns, scales of these columns).

        The columns are a slice, counted from the first column of the step. The scales are a row of an SRAM tile, with
        one scale for each row of w. If w is not quantised, the list has one item: (all columns, None).

        The method emits a load if the scales of this step are not those that were loaded last, and then sets
        job.held[side].

        side: index into job.w. step: slice of K.
        """
        ring, w = self.column_scales[side], job.w[side]
        if not isinstance(w, QuantisedRegion) or ring is None:
            return [(slice(0, step.stop - step.start), None)]
        size = w.group
        numbers = slice(step.start // size, -(-step.stop // size))
        if side not in job.held or job.held[side][0] != numbers:
            part = w.scales_t.part(numbers, job.columns[side])
            job.held[side] = numbers, load(self.k, ring.next(), part, columns=self.cut.columns)
        scales = job.held[side][1]
        cuts = [max(step.start, g * size) - step.start for g in range(numbers.start, numbers.stop)]
        ends = [*cuts[1:], step.stop - step.start]
        return [(slice(a, z), scales.part(slice(i, i + 1))) for i, (a, z) in enumerate(zip(cuts, ends, strict=True))]


Finish = Callable[[TileJob], None]  # emits what follows the product of a job


def product_streams(
    mem: ChipMemory, site: str, codes: Codes, cut: Tiling, jobs: Sequence[TileJob],
    finisher: Callable[[StreamBuilder], Finish],
) -> list[Stream]:  # fmt: skip
    """Emit the instructions of a tiled matrix product. Returns a list with one Stream for each core with work.

    Sets job.accs, the accumulators, of each job. product_seconds() models the time of these Streams.

    Args:
        mem: the chip's memory.
        site: name of the op's place in the model.
        codes: the rounded left operand x.
        cut: tile sizes.
        jobs: the tiles of the result, which are dealt to the cores.
        finisher: function called once for each core with the core's stream builder, after the operands' tiles are
            allocated. It returns a function finish(job), which is called after each job's product and emits the
            instructions that read the accumulators and store the result.
    """
    streams = []
    for core, (k, mine) in enumerate(deal_jobs(mem.chip, jobs, site)):
        product = TiledProduct(k, codes, mine[0].w, cut, w_first=core % 2 > 0)
        accs = [
            [k.tile(cut.rows, cut.columns, "f32", "acc") for _ in mine[0].w] for _ in range(cut.at_once * cut.banks)
        ]
        finish = finisher(k)
        for number, group in enumerate(slices(len(mine), cut.at_once)):
            for i, job in enumerate(mine[group]):
                job.accs = accs[(number * cut.at_once + i) % len(accs)]
            product.multiply(mine[group])
            for job in mine[group]:
                finish(job)
            if not mem.target.library.persistent:
                k.fence()
        streams.append(k.stream())
    return streams


def pieces(job: TileJob, ring: Ring) -> Iterator[tuple[slice, slice]]:
    """Divide a tile's rows into pieces that each fill one SRAM buffer. Yields a pair of slices for each piece.

    The pair is (the piece's rows counted from the first row of the tile, its rows in the whole result). A piece has as
    many rows as one SRAM buffer of `ring`; the last piece may have fewer.
    """
    for piece in slices(job.rows.stop - job.rows.start, ring.tiles[0].rows):
        yield piece, shifted(piece, job.rows.start)


def store_product(k: StreamBuilder, job: TileJob, out: Region, columns: Sequence[slice], ring: Ring) -> None:
    """Emit instructions that move a job's sums from accumulators to SRAM and store them to `out`. Returns nothing.

    No bias, scale, activation or residual is applied. columns: for each accumulator of job.accs, the columns of `out`
    in which its sums are stored. ring: SRAM buffers for the sums.
    """
    for acc, part in zip(job.accs, columns, strict=True):
        for piece, at in pieces(job, ring):
            result = ring.next().shaped(piece.stop - piece.start, part.stop - part.start)
            k.emit(isa.Drain(dst=result, acc=acc.part(piece, slice(0, result.cols))))
            k.emit(isa.Store(dst=out.part(at, part), src=result))
