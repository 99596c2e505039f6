"""Attention on a chip: how queries and keys are tiled and dealt to cores, and how long that takes.

Flash attention (Dao et al. 2022): a job is a tile of queries that walks over tiles of keys; long contexts are cut into
parts that are merged. The kernels in instructions stand in flash.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from intaglio.chips import ChipSpec
from intaglio.silicon.fused import NAME, step_cycles
from intaglio.silicon.instructions import attend_cycles, formats_bits, matmul_cycles, softmax_cycles, vector_cycles
from intaglio.silicon.kernels.linear import BURST, HALF_BURST
from intaglio.silicon.timing import Timing

KEYS = {2: 64, 3: 128}  # in a tile, by generation; a tile is loaded whole even where a context ends inside it
QUERIES = (64, 128)  # rows of a tile that kernels may choose
FUSED_QUERIES = (64, 128, 256, 512)  # rows that a fused engine may keep
FEW = 16  # rows an array takes at least
PARTS = (1, 2, 4, 8, 16, 32, 64, 128)  # a context may be cut into so many
WIDEN_OPS = 8  # operations to widen a value of 8 bits between load and use: unpack, two conversions, scale, pack, move
RESIDENT = 2  # decode jobs at a time on a small core
WINDOW_GRAIN = 256  # keys of a window that decode kernels read at least


@dataclass(frozen=True)
class Heads:
    """The shape of an attention: heads, kv heads, widths of keys and values, window (0: none), and bits of a key."""

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    window: int = 0
    bits: int = 16
    softcap: bool = False

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


Chunks = tuple[tuple[int, int, int], ...]  # (queries, keys up to and including them, how many such sequences)


def chunks(q_len: Sequence[int], context_len: Sequence[int]) -> Chunks:
    """Sequences alike counted together."""
    pairs, counts = np.unique(np.stack([q_len, context_len], axis=1), axis=0, return_counts=True)
    return tuple((int(q), int(c), int(n)) for (q, c), n in zip(pairs, counts, strict=True))


def tile_seconds(spec: ChipSpec, h: Heads, rows: Any) -> Any:
    """One tile of keys under `rows` queries: two products with the softmax between them, which waits for the first
    and is waited for by the second; or the fused engine."""
    rows, keys = np.maximum(FEW, rows), KEYS[spec.flash]
    if spec.att_lanes:
        return attend_cycles(spec, rows, keys, h.head_dim, h.v_dim, "bf16") / spec.clock_hz
    products = matmul_cycles(spec, rows, keys, h.head_dim, "bf16") + matmul_cycles(spec, rows, h.v_dim, keys, "bf16")
    step = step_cycles if NAME in spec.extra else softmax_cycles
    softmax = step(spec, rows * keys, h.softcap)
    if spec.flash >= 3:  # two groups of rows take turns on the array: half of the softmax is hidden
        softmax = softmax / 2
    return (products + softmax) / spec.clock_hz


def widen_seconds(spec: ChipSpec, h: Heads) -> float:
    """A tile of 8-bit keys and values to bf16, on the lanes, between its load and its use."""
    values = KEYS[spec.flash] * (h.head_dim + h.v_dim)
    narrow = h.bits < 16 and not spec.att_lanes
    return float(vector_cycles(spec, WIDEN_OPS * values)) / spec.clock_hz if narrow else 0.0


def both_fit(spec: ChipSpec, h: Heads) -> bool:
    """Whether SRAM holds a tile of two jobs as it came and as it is widened: then one comes in while the other is."""
    return RESIDENT * KEYS[spec.flash] * (h.head_dim + h.v_dim) * (h.bits / 8 + 2) <= spec.sram_bytes


def burst_share(spec: ChipSpec, h: Heads) -> float:
    """Bytes fetched for each byte of a key: rows of half a burst cost more."""
    return HALF_BURST if h.head_dim * h.bits // 8 < BURST and not spec.prefetch else 1.0


def makespan(seconds: np.ndarray, count: np.ndarray, cores: int) -> float:
    """When the last core ends, jobs dealt longest first: no earlier than the longest job, than an even share, and than
    the two jobs that must meet on one core."""
    order = np.argsort(-seconds)
    seconds, count = seconds[order], count[order]
    ends = np.cumsum(count)
    even = float(seconds @ count) / cores
    if ends[-1] <= cores:
        return float(seconds[0])
    at = [seconds[int(np.searchsorted(ends, rank, side="right"))] for rank in (cores - 1, cores)]
    return max(float(seconds[0]), even, float(sum(at)))


def prefill_jobs(spec: ChipSpec, h: Heads, part: Chunks, rows: int, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Key tiles of each job, and how many such jobs: a job is `rows` queries of one head, or of the group's heads
    together."""
    tiles, count = [], []
    for q, keys, n in part:
        pack = h.group if packed else 1
        step = max(1, rows // pack)
        first = np.arange(0, q, step)
        last = np.minimum(first + step, q) + keys - q
        start = np.maximum(0, first + keys - q - h.window + 1) // KEYS[spec.flash] if h.window else 0
        tiles.append(np.ceil(last / KEYS[spec.flash]) - start)
        count.append(np.full(len(first), n * h.heads / pack))
    return np.concatenate(tiles), np.concatenate(count)


def prefill_seconds(spec: ChipSpec, h: Heads, part: Chunks) -> tuple[float, float]:
    """Seconds of the chunks with several queries, and those of the array and lanes, by the best tile."""
    c, best = spec.constants, (np.inf, 0.0)
    sizes = FUSED_QUERIES if spec.att_lanes else QUERIES
    ways = [(rows, packed) for rows in sizes for packed in ((False, True) if spec.flash >= 3 else (False,))]
    for rows, packed in ways:
        tiles, count = prefill_jobs(spec, h, part, rows, packed)
        work = float(tile_seconds(spec, h, rows)) + widen_seconds(spec, h) / 2
        load = (
            KEYS[spec.flash]
            * (h.head_dim + h.v_dim)
            * h.bits
            / 8
            * min(float(count.sum()), spec.cores)
            / spec.shared_rate
        )
        edge = 2 * c.latency_s + rows * (h.head_dim + h.v_dim) * 2 * spec.cores / spec.shared_rate
        edge = 0.0 if spec.persistent else edge / 2  # the next tile's operands come in while this one is worked on
        seconds = makespan(tiles * max(work, load) + edge, count, spec.cores)
        best = min(best, (seconds, float(tiles @ count) * work / spec.cores))
    return best


def decode_keys(h: Heads, keys: int) -> int:
    """Keys that a single query reads."""
    return min(keys, max(h.window, WINDOW_GRAIN)) if h.window else keys


def decode_seconds(spec: ChipSpec, h: Heads, part: Chunks) -> tuple[float, float, int]:
    """Seconds of the chunks with one query, those of the array and lanes, and the parts a context is cut into."""
    c, best = spec.constants, (np.inf, 0.0, 1)
    tiles = np.array([-(-decode_keys(h, keys) // KEYS[spec.flash]) for _, keys, _ in part], float)
    n = np.array([count * h.kv_heads for _, _, count in part], float)
    rows = 2.0 ** np.ceil(np.log2(max(FEW, h.group)))
    work = float(tile_seconds(spec, h, rows))
    tile_bytes = KEYS[spec.flash] * (h.head_dim + h.v_dim) * h.bits / 8 * burst_share(spec, h)
    slots = spec.cores * (RESIDENT if spec.cores > 32 else 1)
    ring = max(2.0, min(16.0, spec.sram_bytes // (2 * tile_bytes))) if spec.persistent else 2.0
    results = float(n.sum()) * h.group * h.v_dim * 4
    for parts in PARTS if (h.group > 1 or spec.flash >= 3) and not spec.persistent else (1,):
        per = np.ceil(tiles / parts)
        count = n * np.ceil(tiles / per)
        active = min(float(count.sum()), slots)
        shared = max(1.0, active / spec.cores)  # jobs on one core take turns
        load = max(tile_bytes * active / spec.hbm_rate, tile_bytes * shared / spec.port_rate)
        widen = widen_seconds(spec, h) * shared
        loaded = max(load, widen) if both_fit(spec, h) else load + widen
        period = max(loaded, work * shared, (load + work + c.latency_s) / ring)
        once = 0.0 if spec.persistent else c.latency_s + load + widen - loaded  # nothing to widen beside the first tile
        seconds = makespan(per * period + once, count, slots) + c.latency_s
        if parts > 1:
            seconds += (c.launch_s if spec.flash < 3 else 0.0) + c.latency_s + 2 * parts * results / spec.hbm_rate
        best = min(best, (seconds, float(per @ count) * work / spec.cores, parts))
    return best


@lru_cache(maxsize=16384)
def attend_timing(spec: ChipSpec, h: Heads, batch: Chunks) -> Timing:
    """One attend over the sequences of a batch: those with several queries, then those with one."""
    c = spec.constants
    many, single = tuple(p for p in batch if p[0] > 1), tuple(p for p in batch if p[0] == 1)
    seconds, used, why = c.launch_s + c.latency_s, 0.0, []
    if many:
        took, worked = prefill_seconds(spec, h, many)
        seconds, used = seconds + took, used + worked
        why.append(f"{sum(q * n for q, _, n in many):,} queries in tiles")
    if single:
        took, worked, parts = decode_seconds(spec, h, single)
        seconds, used = seconds + took, used + worked
        why.append(f"{sum(n for *_, n in single):,} single queries, contexts in {parts}")
    tokens = sum(q * n for q, _, n in batch)
    read = sum(n * (decode_keys(h, k) if q == 1 else min(k, q + h.window) if h.window else k) for q, k, n in batch)
    cache = read * h.kv_heads * (h.head_dim + h.v_dim) * h.bits / 8
    hbm = cache + tokens * h.heads * (h.head_dim + h.v_dim) * 2
    seen = sum(n * scores(q, k, h.window) for q, k, n in batch)
    flops = 2.0 * h.heads * (h.head_dim + h.v_dim) * seen
    seconds = max(seconds, c.launch_s + hbm / spec.hbm_rate)
    engine = "ATT" if spec.att_lanes else "MXU"
    return Timing(
        seconds, {engine: used, "HBM": hbm / spec.hbm_rate}, hbm, hbm, 0.0, flops, "bf16", 0.0, ", ".join(why)
    )


def scores(q: int, keys: int, window: int) -> float:
    """Query and key pairs that count, of q queries at the end of `keys` keys."""
    if not window:
        return q * keys - q * (q - 1) / 2
    return float(np.minimum(np.arange(keys - q + 1, keys + 1), window).sum())


CONVERT_CYCLES = 0.7  # of a core, for a value rounded to 8 bits on its way, threads doing the addressing too


def kv_write_timing(spec: ChipSpec, tokens: int, h: Heads) -> Timing:
    """Keys and values of `tokens` tokens into their pages: rows of one head, scattered."""
    moved = tokens * h.kv_heads * (h.head_dim + h.v_dim) * (2 + h.bits / 8)
    a_value = 2 / spec.vec_lanes if spec.prefetch else CONVERT_CYCLES  # DMA engines scatter what the lanes rounded
    cycles = 2 * spec.row_cycles + (a_value * (h.head_dim + h.v_dim) if h.bits < 16 else 0)
    rows = tokens * h.kv_heads * cycles / spec.cores / spec.clock_hz
    took = max(moved / spec.hbm_rate, rows)
    seconds = spec.constants.launch_s + spec.constants.latency_s + took
    return Timing(seconds, {"OUT": rows, "HBM": moved / spec.hbm_rate}, moved, moved, why="rows to pages")


def bits_of(format: str) -> int:
    return formats_bits(format)
