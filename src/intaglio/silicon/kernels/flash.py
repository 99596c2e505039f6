"""Kernels of attention: keys and values into their pages, and flash attention over pages, on array and lanes or on the
fused engine where a chip has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from intaglio.batch import Batch
from intaglio.chips import ChipSpec
from intaglio.ops import Attend, KvWrite, Tensor
from intaglio.silicon import instructions as do
from intaglio.silicon.fused import NAME, SoftmaxStep
from intaglio.silicon.kernel import Kernel, Stream
from intaglio.silicon.kernels.attention import KEYS, QUERIES
from intaglio.silicon.kernels.board import Board, deal, kernel, pieces
from intaglio.silicon.kernels.dense import ROWS, load
from intaglio.silicon.memory import Region

Tensors = Mapping[str, Tensor]


@kernel("kv_write")
def kv_write(b: Board, op: KvWrite, t: Tensors, batch: Batch) -> list[Stream]:
    """Rows of tokens, rounded to the cache's format, then scattered head by head."""
    pairs = [(b.at(x), b.codes(name), b.scales(name)) for x, name in ((op.k, op.k_cache), (op.v, op.v_cache))]
    width = max(source.cols for source, *_ in pairs)
    step = max(1, min(ROWS, b.spec.sram_bytes // (64 * width)))
    jobs = [(source, cache, scales, rows) for source, cache, scales in pairs for rows in pieces(source.rows, step)]
    streams = []
    for k, mine in deal(b.spec, jobs, op.site):
        raw, index, scale = k.ring(2, step, width), k.ring(2, 1, step * width, "i32"), k.ring(2, step * width, 1)
        rounded = {cache: k.ring(2, step, width, cache.format) for _, cache, _ in pairs}
        for source, cache, scales, rows in mine:
            a, heads = load(k, raw.next(), source.part(rows)), source.cols // cache.cols
            y = rounded[cache].next().shaped(a.rows * heads, cache.cols)
            where = batch.slots[rows, None].astype(np.int64) * heads + np.arange(heads)
            at = load(k, index.next(), b.table(where.reshape(-1)))
            if scales is None:
                k.do(do.Convert(dst=y, src=a.shaped(y.rows, y.cols)))
            else:
                z = scale.next().shaped(y.rows, 1)
                k.do(do.Quantise(codes=y, scale=z, x=a.shaped(y.rows, y.cols), kept=True))
                k.do(do.Scatter(table=scales, src=z, index=at))
            k.do(do.Scatter(table=cache, src=y, index=at))
        streams.append(k.stream())
    return streams


def tile_that_fits(spec: ChipSpec, d: int, dv: int, keys: int) -> tuple[int, int]:
    """Queries and keys of the largest tile whose sums and scores the accumulators hold, and whose rings SRAM holds."""
    rows = max(QUERIES)
    while rows > 1 or keys > 1:
        sram = 4 * (rows * (d + 2 * dv + 2 * keys + 64) + keys * (3 * d + 3 * dv + 4))
        if sram <= spec.sram_bytes and rows * (dv + keys) * 4 + 128 <= spec.acc_bytes:
            break
        rows, keys = (rows // 2, keys) if rows > keys or keys == 1 else (rows, keys // 2)
    return rows, keys


class Tiles:
    """What one core needs for a tile of queries: q, the running sums, maxima and lengths, keys and values in rings."""

    def __init__(self, k: Kernel, rows: int, keys: int, d: int, dv: int, format: str, sinks: str = "f32") -> None:
        self.q, self.out = k.tile(rows, d), k.ring(2, rows, dv)
        self.sums, self.scores = k.tile(rows, dv, "f32", "acc"), k.tile(rows, keys, "f32", "acc")
        self.m, self.length, self.alpha = (k.tile(rows, 1) for _ in range(3))
        self.p = k.ring(2, rows, keys)
        self.keys, self.values = k.ring(2, keys, d, format), k.ring(2, keys, dv, format)
        self.index = k.ring(2, 1, max(rows, keys), "i32")
        self.sink = None if sinks == "f32" else k.tile(rows, 1, sinks)
        if format == "int8":  # with scales: codes and scales come in, values of FP32 are worked on
            self.codes, self.scales = k.ring(2, keys, max(d, dv), format), k.ring(2, keys, 1)
            self.keys, self.values = k.ring(2, keys, d), k.ring(2, keys, dv)


@kernel("attend")
def attend(b: Board, op: Attend, t: Tensors, batch: Batch) -> list[Stream]:
    """A job is a tile of queries of one head of one sequence; it walks over tiles of keys gathered from pages."""
    q, out = b.at(op.q), b.at(op.out)
    kv_heads, dv = int(t[op.k_cache].shape[2]), int(t[op.v_cache].shape[3])
    d = sum(int(t[name].shape[3]) for name in key_parts(op))
    rows, step = tile_that_fits(b.spec, d, dv, KEYS[b.spec.flash])
    jobs = [
        (s, h, piece)
        for s in range(len(batch.q_len)) for h in range(op.heads) for piece in queries(op, batch, s, rows)
    ]  # fmt: skip
    streams = []
    for k, mine in deal(b.spec, jobs, op.site):
        tiles = Tiles(k, rows, step, d, dv, b.codes(op.k_cache).format, b.at(op.sinks).format if op.sinks else "f32")
        for s, h, piece in mine:
            first = int(batch.first_row[s])
            at = slice(first + piece.start, first + piece.stop)
            position = int(batch.context_len[s] - batch.q_len[s]) + piece.start
            low = int(op.first_seen(np.array(position)))
            part = load(k, tiles.q, q.part(at, slice(h * d, (h + 1) * d)))
            sums, m, length = start(b, k, tiles, op, h, (part.rows, dv))
            for keys in pieces(position + part.rows - low, step):
                span = slice(low + keys.start, low + keys.stop)
                where = pages(batch, s, span) * kv_heads + h // (op.heads // kv_heads)
                k_tile, v_tile = gather(b, k, tiles, op, where)
                how = {"query": position, "key": span.start, "keys": span.stop - span.start}
                one_step(b, k, tiles, op, part, (sums, m, length), k_tile, v_tile, how)
            y = tiles.out.next().shaped(part.rows, dv)
            k.do(do.Merge(dst=y, sums=sums, m=m, l=length))
            k.do(do.Store(dst=out.part(at, slice(h * dv, (h + 1) * dv)), src=y))
        streams.append(k.stream())
    return streams


def key_parts(op: Attend) -> list[str]:
    """The caches whose rows, one after the other, are a key."""
    return [op.k_cache, *([op.rope_cache] if op.rope_cache else [])]


def queries(op: Attend, batch: Batch, s: int, rows: int) -> list[slice]:
    """A sequence's queries in tiles, none of which crosses from one chunk of positions to the next: within one, all
    queries see keys from the same first one on."""
    n, end = int(batch.q_len[s]), int(batch.context_len[s])
    edges = [i for i in range(1, n) if op.chunk and (end - n + i) % op.chunk == 0]
    runs = zip([0, *edges], [*edges, n], strict=True)
    return [slice(a + piece.start, a + piece.stop) for a, z in runs for piece in pieces(z - a, rows)]


def pages(batch: Batch, s: int, span: slice) -> np.ndarray:
    """The slots of a sequence's positions."""
    at = np.arange(span.start, span.stop)
    return batch.block_table[s, at // batch.block_size].astype(np.int64) * batch.block_size + at % batch.block_size


def start(
    b: Board, k: Kernel, tiles: Tiles, op: Attend, head: int, shape: tuple[int, int]
) -> tuple[Region, Region, Region]:
    """Sums and lengths of nothing, a maximum below everything; or a sink alone, whose value is nothing."""
    sums, m, length = tiles.sums.shaped(*shape), tiles.m.shaped(shape[0], 1), tiles.length.shaped(shape[0], 1)
    k.do(do.Fill(dst=sums, value=0.0))
    k.do(do.Fill(dst=length, value=1.0 if op.sinks else 0.0))
    if op.sinks is None:
        k.do(do.Fill(dst=m, value=float("-inf")))
        return sums, m, length
    sinks = b.at(op.sinks)
    index = load(k, tiles.index.next().shaped(1, shape[0]), b.table(np.full(shape[0], head)))
    raw = m if tiles.sink is None else tiles.sink.shaped(shape[0], 1)
    k.do(do.Gather(dst=raw, table=sinks.shaped(sinks.cols, 1), index=index))
    if tiles.sink is not None:
        k.do(do.Convert(dst=m, src=raw))
    return sums, m, length


def gather(b: Board, k: Kernel, tiles: Tiles, op: Attend, where: np.ndarray) -> tuple[Region, Region]:
    """A tile of keys and one of values from their pages."""
    index = load(k, tiles.index.next(), b.table(where))
    out = []
    for ring, names in ((tiles.keys, key_parts(op)), (tiles.values, [op.v_cache])):
        whole = ring.next().shaped(len(where), sum(b.codes(name).cols for name in names))
        done = 0
        for name in names:
            cache, scales = b.codes(name), b.scales(name)
            tile = whole.part(cols=slice(done, done + cache.cols))
            done += cache.cols
            if scales is None:
                k.do(do.Gather(dst=tile, table=cache, index=index))
                continue
            codes, scale = tiles.codes.next().shaped(len(where), cache.cols), tiles.scales.next().shaped(len(where), 1)
            k.do(do.Gather(dst=codes, table=cache, index=index))
            k.do(do.Gather(dst=scale, table=scales, index=index))
            k.do(do.Dequantise(dst=tile, codes=codes, scales=scale, group=cache.cols))
        out.append(whole)
    return out[0], out[1]


def one_step(
    b: Board, k: Kernel, tiles: Tiles, op: Attend, q: Region, state: tuple[Region, Region, Region], keys: Region,
    values: Region, how: dict[str, Any],
) -> None:  # fmt: skip
    """One tile of keys: by the fused engine, or product, softmax, rescale, product."""
    sums, m, length = state
    how |= {"scale": op.scale, "softcap": op.softcap, "window": op.window}
    how |= {"temper": op.temper, "every": op.temper_every}
    if b.spec.att_lanes:
        k.do(do.Attend(sums=sums, m=m, l=length, q=q, k=keys, v=values, **how))
        return
    scores, alpha = tiles.scores.shaped(q.rows, keys.rows), tiles.alpha.shaped(q.rows, 1)
    p = tiles.p.next().shaped(q.rows, keys.rows)
    k.do(do.Matmul(acc=scores, a=q, b=keys))
    if NAME in b.spec.extra:
        k.do(SoftmaxStep(p=p, m=m, l=length, sums=sums, scores=scores, **how))
        k.do(do.Matmul(acc=sums, a=p, b=values, by_rows=True, accumulate=True))
        return
    k.do(do.Softmax(p=p, m=m, l=length, alpha=alpha, scores=scores, **how))
    k.do(do.Rescale(acc=sums, alpha=alpha))
    k.do(do.Matmul(acc=sums, a=p, b=values, by_rows=True, accumulate=True))
