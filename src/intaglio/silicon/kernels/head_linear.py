"""Chip kernel of the op `head_linear`: one matrix product for each head, as in latent attention (MLA)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import Target
from intaglio.ops import HeadLinear
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, deal_jobs, load, shifted, slices
from intaglio.silicon.kernels.kernel import WIDE, ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.product import bits_per_value, linear_timing
from intaglio.silicon.kernels.product_loop import product_seconds
from intaglio.silicon.kernels.product_steps import ProductLoop
from intaglio.silicon.kernels.rows import ROWS
from intaglio.silicon.kernels.tiled import (
    Codes,
    Finish,
    TileJob,
    product_streams,
    store_product,
)
from intaglio.silicon.kernels.tiling import Job, Tiling, split_steps, tile_jobs, tiling
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Stream, StreamBuilder
from intaglio.silicon.timing import Timing

COPY = "copy"  # label of the launch that copies columns


@chip_kernel(HeadLinear)
@dataclass(frozen=True)
class HeadLinearKernel(ChipKernel):
    """Chip kernel of the op `head_linear`, which multiplies each head of x by the head's own matrix.

    time() assumes that x is multiplied in bf16, or in FP32 if the activations of the target's kernel library have four
    bytes. streams() multiplies x in the format that x has in the chip's memory.

    Attributes:
        rows: number of rows of x, or the symbol that stands for it.
        heads: number of heads; each has a matrix [n, k].
        n, k: rows and columns of a head's matrix.
        w_format: number format of the weights.
        w_bits: bits of a weight, scales included; may be a fraction.
    """

    by_sequence: ClassVar[bool] = False
    rows: int | str
    heads: int
    n: int
    k: int
    w_format: str
    w_bits: float

    @classmethod
    def of(cls, op: HeadLinear, t: Tensors) -> HeadLinearKernel:
        w = t[op.w]
        heads, n, k = (int(d) for d in w.shape)
        return cls(t[op.x].shape[0], heads, n, k, formats.element(w.format), bits_per_value(w))

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        rows, out_bytes = sizes.rows_of(self.rows), target.library.activation_bytes
        if not rows:
            return Timing(0.0)
        x_format = "f32" if out_bytes >= WIDE else "bf16"
        how = x_format, self.w_format, self.w_bits, out_bytes
        found = linear_timing(target, rows, self.n, self.k, *how, heads=self.heads, prefetched=prefetched)
        if out_bytes < WIDE or prefetched:
            return found
        return replace(found, seconds=target.library.launch_s + stream_seconds(target, self, rows))

    @classmethod
    def streams(cls, mem: ChipMemory, op: HeadLinear, t: Tensors, batch: Batch) -> list[Stream]:
        """Returns a list of Streams that compute each head's product in tiles: one for each core with work.

        The matrix of a head multiplies the first k columns that the head has in x. If the head has more columns in x,
        they are copied unchanged behind the n columns of its product. The returned Streams do not copy them: this
        method itself does so first, with a kernel that it executes in `mem`.
        """
        x, out, w = mem.region(op.x), mem.region(op.out), mem.region(op.w)
        heads, n, depth = (int(d) for d in t[op.w].shape)
        wide, narrow = x.cols // heads, out.cols // heads
        if wide > depth:
            mem.run(copies(mem, op.site, x, out, heads, wide - depth), label=COPY)
        cut = tiling(mem.target, (x.rows, n, depth), x.format, w.format, bits_per_value(t[op.w]), heads=heads)
        jobs = []
        for job in head_jobs(x.rows, heads, n, depth, cut):
            h, columns = job.index, job.columns
            out_columns = shifted(columns, h * narrow)
            jobs.append(TileJob(job.rows, [w], [shifted(columns, h * n)], job.steps, out_columns, h * wide, h))

        def finisher(k: StreamBuilder) -> Finish:
            ring = k.ring(2, cut.drain_rows, cut.columns)
            return lambda job: store_product(k, job, out, [job.out], ring)

        return product_streams(mem, op.site, Codes(x, None, depth), cut, jobs, finisher)


def head_jobs(rows: int, heads: int, n: int, k: int, cut: Tiling) -> list[Job]:
    """Returns a list with one Job for each tile of each head's product, sorted by head.

    The product of a head is [rows, k] @ [k, n]. The `index` of a Job is the number of its head. K is not split,
    whatever `cut` says.
    """
    steps = split_steps(k, k, replace(cut, parts=1))
    return [replace(job, index=h) for h in range(heads) for job in tile_jobs(rows, n, steps, cut)]


@lru_cache(maxsize=65536)
def stream_seconds(target: Target, kernel: HeadLinearKernel, rows: int) -> float:
    """Returns the seconds that the streams take to multiply `rows` rows of x in FP32, for all heads, without launch."""
    n, k, heads = kernel.n, kernel.k, kernel.heads
    cut = tiling(target, (rows, n, k), "f32", kernel.w_format, kernel.w_bits, heads=heads)
    loop = ProductLoop(cut=cut, x_format="f32", w_format=kernel.w_format)
    return product_seconds(target, loop, head_jobs(rows, heads, n, k, cut))[0]


def copies(mem: ChipMemory, site: str, x: Region, out: Region, heads: int, width: int) -> list[Stream]:
    """Returns a list of Streams that copy the last `width` columns of each head of `x` to the same head of `out`.

    They become the last columns of the head in `out`. These columns are not multiplied by the head's matrix.
    """
    step = max(1, min(ROWS, mem.chip.sram_bytes // (3 * 4 * width)))

    def last(matrix: Region, head: int) -> slice:
        end = (head + 1) * (matrix.cols // heads)
        return slice(end - width, end)

    streams = []
    for k, mine in deal_jobs(mem.chip, [(r, h) for r in slices(x.rows, step) for h in range(heads)], site):
        ring = k.ring(2, step, width)
        for rows, h in mine:
            tile = load(k, ring.next(), x.part(rows, last(x, h)))
            k.emit(isa.Store(dst=out.part(rows, last(out, h)), src=tile))
        streams.append(k.stream())
    return streams
