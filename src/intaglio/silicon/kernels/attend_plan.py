"""Plans of attention on a chip, and their time: tiles, packing of heads, splits of contexts, for prefill and decode.

The time of a library's kernels is worked out here. It never falls with more queries, keys or sequences. The time of the
instruction streams is that of their loop, in attend_loop.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from intaglio.chips import KernelLibrary, Target
from intaglio.silicon.kernels.attend_loop import decode_jobs_of_streams, prefill_jobs_of_streams, stream_seconds
from intaglio.silicon.kernels.attend_tiles import (
    SPARE,
    AttendPlan,
    burst_overfetch,
    decode_keys,
    fitted,
    tile_seconds,
    two_jobs_fit,
    widen_seconds,
)
from intaglio.silicon.kernels.kernel import WIDE
from intaglio.silicon.kernels.kv_write import Heads
from intaglio.silicon.sizes import ChunkCounts
from intaglio.silicon.timing import pipeline

ROUNDS = 4  # see least_makespan()
JOBS_AHEAD = 15  # decoding jobs whose operands a persistent kernel loads ahead
PREFILL_LANES = 2  # of kernels that are not persistent: two run on a core


def least_makespan(seconds: np.ndarray, count: np.ndarray, cores: int) -> float:
    """Returns a lower bound on the seconds in which `cores` cores can do all jobs, however the jobs are distributed.

    The result is the largest of several bounds: even_makespan(), and one bound for each j from 1 to ROUNDS. For the
    bound of j, take the j * cores + 1 longest jobs. Some core does at least j + 1 of these jobs, so it needs at least
    the time of the j + 1 shortest of them.

    The result is exact if all jobs are equal and each core has at most ROUNDS jobs. It never falls when jobs are added
    or get longer.

    seconds: for each kind of job, the seconds of one job. count: for each kind, the number of jobs.
    """
    order = np.argsort(-seconds, kind="stable")
    ends, least = np.cumsum(count[order]), even_makespan(seconds, count, cores)
    for j in range(1, min(ROUNDS, int((ends[-1] - 1) // cores)) + 1):
        places = j * cores + 1 - np.arange(j + 1)  # of jobs sorted by their seconds, the longest being number 1
        least = max(least, float(seconds[order[np.searchsorted(ends, places)]].sum()))
    return least


def even_makespan(seconds: np.ndarray, count: np.ndarray, cores: int) -> float:
    """Returns a lower bound on the seconds in which `cores` cores can do all jobs.

    The bound is the larger of two times: the time of the longest job, and the time of all jobs together divided by
    `cores`.

    seconds: for each kind of job, the seconds of one job. count: for each kind, the number of jobs.
    """
    return max(float(seconds.max()), float(seconds @ count) / cores)


def library_prefill_seconds(
    target: Target, h: Heads, plan: AttendPlan, tiles: np.ndarray, keys: np.ndarray, count: np.ndarray, unique: float,
    rows: float,
) -> float:  # fmt: skip
    """Returns the modelled seconds of prefill attention by a vendor's library, until the last result is stored.

    The time never falls with more queries or keys. All cores share the L2's rate equally. Each different key tile is
    loaded from HBM once, and the core that loads it first waits for HBM's latency. The model spreads these waits evenly
    over the cores. Measured times fit this better than a model in which all cores wait. In the simulator's own
    instruction streams, all cores read the same keys at the same time, so all of them wait; see stream_seconds().

    Args:
        target: chip and library.
        h: sizes of the attention layer.
        plan: the plan of the kernel.
        tiles: for each kind of job, the number of key tiles that one job reads.
        keys: for each kind of job, the number of keys in these tiles.
        count: for each kind, the number of jobs.
        unique: number of different key tiles that all jobs together read.
        rows: number of query rows of the largest job.
    """
    chip, lib, latency_s, total = target.chip, target.library, target.chip.constants.hbm_latency_s, float(count.sum())
    t, base = tile_seconds(target, h, plan.rows, plan.keys), min(chip.port_rate, chip.l2_rate / min(total, chip.cores))
    load, whole = (n * h.kv_width(lib) * h.bits / 8 / base for n in (keys / tiles, min(float(keys.max()), plan.keys)))
    work = t.work + widen_seconds(target, h) / 2
    results, queries = (rows * width * lib.activation_bytes / base for width in (h.v_dim, h.head_dim))
    blank = t.blank * min(plan.held, np.ceil(total / chip.cores))
    merge = 0.0 if chip.att_lanes else max(0.0, t.merge - t.scores)  # while the next job's scores are computed
    even = even_makespan(tiles, count, chip.cores)
    first_reads = min(even, max(1.0, unique * h.group / plan.pack / chip.cores)) if chip.l2_bytes else even
    waited, hidden = (pipeline(first_reads, whole, work, s, plan.depth * plan.lanes) for s in (latency_s, 0.0))
    wait = float(waited - hidden)
    alone = pipeline(tiles, load, work, 0.0, plan.depth)  # of each job
    if plan.ahead:
        computed = least_makespan(tiles * work + merge, count, chip.cores) + min(whole, work)
        read = float(tiles @ count)  # key tiles, by all jobs
        mean_load = float(load * tiles @ count) / read
        together = pipeline(max(1.0, read / chip.cores), mean_load, work, 0.0, plan.depth)
        rounds = np.floor((max(1.0, least_makespan(tiles, count, chip.cores)) - 1) / plan.depth) + 1
        loads = max(float(alone.max()), together, rounds * (whole + work))
        return float(blank + t.fill + queries + max(computed, loads) + wait + t.merge + results)
    # Each job reads its queries' row numbers from HBM first, and what it loads next arrives after them.
    first = plan.lanes * t.fill + queries + whole + latency_s
    again = first / plan.lanes + (t.merge + (plan.lanes - 1) * merge) / plan.lanes
    once = blank + first - first / plan.lanes - latency_s
    return float(once + least_makespan(alone - load + again, count, chip.cores) + wait + results)


def prefill_jobs(plan: AttendPlan, h: Heads, part: ChunkCounts) -> tuple[np.ndarray, ...]:
    """Returns three arrays about the jobs of sequences with several new tokens, with one item for each kind of job.

    The arrays are: the number of keys that one job reads; the number of key tiles that one job reads; the number of
    jobs of this kind.

    If a sliding window begins inside a tile, the numbers are means over all positions inside the tile. So a longer
    context never has fewer keys or tiles.

    part: triples (new tokens, context length, number of sequences with these two numbers), one for each distinct pair.
    """
    seen, tiles, count = [], [], []
    step = max(1, plan.rows // plan.pack)
    for q, keys, n in part:
        first = np.arange(0, q, step)
        last = np.minimum(first + step, q) + keys - q
        low = np.maximum(0, first + keys - q - h.window + 1) if h.window else np.zeros(len(first))
        seen.append(last - np.where(low > 0, low - (plan.keys - 1) / 2, 0))
        tiles.append(np.where(low > 0, (last - low + plan.keys - 1) / plan.keys, np.ceil(last / plan.keys)))
        count.append(np.full(len(first), n * h.heads / plan.pack))
    return np.concatenate(seen), np.concatenate(tiles), np.concatenate(count)


@lru_cache(maxsize=16384)
def prefill_plan(target: Target, h: Heads, part: ChunkCounts) -> tuple[float, float, float, AttendPlan, float]:
    """Returns the fastest plan for the sequences with several new tokens, and the figures of this plan.

    The tuple has five items:

    - seconds: time from the first load until the last result is stored.
    - compute seconds: time in which a core computes, as a mean over the cores.
    - jobs: number of jobs.
    - plan: the AttendPlan.
    - bytes read again: bytes of keys and values that HBM delivers more than once. It is 0 with an L2, which serves
      repeated reads.

    part: triples (new tokens, context length, number of sequences with these two numbers), one for each distinct pair.
    """
    chip, lib, best = target.chip, target.library, None
    h = replace(h, window=max(h.window, lib.prefill_window_keys)) if h.window else h
    sizes = lib.fused_query_tiles if chip.att_lanes else lib.query_tiles
    packs = (1, h.group) if lib.pack_gqa and h.group > 1 and not h.slopes else (1,)
    keys = sum(n * (min(k, q + h.window) if h.window else k) for q, k, n in part)
    cache = keys * h.kv_heads * h.kv_width(lib) * h.bits / 8 * h.hbm_part(target)
    for rows, pack in ((r, p) for r in sizes for p in packs):
        wanted = AttendPlan(
            rows=max(rows, pack),
            pack=pack,
            keys=lib.key_tile,
            depth=2,
            ahead=int(lib.persistent),
            lanes=1 if lib.persistent else PREFILL_LANES,
        )
        plan = fitted(target, h, wanted)
        if plan.rows < pack:
            continue
        seen, tiles, count = prefill_jobs(plan, h, part)
        loaded = float(seen @ count) / float(tiles @ count) if knows_lengths(lib, plan) else plan.keys
        read = float(tiles @ count) * loaded * h.kv_width(lib) * h.bits / 8
        missed = min(1.0, cache / read) if chip.l2_bytes else 1.0
        if lib.activation_bytes >= WIDE:
            jobs = prefill_jobs_of_streams(h, plan, part)
            seconds = stream_seconds(target, h, plan, jobs, single=False)
        else:
            exact = seen if knows_lengths(lib, plan) else tiles * plan.keys
            most = min(plan.rows, pack * max(q for q, *_ in part))
            seconds = library_prefill_seconds(target, h, plan, tiles, exact, count, unique_tiles(plan, h, part), most)
        work = tile_seconds(target, h, plan.rows, plan.keys).work + widen_seconds(target, h) / 2
        computed = float(tiles @ count) * work / chip.cores
        seconds = max(seconds, max(cache, missed * read) / chip.hbm_rate)
        found = seconds, computed, float(count.sum()), plan, max(0.0, missed * read - cache)
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None  # one head a tile always fits
    return best


def unique_tiles(plan: AttendPlan, h: Heads, part: ChunkCounts) -> float:
    """Returns how many different key tiles the sequences with several new tokens read, over all K/V heads.

    If a sliding window begins inside a tile, the number is a mean over all positions inside the tile.

    part: triples (new tokens, context length, number of sequences with these two numbers), one for each distinct pair.
    """
    total = 0.0
    for q, keys, n in part:
        low = max(0, keys - q - h.window + 1) if h.window else 0
        total += n * ((keys - low + plan.keys - 1) / plan.keys if low else np.ceil(keys / plan.keys))
    return float(total * h.kv_heads)


def knows_lengths(library: KernelLibrary, plan: AttendPlan) -> bool:
    """True if an attention kernel loads only existing keys; False if it loads the last key tile of a context whole.

    It is True in three cases: the plan loads jobs ahead (plan.ahead > 0); the library's activations are FP32, as in the
    simulator's own instruction streams; the library's whole_key_tiles is False.
    """
    return plan.ahead > 0 or library.activation_bytes >= WIDE or not library.whole_key_tiles


@lru_cache(maxsize=16384)
def decode_plan(target: Target, h: Heads, part: ChunkCounts, cached: float) -> tuple[float, float, float, AttendPlan]:
    """Returns the fastest plan for the sequences with one new token, and the figures of this plan.

    The plans differ in the number of parts into which a context is split. The tuple has four items:

    - seconds: time from the first load until the last result is stored, including the merge of the parts.
    - compute seconds: time in which a core computes, as a mean over the cores.
    - jobs: number of jobs.
    - plan: the AttendPlan; plan.parts is the largest number of parts of a context.

    part: triples (1, context length, number of sequences with this context length), one for each distinct length.
    cached: fraction of the keys and values that the L2 holds.
    """
    chip, lib, best = target.chip, target.library, None
    packs = (lib.pack_windowed or not h.window) and not h.slopes and h.group <= lib.pack_most
    pack = h.group if packs else 1
    rows = int(2 ** np.ceil(np.log2(max(lib.min_query_rows, pack))))
    tile_bytes = lib.key_tile * h.kv_width(lib) * h.bits / 8 * burst_overfetch(lib, h)
    ring = max(2, min(lib.decode_stages, int(chip.sram_bytes // (2 * tile_bytes))))
    wanted = AttendPlan(
        rows=rows, pack=pack, keys=lib.key_tile, depth=ring, ahead=JOBS_AHEAD if lib.persistent else 0,
        lanes=1 if lib.persistent else lib.decode_jobs,
    )  # fmt: skip
    fit = fitted(target, h, wanted)
    pack = max(p for p in range(1, min(pack, fit.rows) + 1) if h.group % p == 0)
    fit = replace(fit, pack=pack)
    alone = h.group // pack  # jobs that read the same keys: HBM delivers them once, the L2 to each
    n = np.array([count * h.kv_heads * alone for _, _, count in part], float)
    keys = np.array([decode_keys(lib, h.window, k) for _, k, _ in part], float)
    missed = (1 - cached) / (alone if chip.l2_bytes else 1) * h.hbm_part(target)
    for parts in lib.kv_splits if pack > 1 or lib.split_mha else (1,):
        plan = replace(fit, parts=parts)
        merged = 2 * WIDE * pack * (parts + 1) * (h.v_dim + 2) + SPARE
        if parts > 1 and lib.activation_bytes >= WIDE and merged > chip.sram_bytes:
            continue  # SRAM does not fit the parts of a tile when they are merged
        tiles, seen, count = decode_jobs(plan, keys, n)
        if lib.activation_bytes >= WIDE:
            jobs = decode_jobs_of_streams(lib, h, plan, part)
            seconds = stream_seconds(target, h, plan, jobs, single=True)
        else:
            loaded = seen if knows_lengths(lib, plan) else tiles * plan.keys
            seconds = decode_seconds(target, h, plan, tiles, loaded, count, missed)
        if parts > 1:
            seconds += merge_seconds(target, h, plan, float(n.sum()))
        work = tile_seconds(target, h, plan.rows, plan.keys).work
        found = seconds, float(tiles @ count) * work / chip.cores, float(count.sum()), plan
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    return best


def decode_jobs(plan: AttendPlan, keys: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns three arrays with one item for each kind of job of the sequences with one new token.

    The arrays are:

    - the number of key tiles that one job reads;
    - the number of keys that one job reads;
    - the number of jobs of this kind.

    A context is cut into parts with equal numbers of tiles, and each part is a job. The last part has the remaining
    tiles, so that its job is a kind of its own.

    keys: the distinct numbers of keys to which tiles of queries attend. n: for each item of `keys`, the number of query
    tiles that attend to this many keys.
    """
    tiles = np.ceil(keys / plan.keys)
    per = np.ceil(tiles / plan.parts)
    whole = np.ceil(tiles / per) - 1  # parts of a context, but for the last
    last = keys - whole * per * plan.keys
    out = (per, tiles - whole * per), (per * plan.keys, last), (n * whole, n)
    kept = np.concatenate(out[2]) > 0
    return tuple(np.concatenate(v)[kept] for v in out)


