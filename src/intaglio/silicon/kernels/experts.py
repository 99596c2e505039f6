"""Chip kernel of the op `experts`: the feed-forward experts of a mixture-of-experts layer, as grouped products.

Timed after the grouped kernels of serving engines: rows are gathered in blocks of one expert each, and each block is a
product; routing, activation and combination are separate kernels over all routed rows.

The work of a core depends on the router's ids. The chip sorts the routed rows by expert; its sequencer then reads how
many rows each expert has, and from these counts the streams of the products are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import KernelLibrary, Target
from intaglio.ops import Experts
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import matmul_cycles, vector_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, QuantisedRegion, deal_jobs, load, slices
from intaglio.silicon.kernels.kernel import ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.product import Operands, bits_per_value, step_depth, tile_shape
from intaglio.silicon.kernels.rows import ROWS
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Stream, StreamBuilder
from intaglio.silicon.timing import Timing

SCALE_BLOCK = 128  # rows and columns of an FP8 weight that share one scale
COMBINE_COLUMNS = 512  # columns of a tile when a token's results are summed, at most
SCALED = (("operand", "a"), ("operand", "b"), ("binary", "*"))


@chip_kernel(Experts)
@dataclass(frozen=True)
class ExpertsKernel(ChipKernel):
    """Chip kernel of `experts` on one chip. Timed with random routing.

    Attributes:
        top: experts that a token chooses.
        held: experts on the chip.
        experts: experts in all.
        hidden, inner: widths of x and of an expert's inner row.
        x_format, w_format: formats of a value of x and of a weight.
        w_bits: bits of a weight, scales included.
        gated: True if experts have a gate.
    """

    by_sequence: ClassVar[bool] = False
    top: int
    held: int
    experts: int
    hidden: int
    inner: int
    x_format: str
    w_format: str
    w_bits: float
    gated: bool = True

    @classmethod
    def of(cls, op: Experts, t: Tensors) -> ExpertsKernel:
        up, x_format, top = t[op.up], formats.element(op.x_format), int(t[op.ids].shape[1])
        held, inner, hidden = (int(d) for d in up.shape)
        w = formats.element(up.format), bits_per_value(up)
        return cls(top, held, op.of or held, hidden, inner, x_format, *w, op.gate is not None)

    def time(self, target: Target, sizes: BatchSizes, resident: bool) -> Timing:
        counts = expected_rows(sizes.tokens, self.top, self.experts, self.held)
        how = self.experts, self.hidden, self.inner, self.x_format, self.w_format, self.w_bits, self.gated
        return experts_timing(target, sizes.tokens, self.top, counts, *how)

    @classmethod
    def unsupported(cls, op: Experts, t: Tensors) -> str | None:
        if op.order or op.down_order:
            return f"{op.site}: chip kernels do not permute columns of experts (act-order); run this model on the host"
        if op.held or op.slots:
            return f"{op.site}: chip kernels have no expert placement; use a layout without r, or the host"
        return None

    @classmethod
    def streams(cls, mem: ChipMemory, op: Experts, t: Tensors, batch: Batch) -> list[Stream]:
        """A list of the Streams of the last launch.

        The launches before it are executed here, since each needs results of earlier ones. 1. Sort the routed rows by
        expert. 2. Gate and up over gathered tokens. 3. Zeros for rows of experts that other chips hold, if there are
        any. 4. Down, scattered back to the order of routing. The last launch computes the weighted sum of each token's
        rows.
        """
        ids = mem.region(op.ids)
        n, (count, inner, _) = ids.rows * ids.cols, map(int, t[op.up].shape)
        order, tokens = (mem.heap.allocate(1, n, "i32") for _ in range(2))
        counts = mem.heap.allocate(1, count, "i32")
        mem.run(sort_by_expert(mem, op, ids.shaped(1, n), (order, tokens, counts)))
        if mem.values:
            sizes = mem.hbm.read(counts)[0]
        else:  # without values there are no ids: the rows that the closed form expects
            sizes = np.array(expected_rows(ids.rows, ids.cols, op.of or count, count))
        hidden = mem.heap.allocate(n, inner, "f32")
        mem.run(gate_up(mem, op, sizes, order, tokens, hidden))
        parts = mem.heap.allocate(n, mem.region(op.out).cols, "f32")
        mem.run(zero_rows(mem, op, order.part(cols=slice(int(sizes.sum()), n)), parts))
        mem.run(down(mem, op, sizes, order, hidden, parts))
        return combine(mem, op, parts)


def expected_rows(tokens: int, top: int, experts: int, held: int) -> tuple[int, ...]:
    """Expected number of rows of each of the `held` experts of a chip, as a tuple; tokens choose experts at random.

    Every token chooses `top` of all `experts`. The rows, at least 1, are spread evenly over the expected number of
    experts that have any, which is held (1 - (1 - top / experts) ** tokens); the other experts have 0.
    """
    rows = max(1, round(tokens * top * held / experts))
    active = min(rows, max(1, round(held * (1 - (1 - top / experts) ** tokens))))
    return tuple(rows // active + (i < rows % active) for i in range(active)) + (0,) * (held - active)


def elementwise_seconds(target: Target, moved: float, held: float = 0.0) -> float:
    """Seconds of an elementwise kernel that reads and writes `moved` bytes in total, launch included.

    Its arithmetic is not counted. If the operands fit the L2, all bytes come from it; otherwise all come from HBM
    through the L2. No two cores read the same bytes, so the L2 has only its rate without multicast.

    held: bytes of the operands; 0: as many as `moved`.
    """
    chip, library = target.chip, target.library
    fits, l2_rate = (held or moved) < chip.l2_bytes * library.l2_usable, chip.l2_rate / library.l2_multicast
    return library.launch_s + moved / (l2_rate if fits else min(l2_rate, chip.hbm_rate))


@dataclass(frozen=True)
class TileMenu:
    """Tile rows and columns that a grouped product may use, and `step_bytes`, the bytes of K in one pipeline step."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    step_bytes: int


