"""Time to add the partial results of a product whose K was split, in closed form; linear.py has the streams."""

from __future__ import annotations

from typing import Any

import numpy as np

from intaglio.chips import Target
from intaglio.silicon.cache import LINE
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.timing import pipeline

PART_COLUMNS = 512  # columns of a row that are summed at a time where K is split, at most


def part_columns(target: Target, n: Any, split: Any, sides: int) -> Any:
    """Returns the number of columns that a core adds at a time when it sums the `split` partial results of a product.

    It is the smallest of PART_COLUMNS, n, and the number of columns that fit half of SRAM.

    n: columns of the result; for a GLU pair, columns of one side. sides: 2 for a GLU pair, else 1.
    """
    buffers = 8 * (sides * (split + 1) + 3)  # bytes of a column, in two tiles of each operand and result
    return np.minimum(np.minimum(PART_COLUMNS, n), np.floor(target.chip.sram_bytes / 2 / buffers))


def missed_sums(target: Target, sums: Any, written: Any) -> Any:
    """Returns how many bytes HBM reads and writes for each byte of partial sums that is read back.

    Before the sums are read, the L2 has evicted a part of them to HBM, and has to fetch this part again. A fetched byte
    takes the place of another byte in the L2, chosen at random. If that other byte belongs to the sums, it is written
    to HBM first; the probability of this is the fraction of the L2 that sums take. Returns 1 if the chip has no L2.

    sums: bytes of all partial sums. written: fraction (0 to 1) of the sums that the L2 has evicted, a number or an
    array; the result has the same shape.
    """
    kept = target.chip.l2_bytes * target.library.l2_usable
    if not kept:
        return np.ones_like(written)
    left = sums * (1 - written) / kept  # of the L2's bytes, those that are sums
    return written * (1 + np.minimum(1, left))


def partial_seconds(target: Target, m: Any, n: Any, split: Any, out_bytes: float, glu: bool, missed: Any) -> Any:
    """Returns the seconds to add the `split` partial results [m, n] of a product and to store the sum.

    A core adds part_columns() columns of a row at a time. For a GLU pair it adds that many columns of each side. The
    last part of a row takes as long as the others, even if it has fewer columns.

    Args:
        target: the chip and its kernel library.
        m: rows of the result.
        n: columns of the partial results; for a GLU pair, columns of both sides together.
        split: number of partial results, one for each part of K.
        out_bytes: bytes of a value of the sum.
        glu: True for a GLU pair.
        missed: HBM traffic in bytes per byte of partial results that is read, see missed_sums().
    """
    chip, sides = target.chip, 1 + glu
    width = part_columns(target, n / sides, split, sides)
    jobs = m * np.ceil(n / sides / width)
    active = np.minimum(jobs, chip.cores)
    rate = np.minimum(chip.port_rate, chip.l2_rate / active)
    load_s = 4 * width * split * sides * np.maximum(1 / rate, missed * active / chip.hbm_rate)
    store_s = width * out_bytes * np.maximum(1 / rate, (not chip.l2_bytes) * active / chip.hbm_rate)
    # A load with a missed line is late by HBM's latency, though its other lines are in the L2
    late = 1 - (1 - np.minimum(1, missed)) ** (4 * width * split * sides / LINE)
    latency_s = chip.constants.hbm_latency_s
    latency_s = np.maximum(latency_s * np.minimum(1, missed), late * np.maximum(0, latency_s - load_s))
    work = vector_cycles(chip, width * (split * sides + 2 * sides - 1)) / chip.clock_hz
    # Results appear in order, so a drain waits until the one before, which has the array's latency, has appeared
    drain = vector_cycles(chip, width * (2 * sides - 1)) / chip.clock_hz
    work = np.maximum(work, drain + chip.array_depth / chip.clock_hz)
    added = pipeline(np.ceil(jobs / chip.cores), load_s, work, latency_s, 2)
    return added + chip.array_depth / chip.clock_hz + store_s
