"""Routed experts on a chip: the grouped products and what stands around them, and how long that takes.

Modelled on the grouped kernels that serving engines run: rows are gathered in blocks of one expert each, every block
is a product of its own; routing, activation and combination are kernels of their own over all routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from intaglio.chips import ChipSpec
from intaglio.silicon.instructions import formats_bits, matmul_cycles, vector_cycles
from intaglio.silicon.kernels.linear import BURST, HALF_BURST, KEPT, step_depth
from intaglio.silicon.timing import Timing

ROW_GRAIN = 16  # values: rows of another length are not loaded in vectors
ODD_ROWS = 4.0  # and cost so many times their bytes
STAGES = 4  # of operands that such a kernel keeps in flight
BLOCKS = (16, 32, 64, 128, 256)  # rows of one expert in a tile
COLUMNS = (64, 128, 256)
ROUTING = 3  # kernels: scores and top-k; counting; sorting
OVERFETCH = 5.0  # a block-scaled FP8 kernel reads bytes one by one: what comes with each is used in part
SCALE_BLOCK = 128
WIDEN_OPS = 25  # operations to widen an FP8 weight with its block scale to BF16, in software, on the lanes
ROUTE_OPS = 8  # operations a routing score takes: softmax, top-k, counting


def move(spec: ChipSpec, moved: float) -> float:
    """Seconds of an elementwise kernel that reads and writes so many bytes."""
    rate = spec.shared_rate if moved < spec.shared_bytes * KEPT else spec.hbm_rate
    return spec.constants.launch_s + moved / rate


@dataclass(frozen=True)
class Tiles:
    """Rows and columns that a tile may have, and bytes of K in a step."""

    rows: tuple[int, ...] = BLOCKS
    columns: tuple[int, ...] = COLUMNS
    step_bytes: int = BURST


def tiles_of(spec: ChipSpec, tokens: int, experts: int, narrow: bool) -> Tiles:
    """What the kernel chooses from. A compiled schedule takes the best, and so does a kernel tuned for FP8; a serving
    engine's bf16 kernel goes by a rule of thumb (get_default_config of vLLM, the older one and that of 0.17)."""
    if narrow or spec.prefetch or spec.persistent:
        return Tiles()
    if spec.flash < 3:
        return Tiles((16,), (32,), 128) if tokens <= experts else Tiles((64,), (64,), 64)
    rows = next((rows for most, rows in ((32, 16), (96, 32), (512, 64)) if tokens <= most), 128)
    return Tiles((rows,), (64,), 256) if tokens <= 64 else Tiles((rows,), (128,), 128)


