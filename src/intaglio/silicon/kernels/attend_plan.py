"""Tiles and jobs of attention on a chip, and the seconds that they take: shared by attend's streams and its timing.

A job is a tile of queries of one K/V head, or of one query head, that iterates over tiles of keys. The time follows one
core through its jobs: loads, products and softmax of each tile, start and end of each job.

Long because it has both the plans and the timing, of prefill and of decode.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from intaglio.chips import KernelLibrary, Target
from intaglio.silicon.isa.cycles import attend_cycles, exposed, matmul_cycles, softmax_cycles, vector_cycles
from intaglio.silicon.isa.softmax_step import NAME, step_cycles
from intaglio.silicon.kernels.kernel import WIDE
from intaglio.silicon.kernels.kv_write import Heads
from intaglio.silicon.sizes import ChunkCounts
from intaglio.silicon.timing import pipeline

ROUNDS = 4  # see least_makespan()
JOBS_AHEAD = 15  # decoding jobs whose operands a persistent kernel loads ahead
LISTED = 16  # jobs whose queries' row numbers a core reads at once
PREFILL_LANES = 2  # of kernels that are not persistent: two run on a core
SPARE = 2048  # bytes of SRAM for sinks, indices and alignment


@dataclass(frozen=True, kw_only=True)
class AttendPlan:
    """How a kernel cuts attention into tiles and jobs. Prompts and decoding sequences have a plan each.

    Attributes:
        rows: query rows of a tile. All of them are computed, even if fewer have a query.
        pack: query heads that share a tile, since they share a K/V head; 1: none do.
        keys: keys of a tile.
        depth: tiles of keys and values that SRAM holds at a time, so that one loads while another is used.
        ahead: largest number of jobs (tiles of queries) whose operands a core loads while it computes an earlier job;
            0: the operands of a job are loaded when the job starts.
        lanes: with `ahead` 0, jobs that a core starts together, so that it waits only for the first job's operands.
        parts: largest number of parts into which the context of a decoding sequence is split.
    """

    rows: int
    pack: int
    keys: int
    depth: int
    ahead: int
    lanes: int = 1
    parts: int = 1

    @property
    def held(self) -> int:
        """Number of jobs whose queries and sums a core holds at the same time."""
        return max(self.lanes, 1 + self.ahead)


def product_format(target: Target, h: Heads) -> str:
    """Format in which a kernel multiplies queries by keys, and softmax weights by values.

    "f32" if the library's activations have 4 bytes. Otherwise "e4m3" if the cache has 8 bits a value and the library
    multiplies such values without conversion (kv_native), else "bf16".
    """
    if target.library.activation_bytes >= WIDE:
        return "f32"
    return "e4m3" if h.bits == 8 and target.library.kv_native else "bf16"


def fitted(target: Target, h: Heads, plan: AttendPlan) -> AttendPlan:
    """Reduce a plan until its tiles fit a core's SRAM and accumulators, and return it.

    With FP32 activations (target.library.activation_bytes), as in the instructions that the simulator executes, the
    result has fewer or smaller tiles, as far as needed. A plan with one row and one key is returned even if it does not
    fit. With smaller activations, as in a vendor's 16-bit kernels, `plan` is returned unchanged and not checked.
    """
    if target.library.activation_bytes < WIDE:
        return plan
    while not fits(target, h, plan) and plan.rows * plan.keys > 1:
        if plan.lanes > 1:
            plan = replace(plan, lanes=1)
        elif plan.ahead > 1:
            plan = replace(plan, ahead=plan.ahead // 2)
        elif plan.depth > 2:
            plan = replace(plan, depth=plan.depth - 1)
        elif plan.ahead:
            plan = replace(plan, ahead=0)
        elif plan.rows > plan.keys or plan.keys == 1:
            plan = replace(plan, rows=plan.rows // 2)
        else:
            plan = replace(plan, keys=plan.keys // 2)
    return plan


def fits(target: Target, h: Heads, plan: AttendPlan) -> bool:
    """True if a core's SRAM and accumulators fit all tiles of the plan: queries, keys, values, scores and sums."""
    chip, d, dv, ring = target.chip, h.head_dim, h.v_dim, plan.held
    kv = plan.depth * plan.keys * (d + dv) * (h.bits / 8 if h.bits >= 16 else WIDE)
    if h.bits < 16:  # codes, scales and indices of heads
        kv += 2 * plan.keys * (max(d, dv) + 2 * WIDE)
    scores = 0 if chip.att_lanes else plan.rows * plan.keys
    sram = kv + WIDE * (plan.rows * (ring * (d + dv + 2) + 3) + scores + 2 * max(plan.rows, plan.keys))
    sram += SPARE + WIDE * ring * (plan.rows // plan.pack)
    return sram <= chip.sram_bytes and WIDE * (ring * plan.rows * dv + scores) + 256 <= chip.acc_bytes


@dataclass(frozen=True)
class TileSeconds:
    """Seconds that one core takes for each part of an attention job, by field.

    `scores`, `softmax` and `sums` are for one tile of queries with one tile of keys; the others are once a job.
    """

    scores: float  # of the product of queries and keys; 0 with a fused engine
    softmax: float
    sums: float  # of the product of weights and values, or all of the fused engine's work
    fill: float  # of setting sums, maxima and denominators
    blank: float  # of setting a tile of queries, before its first use
    merge: float  # of dividing the sums

    @property
    def work(self) -> float:
        """Seconds to attend from one tile of queries to one of keys: scores + softmax + sums, without overlap."""
        return self.scores + self.softmax + self.sums


@lru_cache(maxsize=16384)
def tile_seconds(target: Target, h: Heads, rows: int, keys: int) -> TileSeconds:
    """Modelled seconds of each phase of an attention job (scores, softmax, sums ...), as a TileSeconds. Cached.

    rows: query rows of a tile. keys: keys of a tile.
    """
    chip, d, dv, hz = target.chip, h.head_dim, h.v_dim, target.chip.clock_hz
    width = target.library.activation_bytes
    state = rows * (dv + 2) * WIDE / chip.sram_bytes_per_cycle / hz, rows * d * width / chip.sram_bytes_per_cycle / hz
    merge = float(vector_cycles(chip, 2 * rows * dv, rows)) / hz
    if chip.att_lanes:
        work = float(attend_cycles(target, rows, keys, d, dv, "bf16")) / hz
        return TileSeconds(0.0, 0.0, work, *state, merge)
    run = product_format(target, h)
    if NAME in chip.extra_instructions:
        softmax = step_cycles(chip, rows * keys, h.softcap)
    else:
        softmax = softmax_cycles(chip, rows * keys, h.softcap) + vector_cycles(chip, rows * dv)
    products = (matmul_cycles(target, rows, keys, d, run), matmul_cycles(target, rows, dv, keys, run))
    softmax = exposed(target, float(softmax)) + target.library.key_tile_cycles
    return TileSeconds(float(products[0]) / hz, softmax / hz, float(products[1]) / hz, *state, merge)


def widen_seconds(target: Target, h: Heads) -> float:
    """Seconds to convert one tile of 8-bit keys and values to bf16 on the vector lanes; 0 if none is needed."""
    chip, values = target.chip, target.library.key_tile * h.kv_width(target.library)
    needed = h.bits < 16 and not chip.att_lanes and product_format(target, h) != "e4m3"
    return float(vector_cycles(chip, target.library.kv_dequant_ops * values)) / chip.clock_hz if needed else 0.0


def two_jobs_fit(target: Target, h: Heads) -> bool:
    """True if SRAM fits two tiles of keys and values, each of them twice: in the cache's format and in bf16.

    One job's tile can then be loaded while another job's is converted.
    """
    return 2 * target.library.key_tile * h.kv_width(target.library) * (h.bits / 8 + 2) <= target.chip.sram_bytes


def burst_overfetch(library: KernelLibrary, h: Heads) -> float:
    """Bytes that HBM transfers per byte of a key or value row.

    It is library.half_burst_cost if a row is shorter than library.burst_bytes, else 1.
    """
    return library.half_burst_cost if h.head_dim * h.bits // 8 < library.burst_bytes else 1.0


def deal(seconds: Sequence[float], cores: int) -> list[list[int]]:
    """Deal jobs to cores, the longest first, each to the core with the least work so far.

    seconds: time of each job. Returns a list for each core with the numbers (indices into `seconds`) of its jobs, in
    the order in which they run; cores without a job are left out.
    """
    out: list[list[int]] = [[] for _ in range(min(cores, len(seconds)))]
    free = [(0.0, core) for core in range(len(out))]
    for job in sorted(range(len(seconds)), key=lambda j: -seconds[j]):
        ends, core = heapq.heappop(free)
        out[core].append(job)
        heapq.heappush(free, (ends + seconds[job], core))
    return out


def makespan(seconds: np.ndarray, count: np.ndarray, cores: int) -> float:
    """Seconds until the last core ends, if deal() gives jobs to cores and each core runs its jobs one after the other.

    More or longer jobs may end earlier; least_makespan() has no such anomalies.

    seconds: for each kind of job, seconds of one job. count: for each kind, number of jobs.
    """
    if float(count.sum()) <= cores:
        return float(seconds.max())
    ends = np.zeros(cores)
    for i in np.argsort(-seconds, kind="stable"):
        rounds, rest = divmod(round(float(count[i])), cores)
        ends[:rest] += seconds[i]  # the least busy cores
        if rounds:
            ends += rounds * seconds[i]
        ends.sort()
    return float(ends[-1])


def least_makespan(seconds: np.ndarray, count: np.ndarray, cores: int) -> float:
    """Lower bound in seconds of the time until the last core ends, however jobs are dealt.

    It is the longest of even_makespan() and of these: of the j * cores + 1 longest jobs, one core has j + 1 or more,
    which take at least as long as the j + 1 shortest of them; for j up to ROUNDS. Exact for equal jobs, up to ROUNDS
    jobs a core. It never falls if jobs are added or get longer.

    seconds: for each kind of job, seconds of one job. count: for each kind, number of jobs.
    """
    order = np.argsort(-seconds, kind="stable")
    ends, least = np.cumsum(count[order]), even_makespan(seconds, count, cores)
    for j in range(1, min(ROUNDS, int((ends[-1] - 1) // cores)) + 1):
        places = j * cores + 1 - np.arange(j + 1)  # of jobs sorted by their seconds, the longest being number 1
        least = max(least, float(seconds[order[np.searchsorted(ends, places)]].sum()))
    return least


def even_makespan(seconds: np.ndarray, count: np.ndarray, cores: int) -> float:
    """The longest job in seconds, or the total divided by the cores if that is longer: a lower bound of makespan().

    seconds: for each kind of job, seconds of one job. count: for each kind, number of jobs.
    """
    return max(float(seconds.max()), float(seconds @ count) / cores)


def library_prefill_seconds(
    target: Target, h: Heads, plan: AttendPlan, tiles: np.ndarray, keys: np.ndarray, count: np.ndarray, unique: float,
    rows: float,
) -> float:  # fmt: skip
    """Modelled seconds of prefill attention by a vendor's library, until the last job's result is stored.

    Time never shrinks with more queries or keys. All cores share the L2's rate equally. Of the tiles that a core reads,
    the first reads of a tile on the chip wait for HBM. They are spread evenly over the chip's cores: cores that are
    further ahead bring tiles into the L2 for the others. In the streams, cores read the same keys in step instead, so
    all of them wait; see stream_prefill_seconds(). Measured times are nearer to the former.

    Args:
        target: chip and library.
        h: sizes of the attention layer.
        plan: the plan of the kernel.
        tiles: for each kind of job, key tiles of one job.
        keys: for each kind, keys that these tiles load.
        count: for each kind, number of jobs.
        unique: number of different key tiles that all jobs read.
        rows: query rows of the largest job.
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


def stream_prefill_seconds(
    target: Target, h: Heads, plan: AttendPlan, tiles: np.ndarray, start: np.ndarray, count: np.ndarray, missed: float,
    rows: float, keys: float,
) -> float:  # fmt: skip
    """Seconds of the instruction streams of prefill attention, until the last job's result is stored.

    All cores share the HBM and L2 rates equally, and every tile loads the mean number of keys. A job is one tile of
    queries. Jobs that read the same tiles of keys are listed together, as one kind of job.

    tiles: for each kind, key tiles of one job. start: for each kind, number of a job's first key tile. count: for each
    kind, number of jobs. missed: fraction of the tiles loaded from HBM; the L2 holds the rest. rows: mean number of
    query rows of a job. keys: mean number of keys that a tile loads.
    """
    chip, lib = target.chip, target.library
    t = tile_seconds(target, h, plan.rows, plan.keys)
    active = min(float(count.sum()), chip.cores)
    base, latency_s = min(chip.port_rate, chip.l2_rate / active), chip.constants.hbm_latency_s
    cold = min(base, chip.hbm_rate / max(1.0, missed * active))
    tile_bytes = keys * h.kv_width(lib) * h.bits / 8
    per_byte = (1 - missed) / base + missed / cold
    load = tile_bytes * per_byte
    work = t.work + widen_seconds(target, h) / 2
    later = latency_s if missed >= 1 else 0.0
    results = rows * h.v_dim * lib.activation_bytes / base
    queries = rows * h.head_dim * lib.activation_bytes / base
    blank = t.blank * min(plan.held, -(-float(count.sum()) // chip.cores))
    merge = 0.0 if chip.att_lanes else max(0.0, t.merge - t.scores)  # while the next job's scores are computed
    kinds, numbers, extra = tiles, count, np.zeros(len(tiles))
    if missed < 1:
        # Cores read the same keys in step, so none has them before HBM delivers them. Jobs that start later find them
        # in the L2.
        kind, new, numbers, turn = waiting_jobs(tiles, start, count, chip.cores)
        kinds, extra = tiles[kind], np.zeros(len(kind))
        if plan.ahead:  # a wait for HBM each time that the ring is full of tiles that HBM has not delivered
            cycle = max(0.0, load / 2 + latency_s + work - plan.depth * max(load, work))
            waits = (np.ceil(new / plan.depth) - (turn == 0)).clip(0) * cycle
            wait = sum(float(waits[turn == n].max()) for n in set(turn.tolist()))  # deal() does not know of waits
            # The engine that loads also sets sums and loads queries. A last job of several finds its keys in the L2.
            loads = makespan(kinds * load + queries + t.fill, numbers, chip.cores) + wait + work
            loads += latency_s if float(count.sum()) <= chip.cores else cycle
            moved = kinds * tile_bytes + rows * (h.head_dim + h.v_dim) * lib.activation_bytes  # through the L2
            shared = makespan(moved / (chip.l2_rate / active) + t.fill, numbers, chip.cores) - results
            computed = makespan(kinds * work + merge, numbers, chip.cores) + wait + latency_s + min(load, work)
            return blank + max(computed + t.fill + queries, loads, shared) + t.merge + results
        # Other cores wait from the start of the transfer that brings a tile; values come in the second half of a load.
        behind = max(0.0, latency_s - load / 2)
        extra = pipeline(new, load, work, behind, plan.depth) - pipeline(new, load, work, 0.0, plan.depth)
        extra = np.where(new > 0, extra - behind, 0.0)
    if plan.ahead:
        computed = makespan(kinds * work + merge + extra, numbers, chip.cores) + latency_s + min(load, work)
        even, most = (f(tiles, count, chip.cores) for f in (even_makespan, makespan))
        loads = pipeline(max(1.0, even), load, work, later, plan.depth)
        rounds = np.floor((max(1.0, most) - 1) / plan.depth) + 1
        seconds = float(max(computed, max(loads, rounds * (load + later + work)) + latency_s - later))
        # A core holds the queries and sums of plan.held jobs
        mean = float(tiles @ count) / float(count.sum())
        loaded, worked = t.fill + queries + mean * load, mean * work + t.merge
        inside = t.fill + queries + pipeline(mean, load, work, later, plan.depth) + t.merge - loaded - worked
        held = pipeline(np.ceil(float(count.sum()) / chip.cores), loaded, worked, inside, plan.held)
        seconds = max(seconds, float(held) - t.fill - queries - t.merge)
        return blank + t.fill + queries + seconds + t.merge + results
    # Each job reads its queries' row numbers from HBM first, and what it loads next arrives after them.
    first = plan.lanes * t.fill + queries + load + latency_s
    job_s = pipeline(kinds, load, work, later, plan.depth) - load - later + extra
    again = first / plan.lanes + (t.merge + (plan.lanes - 1) * merge) / plan.lanes
    once = blank + first - first / plan.lanes + tile_bytes * (1 / cold - per_byte)
    return float(once + makespan(job_s + again, numbers, chip.cores) + results)


def waiting_jobs(tiles: np.ndarray, start: np.ndarray, count: np.ndarray, cores: int) -> tuple[np.ndarray, ...]:
    """Find the jobs that wait for keys which no earlier round of jobs has read. A round is one job on each core.

    deal() gives the longest jobs to cores first. Jobs of one round run at the same time. A job does not wait for a tile
    that another job of the round has read before: if a job reads a tile as its third new tile, and another job reads
    the same tile as its first, only the other job waits for HBM.

    tiles: for each kind of job, number of key tiles that one job reads. start: for each kind, index of a job's first
    key tile. count: for each kind, number of jobs. Returns four arrays, with an item for each kind and round: the
    kind's index; number of tiles that the job reads one after the other and waits for; number of jobs; number of the
    round, from 0.
    """
    rounds: dict[int, list[tuple[int, float]]] = {}  # (kind, number of jobs) of each
    position = 0.0
    for i in np.lexsort((-start, -tiles)).tolist():
        left = float(count[i])
        while left > 0:
            turn = int(position // cores)
            together = min(left, (turn + 1) * cores - position)
            rounds.setdefault(turn, []).append((i, together))
            left, position = left - together, position + together
    read, found = set[float](), []
    for turn, jobs in rounds.items():
        new = {i: [t for t in (start[i] + np.arange(tiles[i])).tolist() if t not in read] for i, _ in jobs}
        place: dict[float, int] = {}  # of each tile, the smallest number of new tiles that a job reads until it has it
        for mine in new.values():
            place |= {t: min(n, place.get(t, n)) for n, t in enumerate(mine, 1)}
        found += [(i, max((place[t] for t in new[i]), default=0), together, turn) for i, together in jobs]
        read |= place.keys()
    return tuple(np.array(v) for v in zip(*found, strict=True))


def prefill_jobs(plan: AttendPlan, h: Heads, part: ChunkCounts, exact: bool) -> tuple[np.ndarray, ...]:
    """The jobs of the chunks with several queries, as four arrays with an item for each kind of job.

    They are: how many keys one job reads; how many key tiles that is; index of a job's first key tile; how many jobs
    are of this kind. Key tiles are indexed over all distinct chunks.

    part: (queries, keys, number of sequences) of each distinct chunk. exact: True to count the keys and key tiles of
    jobs whose window starts within a tile. False to count their mean over all positions within the tile, so that a
    longer context does not have fewer.
    """
    seen, tiles, starts, count, before = [], [], [], [], 0.0
    step = max(1, plan.rows // plan.pack)
    for q, keys, n in part:
        first = np.arange(0, q, step)
        last = np.minimum(first + step, q) + keys - q
        low = np.maximum(0, first + keys - q - h.window + 1) if h.window else np.zeros(len(first))
        start = low // plan.keys
        mean = (low > 0) & (not exact)
        seen.append(last - np.where(mean, low - (plan.keys - 1) / 2, start * plan.keys))
        tiles.append(np.where(mean, (last - low + plan.keys - 1) / plan.keys, np.ceil(last / plan.keys) - start))
        starts.append(before + start)
        before += np.ceil(keys / plan.keys)
        count.append(np.full(len(first), n * h.heads / plan.pack))
    return np.concatenate(seen), np.concatenate(tiles), np.concatenate(starts), np.concatenate(count)


@lru_cache(maxsize=16384)
def prefill_plan(target: Target, h: Heads, part: ChunkCounts) -> tuple[float, float, float, AttendPlan, float]:
    """The fastest plan for the chunks with several queries: (seconds, compute seconds, jobs, plan, bytes read again).

    - seconds: from the first load until the last result is stored.
    - compute seconds: time in which a core computes, as a mean over the cores.
    - jobs: number of jobs.
    - plan: the AttendPlan.
    - bytes read again: bytes of keys and values that HBM delivers in addition to delivering each byte once. It is 0
      with an L2, which serves repeated reads.

    part: (queries, keys, number of sequences) of each distinct chunk.
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
        seen, tiles, start, count = prefill_jobs(plan, h, part, lib.activation_bytes >= WIDE)
        loaded = float(seen @ count) / float(tiles @ count) if knows_lengths(lib, plan) else plan.keys
        read = float(tiles @ count) * loaded * h.kv_width(lib) * h.bits / 8
        missed = min(1.0, cache / read) if chip.l2_bytes else 1.0
        mean = sum(q * n for q, _, n in part) * h.heads / float(count.sum())
        if lib.activation_bytes >= WIDE:
            seconds = stream_prefill_seconds(target, h, plan, tiles, start, count, missed, mean, loaded)
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
    """Number of different key tiles that the chunks with several queries read, over all sequences and K/V heads.

    part: (queries, keys, number of sequences) of each distinct chunk. A window that starts within a tile counts with
    the mean over all positions within the tile.
    """
    total = 0.0
    for q, keys, n in part:
        low = max(0, keys - q - h.window + 1) if h.window else 0
        total += n * ((keys - low + plan.keys - 1) / plan.keys if low else np.ceil(keys / plan.keys))
    return float(total * h.kv_heads)


def knows_lengths(library: KernelLibrary, plan: AttendPlan) -> bool:
    """True if an attention kernel loads only the keys that exist; False if it loads the context's last tile whole.

    True if the plan loads jobs ahead (plan.ahead > 0), if the library's activations are FP32, as in the streams that
    the simulator executes, or if the library's whole_key_tiles is False. False in all other cases.
    """
    return plan.ahead > 0 or library.activation_bytes >= WIDE or not library.whole_key_tiles


def decode_keys(library: KernelLibrary, window: int, keys: int) -> int:
    """Number of keys that a kernel reads for the query of a decoding sequence with `keys` keys in its context.

    window: largest number of keys that a query sees; 0: it sees all. The kernel reads at least
    library.window_min_keys keys, even if the window is shorter.
    """
    return min(keys, max(window, library.window_min_keys)) if window else keys


@lru_cache(maxsize=16384)
def decode_plan(target: Target, h: Heads, part: ChunkCounts, cached: float) -> tuple[float, float, float, AttendPlan]:
    """The fastest context split for the chunks with one query: (seconds, compute seconds, jobs, plan).

    - seconds: from the first load until the last result is stored, with the merge of the parts.
    - compute seconds: time in which a core computes, as a mean over the cores.
    - jobs: number of jobs.
    - plan: the AttendPlan; plan.parts is the context split.

    part: (queries, keys, number of sequences) of each distinct chunk; all have 1 query. cached: fraction of the keys
    and values that the L2 holds.
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
        equal = lib.activation_bytes >= WIDE and not plan.ahead
        tiles, seen, count = decode_jobs(plan, keys, n, equal)
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


def decode_jobs(plan: AttendPlan, keys: np.ndarray, n: np.ndarray, equal: bool) -> tuple[np.ndarray, ...]:
    """The jobs of the chunks with one query, as three arrays with an item for each kind: key tiles, keys, number.

    Key tiles and keys are those of one job; the last array is the number of jobs of the kind. A context is cut into
    parts of equally many tiles. The last part, a kind of its own, has the rest.

    keys, n: keys, and number of tiles of queries that attend to so many. equal: True to count the last part like the
    others: streams that load no jobs ahead start jobs of all cores together.
    """
    tiles = np.ceil(keys / plan.keys)
    per = np.ceil(tiles / plan.parts)
    whole = np.ceil(tiles / per) - 1  # parts of a context, but for the last
    if equal:
        return per, per * keys / tiles, n * (whole + 1)
    last = keys - whole * per * plan.keys
    out = (per, tiles - whole * per), (per * plan.keys, last), (n * whole, n)
    kept = np.concatenate(out[2]) > 0
    return tuple(np.concatenate(v)[kept] for v in out)


def decode_seconds(
    target: Target, h: Heads, plan: AttendPlan, tiles: np.ndarray, keys: np.ndarray, count: np.ndarray, missed: float
) -> float:
    """Modelled seconds of decode attention (chunks with one query), until the last job's result is stored.

    The model assumes that all cores share the HBM and L2 rates equally, and that the tiles of a job load equally many
    keys. A job attends with one query, for plan.pack heads, over one part of the context. Equal jobs are one kind.

    tiles, keys: for each kind, number of key tiles that one job loads, and number of keys in them. count: for each
    kind, number of jobs. missed: fraction of the tiles loaded from HBM; the L2 holds the rest.
    """
    chip, lib, latency_s = target.chip, target.library, target.chip.constants.hbm_latency_s
    dealt = makespan if lib.activation_bytes >= WIDE else least_makespan
    t, slots = tile_seconds(target, h, plan.rows, plan.keys), chip.cores * plan.lanes
    active = min(float(count.sum()), slots)
    turns = max(1.0, active / chip.cores)  # jobs on one core take turns
    key_bytes = h.kv_width(lib) * h.bits / 8 * burst_overfetch(lib, h)
    here = 1 - h.hbm_part(target)  # part of a tile that is in the L2; it is loaded last

    def key_seconds(active: float, turns: float) -> float:
        """Seconds to load one key and its value, while `active` cores load."""
        base = max(active / chip.l2_rate, turns / chip.port_rate)
        return key_bytes * ((1 - here) * max(active * missed / (1 - here) / chip.hbm_rate, base) + here * base)

    each, widen = key_seconds(active, turns), widen_seconds(target, h) * turns
    load = keys / tiles * each  # of a tile, for each kind
    loaded = np.maximum(load, widen) if two_jobs_fit(target, h) else load + widen
    total = float(tiles @ count)
    jobs, mean = float(count.sum()) / chip.cores, float(keys @ count) / total  # mean: keys of a tile
    if plan.ahead:  # the loads of all jobs of a core are one pipeline
        between = 0.0 if chip.att_lanes else max(0.0, t.merge - t.scores)
        start = t.blank * min(plan.held, np.ceil(jobs)) + t.fill + t.merge + latency_s
        first = min(float(keys.max()), plan.keys) * each  # seconds to load the first tile
        computed = dealt(tiles * t.work + between, count, chip.cores) + min(first, t.work) + latency_s
        rounds = np.floor((max(1.0, dealt(tiles, count, chip.cores)) - 1) / plan.depth) + 1
        first = max(first, widen) if two_jobs_fit(target, h) else first + widen
        alone = pipeline(tiles, loaded, t.work, latency_s, plan.depth).max()
        mean_load = float(loaded * tiles @ count) / total
        even = max(1.0, total / chip.cores)
        loads = max(alone, pipeline(even, mean_load, t.work, latency_s, plan.depth))
        return float(start + max(computed, rounds * (first + latency_s + t.work), loads))
    if lib.activation_bytes >= WIDE:  # in the streams, a core starts `lanes` jobs after all earlier ones have ended
        full, rest = divmod(round(float(count.sum())), chip.cores)  # jobs of every core; cores that have one more
        users = [chip.cores] * full + [rest] * (rest > 0)  # of each job of the core with most: cores that run one now
        each_job, seconds = total / float(count.sum()), latency_s + t.blank  # each_job: mean tiles of a job
        for first_job in range(0, len(users), plan.lanes):
            now = users[first_job : first_job + plan.lanes]
            how = mean * key_seconds(float(np.mean(now)), 1.0) + widen, t.work, latency_s, plan.depth
            seconds += t.fill + float(pipeline(each_job * len(now), *how)) + t.merge
        return seconds
    # A core waits for the first tile of each job, and no conversion overlaps with that.
    waited = load + widen - loaded
    computed = least_makespan(tiles * t.work + t.fill + t.merge, count, chip.cores) + latency_s + float(waited.max())
    waits = (lib.decode_waits - 1) * latency_s
    seconds = pipeline(tiles, loaded, t.work * turns, latency_s, plan.depth) + waited + waits
    # Jobs that wait for memory speed up as others end, so the cores' idle time is not counted.
    return float(latency_s + t.blank + max(computed, even_makespan(seconds, count, slots)))


def merge_seconds(target: Target, h: Heads, plan: AttendPlan, jobs: float) -> float:
    """Seconds to merge the results of plan.parts parts of the context, for `jobs` tiles of queries.

    Counts HBM latency, the time to store the parts' results and to load them again at HBM's rate, and a launch if the
    library merges in a launch of its own. The arithmetic is not counted.
    """
    chip, lib = target.chip, target.library
    results = jobs * plan.pack * h.v_dim * 4
    seconds = chip.constants.hbm_latency_s + 2 * plan.parts * results / chip.hbm_rate
    return seconds + (lib.launch_s if lib.merge_launch else 0.0)
