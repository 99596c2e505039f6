"""Cycle counts of one core's engines: the matrix array, the vector lanes, the fused attention engine.

Sizes are numbers or NumPy arrays that broadcast, so that one call evaluates every tiling of a product.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from intaglio import formats
from intaglio.chips import ChipSpec, Target


def matmul_cycles(target: Target, m: Any, n: Any, k: Any, format: str) -> Any:
    """Returns the cycles of one core's matrix array to multiply [m, k] by [k, n] in `format`.

    This is the longer of two times, divided by the library's mxu_efficiency. The first is the time of the
    multiply-accumulates, with m, n and k rounded up to the array's shape. The second is the time to write the operands
    to SRAM once and to read them once. Raises ChipError for a format that the chip's array does not multiply.
    """
    chip = target.chip
    am, an, ak = chip.array_shape
    macs = np.ceil(m / am) * am * (np.ceil(n / an) * an) * (np.ceil(k / ak) * ak)
    operands = 2 * (m + n) * k * formats.bits(chip.runs_as(format)) / 8
    cycles = np.maximum(macs / chip.mac_rate(format), operands / chip.sram_bytes_per_cycle)
    return cycles / target.library.mxu_efficiency


def vector_cycles(chip: ChipSpec, ops: Any, exps: Any = 0) -> Any:
    """Returns the cycles of one core's vector lanes for `ops` FP32 operations and `exps` exponentials."""
    return ops / chip.vec_lanes + exps / chip.exp_lanes


def norm_cycles(chip: ChipSpec, n: Any) -> Any:
    """Returns the cycles of the vector lanes to normalise n values.

    There are two passes over the values. Each pass does two operations for each value and one tree reduction across
    the lanes.
    """
    return vector_cycles(chip, 4 * n) + 2 * np.log2(chip.vec_lanes)


def moment_cycles(chip: ChipSpec, n: Any, moment: str) -> Any:
    """Returns the number of cycles that the vector lanes take to compute one statistic of n values.

    moment: "mean", "rms" (root mean square) or "std" (standard deviation). "std" takes two passes over the values, the
    others take one. Each pass ends with a tree reduction across the lanes.
    """
    operations, passes = {"mean": (1, 1), "rms": (2, 1), "std": (4, 2)}[moment]
    return vector_cycles(chip, operations * n) + passes * np.log2(chip.vec_lanes)


def sinkhorn_cycles(chip: ChipSpec, n: Any, iterations: int) -> Any:
    """Returns the cycles of the vector lanes to make a square matrix doubly stochastic (Sinkhorn & Knopp).

    n: number of values in the matrix. The cycles are those of one softmax over each row, followed by 2 * iterations - 1
    passes. Each pass sums all rows or all columns, by a tree reduction, and divides the values by these sums.
    """
    rounds = 2 * iterations - 1
    return vector_cycles(chip, (4 + 2 * rounds) * n, n) + (rounds + 1) * np.log2(np.sqrt(n))


def pool_cycles(chip: ChipSpec, n: Any) -> Any:
    """Returns the cycles of the vector lanes to sum n values, weighted by the softmax of their gates.

    Each value takes six operations and one exponential.
    """
    return vector_cycles(chip, 6 * n, n)


def scan_cycles(chip: ChipSpec, m: Any, n: Any, normalised: bool) -> Any:
    """Returns the cycles of the vector lanes for a linear recurrence: a state of n columns advances over m rows.

    The rows are processed one after the other; n is rounded up to whole vectors of lanes for each row. Each value takes
    two operations and one exponential. If `normalised` is set, each value takes three more operations and two more
    exponentials (a square root counts as an exponential).
    """
    lanes = np.ceil(n / chip.vec_lanes) * chip.vec_lanes
    return m * vector_cycles(chip, (2 + 3 * normalised) * lanes, (1 + 2 * normalised) * n)


def choose_cycles(chip: ChipSpec, m: int, n: int, top: int) -> Any:
    """Returns the cycles of the vector lanes to merge n new scores into a list of the `top` best, for each of m rows.

    Each score and each entry of the list takes 36 operations: 4, and 32 for a bisection that finds the threshold.
    """
    return vector_cycles(chip, 36 * m * (n + top))


SOFTMAX_OPS = 5  # scale and mask, maximum, subtract, sum, convert


def softmax_cycles(chip: ChipSpec, n: Any, capped: bool = False) -> Any:
    """Returns the cycles of the vector lanes for one step of the online softmax over n scores.

    capped: True if scores are soft-capped. Each score then takes one more exponential and two more operations.
    """
    return vector_cycles(chip, (SOFTMAX_OPS + 2 * capped) * n, n * (1 + capped))


def exposed(target: Target, cycles: float) -> float:
    """Returns how many of the `cycles` of a softmax step are not hidden behind matrix products of other rows.

    The fraction target.library.softmax_overlap is hidden.
    """
    return cycles * (1 - target.library.softmax_overlap)


def attend_cycles(target: Target, rows: Any, n: Any, d: Any, dv: Any, format: str) -> Any:
    """Returns the cycles of the fused attention engine for `rows` queries and n keys.

    The matrix array holds queries and sums while keys and values stream through it. At the same time the engine's own
    lanes turn scores into softmax weights. The result is the longest of three times: the multiplications, the
    streaming, and the lanes' work. Raises ChipError for a format that the chip's array does not multiply.

    d: width of a key. dv: width of a value.
    """
    chip = target.chip
    macs = rows * n * (d + dv) / chip.mac_rate(format) / target.library.mxu_efficiency
    streamed = n * (d + dv) * formats.bits(chip.runs_as(format)) / 8 / chip.sram_bytes_per_cycle
    return np.maximum(np.maximum(macs, streamed), rows * n / max(1, chip.att_lanes))


def sample_cycles(chip: ChipSpec, n: Any, filtered: Any) -> Any:
    """Returns the cycles of the vector lanes to sample one token from n logits.

    Each logit takes four operations and one exponential. If `filtered` is set (top-k or top-p), each logit takes 32
    more operations, for a bisection that finds the threshold.
    """
    return vector_cycles(chip, (4 + 32 * filtered) * n, n)
