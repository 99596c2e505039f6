"""Matrix products on a chip, shared by linear, head_linear and experts: tiling, timing, and loading of operands.

The closed form times every tile and K split that the library offers; the fastest is used, as by vendors' libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.chips import ChipError, Target
from intaglio.ops import Tensor
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import matmul_cycles, vector_cycles
from intaglio.silicon.kernels.chip_memory import QuantisedRegion, codes_of, load, slices
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import StreamBuilder
from intaglio.silicon.timing import Timing, waves


@lru_cache(maxsize=64)
def choices(tiles: tuple[tuple[int, int], ...], split_k: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All combinations of tile and K split, as arrays of equal length: (tile rows, tile columns, K splits)."""
    grid = np.array([(m, n, s) for m, n in tiles for s in split_k], float)
    return grid[:, 0], grid[:, 1], grid[:, 2]


def step_depth(target: Target, bits: int) -> int:
    """Number of K values in a pipeline step for operands of `bits` bits: those of one HBM burst.

    On arrays at least 128 deep it is at least four times the array's depth.
    """
    array = target.chip.array_shape[2]
    return max(target.library.burst_bytes * 8 // bits, 4 * array if array >= 128 else 0)


def hbm_traffic(target: Target, m: Any, n: Any, k: Any, tm: Any, tn: Any, split: Any, x_bytes: float, w_bytes: float,
                out_bytes: float) -> tuple[Any, Any]:  # fmt: skip
    """(bytes of all operands, bytes of the weights) that x [m, k] @ w.T [k, n] moves from and to HBM.

    The cores work on one block of tiles at a time, as square as possible, and read the rows of x and of w once for each
    block. An operand that fits the L2 is read from HBM once. A small x is not read at all, since the op before has just
    written it to the L2; of a small result only 30 % is written back, since the next op reads it before.

    tm, tn: rows and columns of a tile. split: number of parts of K. x_bytes, w_bytes, out_bytes: bytes per value.
    """
    chip, part = target.chip, target.library.l2_usable
    gm, gn = np.ceil(m / tm), np.ceil(n / tn)
    block = np.minimum(gm * gn, np.maximum(1, chip.cores / np.minimum(split, chip.cores)))
    rows = np.clip(np.round(np.sqrt(block * tn / tm)), 1, np.minimum(gm, block))
    columns = np.minimum(np.ceil(block / rows), gn)
    x, w, out = m * k * x_bytes, n * k * w_bytes, m * n * out_bytes
    kept = chip.l2_bytes * part
    one_fits = np.minimum(x, w) < kept * part
    rows_fit = np.minimum(rows * tm, m) * k * x_bytes < kept  # a block's rows of x stay while all of w streams past
    x_times = np.where(one_fits | rows_fit, 1, np.ceil(gn / columns))
    w_times = np.where(one_fits, 1, np.ceil(gm / rows))
    x_resident = np.where(x < kept * 0.6, 1.0, 0.0)
    written = np.where(out > kept * 0.3, 1.0, 0.3)  # the next op reads a small result before it is written back
    weights = w * w_times
    return x * x_times - x * x_resident + weights + out * written, weights


def time_choices(target: Target, m: Any, n: Any, k: Any, x_format: str, w_format: str, w_bits: float, out_bytes: float,
                 glu: bool = False, resident: bool = False) -> dict[str, Any]:  # fmt: skip
    """A dict of the times of x [m, k] @ w.T [k, n], as arrays with an item for each choice of tile and K split.

    m, n, k are numbers or arrays [..., 1]. `resident`: True if the weights were prefetched, so that HBM reads none.

    Keys: seconds of the product, infinite for a K split whose parts have fewer than 4 steps; hbm, the bytes read and
    written; weights, the bytes of weights; jobs, their number; steps of one job along K; work, seconds of computing one
    step; drain, seconds of one tile; stage, bytes of operands of one step; ring, stages in flight; depth, K values of a
    step; run, name of the format of products; tile, (tile rows, tile columns, K splits). Raises ChipError for a format
    that the chip's array does not multiply.
    """
    chip, lib = target.chip, target.library
    latency_s = chip.constants.hbm_latency_s
    tm, tn, split = choices(lib.tiles, lib.split_k)
    run = max(chip.runs_as(x_format), chip.runs_as(w_format), key=formats.bits)
    x_bits = formats.bits(x_format)
    tk = step_depth(target, formats.bits(run))
    steps = np.ceil(np.ceil(k / tk) / split)
    jobs = np.ceil(m / tm) * np.ceil(n / tn) * split
    stage = (tm * x_bits + tn * w_bits) * tk / 8
    ring = np.clip(np.floor(chip.sram_bytes / stage), 2, lib.matmul_stages)
    # Tiles that run on one core at a time (occupancy)
    per_core = np.clip(np.minimum(np.floor(chip.sram_bytes / (4 * stage)), chip.acc_bytes / (8 * tm * tn)), 1, 4)
    hbm, weights = hbm_traffic(target, m, n, k, tm, tn, split, x_bits / 8, w_bits / 8, out_bytes)
    if resident:
        hbm = hbm - weights
    work = matmul_cycles(target, tm, tn, tk, run) / chip.clock_hz

    def period(active: Any) -> Any:
        """Seconds of one pipeline step while `active` cores load."""
        load = np.maximum(stage / chip.port_rate, stage * active / chip.l2_rate)
        return np.maximum(np.maximum(load, work), (load + work + latency_s) / (ring * per_core))

    full, rest = waves(jobs, chip.cores)
    rounds = full + (rest > 0)
    drain = vector_cycles(chip, tm * tn * (1 + glu)) / chip.clock_hz
    # A large result is stored to HBM, and with one tile on a core no other tile overlaps with the store.
    exposed = (m * n * out_bytes > chip.l2_bytes * lib.l2_usable) & (per_core < 2)
    store_rate = np.where(exposed, np.minimum(chip.l2_rate, chip.hbm_rate), chip.l2_rate)
    store = tm * tn * out_bytes * np.minimum(jobs, chip.cores) / store_rate
    seconds = steps * (full * period(chip.cores) + (rest > 0) * period(np.maximum(rest, 1)))
    if lib.persistent:  # the next tile's operands are loaded while this one drains
        seconds = seconds + drain * rounds + latency_s + store
    else:
        seconds = seconds + (latency_s + drain + store) * np.ceil(rounds / per_core)
    seconds = lib.launch_s + latency_s + np.maximum(seconds, hbm / chip.hbm_rate)
    partial = np.where(split > 1, 8 * split * m * n / chip.l2_rate + latency_s, 0)
    seconds = np.where((split == 1) | (steps >= 4), seconds + partial, np.inf)
    return {"seconds": seconds, "hbm": hbm, "weights": weights, "jobs": jobs, "steps": steps, "work": work,
            "stage": stage, "ring": ring, "depth": tk, "run": run, "drain": drain, "tile": (tm, tn, split)}  # fmt: skip


@lru_cache(maxsize=65536)
def linear_timing(
    target: Target, m: int, n: int, k: int, x_format: str = "bf16", w_format: str = "bf16", w_bits: float = 0.0,
    out_bytes: float = 2.0, glu: bool = False, resident: bool = False,
) -> Timing:  # fmt: skip
    """The Timing of x [m, k] @ w.T [k, n] with the fastest choice of tile and K split.

    w_bits: bits per weight with its scales; 0: those of `w_format`. out_bytes: bytes per result value. resident: True
    if the weights were prefetched, so that they are not read from HBM. Raises ChipError for a format that the chip's
    array does not multiply.
    """
    chip = target.chip
    w = time_choices(target, m, n, k, x_format, w_format, w_bits or formats.bits(w_format), out_bytes, glu, resident)
    i = int(np.argmin(w["seconds"]))
    tm, tn, split = (int(v[i]) for v in w["tile"])
    cores = chip.cores
    jobs, steps = float(w["jobs"][i]), float(w["steps"][i])
    hbm, moved = float(w["hbm"][i]), jobs * steps * float(w["stage"][i])
    busy = {
        "MXU": jobs * steps * float(w["work"][i]) / cores,
        "VEC": jobs * float(w["drain"][i]) / cores,
        "HBM": hbm / chip.hbm_rate,
        "L2": moved / chip.l2_rate,
    }
    choice = f"tile {tm}x{tn}" + (f", K in {split}" if split > 1 else "") + f", {jobs:,.0f} tiles on {cores} cores"
    seconds, weights = float(w["seconds"][i]), float(w["weights"][i])
    return Timing(seconds, busy, hbm, moved, 0.0, 2.0 * m * n * k, w["run"], weights, choice, jobs=jobs)


def best_tile(target: Target, m: int, n: int, k: int, x_format: str, w_format: str, glu: bool) -> tuple[int, int]:
    """(rows, columns) of the fastest tile without K split that fits accumulators and SRAM.

    The accumulators hold one FP32 tile, or two of a GLU pair; SRAM holds the rings of FP32 operands. Raises ChipError
    if no tile fits.
    """
    chip = target.chip
    w = time_choices(target, m, n, k, x_format, w_format, formats.bits(w_format), 4.0, glu)
    tm, tn, split = w["tile"]
    depth = step_depth(target, 32)
    acc, sram = tm * tn * 4 * (1 + glu), tm * tn * 12 + (16 * tm + 16 * tn) * depth
    fits = (acc <= chip.acc_bytes) & (sram <= chip.sram_bytes)
    if not np.any((split == 1) & fits):
        i = int(np.argmin(np.where(split == 1, sram + acc, np.inf)))
        raise ChipError(
            f"linear of [{m}, {k}] by [{n}, {k}] ({x_format} by {w_format}{', a GLU pair' if glu else ''}): no tile "
            f"fits chip {chip.name}: the smallest, {tm[i]}x{tn[i]}, takes {acc[i]:,.0f} bytes of accumulators and "
            f"{sram[i]:,.0f} of SRAM; the chip has {chip.acc_bytes:,} and {chip.sram_bytes:,}. Give the chip more, or "
            "the kernel library smaller tiles"
        )
    i = int(np.argmin(np.where((split == 1) & fits, w["seconds"], np.inf)))
    return int(tm[i]), int(tn[i])


class Operands:
    """Operands of a product on one core: rings of tiles of x and w, and methods that emit their loads."""

    def __init__(
        self, k: StreamBuilder, x: Region, w: Region | QuantisedRegion, x_format: str, tile: tuple[int, int, int]
    ) -> None:
        tm, tn, tk = tile
        self.k, self.x, self.tk = k, x, tk
        self.whole_rows = x_format == "fp8row"  # one scale a row, so the whole row is loaded before it is rounded
        depth = x.cols if self.whole_rows else tk
        self.raw = k.ring(2, tm, depth, "f32")
        self.rounded = k.ring(2, tm, depth, formats.element(x_format)) if x_format != "f32" else None
        self.columns = k.ring(4, tn, tk, codes_of(w).format)
        self.scales = k.ring(2, tm, 1, "f32") if x_format in ("int8", "fp8row") else None
        self.column_scales = k.ring(4, 1, tn, w.scales_t.format) if isinstance(w, QuantisedRegion) else None

    def load_x(self, rows: slice, depth: slice) -> Region:
        """Load x[rows, depth] unrounded and return its tile."""
        return load(self.k, self.raw.next(), self.x.part(rows, depth))

    def rounded_x(self, rows: slice, depth: slice) -> tuple[Region, Region | None]:
        """Load x[rows, depth] and round it to the op's x_format.

        Returns (tile, row scales); the scales are None if x is not quantised.
        """
        raw = self.load_x(rows, depth)
        if self.rounded is None:
            return raw, None
        part = self.rounded.next().shaped(raw.rows, raw.cols)
        if self.scales is None:
            self.k.emit(isa.Convert(dst=part, src=raw))
            return part, None
        scale = self.scales.next().shaped(raw.rows, 1)
        self.k.emit(isa.Quantise(codes=part, scale=scale, x=raw))
        return part, scale

    def load_w(self, w: Region | QuantisedRegion, columns: slice, depth: slice) -> tuple[Region, Region | None]:
        """Load w[columns, depth]. Returns (tile, column scales); the scales are None if w is not quantised."""
        if not isinstance(w, QuantisedRegion):
            return load(self.k, self.columns.next(), w.part(columns, depth)), None
        assert self.column_scales is not None
        codes = load(self.k, self.columns.next(), w.codes.part(columns, depth))
        group = depth.start // w.group
        return codes, load(self.k, self.column_scales.next(), w.scales_t.part(slice(group, group + 1), columns))

    def multiply(self, rows: slice, sides: Sequence[tuple[Region, Region | QuantisedRegion, slice]]) -> None:
        """Emit the instructions for acc = x[rows] @ w[columns].T over all of K, for each item of `sides`.

        sides: (acc, w, columns) for each product with the same rows of x.
        """
        for depth, groups in k_steps(sides[0][1], self.x.cols, self.tk, self.whole_rows):
            a, row_scale = self.rounded_x(rows, depth)
            for group in groups:
                part = a.part(cols=slice(group.start - depth.start, group.stop - depth.start))
                for acc, w, columns in sides:
                    v, col_scale = self.load_w(w, columns, group)
                    scales: dict[str, Any] = {"row_scale": row_scale, "col_scale": col_scale}
                    self.k.emit(isa.Matmul(acc=acc, a=part, b=v, accumulate=group.start > 0, **scales))


def k_steps(w: Region | QuantisedRegion, k: int, tk: int, whole_rows: bool) -> list[tuple[slice, list[slice]]]:
    """The steps over K, a list of (slice of x to load at once, its sub-slices, each multiplied by one Matmul).

    A quantised w is multiplied one group at a time, since each has its own scales. One scale of x covers
    formats.SPAN values, so groups smaller than that are loaded SPAN values at a time. With `whole_rows` all of K is
    loaded at once.
    """
    if not isinstance(w, QuantisedRegion):
        inner = [slice(d.start, d.stop) for d in slices(k, tk)]
        return [(slice(0, k), inner)] if whole_rows else [(d, [d]) for d in inner]
    outer = [slice(0, k)] if whole_rows else slices(k, w.scale_columns)
    return [(d, [slice(d.start + g.start, d.start + g.stop) for g in slices(d.stop - d.start, w.group)]) for d in outer]


def tile_shape(
    target: Target, m: int, n: int, k: int, x_format: str, w: Region | QuantisedRegion, glu: bool
) -> tuple[int, int, int]:
    """(rows, columns, K values of a step) of a tile of the result, chosen so that all rings fit SRAM."""
    tm, tn = best_tile(target, max(1, m), n, k, formats.element(x_format), codes_of(w).format, glu)
    tk = w.scale_columns if isinstance(w, QuantisedRegion) else min(k, step_depth(target, 32))
    while tm > 1 and tm * 10 * (k if x_format == "fp8row" else tk) + tn * 16 * tk > target.chip.sram_bytes // 2:
        tm //= 2
    return tm, tn, tk


def bits_per_value(tensor: Tensor) -> float:
    """Number of bits per value of a weight, scales included; may be a fraction."""
    rows, cols = prod(int(d) for d in tensor.shape[:-1]), int(tensor.shape[-1])
    return formats.get(tensor.format).nbytes(rows, cols) * 8 / (rows * cols)
