"""Cycle counts of one core's engines: the matrix array, the vector lanes, the fused attention engine.

Sizes are numbers or NumPy arrays that broadcast, so that one call evaluates every tiling of a product.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from intaglio import formats
from intaglio.chips import ChipSpec, Target


def matmul_cycles(target: Target, m: Any, n: Any, k: Any, format: str) -> Any:
    """Number of cycles of one core's matrix array for [m, k] times [k, n] in `format`.

    The result is the longer of two times, divided by the library's mxu_efficiency: the time of the
    multiply-accumulates, with m, n, k rounded up to the array's shape; and the time to write the operands to SRAM once
    and read them once. Raises ChipError for a format that the chip's array does not multiply.
    """
    chip = target.chip
    am, an, ak = chip.array_shape
    macs = np.ceil(m / am) * am * (np.ceil(n / an) * an) * (np.ceil(k / ak) * ak)
    operands = 2 * (m + n) * k * formats.bits(chip.runs_as(format)) / 8
    cycles = np.maximum(macs / chip.mac_rate(format), operands / chip.sram_bytes_per_cycle)
    return cycles / target.library.mxu_efficiency


def vector_cycles(chip: ChipSpec, ops: Any, exps: Any = 0) -> Any:
    """Cycles of one core's vector lanes for `ops` FP32 operations and `exps` exponentials."""
    return ops / chip.vec_lanes + exps / chip.exp_lanes


def norm_cycles(chip: ChipSpec, n: Any) -> Any:
    """Cycles of a norm of n values: two passes of two operations each, with a tree reduction across the lanes."""
    return vector_cycles(chip, 4 * n) + 2 * np.log2(chip.vec_lanes)


def moment_cycles(chip: ChipSpec, n: Any, moment: str) -> Any:
    """Cycles of the mean ("mean"), root mean square ("rms") or standard deviation ("std") of n values.

    A deviation takes two passes, the others one; each pass ends with a tree reduction across the lanes.
    """
    operations, passes = {"mean": (1, 1), "rms": (2, 1), "std": (4, 2)}[moment]
    return vector_cycles(chip, operations * n) + passes * np.log2(chip.vec_lanes)


def sinkhorn_cycles(chip: ChipSpec, n: Any, iterations: int) -> Any:
    """Cycles to make a square matrix of n values doubly stochastic, as the op `sinkhorn` does.

    Counted are a softmax of the rows, and then 2 * iterations - 1 passes. A pass sums all rows or all columns, each by
    a tree reduction, and divides them by their sums.
    """
    rounds = 2 * iterations - 1
    return vector_cycles(chip, (4 + 2 * rounds) * n, n) + (rounds + 1) * np.log2(np.sqrt(n))


def pool_cycles(chip: ChipSpec, n: Any) -> Any:
    """Cycles to pool n values by the softmax of their gates: six operations and one exponential a value."""
    return vector_cycles(chip, 6 * n, n)


def scan_cycles(chip: ChipSpec, m: Any, n: Any, normalised: bool) -> Any:
    """Cycles to advance a state of n columns over m rows, one after the other, so that a row takes whole lanes.

    Two operations and one exponential a value; `normalised` adds three operations and two exponentials (a root takes as
    long as an exponential).
    """
    lanes = np.ceil(n / chip.vec_lanes) * chip.vec_lanes
    return m * vector_cycles(chip, (2 + 3 * normalised) * lanes, (1 + 2 * normalised) * n)


def choose_cycles(chip: ChipSpec, m: int, n: int, top: int) -> Any:
    """Cycles to merge n scores into a list of the `top` best, for m rows.

    Four operations for each score and each entry of the list, and a bisection for the threshold, of 32 passes.
    """
    return vector_cycles(chip, 36 * m * (n + top))


SOFTMAX_OPS = 5  # scale and mask, maximum, subtract, sum, convert


def softmax_cycles(chip: ChipSpec, n: Any, capped: bool = False) -> Any:
    """Cycles of the vector lanes for a softmax step over n scores.

    capped: True if scores are soft-capped, which adds one exponential and two operations per score.
    """
    return vector_cycles(chip, (SOFTMAX_OPS + 2 * capped) * n, n * (1 + capped))


def exposed(target: Target, cycles: float) -> float:
    """The part of a softmax step's `cycles` that is not hidden behind matrix products of other rows, in cycles.

    The hidden fraction is target.library.softmax_overlap.
    """
    return cycles * (1 - target.library.softmax_overlap)


def attend_cycles(target: Target, rows: Any, n: Any, d: Any, dv: Any, format: str) -> Any:
    """Cycles of the fused attention engine for `rows` queries and n keys of width d, values of width dv.

    The matrix array holds queries and sums while keys and values stream through it; at the same time the engine's own
    lanes turn scores into weights. The longest of multiplying, streaming and the lanes' work determines the time.
    Raises ChipError for a format that the chip's array does not multiply.
    """
    chip = target.chip
    macs = rows * n * (d + dv) / chip.mac_rate(format) / target.library.mxu_efficiency
    streamed = n * (d + dv) * formats.bits(chip.runs_as(format)) / 8 / chip.sram_bytes_per_cycle
    return np.maximum(np.maximum(macs, streamed), rows * n / max(1, chip.att_lanes))


def sample_cycles(chip: ChipSpec, n: Any, filtered: Any) -> Any:
    """Cycles to sample from n logits: four operations and one exponential a logit.

    With `filtered` (top-k or top-p), a bisection for the threshold makes 32 more passes.
    """
    return vector_cycles(chip, (4 + 32 * filtered) * n, n)
