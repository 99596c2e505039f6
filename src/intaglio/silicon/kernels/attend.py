"""Chip kernel of the op `attend`: FlashAttention (Dao et al. 2022) over a paged K/V cache.

A job is a tile of queries that iterates over tiles of keys. Long contexts of single queries are split into parts, whose
results are merged (flash decoding). Runs on matrix array and vector lanes, or on the fused attention engine if there is
one. Tiles and plans are those of attend_tiles.py and attend_plan.py; the closed form is in attend_loop.py. Attention to
chosen positions is in attend_chosen.py. Long because prefill, decode and the merge of split contexts use the same jobs,
tile buffers and instructions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import Target
from intaglio.ops import Attend
from intaglio.silicon import isa
from intaglio.silicon.isa.softmax_step import NAME
from intaglio.silicon.kernels.attend_chosen import chosen_seconds, chosen_streams
from intaglio.silicon.kernels.attend_plan import decode_plan, prefill_plan
from intaglio.silicon.kernels.attend_tiles import (
    LISTED,
    AttendPlan,
    deal,
    decode_keys,
    product_format,
    tile_seconds,
)
from intaglio.silicon.kernels.chip_memory import ChipMemory, deal_jobs, load, rows_of, shifted, slices
from intaglio.silicon.kernels.kernel import WIDE, ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.kv_write import Heads, emit_head_scales
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes, ChunkCounts, sizes_of
from intaglio.silicon.stream import Stream, StreamBuilder
from intaglio.silicon.timing import Timing, fraction_held


@chip_kernel(Attend)
@dataclass(frozen=True)
class AttendKernel(ChipKernel):
    """Kernel of the op `attend` on simulated chips: its modelled time, and its instruction streams.

    The attention is divided into jobs. Each core does its jobs one after the other.
    """

    heads: Heads
    chosen: int = 0  # places of a token's list of positions; 0: there is none

    @classmethod
    def of(cls, op: Attend, t: Tensors) -> AttendKernel:
        keys, values = t[op.k_cache], t[op.v_cache]
        d = sum(int(t[name].shape[3]) for name in key_parts(op))
        # With chunked attention a query sees at most `chunk` keys, with an indexer only the chosen ones. Both are timed
        # as a sliding window of so many keys.
        chosen = int(t[op.chosen].shape[1]) if op.chosen else 0
        window, bits = op.window or op.chunk or chosen, formats.bits(keys.format)
        kv_heads, dv = int(keys.shape[2]), int(values.shape[3])
        in_keys = op.v_cache in key_parts(op)
        h = Heads(op.heads, kv_heads, d, dv, window, bits, bool(op.softcap), op.slopes is not None, in_keys)
        return cls(h, chosen)

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        timing = attend_timing(target, self.heads, sizes.sequences)
        if not self.chosen or target.library.activation_bytes < WIDE:
            return timing
        seconds = chosen_seconds(target, self.heads, self.chosen, sizes.sequences)
        return replace(timing, seconds=seconds + target.library.launch_s)

    @classmethod
    def unsupported(cls, op: Attend, t: Tensors) -> str | None:
        extras = op.window, op.chunk, op.softcap, op.sinks, op.slopes
        if op.chosen is not None and (any(extras) or t[op.k_cache].format not in ("f32", "bf16")):
            return (
                f"{op.site}: chip kernels attend to chosen positions of an f32 or bf16 cache, without window, chunk, "
                "softcap, sinks and slopes"
            )
        return None

    @classmethod
    def streams(cls, mem: ChipMemory, op: Attend, t: Tensors, batch: Batch) -> list[Stream]:
        """Returns the Streams (instruction sequences) of the op's last launch: a list with one for each core with work.

        The attention takes up to three launches, in this order: sequences with several new tokens; sequences with one
        new token; the merge of contexts that were split. This method executes all launches but the last in `mem`
        itself. The caller must run the returned Streams, which complete the attention.
        """
        h, on = cls.of(op, t).heads, mem.target.with_library(activation_bytes=WIDE)
        if op.chosen:
            return chosen_streams(mem, on, op, h, batch)
        launches: list[list[Stream]] = []
        chunks = sizes_of(batch).sequences
        prefill, decode = (tuple(p for p in chunks if (p[0] > 1) == several) for several in (True, False))
        if prefill:
            mine = on.kernel("prefill", h.format, h.head_dim)
            plan, least = prefill_plan(mine, h, prefill)[3], mine.library.prefill_window_keys
            chunked = [s for s in range(len(batch.q_len)) if batch.q_len[s] > 1]
            jobs = [j for s in chunked for j in prefill_work(op, h, batch, s, plan, least)]
            launches.append(attend_streams(mem, mine, op, t, batch, plan, jobs))
            if decode:
                mem.run(launches.pop(), mem.target.kernel("prefill", h.format, h.head_dim))
        if decode:
            mine = on.kernel("decode", h.format, h.head_dim)
            plan = decode_plan(mine, h, decode, 0.0)[3]
            tokens = [s for s in range(len(batch.q_len)) if batch.q_len[s] == 1]
            jobs = [j for s in tokens for j in decode_work(op, h, batch, s, plan, mine)]
            if not any(j.parts > 1 for j in jobs):
                launches.append(attend_streams(mem, mine, op, t, batch, plan, jobs))
            else:
                launches += split_streams(mem, mine, op, t, batch, plan, jobs)
        for streams in launches[:-1]:
            mem.run(streams, mem.target.kernel("decode", h.format, h.head_dim))
        return launches[-1]

    @classmethod
    def runs_on(cls, target: Target, op: Attend, t: Tensors, batch: Batch) -> Target:
        if op.chosen:
            return target
        h = cls.of(op, t).heads
        phase = "decode" if min(batch.q_len) == 1 else "prefill"
        return target.kernel(phase, h.format, h.head_dim)


@lru_cache(maxsize=16384)
def attend_timing(target: Target, h: Heads, batch: ChunkCounts, warm: bool = False, kernel: str = "") -> Timing:
    """Returns the Timing of one `attend` op over a batch.

    The sequences with several new tokens (prefill) are computed first, then the sequences with one new token (decode).

    batch: (new tokens, context length, number of such sequences) for each distinct pair of the first two. warm: True if
    the L2 holds the keys and values at the start, as far as they fit. kernel: name of an attention kernel that the
    library describes; "": the library chooses. Raises ChipError if the library describes kernels but none with this
    name.
    """
    chip, lib = target.chip, target.library
    on = {phase: target.kernel(phase, h.format, h.head_dim, kernel) for phase in ("prefill", "decode")}
    prefill, decode = tuple(p for p in batch if p[0] > 1), tuple(p for p in batch if p[0] == 1)
    seconds, compute, jobs, again, choices = lib.launch_s, 0.0, 0.0, 0.0, []
    tokens = sum(q * n for q, _, n in batch)
    read = sum(
        n * (decode_keys(lib, h.window, k) if q == 1 else min(k, q + h.window) if h.window else k) for q, k, n in batch
    )
    cache = read * h.kv_heads * h.kv_width(lib) * h.bits / 8 * h.hbm_part(target)
    cached = fraction_held(cache, chip.l2_bytes * lib.l2_usable) if warm else 0.0
    if prefill:
        added, worked, jobs, _, again = prefill_plan(on["prefill"], h, prefill)
        seconds, compute = seconds + added, compute + worked
        choices.append(f"{sum(q * n for q, _, n in prefill):,} queries in tiles")
    if decode:
        added, worked, more, plan = decode_plan(on["decode"], h, decode, cached)
        seconds, compute, jobs = seconds + added, compute + worked, jobs + more
        choices.append(f"{sum(n for *_, n in decode):,} single queries, {plan.parts} context splits")
    rows = float(tokens * h.heads * (h.head_dim + h.v_dim) * lib.activation_bytes)  # queries and results
    if lib.activation_bytes >= WIDE:  # the simulator's L2 holds them as far as they fit
        rows = max(0.0, rows - chip.l2_bytes * lib.l2_usable)
    hbm = cache * (1 - cached) + again + rows
    pairs = sum(n * scored_pairs(q, k, h.window) for q, k, n in batch)
    flops = 2.0 * h.heads * (h.head_dim + h.v_dim) * pairs
    if lib.activation_bytes < WIDE:  # streams count the bytes of each transfer
        seconds = max(seconds, lib.launch_s + hbm / chip.hbm_rate)
    engine = "ATT" if chip.att_lanes else "MXU"
    busy = {engine: compute, "HBM": hbm / chip.hbm_rate}
    run = "bf16" if chip.att_lanes else product_format(on["prefill" if prefill else "decode"], h)
    return Timing(seconds, busy, hbm, hbm, 0.0, flops, run, 0.0, ", ".join(choices), jobs=jobs)


def scored_pairs(q: int, keys: int, window: int) -> float:
    """Returns the number of (query, key) pairs of one head that are not masked.

    q: number of queries; they are the last `q` of the `keys` tokens. window: number of latest keys that a query sees;
    0: it sees all keys up to its own position.
    """
    return float(np.minimum(np.arange(keys - q + 1, keys + 1), window or keys).sum())


@dataclass(frozen=True)
class Job:
    """One job of a core: attention of some queries of one sequence to a range of keys, for some heads.

    Attributes:
        s: number of the sequence in the batch.
        head: the first query head. The job computes plan.pack heads, from this head on.
        rows: the queries, as a slice of the sequence's new tokens.
        low, high: the job's keys are those at the positions low .. high - 1.
        part: if the context is split into parts, the number of the part that the job computes; else 0.
        parts: number of parts into which the context is split; 1 if it is not split.
    """

    s: int
    head: int
    rows: slice
    low: int
    high: int
    part: int = 0
    parts: int = 1


def prefill_work(op: Attend, h: Heads, batch: Batch, s: int, plan: AttendPlan, least: int = 1) -> list[Job]:
    """Returns a list of the Jobs for one sequence with several new tokens. s: number of the sequence in the batch.

    The queries are cut into tiles. Each tile has h.heads / plan.pack Jobs, since a Job computes plan.pack query heads.
    The Jobs of the last queries come first: they load the most keys, so the later Jobs find their keys in the L2.

    least: smallest number of keys to process for a query. If the window is smaller, the keys outside it are masked.
    """
    heads = sorted(range(0, h.heads, plan.pack), key=lambda head: (head % h.group, head))
    before, out = int(batch.context_len[s] - batch.q_len[s]), list[Job]()
    for rows in reversed(query_tiles(op, batch, s, max(1, plan.rows // plan.pack))):
        low = int(op.first_seen(np.array(before + rows.start)))
        low = low if op.chunk else max(0, min(low, before + rows.start + 1 - least))
        low -= 0 if op.chunk else low % plan.keys  # the instructions mask a window, but not the chunk before
        out += [Job(s, head, rows, low, before + rows.stop) for head in heads]
    return out


def decode_work(op: Attend, h: Heads, batch: Batch, s: int, plan: AttendPlan, target: Target) -> list[Job]:
    """Returns a list of the Jobs for one sequence with one new token. s: number of the sequence in the batch.

    The context is cut into at most plan.parts parts. Each part is a whole number of tiles of plan.keys keys, but the
    last part may end with a shorter tile. Each part has h.heads / plan.pack Jobs, since a Job computes plan.pack query
    heads.
    """
    context, out = int(batch.context_len[s]), []
    low = context - decode_keys(target.library, h.window, context)
    low = max(low, int(op.first_seen(np.array(context - 1)))) if op.chunk else low
    tiles = -(-(context - low) // plan.keys)
    step = -(-tiles // plan.parts) * plan.keys
    cuts = [*range(low, context, step), context]
    for head in range(0, h.heads, plan.pack):
        out += [Job(s, head, slice(0, 1), a, b, i, len(cuts) - 1) for i, (a, b) in enumerate(pairwise(cuts))]
    return out


def attend_streams(
    mem: ChipMemory, on: Target, op: Attend, t: Tensors, batch: Batch, plan: AttendPlan, jobs: list[Job],
    parts: dict[tuple[int, int, int], tuple[Region, ...]] | None = None,
) -> list[Stream]:  # fmt: skip
    """Returns a list of Streams (instruction sequences) that compute `jobs`: one for each core with work.

    on: the target for which `plan` was made; see Target.kernel(). parts: where the jobs store their results:

    - None: in the op's output.
    - a dict from (sequence, head, number of the part) to three regions of HBM, if contexts are split: a job stores its
      sums, maxima and denominators in these regions. The results are computed from them later.
    """
    q, out, h = mem.region(op.q), mem.region(op.out), AttendKernel.of(op, t).heads
    single = all(batch.q_len[j.s] == 1 for j in jobs)
    d, dv = h.head_dim, h.v_dim
    e = tile_seconds(on, h, plan.rows, plan.keys)
    seconds = [-(-(j.high - j.low) // plan.keys) * e.work + e.fill + e.merge for j in jobs]
    streams = []
    for mine in deal(seconds, mem.chip.cores):
        k = StreamBuilder(op.site)
        own = [jobs[i] for i in mine]
        listed = (len(own) if plan.ahead else LISTED) if single else 0
        tiles = AttendTiles(mem, k, op, plan, d, dv, listed)
        for number, job in enumerate(own):
            first = int(batch.first_row[job.s])
            at, n = shifted(job.rows, first), job.rows.stop - job.rows.start
            position = int(batch.context_len[job.s] - batch.q_len[job.s]) + job.rows.start
            state = init_softmax(mem, k, tiles, op, own, number)
            part = tiles.queries(k)
            columns = slice(job.head * d, (job.head + plan.pack) * d)
            rows_tile = None
            if tiles.listed is None:
                if not plan.ahead:  # the results' row numbers
                    rows_tile = load(
                        k, tiles.row_numbers.next().shaped(1, n), mem.put_indices(np.arange(at.start, at.stop))
                    )
                load(k, part.shaped(n, plan.pack * d), q.part(at, columns))
            else:
                index = row_number(mem, k, tiles, batch, own, number)
                k.emit(isa.Gather(dst=part.shaped(n, plan.pack * d), table=q.part(cols=columns), index=index))
            slope = t[op.slopes].values[job.head] if op.slopes else 0.0
            for low in range(job.low, job.high, plan.keys):
                span = slice(low, min(job.high, low + plan.keys))
                k_tile, v_tile = load_kv(mem, k, tiles, op, batch, job.s, span, h.kv_heads, job.head // h.group)
                how = {"query": position, "pack": plan.pack, "key": low, "keys": span.stop - low, "slope": slope}
                attend_tile(mem, k, tiles, op, part, state, k_tile, v_tile, how)
            rows = slice(0, n * plan.pack)
            sums, m, length = (r.part(rows) for r in state)
            if parts is not None:
                for piece, src in zip(parts[job.s, job.head, job.part], (sums, m, length), strict=True):
                    k.emit(isa.Store(dst=piece, src=src))
                continue
            y = tiles.out.next().shaped(rows.stop, dv)
            k.emit(isa.Merge(dst=y, sums=sums, m=m, l=length))
            columns = slice(job.head * dv, (job.head + plan.pack) * dv)
            if rows_tile is None:
                k.emit(isa.Store(dst=out.part(at, columns), src=y.shaped(n, plan.pack * dv)))
            else:
                k.emit(isa.Scatter(table=out.part(cols=columns), src=y.shaped(n, plan.pack * dv), index=rows_tile))
        streams.append(k.stream())
    return streams


def split_streams(
    mem: ChipMemory, on: Target, op: Attend, t: Tensors, batch: Batch, plan: AttendPlan, jobs: list[Job]
) -> list[list[Stream]]:
    """Returns [Streams of the jobs, Streams of the merge], two lists, for contexts that are split into parts.

    The jobs store sums, maxima and softmax denominators in HBM. The merge computes the attention from them. All parts
    of one tile of queries are stored in one matrix, one part below the other: sums f32 [parts * rows, dv], maxima and
    denominators f32 [parts * rows, 1].
    """
    out, dv, rows = mem.region(op.out), AttendKernel.of(op, t).heads.v_dim, plan.pack
    whole: dict[tuple[int, int], tuple[Region, ...]] = {}
    stored: dict[tuple[int, int, int], tuple[Region, ...]] = {}
    for job in jobs:
        key = job.s, job.head
        if key not in whole:
            whole[key] = tuple(mem.heap.allocate(job.parts * rows, width, "f32") for width in (dv, 1, 1))
        stored[job.s, job.head, job.part] = tuple(
            r.part(slice(job.part * rows, (job.part + 1) * rows)) for r in whole[key]
        )
    streams, most = [], max(job.parts for job in jobs)
    for k, mine in deal_jobs(mem.chip, [job for job in jobs if not job.part], op.site):
        rings = [k.ring(2, most * rows, width) for width in (dv, 1, 1)]
        results, index = k.ring(2, rows, dv), k.ring(2, 1, 1, "i32")
        for job in mine:
            at = load(k, index.next(), mem.put_indices([int(batch.first_row[job.s])]))
            pieces = whole[job.s, job.head]
            sums, m, length = (load(k, ring.next(), r) for ring, r in zip(rings, pieces, strict=True))
            y = results.next()
            k.emit(isa.Merge(dst=y, sums=sums, m=m, l=length, parts=job.parts))
            columns = slice(job.head * dv, (job.head + rows) * dv)
            k.emit(isa.Scatter(table=out.part(cols=columns), src=y.shaped(1, rows * dv), index=at))
        streams.append(k.stream())
    return [attend_streams(mem, on, op, t, batch, plan, jobs, stored), streams]


class AttendTiles:
    """Tile buffers of one core for attention: queries, keys, values, results, and the state of the softmax.

    The state of the softmax consists of sums, maxima and denominators. There are plan.held buffers each for queries and
    for results. If plan.ahead is above 0, there are also plan.held buffers for the state, so that the state of a job is
    initialised while an earlier job is computed. If plan.ahead is 0, plan.lanes jobs share one buffer for the state,
    which is initialised for all of them together.

    Args:
        mem: the chip's memory.
        k: stream builder of the core.
        op: the op.
        plan: tile sizes and numbers of buffers.
        d: width of a key.
        dv: width of a value.
        listed: for jobs with a single query: number of jobs whose row numbers are loaded together, see row_number().
            0 for jobs with several queries.
    """

    def __init__(
        self, mem: ChipMemory, k: StreamBuilder, op: Attend, plan: AttendPlan, d: int, dv: int, listed: int
    ) -> None:
        rows, keys, held = plan.rows, plan.keys, plan.held
        format = mem.codes(op.k_cache).format
        sinks = mem.region(op.sinks).format if op.sinks else "f32"
        self.plan, self.dv, self.together = plan, dv, 1 if plan.ahead else plan.lanes
        each = held if plan.ahead else 1
        self.q, self.out = k.ring(held, rows, d), k.ring(held, rows, dv)
        self.sums = k.ring(each, self.together * rows, dv, "f32", "acc")
        self.m, self.length = (k.ring(each, self.together * rows, 1) for _ in range(2))
        self.state: tuple[Region, ...] = ()
        self.written: set[Region] = set()  # tiles of queries
        if not mem.chip.att_lanes:
            self.scores, self.alpha = k.tile(rows, keys, "f32", "acc"), k.tile(rows, 1)
            self.p = k.tile(rows, keys)
        self.sink = None if sinks == "f32" else k.tile(self.together * rows, 1, sinks)
        self.index = k.tile(1, self.together * rows, "i32") if op.sinks else None
        self.listed = k.tile(1, listed, "i32") if listed else None
        self.row_numbers = k.ring(held, 1, max(1, rows // plan.pack), "i32")
        if format in ("int8", "e4m3"):  # codes and scales are loaded, and dequantised to FP32 keys and values
            self.codes, self.scales = k.ring(2, keys, max(d, dv), format), k.ring(2, keys, 1)
            self.heads, format = k.ring(2, 1, keys, "i32"), "f32"
        self.pairs, self.d = k.ring(plan.depth, keys, d + dv, format), d  # keys and, beside them, their values

    def queries(self, k: StreamBuilder) -> Region:
        """Returns the SRAM tile for the queries of the next job. The plan.held tiles are used in turn.

        At the first use of a tile, a Fill with 0 is emitted, since a job may have fewer queries than the tile has rows.
        """
        tile = self.q.next()
        if tile not in self.written:
            k.emit(isa.Fill(dst=tile, value=0.0))
            self.written.add(tile)
        return tile


def row_number(
    mem: ChipMemory, k: StreamBuilder, tiles: AttendTiles, batch: Batch, jobs: list[Job], number: int
) -> Region:
    """Returns an SRAM region i32 [1, 1] with a row number: job `number` reads this row of the tensor q.

    Every job must have a single query. Call the function for each job in order. The call for every tiles.listed.cols-th
    job emits one Load, which brings the row numbers of that many jobs. The other calls emit nothing.

    jobs: all jobs of the core.
    """
    assert tiles.listed is not None
    place = number % tiles.listed.cols
    if not place:
        some = jobs[number : number + tiles.listed.cols]
        load(k, tiles.listed, mem.put_indices([int(batch.first_row[j.s]) for j in some]))
    return tiles.listed.part(cols=slice(place, place + 1))


def key_parts(op: Attend) -> list[str]:
    """Returns a list of the names of the caches that hold the keys: k_cache, and also rope_cache with latent attention.

    A key consists of the columns of all these caches, side by side.
    """
    return [op.k_cache, *([op.rope_cache] if op.rope_cache else [])]


def query_tiles(op: Attend, batch: Batch, s: int, rows: int) -> list[slice]:
    """Cuts the new tokens of sequence number `s` into slices of at most `rows` tokens. Returns a list of slices.

    The first new token has the index 0. With chunked attention (op.chunk), a slice never crosses the boundary between
    two chunks, so all its queries see the same first key.
    """
    n, end = int(batch.q_len[s]), int(batch.context_len[s])
    edges = [i for i in range(1, n) if op.chunk and (end - n + i) % op.chunk == 0]
    runs = zip([0, *edges], [*edges, n], strict=True)
    return [shifted(piece, a) for a, z in runs for piece in slices(z - a, rows)]


def slots_of(batch: Batch, s: int, span: slice) -> np.ndarray:
    """Returns the K/V cache slots for the positions `span` of sequence number `s`, as an int64 array."""
    at = np.arange(span.start, span.stop)
    return batch.block_table[s, at // batch.block_size].astype(np.int64) * batch.block_size + at % batch.block_size


def init_softmax(
    mem: ChipMemory, k: StreamBuilder, tiles: AttendTiles, op: Attend, jobs: list[Job], number: int
) -> tuple[Region, Region, Region]:
    """Initialise the softmax state of job `number`. Returns three regions: sums, maxima m, denominators l.

    Sums are set to 0. Without an attention sink, m is -inf and l is 0. With a sink, m is the sink's logit for the head
    and l is 1, because the sink counts as a key whose value is 0. Row r of a job belongs to the query head job.head + r
    % plan.pack.

    If several jobs share a tile, the call for the first of them initialises all rows of the tile; the other calls emit
    nothing. jobs: all jobs of the core.
    """
    plan, place = tiles.plan, number % tiles.together
    if not place:
        tiles.state = tiles.sums.next(), tiles.m.next(), tiles.length.next()
        sums, m, length = tiles.state
        k.emit(isa.Fill(dst=sums, value=0.0))
        k.emit(isa.Fill(dst=length, value=1.0 if op.sinks else 0.0))
        if op.sinks is None or tiles.index is None:
            k.emit(isa.Fill(dst=m, value=float("-inf")))
        else:
            some = [jobs[min(number + i, len(jobs) - 1)].head for i in range(tiles.together)]
            heads = np.repeat(some, plan.rows) + np.tile(np.arange(plan.rows), len(some)) % plan.pack
            sinks, index = mem.region(op.sinks), load(k, tiles.index, mem.put_indices(heads))
            raw = m if tiles.sink is None else tiles.sink
            k.emit(isa.Gather(dst=raw, table=sinks.shaped(sinks.cols, 1), index=index))
            if tiles.sink is not None:
                k.emit(isa.Convert(dst=m, src=raw))
    part = slice(place * plan.rows, (place + 1) * plan.rows)
    sums, m, length = (r.part(part) for r in tiles.state)
    return sums, m, length


def load_kv(
    mem: ChipMemory, k: StreamBuilder, tiles: AttendTiles, op: Attend, batch: Batch, s: int, span: slice, heads: int,
    head: int,
) -> tuple[Region, Region]:  # fmt: skip
    """Load keys and values at the positions `span` of sequence `s` into tiles. Returns the two tiles (keys, values).

    If the cache is quantised, keys and values are dequantised to FP32; an e4m3 cache has one scale for each head. Rows
    after the last position are set to 0.

    heads: number of K/V heads. head: the head to load.
    """
    slots, n, done = slots_of(batch, s, span), span.stop - span.start, 0
    pair = tiles.pairs.next()
    if n < pair.rows:
        k.emit(isa.Fill(dst=pair.part(slice(n, None)), value=0.0))
    for names, own in ((key_parts(op), op.k_scale), ([op.v_cache], op.v_scale)):
        for name in names:
            cache, scales = mem.codes(name), mem.scales(name)
            tile = pair.part(slice(0, n), slice(done, done + cache.cols))
            done += cache.cols
            if scales is None and cache.format != "e4m3":
                for rows, region in rows_of(cache, slots, heads, head):
                    k.emit(isa.Load(dst=tile.part(rows), src=region))
                continue
            codes, scale = tiles.codes.next().shaped(n, cache.cols), tiles.scales.next().shaped(n, 1)
            for rows, region in rows_of(cache, slots, heads, head):
                k.emit(isa.Load(dst=codes.part(rows), src=region))
            if scales is not None:
                for rows, region in rows_of(scales, slots, heads, head):
                    k.emit(isa.Load(dst=scale.part(rows), src=region))
            else:
                emit_head_scales(mem, k, tiles.heads, scale, own, np.full(n, head))
            k.emit(isa.Dequantise(dst=tile, codes=codes, scales=scale, group=cache.cols))
    return pair.part(cols=slice(0, tiles.d)), pair.part(cols=slice(tiles.d, None))


def attend_tile(
    mem: ChipMemory, k: StreamBuilder, tiles: AttendTiles, op: Attend, q: Region,
    state: tuple[Region, Region, Region], keys: Region, values: Region, how: dict[str, Any],
) -> None:  # fmt: skip
    """Emit the instructions with which a job's queries attend to one tile of keys. Returns nothing.

    - On a chip with the fused attention engine: Attend.
    - On a chip with the extra instruction SoftmaxStep: Matmul, SoftmaxStep, Matmul.
    - On other chips: Matmul, Softmax, Rescale, Matmul.

    q, keys, values: the tiles of queries, keys and values. state: three regions that the instructions update: sums of
    weighted values, maxima m of the scores, softmax denominators l. how: a dict of instruction fields (positions and
    ALiBi slope). The function adds the fields that follow from `op` to this dict.
    """
    sums, m, length = state
    how |= {"scale": op.scale, "softcap": op.softcap, "window": op.window}
    how |= {"temper": op.temper, "every": op.temper_every, "from_zero": not op.temper_from}
    if mem.chip.att_lanes:
        k.emit(isa.Attend(sums=sums, m=m, l=length, q=q, k=keys, v=values, **how))
        return
    scores, alpha, p = tiles.scores, tiles.alpha, tiles.p
    k.emit(isa.Matmul(acc=scores, a=q, b=keys))
    if NAME in mem.chip.extra_instructions:
        k.emit(isa.SoftmaxStep(p=p, m=m, l=length, sums=sums, scores=scores, **how))
        k.emit(isa.Matmul(acc=sums, a=p, b=values, by_rows=True, accumulate=True))
        return
    k.emit(isa.Softmax(p=p, m=m, l=length, alpha=alpha, scores=scores, **how))
    k.emit(isa.Rescale(acc=sums, alpha=alpha))
    k.emit(isa.Matmul(acc=sums, a=p, b=values, by_rows=True, accumulate=True))
