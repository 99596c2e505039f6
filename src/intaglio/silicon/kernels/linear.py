"""The matrix product on a chip: how it is tiled, and how long that takes.

Every tile and split the chip allows is weighed by the closed form and the fastest taken, as vendors' libraries do. The
kernel in instructions stands in product.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from intaglio.chips import ChipSpec
from intaglio.silicon.instructions import formats_bits, matmul_cycles, vector_cycles
from intaglio.silicon.timing import Timing, spread

SPLITS = (1, 2, 3, 4, 6, 8, 16, 32)
BURST = 128  # bytes of HBM that come together; of K in one step
HALF_BURST = 1.3  # times the bytes, where a row's piece is half a burst: the other half comes too, and at times again
MOST_STAGES = 8
KEPT = 0.8  # of the shared level: the rest is in flight, or belongs to others
WIDE = ("f32", "bf16", "f16")


@lru_cache(maxsize=64)
def choices(tiles: tuple[tuple[int, int], ...], cores: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tile rows, tile columns and splits of K, every combination, as arrays. Few large cores do not split: their
    columns are enough to go round."""
    splits = SPLITS if cores > 32 else (1,)
    grid = np.array([(m, n, s) for m, n in tiles for s in splits], float)
    return grid[:, 0], grid[:, 1], grid[:, 2]


