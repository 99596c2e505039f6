"""Chip kernel of the op `kv_write`: writes a step's keys and values to their slots of the K/V cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import Target
from intaglio.ops import KvWrite
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, deal_jobs, load, slices
from intaglio.silicon.kernels.kernel import ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.rows import ROWS
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Ring, Stream, StreamBuilder
from intaglio.silicon.timing import Timing

QUOTIENT = postfix("a / b")


@dataclass(frozen=True)
class Heads:
    """What the time of an attention layer depends on: numbers and widths of heads, window, bits of a cached value.

    Attributes:
        heads: query heads.
        kv_heads: heads of keys and values.
        head_dim: width of a query and of a key.
        v_dim: width of a value.
        window: keys that a query sees at most; 0: all.
        bits: bits of a cached key or value.
        softcap: True if scores are soft-capped.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    window: int = 0
    bits: int = 16
    softcap: bool = False

    @property
    def group(self) -> int:
        """Number of query heads that share one K/V head."""
        return self.heads // self.kv_heads


@chip_kernel(KvWrite)
@dataclass(frozen=True)
class KvWriteKernel(ChipKernel):
    """Chip kernel of `kv_write`: rows are rounded to the cache's format and scattered, head by head."""

    by_sequence: ClassVar[bool] = False
    heads: Heads

    @classmethod
    def of(cls, op: KvWrite, t: Tensors) -> KvWriteKernel:
        keys, values = t[op.k_cache], t[op.v_cache]
        kv_heads, d, dv = int(keys.shape[2]), int(keys.shape[3]), int(values.shape[3])
        return cls(Heads(kv_heads, kv_heads, d, dv, bits=formats.bits(keys.format)))

    def time(self, target: Target, sizes: BatchSizes, resident: bool) -> Timing:
        return kv_write_timing(target, sizes.tokens, self.heads)

    @classmethod
    def streams(cls, mem: ChipMemory, op: KvWrite, t: Tensors, batch: Batch) -> list[Stream]:
        pairs = [
            (mem.region(x), mem.codes(name), mem.scales(name), own)
            for x, name, own in ((op.k, op.k_cache, op.k_scale), (op.v, op.v_cache, op.v_scale))
        ]
        width = max(source.cols for source, *_ in pairs)
        step = max(1, min(ROWS, mem.chip.sram_bytes // (64 * width)))
        jobs = [(*pair, rows) for pair in pairs for rows in slices(pair[0].rows, step)]
        streams = []
        for k, mine in deal_jobs(mem.chip, jobs, op.site):
            raw, index, scale = k.ring(2, step, width), k.ring(2, 1, step * width, "i32"), k.ring(2, step * width, 1)
            rounded = {cache: k.ring(2, step, width, cache.format) for _, cache, *_ in pairs}
            divided, order = k.ring(2, step, width), k.ring(2, 1, step * width, "i32")
            for source, cache, scales, own, rows in mine:
                a, heads = load(k, raw.next(), source.part(rows)), source.cols // cache.cols
                y = rounded[cache].next().shaped(a.rows * heads, cache.cols)
                where = batch.slots[rows, None].astype(np.int64) * heads + np.arange(heads)
                at = load(k, index.next(), mem.put_indices(where.reshape(-1)))
                if scales is None:
                    x = a.shaped(y.rows, y.cols)
                    if own is not None and cache.format == "e4m3":
                        z, x = scale.next().shaped(y.rows, 1), divided.next().shaped(y.rows, y.cols)
                        emit_head_scales(mem, k, order, z, own, np.tile(np.arange(heads), a.rows))
                        k.emit(isa.Map(dst=x, a=a.shaped(y.rows, y.cols), b=z, steps=QUOTIENT))
                    k.emit(isa.Convert(dst=y, src=x))
                else:
                    z = scale.next().shaped(y.rows, 1)
                    k.emit(isa.Quantise(codes=y, scale=z, x=a.shaped(y.rows, y.cols), for_cache=True))
                    k.emit(isa.Scatter(table=scales, src=z, index=at))
                k.emit(isa.Scatter(table=cache, src=y, index=at))
            streams.append(k.stream())
        return streams


def emit_head_scales(
    mem: ChipMemory, k: StreamBuilder, ring: Ring, dst: Region, name: str | None, heads: np.ndarray
) -> None:
    """Emit instructions that fill `dst`, f32 [n, 1], with the scale of each row's head in an e4m3 cache.

    ring: tiles for the indices. name: the op's operand of scales; None: all scales are 1. heads: the head of each row.
    """
    if name is None:
        k.emit(isa.Fill(dst=dst, value=1.0))
        return
    scales, index = mem.region(name), load(k, ring.next().shaped(1, len(heads)), mem.put_indices(heads))
    k.emit(isa.Gather(dst=dst, table=scales.shaped(scales.cols, 1), index=index))


def kv_write_timing(target: Target, tokens: int, h: Heads) -> Timing:
    """The Timing of writing keys and values of `tokens` tokens to their slots, one row of one head at a time."""
    chip, library = target.chip, target.library
    moved = tokens * h.kv_heads * (h.head_dim + h.v_dim) * (2 + h.bits / 8)
    # Cycles to round one value: by the kernel, or by the vector lanes, two operations each, before a DMA scatter.
    value_cycles = library.kv_quant_cycles or 2 / chip.vec_lanes
    cycles = 2 * library.kv_row_cycles + (value_cycles * (h.head_dim + h.v_dim) if h.bits < 16 else 0)
    stores = tokens * h.kv_heads * cycles / chip.cores / chip.clock_hz
    seconds = library.launch_s + chip.constants.hbm_latency_s + max(moved / chip.hbm_rate, stores)
    return Timing(seconds, {"OUT": stores, "HBM": moved / chip.hbm_rate}, moved, moved, choice="row scatter")