def decode_seconds(
    target: Target, h: Heads, plan: AttendPlan, tiles: np.ndarray, keys: np.ndarray, count: np.ndarray, missed: float
) -> float:
    """Returns the modelled seconds of attention for sequences with one new token, until the last result is stored.

    A job computes one query, for plan.pack heads, over one part of the context. The model assumes that all cores share
    the rates of HBM and L2 equally, and that all tiles of a job have the same number of keys.

    tiles: for each kind of job, the number of key tiles that one job loads. keys: for each kind, the number of keys in
    these tiles. count: for each kind, the number of jobs. missed: fraction of the tiles that is loaded from HBM; the L2
    holds the rest.
    """
    chip, lib, latency_s = target.chip, target.library, target.chip.constants.hbm_latency_s
    t, slots = tile_seconds(target, h, plan.rows, plan.keys), chip.cores * plan.lanes
    active = min(float(count.sum()), slots)
    turns = max(1.0, active / chip.cores)  # jobs on one core take turns
    key_bytes = h.kv_width(lib) * h.bits / 8 * burst_overfetch(lib, h)
    base = max(active / chip.l2_rate, turns / chip.port_rate)
    each = key_bytes * max(active * missed / chip.hbm_rate, base)  # seconds to load one key and its value
    widen = widen_seconds(target, h) * turns
    load = keys / tiles * each  # of a tile, for each kind
    loaded = np.maximum(load, widen) if two_jobs_fit(target, h) else load + widen
    total, jobs = float(tiles @ count), float(count.sum()) / chip.cores
    if plan.ahead:  # the loads of all jobs of a core are one pipeline
        between = 0.0 if chip.att_lanes else max(0.0, t.merge - t.scores)
        start = t.blank * min(plan.held, np.ceil(jobs)) + t.fill + t.merge + latency_s
        first = min(float(keys.max()), plan.keys) * each  # seconds to load the first tile
        computed = least_makespan(tiles * t.work + between, count, chip.cores) + min(first, t.work) + latency_s
        rounds = np.floor((max(1.0, least_makespan(tiles, count, chip.cores)) - 1) / plan.depth) + 1
        first = max(first, widen) if two_jobs_fit(target, h) else first + widen
        alone = pipeline(tiles, loaded, t.work, latency_s, plan.depth).max()
        mean_load = float(loaded * tiles @ count) / total
        even = max(1.0, total / chip.cores)
        loads = max(alone, pipeline(even, mean_load, t.work, latency_s, plan.depth))
        return float(start + max(computed, rounds * (first + latency_s + t.work), loads))
    # A core waits for the first tile of each job, and no conversion overlaps with that.
    waited = load + widen - loaded
    computed = least_makespan(tiles * t.work + t.fill + t.merge, count, chip.cores) + latency_s + float(waited.max())
    waits = (lib.decode_waits - 1) * latency_s
    seconds = pipeline(tiles, loaded, t.work * turns, latency_s, plan.depth) + waited + waits
    # Jobs that wait for memory speed up as others end, so the cores' idle time is not counted.
    return float(latency_s + t.blank + max(computed, even_makespan(seconds, count, slots)))


def merge_seconds(target: Target, h: Heads, plan: AttendPlan, jobs: float) -> float:
    """Returns the modelled seconds to merge the attention results of plan.parts parts of a context.

    Counted are HBM's latency, the time to store the results of the parts and to load them again at HBM's rate, and the
    launch overhead if the library merges in a launch of its own. The arithmetic is not counted.

    jobs: number of tiles of queries.
    """
    chip, lib = target.chip, target.library
    results = jobs * plan.pack * h.v_dim * 4
    seconds = chip.constants.hbm_latency_s + 2 * plan.parts * results / chip.hbm_rate
    return seconds + (lib.launch_s if lib.merge_launch else 0.0)
