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
    """How a kernel divides attention into tiles and jobs. Prefill and decode have separate plans.

    Attributes:
        rows: query rows in a tile. All rows are computed, even if some have no query.
        pack: number of query heads of one K/V head that share a tile; 1: each query head has its own tile.
        keys: number of keys in a tile.
        depth: number of tiles of keys and values that SRAM holds at the same time, so that one is loaded while another
            is used.
        ahead: largest number of later jobs whose queries and keys a core loads while it computes a job; 0: a core loads
            them when the job starts.
        lanes: if `ahead` is 0, number of jobs that a core starts together. It then waits only for the loads of the
            first.
        parts: largest number of parts into which the context of a sequence with one new token is split.
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
        """Number of jobs whose queries and sums a core keeps in its memory at the same time."""
        return max(self.lanes, 1 + self.ahead)


def product_format(target: Target, h: Heads) -> str:
    """Returns the name of the format in which a kernel multiplies queries by keys, and softmax weights by values.

    It is "f32" if the library's activations have 4 bytes. Otherwise it is "e4m3" if the cache has 8 bits per value and
    the library multiplies such values without converting them (kv_native). In all other cases it is "bf16".
    """
    if target.library.activation_bytes >= WIDE:
        return "f32"
    return "e4m3" if h.bits == 8 and target.library.kv_native else "bf16"


def fitted(target: Target, h: Heads, plan: AttendPlan) -> AttendPlan:
    """Returns a copy of `plan` with tiles that fit a core's SRAM and accumulators.

    Until they fit, the plan's tiles are made fewer or smaller. A plan with one row and one key is returned even if it
    does not fit. All this applies only if activations are FP32 (target.library.activation_bytes), as in the
    instructions that the simulator executes. If they are smaller, as in a vendor's 16-bit kernels, `plan` is returned
    unchanged.
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
    """True if all tiles of the plan (queries, keys, values, scores, sums) fit a core's SRAM and accumulators."""
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
    """Seconds that one core takes for each phase of an attention job.

    The first three phases are done for each tile of queries with each tile of keys.

    Attributes:
        scores: seconds to multiply the queries by the keys; 0 on a chip with a fused attention engine.
        softmax: seconds to compute the softmax weights from the scores; 0 on a chip with a fused attention engine.
        sums: seconds to multiply the softmax weights by the values. On a chip with a fused attention engine: seconds of
            all three phases together.
        fill: seconds to set the sums, maxima and softmax denominators to their initial values, once for each job.
        blank: seconds to set a tile of queries in SRAM to zeros. This is done once, before the first job that uses the
            tile.
        merge: seconds to divide the sums by the softmax denominators, once for each job.
    """

    scores: float
    softmax: float
    sums: float
    fill: float
    blank: float
    merge: float

    @property
    def work(self) -> float:
        """Seconds to process one tile of queries with one tile of keys.

        This is the sum of scores, softmax and sums, which run one after the other.
        """
        return self.scores + self.softmax + self.sums


@lru_cache(maxsize=16384)
def tile_seconds(target: Target, h: Heads, rows: int, keys: int) -> TileSeconds:
    """Returns the modelled seconds of each phase of an attention job, such as scores and softmax.

    rows: query rows of a tile. keys: keys of a tile. Results are cached.
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
    """Returns the seconds to convert one tile of 8-bit keys and values to bf16 on the vector lanes.

    It is 0 if the kernel needs no conversion.
    """
    chip, values = target.chip, target.library.key_tile * h.kv_width(target.library)
    needed = h.bits < 16 and not chip.att_lanes and product_format(target, h) != "e4m3"
    return float(vector_cycles(chip, target.library.kv_dequant_ops * values)) / chip.clock_hz if needed else 0.0


def two_jobs_fit(target: Target, h: Heads) -> bool:
    """True if SRAM has room for two tiles of keys and values, each stored in the cache's format and again in bf16.

    The tile of one job can then be loaded while the tile of another job is converted.
    """
    return 2 * target.library.key_tile * h.kv_width(target.library) * (h.bits / 8 + 2) <= target.chip.sram_bytes


def burst_overfetch(library: KernelLibrary, h: Heads) -> float:
    """Returns how many bytes HBM transfers for each byte of a row of keys or values.

    The number is library.half_burst_cost if a row is shorter than library.burst_bytes, else 1.
    """
    return library.half_burst_cost if h.head_dim * h.bits // 8 < library.burst_bytes else 1.0


def deal(seconds: Sequence[float], cores: int) -> list[list[int]]:
    """Distributes jobs to cores: the longest job first, each to the core with the least work so far.

    Returns a list for each core with work. The list has the numbers of the core's jobs (indices into `seconds`), in the
    order in which they run.

    seconds: time of each job.
    """
    out: list[list[int]] = [[] for _ in range(min(cores, len(seconds)))]
    free = [(0.0, core) for core in range(len(out))]
    for job in sorted(range(len(seconds)), key=lambda j: -seconds[j]):
        ends, core = heapq.heappop(free)
        out[core].append(job)
        heapq.heappush(free, (ends + seconds[job], core))
    return out


def decode_keys(library: KernelLibrary, window: int, keys: int) -> int:
    """Returns the number of keys that a kernel reads for a sequence with one query.

    keys: number of keys of the sequence. window: number of latest keys that the query sees; 0: it sees all keys. If
    there is a window, the kernel reads at least library.window_min_keys keys, or all keys of a sequence that has fewer.
    """
    return min(keys, max(window, library.window_min_keys)) if window else keys
