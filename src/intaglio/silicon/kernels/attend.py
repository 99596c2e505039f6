"""Chip kernel of the op `attend`: FlashAttention (Dao et al. 2022) over a paged K/V cache.

A job is a tile of queries that iterates over tiles of keys. Long contexts of single queries are split into parts, whose
results are merged (flash decoding). Runs on the matrix array and the vector lanes, or on the fused attention engine of
a chip that has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import KernelLibrary, Target
from intaglio.ops import Attend
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import attend_cycles, matmul_cycles, softmax_cycles, vector_cycles
from intaglio.silicon.isa.softmax_step import NAME, step_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, deal_jobs, load, slices
from intaglio.silicon.kernels.kernel import ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.kv_write import Heads, emit_head_scales
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes, ChunkCounts
from intaglio.silicon.stream import Stream, StreamBuilder
from intaglio.silicon.timing import Timing, fraction_held


@chip_kernel(Attend)
@dataclass(frozen=True)
class AttendKernel(ChipKernel):
    """Chip kernel of `attend`: timing and instruction streams. A core takes a tile of queries of one head at a time."""

    heads: Heads

    @classmethod
    def of(cls, op: Attend, t: Tensors) -> AttendKernel:
        keys, values = t[op.k_cache], t[op.v_cache]
        d = sum(int(t[name].shape[3]) for name in key_parts(op))
        # With chunked attention a query sees at most `chunk` keys, with an indexer only the chosen ones. Both are timed
        # as a sliding window of so many keys.
        chosen = int(t[op.chosen].shape[1]) if op.chosen else 0
        window, bits = op.window or op.chunk or chosen, formats.bits(keys.format)
        kv_heads, dv = int(keys.shape[2]), int(values.shape[3])
        return cls(Heads(op.heads, kv_heads, d, dv, window, bits, bool(op.softcap)))

    def time(self, target: Target, sizes: BatchSizes, resident: bool) -> Timing:
        return attend_timing(target, self.heads, sizes.sequences)

    @classmethod
    def unsupported(cls, op: Attend, t: Tensors) -> str | None:
        if op.chosen is not None:
            return f"{op.site}: chip kernels do not attend to chosen positions (an indexer); run this model on the host"
        return None

    @classmethod
    def streams(cls, mem: ChipMemory, op: Attend, t: Tensors, batch: Batch) -> list[Stream]:
        q, out = mem.region(op.q), mem.region(op.out)
        kv_heads, dv = int(t[op.k_cache].shape[2]), int(t[op.v_cache].shape[3])
        d = sum(int(t[name].shape[3]) for name in key_parts(op))
        rows, step = largest_tile(mem.target, d, dv, mem.target.library.key_tile)
        jobs = [
            (s, h, piece)
            for s in range(len(batch.q_len)) for h in range(op.heads) for piece in query_tiles(op, batch, s, rows)
        ]  # fmt: skip
        streams = []
        for k, mine in deal_jobs(mem.chip, jobs, op.site):
            tiles = AttendTiles(
                k, rows, step, d, dv, mem.codes(op.k_cache).format, mem.region(op.sinks).format if op.sinks else "f32"
            )
            for s, h, piece in mine:
                first = int(batch.first_row[s])
                at = slice(first + piece.start, first + piece.stop)
                position = int(batch.context_len[s] - batch.q_len[s]) + piece.start
                low = int(op.first_seen(np.array(position)))
                part = load(k, tiles.q, q.part(at, slice(h * d, (h + 1) * d)))
                sums, m, length = init_softmax(mem, k, tiles, op, h, (part.rows, dv))
                slope = t[op.slopes].values[h] if op.slopes else 0.0
                for keys in slices(position + part.rows - low, step):
                    span = slice(low + keys.start, low + keys.stop)
                    slots = slots_of(batch, s, span) * kv_heads + h // (op.heads // kv_heads)
                    k_tile, v_tile = gather_kv(mem, k, tiles, op, slots, h // (op.heads // kv_heads))
                    how = {"query": position, "key": span.start, "keys": span.stop - span.start, "slope": slope}
                    attend_tile(mem, k, tiles, op, part, (sums, m, length), k_tile, v_tile, how)
                y = tiles.out.next().shaped(part.rows, dv)
                k.emit(isa.Merge(dst=y, sums=sums, m=m, l=length))
                k.emit(isa.Store(dst=out.part(at, slice(h * dv, (h + 1) * dv)), src=y))
            streams.append(k.stream())
        return streams


def tile_seconds(target: Target, h: Heads, rows: Any) -> Any:
    """Seconds that a core computes on one key tile with `rows` queries: two products and a softmax, or one fused pass.

    The library's softmax_overlap is the fraction of the softmax that overlaps with other rows' products.
    """
    chip, lib = target.chip, target.library
    rows, keys = np.maximum(lib.min_query_rows, rows), lib.key_tile
    if chip.att_lanes:
        return attend_cycles(target, rows, keys, h.head_dim, h.v_dim, "bf16") / chip.clock_hz
    run = product_format(target, h)
    products = matmul_cycles(target, rows, keys, h.head_dim, run) + matmul_cycles(target, rows, h.v_dim, keys, run)
    step = step_cycles if NAME in chip.extra_instructions else softmax_cycles
    softmax = step(chip, rows * keys, h.softcap) * (1 - lib.softmax_overlap)
    return (products + softmax) / chip.clock_hz


def product_format(target: Target, h: Heads) -> str:
    """Format in which a kernel multiplies queries by keys, and weights by values."""
    return "e4m3" if h.bits == 8 and target.library.kv_native else "bf16"


def widen_seconds(target: Target, h: Heads) -> float:
    """Seconds to convert one tile of 8-bit keys and values to bf16 on the vector lanes; 0 if none is needed."""
    chip, values = target.chip, target.library.key_tile * (h.head_dim + h.v_dim)
    needed = h.bits < 16 and not chip.att_lanes and product_format(target, h) == "bf16"
    return float(vector_cycles(chip, target.library.kv_dequant_ops * values)) / chip.clock_hz if needed else 0.0


def two_jobs_fit(target: Target, h: Heads) -> bool:
    """True if SRAM fits the key tiles of two jobs, each in the cache's format and in bf16.

    One job's tile can then be loaded while the other's is converted.
    """
    return 2 * target.library.key_tile * (h.head_dim + h.v_dim) * (h.bits / 8 + 2) <= target.chip.sram_bytes


def burst_overfetch(library: KernelLibrary, h: Heads) -> float:
    """Bytes that HBM transfers per byte of a key or value row; above 1 if a row is shorter than a burst."""
    return library.half_burst_cost if h.head_dim * h.bits // 8 < library.burst_bytes else 1.0


def makespan(seconds: np.ndarray, count: np.ndarray, cores: int) -> float:
    """Estimated seconds until the last core ends, if `count` jobs of `seconds` each are scheduled longest first.

    The largest of three lower bounds: the longest job, the total over the cores, and the two jobs that must share a
    core (the cores-th and the next one in descending order).
    """
    order = np.argsort(-seconds)
    seconds, count = seconds[order], count[order]
    ends = np.cumsum(count)
    even = float(seconds @ count) / cores
    if ends[-1] <= cores:
        return float(seconds[0])
    at = [seconds[int(np.searchsorted(ends, rank, side="right"))] for rank in (cores - 1, cores)]
    return max(float(seconds[0]), even, float(sum(at)))


def prefill_jobs(key_tile: int, h: Heads, part: ChunkCounts, rows: int, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    """The jobs of the chunks with several queries, as two arrays: key tiles of each kind of job, number of such jobs.

    A job is a tile of `rows` queries of one head or, if `packed`, of all query heads that share a K/V head. part:
    (queries, keys, number of sequences) of each distinct chunk.
    """
    tiles, count = [], []
    for q, keys, n in part:
        pack = h.group if packed else 1
        step = max(1, rows // pack)
        first = np.arange(0, q, step)
        last = np.minimum(first + step, q) + keys - q
        start = np.maximum(0, first + keys - q - h.window + 1) // key_tile if h.window else 0
        tiles.append(np.ceil(last / key_tile) - start)
        count.append(np.full(len(first), n * h.heads / pack))
    return np.concatenate(tiles), np.concatenate(count)


def prefill_seconds(target: Target, h: Heads, part: ChunkCounts) -> tuple[float, float, float]:
    """(seconds, of which compute seconds, jobs) of the chunks with several queries, with the fastest query tile.

    part: (queries, keys, number of sequences) of each distinct chunk.
    """
    chip, lib, best = target.chip, target.library, (np.inf, 0.0, 0.0)
    sizes = lib.fused_query_tiles if chip.att_lanes else lib.query_tiles
    choices = [(rows, packed) for rows in sizes for packed in ((False, True) if lib.pack_gqa else (False,))]
    for rows, packed in choices:
        tiles, count = prefill_jobs(lib.key_tile, h, part, rows, packed)
        work = float(tile_seconds(target, h, rows)) + widen_seconds(target, h) / 2
        load = lib.key_tile * (h.head_dim + h.v_dim) * h.bits / 8 * min(float(count.sum()), chip.cores) / chip.l2_rate
        # Start and end of a job. Another job on the same core overlaps half of it; a persistent kernel, all of it.
        edge = 2 * chip.constants.hbm_latency_s + rows * (h.head_dim + h.v_dim) * 2 * chip.cores / chip.l2_rate
        edge = 0.0 if lib.persistent else edge / 2
        seconds = makespan(tiles * max(work, load) + edge, count, chip.cores)
        best = min(best, (seconds, float(tiles @ count) * work / chip.cores, float(count.sum())))
    return best


def decode_keys(library: KernelLibrary, h: Heads, keys: int) -> int:
    """Number of keys that the query of a decoding sequence reads, of the `keys` keys in its context."""
    return min(keys, max(h.window, library.window_min_keys)) if h.window else keys


def decode_seconds(target: Target, h: Heads, part: ChunkCounts, cached: float) -> tuple[float, float, int, float]:
    """(seconds, of which compute seconds, number of context splits, jobs) for the chunks with one query.

    part: (1, keys, number of sequences) of each distinct chunk. cached: fraction of the keys and values in the L2.
    """
    chip, lib, best = target.chip, target.library, (np.inf, 0.0, 1, 0.0)
    latency_s = chip.constants.hbm_latency_s
    tiles = np.array([-(-decode_keys(lib, h, keys) // lib.key_tile) for _, keys, _ in part], float)
    group = h.group if lib.pack_windowed or not h.window else 1  # query heads of a job
    alone = h.group // group  # jobs that read the same keys: HBM delivers them once, the L2 to each
    n = np.array([count * h.kv_heads * alone for _, _, count in part], float)
    rows = 2.0 ** np.ceil(np.log2(max(lib.min_query_rows, group)))
    work = float(tile_seconds(target, h, rows))
    tile_bytes = lib.key_tile * (h.head_dim + h.v_dim) * h.bits / 8 * burst_overfetch(lib, h)
    slots = chip.cores * lib.decode_jobs
    ring = max(2.0, min(float(lib.decode_stages), chip.sram_bytes // (2 * tile_bytes)))
    results = float(n.sum()) * group * h.v_dim * 4
    for parts in lib.kv_splits if group > 1 or lib.split_mha else (1,):
        per = np.ceil(tiles / parts)
        count = n * np.ceil(tiles / per)
        active = min(float(count.sum()), slots)
        per_core = max(1.0, active / chip.cores)  # jobs on one core take turns
        memory = max(tile_bytes * active / alone * (1 - cached) / chip.hbm_rate, tile_bytes * active / chip.l2_rate)
        load = max(memory, tile_bytes * per_core / chip.port_rate)
        widen = widen_seconds(target, h) * per_core
        loaded = max(load, widen) if two_jobs_fit(target, h) else load + widen
        period = max(loaded, work * per_core, (load + work + latency_s) / ring)
        # The first tile's load overlaps with no conversion.
        first = 0.0 if lib.persistent else latency_s + load + widen - loaded
        seconds = makespan(per * period + first, count, slots) + latency_s
        if parts > 1:
            seconds += (lib.launch_s if lib.merge_launch else 0.0) + latency_s + 2 * parts * results / chip.hbm_rate
        best = min(best, (seconds, float(per @ count) * work / chip.cores, parts, float(count.sum())))
    return best


@lru_cache(maxsize=16384)
def attend_timing(target: Target, h: Heads, batch: ChunkCounts, warm: bool = False, kernel: str = "") -> Timing:
    """The Timing of one `attend` over all chunks of a batch.

    Chunks with several queries run first, then those with one. warm: True if keys and values are in the L2, as far as
    they fit. kernel: name of one of the library's attention kernels; "": the library's choice. Raises ChipError
    for an unknown kernel.
    """
    chip, lib = target.chip, target.library
    format = "bf16" if h.bits == 16 else "e4m3"
    on = {phase: target.kernel(phase, format, h.head_dim, kernel) for phase in ("prefill", "decode")}
    prefill, decode = tuple(p for p in batch if p[0] > 1), tuple(p for p in batch if p[0] == 1)
    seconds, compute, jobs, choices = lib.launch_s + chip.constants.hbm_latency_s, 0.0, 0.0, []
    tokens = sum(q * n for q, _, n in batch)
    read = sum(n * (decode_keys(lib, h, k) if q == 1 else min(k, q + h.window) if h.window else k) for q, k, n in batch)
    cache = read * h.kv_heads * (h.head_dim + h.v_dim) * h.bits / 8
    cached = fraction_held(cache, chip.l2_bytes * lib.l2_usable) if warm else 0.0
    if prefill:
        added, worked, jobs = prefill_seconds(on["prefill"], h, prefill)
        seconds, compute = seconds + added, compute + worked
        choices.append(f"{sum(q * n for q, _, n in prefill):,} queries in tiles")
    if decode:
        added, worked, splits, more = decode_seconds(on["decode"], h, decode, cached)
        seconds, compute, jobs = seconds + added, compute + worked, jobs + more
        choices.append(f"{sum(n for *_, n in decode):,} single queries, {splits} context splits")
    hbm = cache * (1 - cached) + tokens * h.heads * (h.head_dim + h.v_dim) * 2
    pairs = sum(n * scored_pairs(q, k, h.window) for q, k, n in batch)
    flops = 2.0 * h.heads * (h.head_dim + h.v_dim) * pairs
    seconds = max(seconds, lib.launch_s + hbm / chip.hbm_rate)
    engine = "ATT" if chip.att_lanes else "MXU"
    busy = {engine: compute, "HBM": hbm / chip.hbm_rate}
    run = "bf16" if chip.att_lanes else product_format(on["prefill" if prefill else "decode"], h)
    return Timing(seconds, busy, hbm, hbm, 0.0, flops, run, 0.0, ", ".join(choices), jobs=jobs)


def scored_pairs(q: int, keys: int, window: int) -> float:
    """Number of unmasked (query, key) pairs of one head, for q queries at the end of `keys` keys."""
    if not window:
        return q * keys - q * (q - 1) / 2
    return float(np.minimum(np.arange(keys - q + 1, keys + 1), window).sum())


def largest_tile(target: Target, d: int, dv: int, keys: int) -> tuple[int, int]:
    """(queries, keys) of the largest tile that fits accumulators (sums, scores) and SRAM (rings).

    keys: upper limit of its keys.
    """
    chip, rows = target.chip, max(target.library.query_tiles)
    while rows > 1 or keys > 1:
        sram = 4 * (rows * (d + 2 * dv + 2 * keys + 64) + keys * (3 * d + 3 * dv + 4))
        if sram <= chip.sram_bytes and rows * (dv + keys) * 4 + 128 <= chip.acc_bytes:
            break
        rows, keys = (rows // 2, keys) if rows > keys or keys == 1 else (rows, keys // 2)
    return rows, keys


class AttendTiles:
    """Tile buffers of one core: queries, the softmax's running sums, maxima and denominators, rings of keys, values."""

    def __init__(
        self, k: StreamBuilder, rows: int, keys: int, d: int, dv: int, format: str, sinks: str = "f32"
    ) -> None:
        self.q, self.out = k.tile(rows, d), k.ring(2, rows, dv)
        self.sums, self.scores = k.tile(rows, dv, "f32", "acc"), k.tile(rows, keys, "f32", "acc")
        self.m, self.length, self.alpha = (k.tile(rows, 1) for _ in range(3))
        self.p = k.ring(2, rows, keys)
        self.keys, self.values = k.ring(2, keys, d, format), k.ring(2, keys, dv, format)
        self.index = k.ring(2, 1, max(rows, keys), "i32")
        self.sink = None if sinks == "f32" else k.tile(rows, 1, sinks)
        if format in ("int8", "e4m3"):  # codes and scales are loaded, and dequantised to FP32 keys and values
            self.codes, self.scales = k.ring(2, keys, max(d, dv), format), k.ring(2, keys, 1)
            self.keys, self.values = k.ring(2, keys, d), k.ring(2, keys, dv)
            self.heads = k.ring(2, 1, keys, "i32")