def step_depth(spec: ChipSpec, bits: int) -> int:
    """K values in one step: a burst's worth, or what four passes of a large array take."""
    return max(BURST * 8 // bits, 4 * spec.array[2] if spec.array[2] >= 128 else 0)


def traffic(spec: ChipSpec, m: Any, n: Any, k: Any, tm: Any, tn: Any, split: Any, x_bytes: float, w_bytes: float,
            out_bytes: float) -> tuple[Any, Any]:  # fmt: skip
    """HBM bytes of a product, all and weights alone. Cores work on a block of tiles at a time, as square as can be:
    rows of x and columns of w are read once a block. What fits the shared level is read once; x is there already, in
    so far as it fits, since the op before has just written it."""
    gm, gn = np.ceil(m / tm), np.ceil(n / tn)
    block = np.minimum(gm * gn, np.maximum(1, spec.cores / np.minimum(split, spec.cores)))
    rows = np.clip(np.round(np.sqrt(block * tn / tm)), 1, gm)
    columns = np.minimum(np.ceil(block / rows), gn)
    x, w, out = m * k * x_bytes, n * k * w_bytes, m * n * out_bytes
    kept = spec.shared_bytes * KEPT
    small = np.minimum(x, w) < kept * KEPT
    band = np.minimum(rows * tm, m) * k * x_bytes < kept  # of rows: then columns pass it by
    x_times = np.where(small | band, 1, np.ceil(gn / columns))
    w_times = np.where(small, 1, np.ceil(gm / rows))
    there = np.where(x < kept * 0.6, 1.0, 0.0)
    written = np.where(out > kept * 0.3, 1.0, 0.3)  # a small result is read from the shared level before it is written
    weights = w * w_times
    return x * x_times - x * there + weights + out * written, weights


def weigh(spec: ChipSpec, m: Any, n: Any, k: Any, x_format: str, w_format: str, w_bits: float, out_bytes: float,
          glu: bool = False, there: bool = False) -> dict[str, Any]:  # fmt: skip
    """Seconds of x [m, k] @ w.T [k, n] for every choice, and what makes them. m, n, k numbers or arrays [..., 1]."""
    c = spec.constants
    tm, tn, split = choices(spec.tiles, spec.cores)
    run = max(spec.runs_as(x_format), spec.runs_as(w_format), key=formats_bits)
    x_bits = formats_bits(x_format)
    tk = step_depth(spec, formats_bits(run))
    steps = np.ceil(np.ceil(k / tk) / split)
    jobs = np.ceil(m / tm) * np.ceil(n / tn) * split
    stage = (tm * x_bits + tn * w_bits) * tk / 8
    ring = np.clip(np.floor(spec.sram_bytes / stage), 2, MOST_STAGES)
    resident = np.clip(np.minimum(np.floor(spec.sram_bytes / (4 * stage)), spec.acc_bytes / (8 * tm * tn)), 1, 4)
    hbm, weights = traffic(spec, m, n, k, tm, tn, split, x_bits / 8, w_bits / 8, out_bytes)
    if there:  # the weights were fetched before
        hbm = hbm - weights
    work = matmul_cycles(spec, tm, tn, tk, run) / spec.clock_hz

    def period(active: Any) -> Any:
        load = np.maximum(stage / spec.port_rate, stage * active / spec.shared_rate)
        return np.maximum(np.maximum(load, work), (load + work + c.latency_s) / (ring * resident))

    full, rest = spread(jobs, spec.cores)
    rounds = full + (rest > 0)
    drain = vector_cycles(spec, tm * tn * (1 + glu)) / spec.clock_hz
    # A large result goes to HBM; with one tile at a time on a core there is nobody to work meanwhile
    alone = (m * n * out_bytes > spec.shared_bytes * KEPT) & (resident < 2)
    sink = np.where(alone, np.minimum(spec.shared_rate, spec.hbm_rate), spec.shared_rate)
    store = tm * tn * out_bytes * np.minimum(jobs, spec.cores) / sink
    seconds = steps * (full * period(spec.cores) + (rest > 0) * period(np.maximum(rest, 1)))
    if spec.persistent:  # the next tile's operands come in while this one drains
        seconds = seconds + drain * rounds + c.latency_s + store
    else:
        seconds = seconds + (c.latency_s + drain + store) * np.ceil(rounds / resident)
    seconds = c.launch_s + c.latency_s + np.maximum(seconds, hbm / spec.hbm_rate)
    partial = np.where(split > 1, 8 * split * m * n / spec.shared_rate + c.latency_s, 0)
    seconds = np.where((split == 1) | (steps >= 4), seconds + partial, np.inf)
    return {"seconds": seconds, "hbm": hbm, "weights": weights, "jobs": jobs, "steps": steps, "work": work,
            "stage": stage, "run": run, "drain": drain, "tile": (tm, tn, split)}  # fmt: skip


@lru_cache(maxsize=65536)
def linear_timing(
    spec: ChipSpec, m: int, n: int, k: int, x_format: str = "bf16", w_format: str = "bf16", w_bits: float = 0.0,
    out_bytes: float = 2.0, glu: bool = False, there: bool = False,
) -> Timing:  # fmt: skip
    """x [m, k] @ w.T [k, n] by the fastest choice. `w_bits`: of a weight with its scales, if not the
    format's. `there`: the weights are on the chip already."""
    w = weigh(spec, m, n, k, x_format, w_format, w_bits or formats_bits(w_format), out_bytes, glu, there)
    i = int(np.argmin(w["seconds"]))
    tm, tn, split = (int(v[i]) for v in w["tile"])
    cores = spec.cores
    jobs, steps = float(w["jobs"][i]), float(w["steps"][i])
    hbm, moved = float(w["hbm"][i]), jobs * steps * float(w["stage"][i])
    busy = {
        "MXU": jobs * steps * float(w["work"][i]) / cores,
        "VEC": jobs * float(w["drain"][i]) / cores,
        "HBM": hbm / spec.hbm_rate,
        "shared": moved / spec.shared_rate,
    }
    why = f"tile {tm}x{tn}" + (f", K in {split}" if split > 1 else "") + f", {jobs:,.0f} tiles on {cores} cores"
    return Timing(float(w["seconds"][i]), busy, hbm, moved, 0.0, 2.0 * m * n * k, w["run"], float(w["weights"][i]), why)


def best_tile(spec: ChipSpec, m: int, n: int, k: int, x_format: str, w_format: str, glu: bool) -> tuple[int, int]:
    """Rows and columns of the fastest tile of an unsplit product, for which there is room: two FP32 accumulators for a
    GLU pair, and SRAM for the rings of FP32 rows that come in."""
    w = weigh(spec, m, n, k, x_format, w_format, formats_bits(w_format), 4.0, glu)
    tm, tn, split = w["tile"]
    depth = step_depth(spec, 32)
    room = (tm * tn * 4 * (1 + glu) <= spec.acc_bytes) & (tm * tn * 12 + (16 * tm + 16 * tn) * depth <= spec.sram_bytes)
    i = int(np.argmin(np.where((split == 1) & room, w["seconds"], np.inf)))
    return int(tm[i]), int(tn[i])
