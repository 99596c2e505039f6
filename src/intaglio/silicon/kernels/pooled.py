"""Chip kernel of the op `pool_keys` of compressed attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import Target
from intaglio.ops import PoolKeys
from intaglio.ops.pooled import closers
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import norm_cycles, pool_cycles, vector_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load, slices
from intaglio.silicon.kernels.kernel import ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.rows import INDEX_BYTES, ring_depth, runs
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Stream, StreamBuilder
from intaglio.silicon.tile_loop import TileLoop
from intaglio.silicon.timing import Timing


@chip_kernel(PoolKeys)
@dataclass(frozen=True)
class PoolKeysKernel(ChipKernel):
    """Chip kernel of the op `pool_keys`: pools what two caches hold of a run of consecutive tokens into one entry.

    A core computes one entry at a time. It gathers the tokens' rows of the value cache and of the gate cache by index
    and pools them.

    Attributes:
        every: number of tokens in a run.
        overlap: True if the rows of the run before are pooled too.
        head_dim: number of columns of an entry.
        pairs: number of column pairs that rope rotates.
        bits: bits of a value in the caches.
    """

    every: int
    overlap: bool
    head_dim: int
    pairs: int
    bits: int

    @classmethod
    def of(cls, op: PoolKeys, t: Tensors) -> PoolKeysKernel:
        entries, pairs = t[op.entries], int(t[op.frequencies].shape[0])
        return cls(op.every, op.overlap, int(entries.shape[3]), pairs, formats.bits(entries.format))

    @property
    def pooled(self) -> int:
        """The largest number of rows of each cache that are pooled into one entry.

        With `overlap`, the first entry of a sequence is pooled from only half this number of rows, since no run of
        tokens precedes it.
        """
        return self.every * (1 + self.overlap)

    def plan(self, target: Target) -> tuple[int, int]:
        """Returns (number of columns of a tile, number of tiles that each circular buffer in SRAM holds).

        A tile is as wide as an entry if SRAM then has room for at least two tiles in each buffer. Otherwise its number
        of columns is halved until SRAM has room for two tiles, or until one column is left.
        """
        step = self.head_dim
        while True:
            columns = *(self.pooled * step,) * 3, *(self.head_dim,) * 4
            load = self.pooled * step * (2 * self.bits / 8 + 4)
            depth = ring_depth(target, columns, load, 8.0 * self.head_dim)
            if depth > 1 or step == 1:
                return step, depth
            step = -(-step // 2)

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        chip, lib = target.chip, target.library
        jobs = sum(n * (keys // self.every - (keys - q) // self.every) for q, keys, n in sizes.sequences)
        if not jobs:
            return Timing(0.0)
        step, depth = self.plan(target)
        gathered = 2 * self.pooled * self.head_dim * self.bits / 8
        load, store = gathered + 4.0 * self.pooled * self.head_dim, self.head_dim * self.bits / 8
        cycles = pool_cycles(chip, self.pooled * self.head_dim) + norm_cycles(chip, self.head_dim)
        cycles += vector_cycles(chip, (3 + (self.bits < 32)) * self.head_dim, 2 * self.pairs)
        pieces = [(c.stop - c.start) / self.head_dim for c in slices(self.head_dim, step)]
        loop = TileLoop(
            jobs=jobs, load=load, store=store, work_s=float(cycles) / len(pieces) / chip.clock_hz, depth=depth,
            once=4.0 * (self.head_dim + self.pairs) + -(-jobs // chip.cores) * (self.pooled + 2) * INDEX_BYTES,
            pieces=tuple(pieces), one_ring=True, load_missed=gathered / load if chip.l2_bytes else 1.0,
            store_missed=1.0, wait_s=chip.constants.hbm_latency_s,
        )  # fmt: skip
        seconds = lib.launch_s + chip.constants.hbm_latency_s + loop.seconds(target)  # indices come first
        hbm, moved = jobs * (gathered + store) + 4.0 * self.pooled * self.head_dim, jobs * (load + store)
        busy = {"VEC": jobs * float(cycles) / chip.clock_hz / chip.cores, "HBM": hbm / chip.hbm_rate}
        return Timing(seconds, busy, hbm, moved)

    @classmethod
    def streams(cls, mem: ChipMemory, op: PoolKeys, t: Tensors, batch: Batch) -> list[Stream]:
        kernel, jobs = cls.of(op, t), closers(batch, op.every)
        values, gates, entries = mem.region(op.value_cache), mem.region(op.gate_cache), mem.region(op.entries)
        bias, d, m = mem.region(op.bias), kernel.head_dim, kernel.pooled
        bias = bias.shaped(op.every, bias.rows * bias.cols // op.every)
        step, depth = kernel.plan(mem.target)
        streams = []
        for run in runs(mem, len(jobs)):
            k, mine = StreamBuilder(op.site), [jobs[i] for i in run]
            rows = [cache_rows(op, batch, *job) for job in mine]
            at = np.array([batch.positions[row] for _, row in mine], np.int64)
            pages = np.array([batch.slots[row] for _, row in mine], np.int64) // batch.block_size
            places = pages * -(-batch.block_size // op.every) + at % batch.block_size // op.every
            numbers = np.concatenate([places, at + 1 - op.every, *rows])
            index = load(k, k.tile(1, len(numbers), "i32"), mem.put_indices(numbers))
            weight, frequencies = (
                load(k, k.tile(1, r.cols, r.format), r) for r in (mem.region(op.weight), mem.region(op.frequencies))
            )
            x, g = (k.ring(depth, m, step, values.format) for _ in range(2))
            b, y, z, turned = k.ring(depth, m, step), *(k.ring(depth, 1, d) for _ in range(3))
            rounded, taken = k.ring(depth, 1, d, entries.format), 2 * len(mine)
            for i, chosen in enumerate(rows):
                count, sums = len(chosen), y.next()
                which, taken = index.part(cols=slice(taken, taken + count)), taken + count
                for cols in slices(d, step):
                    tiles = [ring.next().shaped(count, cols.stop - cols.start) for ring in (x, g, b)]
                    k.emit(isa.Gather(dst=tiles[0], table=values.part(cols=cols), index=which))
                    k.emit(isa.Gather(dst=tiles[1], table=gates.part(cols=cols), index=which))
                    for half in range(count // op.every):  # the first half is of the run before
                        first = (half if count == m else half + m // op.every - 1) * d
                        source = bias.part(cols=slice(first + cols.start, first + cols.stop))
                        to = tiles[2].part(slice(half * op.every, (half + 1) * op.every))
                        k.emit(isa.Load(dst=to, src=source))
                    k.emit(isa.Pool(dst=sums.part(cols=cols), x=tiles[0], gates=tiles[1], bias=tiles[2]))
                one, norm, out = z.next(), turned.next(), rounded.next()
                k.emit(isa.Norm(dst=one, x=sums, weight=weight, eps=op.eps, span=d))
                position = index.part(cols=slice(len(mine) + i, len(mine) + i + 1))
                how: dict[str, Any] = {"head_dim": d, "style": "interleaved", "factor": op.factor, "trailing": True}
                k.emit(isa.Rope(dst=norm, x=one, positions=position, frequencies=frequencies, **how))
                if entries.format == "f32":
                    out = norm
                else:
                    k.emit(isa.Convert(dst=out, src=norm))
                k.emit(isa.Scatter(table=entries, src=out, index=index.part(cols=slice(i, i + 1))))
            streams.append(k.stream())
        return streams


def cache_rows(op: PoolKeys, batch: Batch, sequence: int, row: int) -> np.ndarray:
    """Returns the numbers of the cache rows that are pooled into one entry, as int64 [n].

    The numbers hold for both caches, each of which has one row for each slot and head. The entry belongs to the run of
    tokens that ends with the token in row `row` of the step. sequence: number of this token's sequence.
    """
    table, at, n = batch.of_windows.block_table[sequence], int(batch.positions[row]), 1 + op.overlap
    taken = np.arange(max(0, at + 1 - n * op.every), at + 1)
    slots = table[taken // batch.block_size].astype(np.int64) * batch.block_size + taken % batch.block_size
    return np.asarray(slots * n + np.where(taken > at - op.every, n - 1, 0))