def grouped(
    spec: ChipSpec, tokens: int, counts: np.ndarray, n: int, k: int, x_format: str, w_format: str, w_bits: float
) -> Timing:
    """One grouped product: rows counts[e] of x times w[e] [n, k], for every expert e with rows."""
    c = spec.constants
    run = max(spec.runs_as(x_format), spec.runs_as(w_format), key=formats_bits)
    narrow = w_format == "e4m3" and not spec.persistent
    tiles = tiles_of(spec, tokens, len(counts), formats_bits(run) < 16)
    counts = counts[counts > 0]
    if not len(counts):
        return Timing(c.launch_s)
    x_bits, tk = formats_bits(x_format), step_depth(spec, formats_bits(run)) * tiles.step_bytes // BURST
    steps = -(-k // tk)
    over: float = HALF_BURST if tiles.step_bytes == BURST // 2 else 1.0
    over = OVERFETCH if narrow else ODD_ROWS if k % ROW_GRAIN and not spec.prefetch else over
    weights = len(counts) * n * k * w_bits / 8 * over
    if narrow:  # blocks of 128 by 128 share a scale and are taken whole
        run = "bf16"
        weights *= -(-n // SCALE_BLOCK) * SCALE_BLOCK / n * -(-k // SCALE_BLOCK) * SCALE_BLOCK / k
    best: tuple[float, Timing] | None = None
    for rows in tiles.rows:
        for columns in tiles.columns:
            if rows * columns * 4 > spec.acc_bytes // 2:
                continue
            blocks = float(np.ceil(counts / rows).sum())
            jobs = blocks * -(-n // columns)
            stage = (rows * x_bits + columns * w_bits * over) * tk / 8
            work = float(matmul_cycles(spec, rows, columns, tk, run)) / c.gather_share / spec.clock_hz
            if narrow:
                work += float(vector_cycles(spec, WIDEN_OPS * columns * tk)) / spec.clock_hz
            active = min(jobs, spec.cores)
            load = max(stage / spec.port_rate, stage * active / spec.shared_rate)
            ring = max(2, min(STAGES, spec.sram_bytes // int(stage)))
            room = min(4, spec.sram_bytes // int(4 * stage), spec.acc_bytes // (8 * rows * columns))
            resident = max(1.0, min(room, jobs / spec.cores))
            period = max(load, work, (load + work + c.latency_s) / (ring * resident))
            rounds = max(1.0, jobs / spec.cores) if jobs > 4 * spec.cores else float(np.ceil(jobs / spec.cores))
            edge = c.latency_s + float(vector_cycles(spec, rows * columns)) / spec.clock_hz
            total = float(counts.sum())
            hbm = weights + total * (k * x_bits / 8 + n * 2)
            seconds = max(rounds * steps * period + edge * np.ceil(rounds / resident), hbm / spec.hbm_rate)
            seconds += c.launch_s + c.latency_s
            busy = {"MXU": jobs * steps * work / spec.cores, "HBM": hbm / spec.hbm_rate}
            why = f"blocks of {rows}x{columns} for {len(counts)} experts"
            if best is None or seconds < best[0]:
                flops = 2.0 * total * n * k
                best = seconds, Timing(float(seconds), busy, hbm, hbm, 0.0, flops, run, weights, why)
    assert best is not None
    return best[1]


@lru_cache(maxsize=4096)
def experts_timing(
    spec: ChipSpec, tokens: int, top_k: int, counts: tuple[int, ...], n_experts: int, hidden: int, inner: int,
    x_format: str, w_format: str, w_bits: float = 0.0, gated: bool = True,
) -> Timing:  # fmt: skip
    """A layer of routed experts on one rank: `counts` rows for each expert it holds, of tokens * top_k routed rows that
    all pass through activation and combination."""
    sides = 2 if gated else 1
    w_bits = w_bits or formats_bits(w_format)
    held = np.array(counts)
    rows = float(held.sum()) if formats_bits(x_format) < 16 else tokens * top_k
    score = float(vector_cycles(spec, ROUTE_OPS * tokens * n_experts)) / spec.cores / spec.clock_hz
    c = spec.constants
    routing = Timing(ROUTING * c.launch_s + score, {"VEC": score})
    narrow = formats_bits(x_format) < 16
    parts = [routing]
    if narrow:
        parts.append(Timing(move(spec, tokens * hidden * 3.0)))
    parts.append(grouped(spec, tokens, held, sides * inner, hidden, x_format, w_format, w_bits))
    parts.append(Timing(move(spec, rows * inner * 2.0 * (sides + 1))))
    if narrow:
        parts.append(Timing(move(spec, rows * inner * 3.0)))
    parts.append(grouped(spec, tokens, held, hidden, inner, x_format, w_format, w_bits))
    elsewhere = tokens * top_k - float(held.sum())
    if elsewhere > 0 and not narrow:  # rows of experts that other ranks hold are set to zero
        parts.append(Timing(elsewhere * (sides * inner + hidden) * 2 / spec.hbm_rate))
    parts.append(Timing(move(spec, rows * hidden * 2.0 + tokens * hidden * 2.0)))
    return sum(parts[1:], parts[0])
