"""Tiles of attention on a chip, and the seconds that a core takes for each: shared by attend's streams and its timing.

A job is a tile of queries of one K/V head, or of one query head, that iterates over tiles of keys.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from intaglio.chips import KernelLibrary, Target
from intaglio.silicon.isa.cycles import attend_cycles, exposed, matmul_cycles, softmax_cycles, vector_cycles
from intaglio.silicon.isa.softmax_step import NAME, step_cycles
from intaglio.silicon.kernels.kernel import WIDE
from intaglio.silicon.kernels.kv_write import Heads

LISTED = 16  # jobs whose queries' row numbers a core reads at once
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


def decode_keys(library: KernelLibrary, window: int, keys: int) -> int:
    """Number of keys that a kernel reads for the query of a decoding sequence with `keys` keys in its context.

    window: largest number of keys that a query sees; 0: it sees all. The kernel reads at least
    library.window_min_keys keys, even if the window is shorter.
    """
    return min(keys, max(window, library.window_min_keys)) if window else keys
