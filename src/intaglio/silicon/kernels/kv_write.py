"""Chip kernel of the op `kv_write`: writes a step's keys and values to their slots of the K/V cache.

Also Heads, the sizes of an attention layer, which the kernels of attention share.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import ClassVar

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import KernelLibrary, Target
from intaglio.ops import KvWrite
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load, slices
from intaglio.silicon.kernels.kernel import WIDE, ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.rows import INDEX_BYTES, MOST_TILES, ROWS, ring_depth, runs
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Ring, Stream, StreamBuilder
from intaglio.silicon.tile_loop import TileLoop
from intaglio.silicon.timing import Timing

QUOTIENT = postfix("a / b")


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer that determine its time.

    Attributes:
        heads: number of query heads.
        kv_heads: number of heads of keys and values.
        head_dim: width of a query and of a key.
        v_dim: width of a value.
        window: largest number of keys that a query attends to; 0: no limit.
        bits: bits of a number in the K/V cache.
        softcap: True if scores are soft-capped.
        slopes: True if each query head has a bias of its own (ALiBi), so that heads share no tile of queries.
        values_in_keys: True if values are columns of the key cache (latent attention). Kernels of a vendor's library
            load these columns once, with the keys. The simulated streams load them twice; the second time they come
            from the L2.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    window: int = 0
    bits: int = 16
    softcap: bool = False
    slopes: bool = False
    values_in_keys: bool = False

    def kv_width(self, library: KernelLibrary) -> int:
        """Returns the number of columns that a kernel loads from the K/V cache for one position and one K/V head.

        These are the columns of the key and of the value. If values are columns of the key cache (`values_in_keys`),
        kernels of a vendor's library load only the columns of the key, while the simulated streams load both. `library`
        stands for the simulated streams if its activations are FP32.
        """
        once = self.values_in_keys and library.activation_bytes < WIDE
        return self.head_dim + (0 if once else self.v_dim)

    def hbm_part(self, target: Target) -> float:
        """Returns the fraction of the loaded K/V columns that comes from HBM; the rest comes from the L2.

        It is below 1 in one case: values are columns of the key cache (`values_in_keys`), the chip has an L2, and
        `target` stands for the simulated streams, with FP32 activations.
        """
        twice = self.values_in_keys and target.chip.l2_bytes and target.library.activation_bytes >= WIDE
        return self.head_dim / self.kv_width(target.library) if twice else 1.0

    @property
    def group(self) -> int:
        """The number of query heads that share one K/V head."""
        return self.heads // self.kv_heads

    @property
    def format(self) -> str:
        """The number format under which a KernelLibrary lists its attention kernels for this cache.

        It is "bf16" for a cache of 16 bits per value, and "e4m3" for any other width.
        """
        return "bf16" if self.bits == 16 else "e4m3"


@chip_kernel(KvWrite)
@dataclass(frozen=True)
class KvWriteKernel(ChipKernel):
    """Chip kernel of `kv_write`, which rounds keys and values to the cache's format and stores them in cache slots."""

    by_sequence: ClassVar[bool] = False
    heads: Heads

    @classmethod
    def of(cls, op: KvWrite, t: Tensors) -> KvWriteKernel:
        keys, values = t[op.k_cache], t[op.v_cache]
        kv_heads, d, dv = int(keys.shape[2]), int(keys.shape[3]), int(values.shape[3])
        return cls(Heads(kv_heads, kv_heads, d, dv, bits=formats.bits(keys.format)))

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        return kv_write_timing(target, sizes.tokens, self.heads)

    @classmethod
    def streams(cls, mem: ChipMemory, op: KvWrite, t: Tensors, batch: Batch) -> list[Stream]:
        """Returns a list of Streams, one per core with work, that write the step's keys and values to the K/V cache.

        A row is the key or value of one head of one token. Each core has consecutive rows. It first loads the numbers
        of their cache slots. Then it loads, rounds and stores some rows of keys, some rows of values, and so on.
        """
        pairs = [
            (mem.region(x), mem.codes(name), mem.scales(name), own)
            for x, name, own in ((op.k, op.k_cache, op.k_scale), (op.v, op.v_cache, op.v_scale))
        ]
        width, heads = max(cache.cols for _, cache, *_ in pairs), pairs[0][0].cols // pairs[0][1].cols
        slots = (batch.slots[:, None].astype(np.int64) * heads + np.arange(heads)).reshape(-1)
        streams = []
        for run in runs(mem, len(slots)):
            k, step = StreamBuilder(op.site), job_rows(mem.target, len(run), width)
            depth = tiles_in_flight(mem.target, step, width)
            raw, scale = k.ring(depth, step, width), k.ring(depth, step, 1)
            rounded = {cache: k.ring(depth, step, width, cache.format) for _, cache, *_ in pairs}
            divided, order = k.ring(depth, step, width), k.ring(depth, 1, step, "i32")
            mine = mem.put_indices(slots[run.start : run.stop])
            index = load(k, k.tile(1, len(run), "i32"), mine)
            for source, cache, scales, own, piece in ((*pair, p) for p in slices(len(run), step) for pair in pairs):
                rows = range(run.start + piece.start, run.start + piece.stop)
                a = load_heads(k, raw.next().shaped(len(rows), cache.cols), source, rows)
                y, at = rounded[cache].next().shaped(a.rows, a.cols), index.part(cols=piece)
                store_row = row_cycles(mem.target.library, cache.cols, formats.bits(cache.format))
                if scales is None:
                    x = a
                    if own is not None and cache.format == "e4m3":
                        z, x = scale.next().shaped(y.rows, 1), divided.next().shaped(y.rows, y.cols)
                        emit_head_scales(mem, k, order, z, own, np.array(rows) % heads)
                        k.emit(isa.Map(dst=x, a=a, b=z, steps=QUOTIENT))
                    k.emit(isa.Convert(dst=y, src=x))
                else:
                    z = scale.next().shaped(y.rows, 1)
                    k.emit(isa.Quantise(codes=y, scale=z, x=a, for_cache=True))
                    k.emit(isa.Scatter(table=scales, src=z, index=at))
                k.emit(isa.Scatter(table=cache, src=y, index=at, row_cycles=store_row))
            streams.append(k.stream())
        return streams