def tile_menu(library: KernelLibrary, tokens: int, experts: int) -> TileMenu:
    """The TileMenu that the library's kernel chooses from, for `tokens` tokens in a step and `experts` experts.

    It depends on the library's expert_tiles:

    - "best": all of its tiles, as with a static schedule or a kernel tuned for each size;
    - "by_experts": the one tile that get_default_config of an older vLLM chooses by tokens and experts;
    - "by_tokens": the one tile that get_default_config of vLLM 0.17 chooses by tokens.
    """
    if library.expert_tiles == "best":
        return TileMenu(library.expert_rows, library.expert_columns, library.burst_bytes)
    if library.expert_tiles == "by_experts":
        return TileMenu((16,), (32,), 128) if tokens <= experts else TileMenu((64,), (64,), 64)
    rows = next((rows for most, rows in ((32, 16), (96, 32), (512, 64)) if tokens <= most), 128)
    return TileMenu((rows,), (64,), 256) if tokens <= 64 else TileMenu((rows,), (128,), 128)


def grouped_timing(
    target: Target, tokens: int, counts: np.ndarray, n: int, k: int, x_format: str, w_format: str, w_bits: float
) -> Timing:
    """The Timing of one grouped product: counts[e] rows [k] times w[e] [n, k], for every expert e with rows.

    The tile of the library's menu that gives the least time is used. Tiles at the edge count whole.

    tokens: number of tokens of the step, by which the library may choose tiles. w_bits: bits of a weight with its share
    of the scales. Raises ChipError for a format that the chip's array does not multiply.
    """
    chip, lib, latency_s = target.chip, target.library, target.chip.constants.hbm_latency_s
    run = max(chip.runs_as(x_format), chip.runs_as(w_format), key=formats.bits)
    run = run if lib.experts_native else "bf16"
    widened = w_format == "e4m3" and run == "bf16"  # FP8 weights are converted to BF16 by the vector lanes
    tiles = tile_menu(lib, tokens, len(counts))
    counts = counts[counts > 0]
    if not len(counts):
        return Timing(lib.launch_s)
    x_bits, tk = formats.bits(x_format), step_depth(target, formats.bits(run)) * tiles.step_bytes // lib.burst_bytes
    steps = -(-k // tk)
    overfetch: float = lib.half_burst_cost if tiles.step_bytes == lib.burst_bytes // 2 else 1.0
    overfetch = lib.unaligned_row_cost if k % lib.vector_load_values else overfetch
    weights = len(counts) * n * k * w_bits / 8 * overfetch
    if widened:  # blocks of 128 by 128 weights share a scale and are read whole
        overfetch = lib.fp8_overfetch
        weights *= -(-n // SCALE_BLOCK) * SCALE_BLOCK / n * -(-k // SCALE_BLOCK) * SCALE_BLOCK / k
    loaded = 0.0
    if widened and lib.fp8_load_bytes_per_cycle:
        loaded = weights / (lib.fp8_load_bytes_per_cycle * chip.cores * chip.clock_hz)
    best: tuple[float, Timing] | None = None
    for rows in tiles.rows:
        for columns in tiles.columns:
            if rows * columns * 4 > chip.acc_bytes // 2:
                continue
            blocks = float(np.ceil(counts / rows).sum())
            jobs = blocks * -(-n // columns)
            stage = (rows * x_bits + columns * w_bits * overfetch) * tk / 8
            work = float(matmul_cycles(target, rows, columns, tk, run)) / lib.grouped_mxu_efficiency / chip.clock_hz
            if widened:
                work += float(vector_cycles(chip, lib.fp8_dequant_ops * columns * tk)) / chip.clock_hz
            active = min(jobs, chip.cores)
            load = max(stage / chip.port_rate, stage * active / chip.l2_rate)
            ring = max(2, min(lib.expert_stages, chip.sram_bytes // int(stage)))
            fit = min(4, chip.sram_bytes // int(4 * stage), chip.acc_bytes // (8 * rows * columns))
            per_core = max(1, min(fit, int(np.ceil(jobs / chip.cores))))  # tiles that run on a core at a time
            period = max(load, work, (load + work + latency_s) / (ring * per_core))
            rounds = max(1.0, jobs / chip.cores) if jobs > 4 * chip.cores else float(np.ceil(jobs / chip.cores))
            edge = latency_s + float(vector_cycles(chip, rows * columns)) / chip.clock_hz
            total = float(counts.sum())
            hbm = weights + total * (k * x_bits / 8 + n * 2)
            computed = rounds * steps * period + edge * np.ceil(rounds / per_core)
            seconds = max(computed, hbm / chip.hbm_rate, loaded)
            seconds += lib.launch_s + latency_s
            busy = {"MXU": jobs * steps * work / chip.cores, "HBM": hbm / chip.hbm_rate}
            choice = f"blocks of {rows}x{columns} for {len(counts)} experts"
            if best is None or seconds < best[0]:
                flops = 2.0 * total * n * k
                numbers = float(seconds), busy, hbm, hbm, 0.0, flops, run, weights, choice
                best = seconds, Timing(*numbers, jobs=jobs)
    assert best is not None
    return best[1]


@lru_cache(maxsize=4096)
def experts_timing(
    target: Target, tokens: int, top_k: int, counts: tuple[int, ...], n_experts: int, hidden: int, inner: int,
    x_format: str, w_format: str, w_bits: float = 0.0, gated: bool = True, kernel: str = "",
) -> Timing:  # fmt: skip
    """The Timing of a layer of routed experts on one rank, router included.

    Some libraries' kernels of activation and combination process all tokens * top_k rows; then all are counted.
    Otherwise only the rank's own rows are.

    Args:
        target: chip and kernel library.
        tokens: tokens of the step.
        top_k: experts that a token chooses.
        counts: token rows of each expert that the rank holds.
        n_experts: experts in all.
        hidden: width of a token's row.
        inner: width of an expert's inner row.
        x_format: format of a value of x.
        w_format: format of a weight.
        w_bits: bits per weight including scales; 0: those of `w_format`.
        gated: True if experts have a gate.
        kernel: name of the library's kernel; "": its default.

    Raises ChipError for an unknown kernel.
    """
    run = max(x_format, w_format, key=formats.bits)
    target = target.kernel("experts", run, name=kernel)
    chip, lib, sides = target.chip, target.library, 2 if gated else 1
    w_bits = w_bits or formats.bits(w_format)
    held = np.array(counts)
    rows = tokens * top_k if lib.expert_all_rows else float(held.sum())
    score = float(vector_cycles(chip, lib.routing_ops * tokens * n_experts)) / chip.cores / chip.clock_hz
    routing = Timing(lib.routing_launches * lib.launch_s + score, {"VEC": score})
    eight_bit = formats.bits(x_format) < 16
    parts = [routing]
    if eight_bit:  # quantise the inputs: read 2 bytes, write 1
        parts.append(Timing(elementwise_seconds(target, tokens * hidden * 3.0)))
    parts.append(grouped_timing(target, tokens, held, sides * inner, hidden, x_format, w_format, w_bits))
    if not lib.expert_fused_activation:
        parts.append(Timing(elementwise_seconds(target, rows * inner * 2.0 * (sides + 1))))
    if eight_bit and not lib.expert_fused_activation:
        parts.append(Timing(elementwise_seconds(target, rows * inner * 3.0)))
    parts.append(grouped_timing(target, tokens, held, hidden, inner, x_format, w_format, w_bits))
    elsewhere = tokens * top_k - float(held.sum())
    if elsewhere > 0 and lib.expert_all_rows:  # rows of experts that other ranks hold are set to zero
        parts.append(Timing(elsewhere * (sides * inner + hidden) * 2 / chip.hbm_rate))
    parts.append(Timing(elementwise_seconds(target, rows * hidden * 2.0 + tokens * hidden * 2.0)))
    return sum(parts[1:], parts[0])


class GatheredOperands(Operands):
    """Operands of a product whose rows of x are gathered by index, and may be multiplied by routing weights first."""

    def __init__(
        self, k: StreamBuilder, x: Region, w: Region | QuantisedRegion, x_format: str, tile: tuple[int, int, int]
    ) -> None:
        super().__init__(k, x, w, x_format, tile)
        self.index, self.weight_index = k.ring(2, 1, tile[0], "i32"), k.ring(2, 1, tile[0], "i32")
        self.weight, self.weighted = k.ring(2, tile[0], 1), k.ring(2, tile[0], self.raw.tiles[0].cols)
        self.rows: Region | None = None
        self.factors: Region | None = None

    def select_rows(self, rows: Region, weights: Region | None, weight_rows: Region) -> None:
        """Set the rows of x that are gathered from now on: those whose numbers are in `rows` [1, n].

        weights: None, or [N, 1]; row i is then multiplied by weights[weight_rows[i]].
        """
        self.rows, self.factors = load(self.k, self.index.next(), rows), None
        if weights is not None:
            self.factors = self.weight.next().shaped(rows.cols, 1)
            index = load(self.k, self.weight_index.next(), weight_rows)
            self.k.emit(isa.Gather(dst=self.factors, table=weights, index=index))

    def load_x(self, rows: slice, depth: slice) -> Region:
        """Gather columns `depth` of the rows of x set by select_rows(), times their routing weights if they have any.

        Returns the tile with them, not rounded. `rows` is ignored; the base class needs it.
        """
        assert self.rows is not None
        raw = self.raw.next().shaped(self.rows.cols, depth.stop - depth.start)
        self.k.emit(isa.Gather(dst=raw, table=self.x.part(cols=depth), index=self.rows))
        if self.factors is None:
            return raw
        out = self.weighted.next().shaped(raw.rows, raw.cols)
        self.k.emit(isa.Map(dst=out, a=raw, b=self.factors, steps=SCALED))
        return out


Block = tuple[int, slice]  # an expert, and a slice of the rows sorted by expert


def blocks(counts: np.ndarray, rows: int) -> list[Block]:
    """A list of (expert, slice of at most `rows` rows) that cover the rows sorted by expert.

    counts: rows of each expert.
    """
    ends = np.cumsum(counts).tolist()
    return [
        (e, slice(end - n + piece.start, end - n + piece.stop))
        for e, (n, end) in enumerate(zip(counts.tolist(), ends, strict=True))
        for piece in slices(n, rows)
    ]


def expert_rows(e: int, n: int, columns: slice) -> slice:
    """The rows of the stacked weights [experts * n, K] that compute `columns` of expert e's result."""
    return slice(e * n + columns.start, e * n + columns.stop)


def sort_by_expert(mem: ChipMemory, op: Experts, ids: Region, out: tuple[Region, Region, Region]) -> list[Stream]:
    """A list with the stream that sorts the routed rows by expert, on one core.

    ids: i32 [1, n], the expert of each routed row. out: regions for order, tokens and counts, as Group writes them.
    """
    k = StreamBuilder(op.site)
    tiles = [k.tile(r.rows, r.cols, "i32") for r in out]
    ids_tile = load(k, k.tile(1, ids.cols, "i32"), ids)
    order, tokens, counts = tiles
    experts = op.of or counts.cols
    top, first = mem.region(op.ids).cols, op.first
    k.emit(isa.Group(order=order, tokens=tokens, counts=counts, ids=ids_tile, top=top, first=first, experts=experts))
    for dst, src in zip(out, tiles, strict=True):
        k.emit(isa.Store(dst=dst, src=src))
    return [k.stream()]


def gate_up(
    mem: ChipMemory, op: Experts, sizes: np.ndarray, order: Region, tokens: Region, out: Region
) -> list[Stream]:
    """A list of Streams that compute out = act(gate(x)) * up(x), or act(up(x)) without a gate, by the experts of rows.

    sizes: rows of each expert. order, tokens: for each row, sorted by expert, its place in routing order and its token.
    out [rows, inner]: the rows sorted by expert.
    """
    x, up, glu = mem.region(op.x), mem.regions[op.up], op.gate is not None
    sides = [mem.regions[op.gate], up] if op.gate is not None else [up]
    tm, tn, tk = tile_shape(mem.target, int(sizes.max()), out.cols, x.cols, op.x_format, up, glu)
    weights = mem.region(op.weights).shaped(order.cols, 1) if op.scale_input else None
    how: dict[str, Any] = {n: getattr(op, n) for n in ("activation", "alpha", "limit", "shift")}
    streams = []
    jobs = [(*block, c) for block in blocks(sizes, tm) for c in slices(out.cols, tn)]
    for k, mine in deal_jobs(mem.chip, jobs, op.site):
        operands, result = GatheredOperands(k, x, up, op.x_format, (tm, tn, tk)), k.ring(2, tm, tn)
        accs = [k.tile(tm, tn, "f32", "acc") for _ in sides]
        extra = biases(mem, k, (op.gate_bias, op.up_bias)[2 - len(sides) :], tn)
        for e, rows, columns in mine:
            shape, w_rows = (rows.stop - rows.start, columns.stop - columns.start), expert_rows(e, out.cols, columns)
            operands.select_rows(tokens.part(cols=rows), weights, order.part(cols=rows))
            parts = [acc.shaped(*shape) for acc in accs]
            operands.multiply(rows, [(acc, w, w_rows) for acc, w in zip(parts, sides, strict=True)])
            y = result.next().shaped(*shape)
            own = [bias_of(mem, k, *pair, e, columns) for pair in extra]
            second = {"up": parts[1], "up_bias": own[1]} if glu else {}
            k.emit(isa.Drain(dst=y, acc=parts[0], bias=own[0], **second, **how))
            k.emit(isa.Store(dst=out.part(rows, columns), src=y))
        streams.append(k.stream())
    return streams


def zero_rows(mem: ChipMemory, op: Experts, rows: Region, out: Region) -> list[Stream]:
    """A list of Streams that set to zero the rows of `out` listed in `rows` [1, n], whose experts other chips hold."""
    step = max(1, min(ROWS, mem.chip.sram_bytes // (8 * out.cols)))
    streams = []
    for k, mine in deal_jobs(mem.chip, slices(rows.cols, step), op.site):
        zeros, index_ring = k.tile(step, out.cols), k.ring(2, 1, step, "i32")
        k.emit(isa.Fill(dst=zeros))
        for piece in mine:
            index = load(k, index_ring.next(), rows.part(cols=piece))
            k.emit(isa.Scatter(table=out, src=zeros.part(slice(0, index.cols)), index=index))
        streams.append(k.stream())
    return streams


def down(mem: ChipMemory, op: Experts, sizes: np.ndarray, order: Region, x: Region, out: Region) -> list[Stream]:
    """A list of Streams that compute the down product, each row with its own expert.

    sizes: rows of each expert. order: for each row, sorted by expert, its place in routing order. x: rows sorted by
    expert. out: rows in routing order.
    """
    w = mem.regions[op.down]
    tm, tn, tk = tile_shape(mem.target, int(sizes.max()), out.cols, x.cols, op.x_format, w, False)
    streams = []
    jobs = [(*block, c) for block in blocks(sizes, tm) for c in slices(out.cols, tn)]
    for k, mine in deal_jobs(mem.chip, jobs, op.site):
        operands, acc = Operands(k, x, w, op.x_format, (tm, tn, tk)), k.tile(tm, tn, "f32", "acc")
        result, index_ring = k.ring(2, tm, tn), k.ring(2, 1, tm, "i32")
        (extra,) = biases(mem, k, (op.down_bias,), tn)
        for e, rows, columns in mine:
            part = acc.shaped(rows.stop - rows.start, columns.stop - columns.start)
            operands.multiply(rows, [(part, w, expert_rows(e, out.cols, columns))])
            y = result.next().shaped(part.rows, part.cols)
            k.emit(isa.Drain(dst=y, acc=part, bias=bias_of(mem, k, *extra, e, columns)))
            index = load(k, index_ring.next(), order.part(cols=rows))
            k.emit(isa.Scatter(table=out.part(cols=columns), src=y, index=index))
        streams.append(k.stream())
    return streams


Bias = tuple[Region | None, Region | None]  # [experts, n] in HBM, and a tile for part of one row; or no bias


def biases(mem: ChipMemory, k: StreamBuilder, names: Sequence[str | None], tn: int) -> list[Bias]:
    """A list of (region in HBM, tile of `tn` columns) for each bias in `names`; (None, None) for a missing bias."""
    return [(r, k.tile(1, tn, r.format) if r else None) for r in map(mem.optional_region, names)]


def bias_of(
    mem: ChipMemory, k: StreamBuilder, bias: Region | None, tile: Region | None, e: int, columns: slice
) -> Region | None:
    """Load `columns` of expert e's bias into its tile; returns the tile, or None without a bias."""
    return load(k, tile, bias.part(slice(e, e + 1), columns)) if bias and tile else None


def combine(mem: ChipMemory, op: Experts, parts: Region) -> list[Stream]:
    """A list of Streams that sum each token's rows of `parts`, times their routing weights, and add the residual."""
    out, top, residual = mem.region(op.out), mem.region(op.ids).cols, mem.optional_region(op.residual)
    width = min(COMBINE_COLUMNS, out.cols)
    step = max(1, min(ROWS, mem.chip.sram_bytes // (3 * 4 * width * (top + 2))))
    streams = []
    for k, mine in deal_jobs(
        mem.chip, [(r, c) for r in slices(out.rows, step) for c in slices(out.cols, width)], op.site
    ):
        rows_in, weight, added, result = (k.ring(2, *shape) for shape in (
            (step * top, width), (step, top), (step, width), (step, width)))  # fmt: skip
        for rows, columns in mine:
            n = rows.stop - rows.start
            x = load(k, rows_in.next(), parts.part(slice(rows.start * top, rows.stop * top), columns))
            w = None if op.scale_input else load(k, weight.next(), mem.region(op.weights).part(rows))
            r = load(k, added.next(), residual.part(rows, columns)) if residual else None
            y = result.next().shaped(n, x.cols)
            k.emit(isa.Combine(dst=y, parts=x, weights=w, residual=r))
            k.emit(isa.Store(dst=out.part(rows, columns), src=y))
        streams.append(k.stream())
    return streams