def key_parts(op: Attend) -> list[str]:
    """A list of the caches whose columns, side by side, make a key: k_cache, with latent attention also rope_cache."""
    return [op.k_cache, *([op.rope_cache] if op.rope_cache else [])]


def query_tiles(op: Attend, batch: Batch, s: int, rows: int) -> list[slice]:
    """A list of the queries of sequence `s`, as slices of at most `rows`.

    With chunked attention (op.chunk) no tile crosses a chunk boundary, so that all queries of a tile see the same
    first key.
    """
    n, end = int(batch.q_len[s]), int(batch.context_len[s])
    edges = [i for i in range(1, n) if op.chunk and (end - n + i) % op.chunk == 0]
    runs = zip([0, *edges], [*edges, n], strict=True)
    return [slice(a + piece.start, a + piece.stop) for a, z in runs for piece in slices(z - a, rows)]


def slots_of(batch: Batch, s: int, span: slice) -> np.ndarray:
    """The K/V slots of the positions `span` of sequence `s`, an int64 array."""
    at = np.arange(span.start, span.stop)
    return batch.block_table[s, at // batch.block_size].astype(np.int64) * batch.block_size + at % batch.block_size


def init_softmax(
    mem: ChipMemory, k: StreamBuilder, tiles: AttendTiles, op: Attend, head: int, shape: tuple[int, int]
) -> tuple[Region, Region, Region]:
    """Initialise sums (0), m and l for a tile of queries of `head`, shape (queries, dv); returns the three regions.

    Without a sink m is -inf and l is 0. With one, m is the head's sink logit and l is 1: the sink counts as a key whose
    value is 0.
    """
    sums, m, length = tiles.sums.shaped(*shape), tiles.m.shaped(shape[0], 1), tiles.length.shaped(shape[0], 1)
    k.emit(isa.Fill(dst=sums, value=0.0))
    k.emit(isa.Fill(dst=length, value=1.0 if op.sinks else 0.0))
    if op.sinks is None:
        k.emit(isa.Fill(dst=m, value=float("-inf")))
        return sums, m, length
    sinks = mem.region(op.sinks)
    index = load(k, tiles.index.next().shaped(1, shape[0]), mem.put_indices(np.full(shape[0], head)))
    raw = m if tiles.sink is None else tiles.sink.shaped(shape[0], 1)
    k.emit(isa.Gather(dst=raw, table=sinks.shaped(sinks.cols, 1), index=index))
    if tiles.sink is not None:
        k.emit(isa.Convert(dst=m, src=raw))
    return sums, m, length


def gather_kv(
    mem: ChipMemory, k: StreamBuilder, tiles: AttendTiles, op: Attend, slots: np.ndarray, head: int
) -> tuple[Region, Region]:
    """Gather a tile of keys and a tile of values from the cache rows `slots`. Returns (keys, values).

    Both are dequantised if the cache is quantised. head: the K/V head, which has one scale if the cache is e4m3.
    """
    index = load(k, tiles.index.next(), mem.put_indices(slots))
    out = []
    for ring, names, own in (
        (tiles.keys, key_parts(op), op.k_scale),
        (tiles.values, [op.v_cache], op.v_scale),
    ):
        whole = ring.next().shaped(len(slots), sum(mem.codes(name).cols for name in names))
        done = 0
        for name in names:
            cache, scales = mem.codes(name), mem.scales(name)
            tile = whole.part(cols=slice(done, done + cache.cols))
            done += cache.cols
            if scales is None and cache.format != "e4m3":
                k.emit(isa.Gather(dst=tile, table=cache, index=index))
                continue
            codes, scale = tiles.codes.next().shaped(len(slots), cache.cols), tiles.scales.next().shaped(len(slots), 1)
            k.emit(isa.Gather(dst=codes, table=cache, index=index))
            if scales is not None:
                k.emit(isa.Gather(dst=scale, table=scales, index=index))
            else:
                emit_head_scales(mem, k, tiles.heads, scale, own, np.full(len(slots), head))
            k.emit(isa.Dequantise(dst=tile, codes=codes, scales=scale, group=cache.cols))
        out.append(whole)
    return out[0], out[1]


def attend_tile(
    mem: ChipMemory, k: StreamBuilder, tiles: AttendTiles, op: Attend, q: Region,
    state: tuple[Region, Region, Region], keys: Region, values: Region, how: dict[str, Any],
) -> None:  # fmt: skip
    """Emit the instructions for one tile of keys, which update `state` (the regions of sums, m, l). Returns nothing.

    On a chip with the fused engine that is one Attend; else Matmul, Softmax, Rescale and Matmul, or SoftmaxStep in
    place of the two in the middle if the chip has it. how: position fields of the instructions; the other fields are
    added.
    """
    sums, m, length = state
    how |= {"scale": op.scale, "softcap": op.softcap, "window": op.window}
    how |= {"temper": op.temper, "every": op.temper_every, "from_zero": not op.temper_from}
    if mem.chip.att_lanes:
        k.emit(isa.Attend(sums=sums, m=m, l=length, q=q, k=keys, v=values, **how))
        return
    scores, alpha = tiles.scores.shaped(q.rows, keys.rows), tiles.alpha.shaped(q.rows, 1)
    p = tiles.p.next().shaped(q.rows, keys.rows)
    k.emit(isa.Matmul(acc=scores, a=q, b=keys))
    if NAME in mem.chip.extra_instructions:
        k.emit(isa.SoftmaxStep(p=p, m=m, l=length, sums=sums, scores=scores, **how))
        k.emit(isa.Matmul(acc=sums, a=p, b=values, by_rows=True, accumulate=True))
        return
    k.emit(isa.Softmax(p=p, m=m, l=length, alpha=alpha, scores=scores, **how))
    k.emit(isa.Rescale(acc=sums, alpha=alpha))
    k.emit(isa.Matmul(acc=sums, a=p, b=values, by_rows=True, accumulate=True))