def load_heads(k: StreamBuilder, tile: Region, source: Region, rows: range) -> Region:
    """Emit the loads of some heads of `source` [tokens, heads * d] into `tile` [len(rows), d]. Returns the tile.

    Heads are numbered over all tokens: number r is head r % heads of token r // heads. If the rows of `source` have no
    gaps between them in memory, one load is emitted. Otherwise up to three are emitted: for the heads of the first
    token, of the tokens that are loaded whole, and of the last token.

    rows: numbers of the heads to load.
    """
    if source.stride == source.row_bytes:
        return load(
            k, tile, source.shaped(source.rows * source.cols // tile.cols, tile.cols).part(slice(rows.start, rows.stop))
        )
    d, heads, done = tile.cols, source.cols // tile.cols, 0
    whole = range(-(-rows.start // heads) * heads, rows.stop // heads * heads)  # empty if a token is not whole
    cuts = [rows.start, whole.start, whole.stop, rows.stop] if whole else [rows.start, whole.start, rows.stop]
    for a, b in pairwise(min(cut, rows.stop) for cut in cuts):
        if a < b:
            first, last = a // heads, -(-b // heads)
            columns = slice(a % heads * d, (b - 1) % heads * d + d)
            src = source.part(slice(first, last), columns if last - first == 1 else slice(None))
            load(k, tile.part(slice(done, done + b - a)).shaped(src.rows, src.cols), src)
            done += b - a
    return tile


def emit_head_scales(
    mem: ChipMemory, k: StreamBuilder, ring: Ring, dst: Region, name: str | None, heads: np.ndarray
) -> None:
    """Emit instructions that fill `dst`, f32 [n, 1], with the scale of each row's head. Returns nothing.

    Args:
        mem: the chip's memory.
        k: the core's stream builder.
        ring: SRAM tiles for the head numbers.
        dst: SRAM tile for the scales.
        name: tensor with the scales of the heads; None: all scales are 1.
        heads: int [n], for each row the number of its head.
    """
    if name is None:
        k.emit(isa.Fill(dst=dst, value=1.0))
        return
    scales, index = mem.region(name), load(k, ring.next().shaped(1, len(heads)), mem.put_indices(heads))
    k.emit(isa.Gather(dst=dst, table=scales.shaped(scales.cols, 1), index=index))


def job_rows(target: Target, rows: int, width: int) -> int:
    """Returns the number of rows that a core loads, rounds and stores at a time. A row is one head of one token.

    The `rows` rows of a core are cut into as few parts as possible. All parts but the last have the returned number of
    rows. The largest number allowed is found in this order:

    1. It is ROWS.
    2. It is larger if HBM's latency would not be hidden otherwise. Half of the MOST_TILES buffers are loaded at the
       same time, and these loads together must take as long as the latency.
    3. It is smaller if SRAM has no room for so many rows, but it is at least 1.

    Returns 1 if `rows` is 0. width: number of values of a row.
    """
    chip = target.chip
    in_flight = chip.constants.hbm_latency_s * min(chip.port_rate, chip.hbm_rate / chip.cores)
    most = max(ROWS, ceil(in_flight / (MOST_TILES // 2) / width / target.library.activation_bytes))
    most = max(1, min(most, chip.sram_bytes // (64 * width)))
    return -(-rows // -(-rows // most)) if rows else 1


def tiles_in_flight(target: Target, rows: int, width: int) -> int:
    """Returns the number of tiles in each circular buffer of a core, from 2 to MOST_TILES.

    There are as many tiles as are needed to hide HBM's latency, but no more than SRAM has room for. The result is 2
    even if SRAM has no room for two tiles.

    rows, width: size of a tile.
    """
    return max(2, ring_depth(target, (rows * width,) * 5, rows * width * target.library.activation_bytes))


def row_cycles(library: KernelLibrary, width: int, bits: int) -> float:
    """Returns the cycles that a core takes to store one row, a key or value of one head, in the K/V cache.

    width: number of values of the row. bits: bits per value in the cache.

    The cycles are library.kv_row_cycles. For a cache of fewer than 16 bits per value, quantising the row adds
    library.kv_quant_cycles for each value.
    """
    return library.kv_row_cycles + (library.kv_quant_cycles * width if bits < 16 else 0)


def kv_write_timing(target: Target, tokens: int, h: Heads) -> Timing:
    """Returns the Timing of writing the keys and values of `tokens` tokens to the K/V cache; 0 s if `tokens` is 0.

    A row is the key or value of one head of one token. The time is that of the core with the most rows, which loads,
    rounds and stores them in a loop (tile_loop.py). If keys and values differ in width, the mean width is used for
    both.
    """
    chip, lib = target.chip, target.library
    if not tokens:
        return Timing(0.0)
    rows, width = tokens * h.kv_heads, (h.head_dim + h.v_dim) / 2  # of keys or of values; mean width
    cores = min(rows, chip.cores)
    run = -(-rows // cores)
    widest = max(h.head_dim, h.v_dim)
    step = job_rows(target, run, widest)
    pieces = -(-run // step)
    values = rows / cores / pieces * width  # of a mean job: some cores have one row less than `run`
    stored_s = row_cycles(lib, round(width), h.bits) * run / chip.clock_hz
    reads, writes = rows * 2 * width * lib.activation_bytes, rows * 2 * width * h.bits / 8
    index, missed = run * INDEX_BYTES, reads > chip.l2_bytes * lib.l2_usable
    loop = TileLoop(
        jobs=cores * 2 * pieces, load=values * lib.activation_bytes, store=values * h.bits / 8, store_missed=1.0,
        store_s=stored_s / pieces, work_s=float(vector_cycles(chip, values)) / chip.clock_hz,
        once=float(index) if missed else 0.0, load_missed=float(missed),
        depth=tiles_in_flight(target, step, widest),
    )  # fmt: skip
    seconds = lib.launch_s + loop.seconds(target)
    if not missed:  # indices come from HBM; the first rows come from the L2 meanwhile
        rate = min(chip.port_rate, chip.l2_rate / cores)
        first = index / min(rate, chip.hbm_rate / cores)
        seconds += first + max(0.0, chip.constants.hbm_latency_s - loop.load / rate)
    busy = {"OUT": rows / run * 2 * stored_s / chip.cores, "HBM": (reads + writes) / chip.hbm_rate}
    seconds = max(seconds, lib.launch_s + writes / chip.hbm_rate)
    return Timing(seconds, busy, reads + writes, reads + writes, choice="row scatter")
