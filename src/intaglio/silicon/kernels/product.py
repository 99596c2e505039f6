"""Timing of matrix products on a chip, shared by linear, head_linear and experts, with the choice of tiles.

The closed form times every tile and K split that the library offers; the fastest is used, as by vendors' libraries.

Long because the times of a tile, of a core's loop over tiles and of K splits are worked out together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.chips import Target
from intaglio.ops import Tensor
from intaglio.silicon.isa.cycles import matmul_cycles, vector_cycles
from intaglio.silicon.kernels.partial_sums import partial_seconds
from intaglio.silicon.timing import Timing, pipeline, waves

DRAIN_PART = 16  # a tile is drained in pieces whose buffers take at most this part of SRAM
MIXED = 8  # see load() in time_choices()
IN_STEP = 0.5  # part of HBM's idle time between groups of tiles that a library's cores have, which end at other times
MOST_TILES, MOST_GROUPED_TILES = 4, 8  # that run on a core at a time: of a product, and of small tiles of experts


@lru_cache(maxsize=64)
def choices(tiles: tuple[tuple[int, int], ...], split_k: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all combinations of a tile size and a K split, as three arrays with one item for each combination.

    The arrays are: rows of a tile, columns of a tile, number of parts into which K is divided.
    """
    grid = np.array([(m, n, s) for m, n in tiles for s in split_k], float)
    return grid[:, 0], grid[:, 1], grid[:, 2]


def step_depth(target: Target, bits: int) -> int:
    """Returns the number of K values that one pipeline step processes, for operands of `bits` bits.

    It is the number of values in one HBM burst. On matrix arrays of depth 128 or more it is at least four times the
    depth.
    """
    array = target.chip.array_shape[2]
    return max(target.library.burst_bytes * 8 // bits, 4 * array if array >= 128 else 0)


def block_shape(target: Target, gm: Any, gn: Any, tm: Any, tn: Any, split: Any) -> tuple[Any, Any]:
    """Returns the size (rows, columns), counted in tiles, of the blocks in which the cores compute a result.

    The cores work on one block of tiles at a time. A block has about one tile for each core and is as square as
    possible, because its tiles share rows of x and of w in the L2. Arguments and results are numbers or arrays.

    Args:
        target: the chip.
        gm: rows of the result, in tiles.
        gn: columns of the result, in tiles.
        tm: rows of a tile.
        tn: columns of a tile.
        split: number of parts into which K is divided; each part of a tile occupies a core.
    """
    block = np.minimum(gm * gn, np.maximum(1, target.chip.cores / np.minimum(split, target.chip.cores)))
    rows = np.clip(np.round(np.sqrt(block * tn / tm)), 1, np.minimum(gm, block))
    rows = np.where(gm * gn <= block, gm, rows)
    return rows, np.minimum(np.ceil(block / rows), gn)


def hbm_traffic(target: Target, m: Any, n: Any, k: Any, tm: Any, tn: Any, split: Any, x_bytes: float, w_bytes: float,
                out_bytes: Any, heads: int, gm: Any, streamed: bool = False) -> tuple[Any, Any, Any]:  # fmt: skip
    """Returns the HBM bytes of `heads` products x [m, k] @ w.T [k, n], as a triple (x read, w read, result written).

    Without an L2, each tile reads its rows of x and its rows of w, and the whole result is written. With an L2:

    - The cores work on one block of tiles at a time (block_shape()). Each block reads its rows of x and of w once.
    - If x or w fits the L2, x and w are each read once in total. If a block's rows of x fit, x is read once in total.
    - If all of x fits, the first read of x needs no HBM, since the op before has just written x to the L2.
    - At the end the L2 holds the bytes that were used last. Results among them are not counted as written.

    Numeric arguments are numbers or arrays; the three results have the same shape.

    Args:
        target: the chip and its kernel library.
        m: rows of x.
        n: rows of w.
        k: columns of x and of w.
        tm: rows of a tile.
        tn: columns of a tile.
        split: number of parts into which K is divided.
        x_bytes: bytes per value of x.
        w_bytes: bytes per weight.
        out_bytes: bytes per value of the result.
        heads: number of products.
        gm: number of tiles that cover the m rows of a product; a mean if products have different numbers of rows.
        streamed: True if the L2 holds nothing at the start and keeps no result: x is then always read from HBM, and all
            results are written to HBM.
    """
    chip, part = target.chip, target.library.l2_usable
    gn = np.ceil(n / tn)
    rows, columns = block_shape(target, gm, gn, tm, tn, split)
    x, w, out = m * k * x_bytes, n * k * w_bytes, m * n * out_bytes
    kept = chip.l2_bytes * part
    if not kept:
        return heads * x * gn, heads * w * gm, heads * out + 0 * gn
    one_fits = np.minimum(x, w) < kept * part
    rows_fit = np.minimum(rows * tm, m) * k * x_bytes < kept  # a block's rows of x stay while all of w streams past
    x_times = np.where(one_fits | rows_fit, 1, np.ceil(gn / columns))
    w_times = np.where(one_fits, 1, np.ceil(gm / rows))
    if streamed:
        return heads * x * x_times, heads * w * w_times, heads * out + 0 * gn
    # The L2 holds the latest bytes; of the result, those before have been written back
    written = np.maximum(0, 1 - kept / (heads * (w * w_times + x + out)))
    return heads * x * (x_times - x_resident(target, heads * x)), heads * w * w_times, heads * out * written


def x_resident(target: Target, x_bytes: Any) -> Any:
    """Returns 1.0 if the L2 still holds all of x at the start of a product, else 0.0.

    The op before has just written x. x_bytes: bytes of x, a number or an array; the result has the same shape.
    """
    return np.where(x_bytes < target.chip.l2_bytes * target.library.l2_usable * 0.6, 1.0, 0.0)


def stage_space(target: Target, tm: Any, tn: Any, glu: bool, x_bits: float) -> tuple[Any, Any, Any]:
    """Returns three numbers that describe how a core uses its SRAM.

    They are (rows per drain, bytes of all stages, bytes of a stage that hold no operands):

    - Rows per drain: number of rows of a tile that move from the accumulators to SRAM at a time.
    - Bytes of all stages: a stage is a buffer for the operands of one step over K. SRAM also holds two buffers of
      drained rows, two rows of bias and 1,024 other bytes. The stages get the rest, but at least a quarter of SRAM.
    - Bytes of a stage that hold no operands: its scales (if x has 8 bits) and padding for alignment; at most an eighth
      of all stages.

    The results are numbers or arrays, as tm and tn are.

    Args:
        target: the chip.
        tm: rows of a tile.
        tn: columns of a tile; both sides of a GLU pair.
        glu: True for a GLU pair.
        x_bits: bits of a value of x.
    """
    sram, columns = target.chip.sram_bytes, tn / (1 + glu)
    rows = np.clip(np.floor(sram / DRAIN_PART / (8 * columns)), 1, tm)
    beside = 64 * (2 + glu) + (4 * tm + 8 * tn + 128 * (2 + glu) if x_bits == 8 else 0) + 0 * tm
    space = np.maximum(sram - 8 * columns * (rows + 1) - 1024, sram / 4)
    return rows, space, np.minimum(beside, space / 8)


@dataclass(frozen=True)
class Grouped:
    """A grouped matrix product: one kernel computes a product x @ w.T for each expert.

    The products may have different numbers of rows.

    Attributes:
        counts: number of rows of each product, at least 1.
        scattered: True if rows of the result are stored by index. These stores go to HBM and bypass the L2.
        overfetch: bytes that the kernel moves from the L2, divided by the bytes of the weights.
        convert_ops: operations of the vector lanes to convert one weight.
        run: number format in which the matrix array multiplies. "": each operand format stands for the format in which
            the array multiplies it, and the wider of these two formats is used.
    """

    counts: tuple[int, ...]
    scattered: bool = False
    overfetch: float = 1.0
    convert_ops: float = 0
    run: str = ""


def time_choices(target: Target, m: Any, n: Any, k: Any, x_format: str, w_format: str, w_bits: float, out_bytes: float,
                 glu: bool = False, resident: bool = False, heads: int = 1, grouped: Grouped | None = None,
                 streamed: bool = False) -> dict[str, Any]:  # fmt: skip
    """Returns the modelled times of x [m, k] @ w.T [k, n] for each choice of tile and K split, as a dict of arrays.

    The choices are those of the library, and the times are those of its kernels. (The time of the instruction streams
    is computed in product_loop.py.) For each of its tiles a core loads operands in steps over K, multiplies them,
    drains the tile (moves its sums from accumulators to SRAM) and stores it. Tiles at the edge are padded, and
    multiplied whole. Two kinds of choices are not possible, and get infinite seconds: those that split K into parts of
    fewer than 4 steps, and those that split K although there are several products.

    Args:
        target: the chip and its kernel library.
        m: rows of x, a number or an array [..., 1].
        n: rows of w, a number or an array [..., 1].
        k: columns of x and of w, a number or an array [..., 1].
        x_format: number format of x.
        w_format: number format of w.
        w_bits: bits of a weight with its scales.
        out_bytes: bytes of a value of the result.
        glu: True if n counts both sides of a GLU pair, whose result has n / 2 columns.
        resident: True if the weights were prefetched, so that the product reads none from HBM.
        heads: number of products, each with its own x and w; if there are several, K is not split.
        grouped: None, or the row counts of several products (experts); m and heads are then ignored.
        streamed: True if the L2 keeps neither x nor the result, see hbm_traffic().

    In the dict, the last axis of an array has one item for each choice. A job is one tile, for one part of K; it runs
    in steps over K. The keys are:

    - seconds: time of the product, launch included.
    - hbm: bytes moved from and to HBM, without the weights if they are resident. weights: bytes of the weights that HBM
      delivers, or would deliver if they were not resident. moved: bytes between L2 and cores.
    - tile: a tuple of three arrays: rows and columns of a tile, and parts of K. jobs: number of jobs.
    - steps: number of steps of a job. depth: K values of a step.
    - work: seconds of one step's matmuls. drain: seconds to drain one tile.
    - ring: number of steps whose operands SRAM holds at the same time. at_once: number of tiles whose steps a core
      interleaves; 1 with a persistent kernel.
    - banks: 2 if the accumulators fit two tiles of the result, else 1.
    - run: number format in which the matrix array multiplies, such as "bf16"; one str for all choices.
    - block: a tuple of two arrays: rows and columns of a block of tiles, see block_shape().
    """
    how = x_format, w_format, w_bits, out_bytes, glu, resident, heads, grouped, streamed
    if not target.library.persistent:
        return product_times(target, m, n, k, *how)
    # A product of the first row of tiles alone, or of the rows above the tiles at the lower edge, never takes longer
    tm, _, _ = choices(target.library.tiles, target.library.split_k)
    if grouped:
        m = np.array(grouped.counts)[:, None]
    rows = [m + 0 * tm, np.minimum(m, tm)]
    if not grouped:
        rows.append(np.where(m > tm, (np.ceil(m / tm) - 1) * tm, m))
    found = product_times(target, np.stack(rows), n, k, *how)
    shape, seconds = found["seconds"].shape, found["seconds"].max(axis=0)

    def of_all(v: Any) -> Any:
        """Returns the part of `v` that belongs to the product of all m rows.

        An array has a first axis for the numbers of rows that were timed; its item 0 is returned. A tuple is returned
        with this done for each of its items. Any other value is returned unchanged.
        """
        if isinstance(v, tuple):
            return tuple(of_all(one) for one in v)
        return np.broadcast_to(v, shape)[0] if isinstance(v, np.ndarray) else v

    return {name: of_all(v) for name, v in found.items()} | {"seconds": seconds}


def product_times(
    target: Target, m: Any, n: Any, k: Any, x_format: str, w_format: str, w_bits: float, out_bytes: float, glu: bool,
    resident: bool, heads: int, grouped: Grouped | None, streamed: bool,
) -> dict[str, Any]:  # fmt: skip
    """Returns the times of one product for every choice of tile and K split.

    The result is a dict, which time_choices() describes. With `grouped`, m may be an array [..., products, choices]
    with the number of rows of each product; if m is a number, the numbers of rows are those in `grouped`. In a
    persistent kernel, tiles of the last round that lie at the lower edge load and store only the rows that they have.
    """
    chip, lib = target.chip, target.library
    latency_s, cores = chip.constants.hbm_latency_s, chip.cores
    tm, tn, split = choices(lib.tiles, lib.split_k)
    run = max(chip.runs_as(x_format), chip.runs_as(w_format), key=formats.bits)
    gm, most, fetched = np.ceil(m / tm), m, w_bits  # gm: tiles of one product's rows; fetched: bits moved for a weight
    if grouped:
        counts = m if isinstance(m, np.ndarray) else np.array(grouped.counts)[:, None]
        heads, gm = len(grouped.counts), np.ceil(counts / tm).mean(axis=-2)
        m, most = counts.mean(axis=-2), counts.max(axis=-2)
        run, fetched = grouped.run or run, w_bits * grouped.overfetch
    x_bits = formats.bits(x_format)
    piece, space, beside = stage_space(target, tm, tn, glu, x_bits)
    tk = np.minimum(step_depth(target, formats.bits(run)), k)
    whole = (tm * x_bits + tn * w_bits) * tk / 8
    tk = tk / 2 ** np.clip(np.ceil(np.log2(whole / (space / 2 - beside))), 0, None)  # two stages fit
    k_steps, gn = np.ceil(k / tk), np.ceil(n / tn)
    steps = np.ceil(k_steps / split)
    allowed = (split == 1) | ((steps >= 4) & (heads == 1))
    split = np.ceil(k_steps / steps)
    jobs = heads * gm * gn * split
    full, rest = waves(jobs, cores)
    rounds = full + (rest > 0)
    rows = np.minimum(tm, most)  # of a tile that are loaded and stored
    stage = (tm * x_bits + tn * fetched) * tk / 8
    at_once = np.minimum(np.minimum(np.floor(space / (4 * (stage + beside))), chip.acc_bytes / (8 * tm * tn)), rounds)
    at_once = np.clip(np.floor(at_once), 1, MOST_GROUPED_TILES if grouped else MOST_TILES)
    at_once = np.ones_like(tm) if lib.persistent else at_once
    ring = np.clip(np.floor(space / (stage + beside)), 2, lib.matmul_stages * at_once)
    banks = np.where(8 * tm * tn <= chip.acc_bytes, 2, 1)
    # Bytes
    # By the libraries' measured times, partial sums take no more of HBM than the result does
    each = x_bits / 8, w_bits / 8, out_bytes / (1 + glu)
    x_hbm, w_hbm, out_hbm = hbm_traffic(target, m, n, k, tm, tn, split, *each, heads, gm, streamed)
    if grouped and grouped.scattered:
        out_hbm = heads * m * n * each[2] + 0 * gn
    read = x_hbm + w_hbm * (not resident)
    hbm = read + out_hbm
    w_times = w_hbm / (heads * n * k * each[1])  # how often HBM delivers w
    written = out_hbm / (heads * m * n * each[2])  # the part of the result that leaves the L2
    wait_s = 0.0 if resident else latency_s  # of a stage; cores that need the same weights wait for them together
    stage_mean = (rows * x_bits + n / gn * fetched) * tk / 8
    last_jobs = np.where(rest > 0, rest, np.minimum(jobs, cores))  # of the last round
    # Columns of a tile in that round, which on a single core is the one at the corner
    last_n = n - (gn - 1) * tn if cores == 1 else n / gn
    # Rows of a tile in that round, and number of other tiles with as few rows
    edge = cores == 1 and not grouped
    block = block_shape(target, gm, gn, tm, tn, split)
    last_rows, last_out = rows, 1 / rounds
    if lib.persistent and heads == 1 and not grouped:
        at_edge = (gn - (np.ceil(gn / block[1]) - 1) * block[1]) * split  # last jobs that have the last rows
        last_rows = np.where(last_jobs <= at_edge, m - (gm - 1) * tm, rows)
        last_out = np.where(last_jobs <= at_edge, last_jobs * last_rows * last_n / (m * n * split), last_out)
    elif edge:
        last_rows = m - (gm - 1) * tm
        last_out = last_rows * last_n / (heads * m * n)
    edges = (gn - 1) * (gm > 1) if edge and heads == 1 else 0.0
    others = np.maximum(1, jobs - last_jobs)
    mean_n = np.where(rounds > 1, (heads * gm * n * split - last_n * last_jobs) / others, last_n)
    # Seconds of a step over K; the last may be shorter
    last_part = np.where(split == 1, k - (k_steps - 1) * tk, tk)
    work = matmul_cycles(target, tm, tn, tk, run) / chip.clock_hz
    last_work = matmul_cycles(target, tm, tn, last_part, run) / chip.clock_hz
    if grouped and grouped.convert_ops:
        work = work + vector_cycles(chip, grouped.convert_ops * tn * tk) / chip.clock_hz
        last_work = last_work + vector_cycles(chip, grouped.convert_ops * tn * last_part) / chip.clock_hz
    job_work = (steps - 1) * work + last_work
    job_steps = steps - 1 + last_part / tk

    past_l2 = not chip.l2_bytes and not resident  # then all bytes come from HBM
    shared = min(chip.l2_rate, chip.hbm_rate) if past_l2 else chip.l2_rate
    port = min(chip.port_rate, shared)

    def load(active: Any, columns: Any, rows: Any = rows) -> tuple[Any, Any]:
        """Returns (seconds of a load while `active` cores load at once, seconds of the load on one core alone).

        The load is that of a core's parts of x and w for one step over K. A core alone loads at the rate of its port.

        columns: mean number of columns of a tile (rows of w). rows: rows of x in a tile; 0: only w is loaded.
        """
        own = (rows * x_bits + (columns if cores == 1 else np.minimum(tn, n)) * fetched) * tk / 8
        mean = (rows * x_bits + columns * fetched) * tk / 8
        return np.maximum(own / port, mean * active / shared), own / port

    # The first stage of all cores comes from HBM
    wide = np.ceil(cores / np.clip(np.round(np.sqrt(cores * tn / tm)), 1, cores))  # tiles of w: of a block of many rows
    if lib.persistent:  # with few rows, all tiles of w are shared evenly by the rounds
        wide = np.clip(heads * gn * split / rounds, wide, cores)
    wide = np.minimum(heads * gn * split, wide) if lib.persistent else np.minimum(gn, wide)
    first_columns = np.minimum(wide * np.minimum(tn, n), heads * n * split)  # an edge tile loads only its columns
    first_bytes = 0.0 if resident else first_columns * tk * w_bits / 8
    if not chip.l2_bytes:
        first_bytes = np.minimum(jobs, cores) * (rows * x_bits + np.minimum(tn, n) * w_bits) * tk / 8
    fill = first_bytes / chip.hbm_rate

    # The end of a tile: pieces are drained to SRAM, then stored
    value_bytes = np.where(split > 1, 4.0, out_bytes / (1 + glu))
    piece = np.minimum(piece, rows)
    pieces = np.ceil(rows / piece)
    cells = rows * np.minimum(tn, n) / (1 + glu)
    drain = vector_cycles(chip, cells * (3 if glu else 1), cells * glu) / chip.clock_hz  # as isa.Drain counts them
    active = np.minimum(jobs, cores)
    store = rows * np.minimum(tn, n) * value_bytes * np.maximum(1 / chip.port_rate, np.maximum(
        active / chip.l2_rate, written * active / chip.hbm_rate))  # fmt: skip
    depth_s = chip.array_depth / chip.clock_hz
    last_part_n = np.where(last_jobs == 1, last_n, np.minimum(tn, n)) / np.minimum(tn, n)

    # Seconds to drain and store one of several tiles. Pieces of tiles use two buffers in turn. With an even number of
    # pieces, the shorter last piece of every tile uses the same buffer; the other buffer has whole pieces only
    half = np.where(pieces % 2 == 0, (drain + store) * piece / rows * pieces, drain + store)
    per_tile = np.maximum(np.maximum(drain, store), (half + pieces * depth_s) / 2)

    def end(part: Any = 1.0, height: Any = rows) -> tuple[Any, Any]:
        """Returns (seconds until a tile is drained, seconds until it is stored), both counted from its last matmul.

        A tile is drained and stored in pieces of `piece` rows; the last may have fewer. A piece is drained while the
        piece before it is stored. part: width of the tile, as a fraction of a full tile. height: rows of the tile.
        """
        one, other = drain * part * piece / rows, store * part * piece / rows
        pieces = np.ceil(height / piece)
        last = (height - (pieces - 1) * piece) / piece

        def stored(count: Any) -> Any:
            return np.where(count > 0, pipeline(np.maximum(count, 1), one, other, depth_s, 2), 0)

        drained = np.maximum((pieces - 1) * one, stored(pieces - 2)) + one * last + depth_s
        return drained, np.maximum(drained, stored(pieces - 1)) + other * last

    def turn_load(load_s: Any) -> Any:
        """Returns the seconds from the start of a stage's load until its operands have arrived from HBM.

        This is the load itself plus HBM's latency. If cores share weights (in a persistent kernel whose block has
        several rows of tiles), only the first core to load them waits for the latency; the others load other data
        meanwhile. The cores take turns in being first, so the result is then the longer of load and latency.

        load_s: seconds of the load itself.
        """
        return np.where((block[0] > 1) & lib.persistent, np.maximum(load_s, wait_s), load_s + wait_s)

    def product(tiles: Any, load_s: Any, alone_s: Any, start_s: Any, follows: Any = np.False_) -> Any:
        """Returns the seconds from first load to last matmul of `tiles` tiles, whose steps one core interleaves.

        Args:
            tiles: number of tiles.
            load_s: seconds to load one step's operands while all cores load; limits the sum of all loads.
            alone_s: seconds to load one step's operands while no other core loads; limits how soon a stage (buffer of a
                step) can be filled again.
            start_s: seconds until the first matmul can start.
            follows: True if the core has other tiles before these. Waits for free stages are then not counted here.
        """
        n_steps = steps * tiles
        turns = np.floor((n_steps - 1) / ring)
        around = alone_s + turns * turn_load(alone_s) + wait_s + (turns + 1) * work
        around += (n_steps - 1 - turns * ring) * np.maximum(alone_s, work)
        around -= tiles * (np.maximum(alone_s, work) - np.maximum(alone_s * last_part / tk, last_work))
        by_work = start_s + tiles * job_work
        by_load = tiles * job_steps * load_s + wait_s + last_work
        before = (tiles * job_steps - last_part / tk) * load_s + wait_s + work + last_work  # the last is shorter
        found = np.maximum(np.maximum(by_work, by_load), np.where((turns > 0) & ~follows, around, 0))
        return np.where(steps > 1, np.maximum(found, before), found)

    (all_load, all_alone), (last_load, last_alone) = (
        load(np.minimum(jobs, cores), mean_n),
        load(last_jobs, last_n, last_rows),
    )
    edge_load, _ = load(np.minimum(jobs, cores), mean_n, last_rows)
    # Weights are loaded first. If HBM delivers them and the L2 has x, x is loaded during their latency.
    only_w, _ = load(np.minimum(jobs, cores), mean_n, 0)
    x_waits = 1.0 if streamed else 1 - x_resident(target, heads * m * k * each[0])
    part = np.where(steps > 1, 1, last_part / tk)
    start_s = np.maximum(np.maximum(only_w, fill) * part + wait_s, np.maximum(all_load, fill) * part + wait_s * x_waits)
    if lib.persistent:  # the next tile's operands are loaded while this one drains
        drained, all_end = end()  # the accumulators are free once drained
        two = np.maximum(np.maximum(job_work, per_tile), (job_work + drained) / 2)
        by_work = np.where(banks == 2, two, job_work + drained)
        width = mean_n / np.minimum(tn, n) if edge else 1.0  # narrower tiles are stored sooner
        by_work = np.maximum(by_work, np.where(banks == 2, 0, per_tile * width))
        # With two banks, and two buffers of pieces, every second tile waits for the one before the last
        unpaired = np.maximum(job_work, np.where(pieces > 1, per_tile, np.maximum(drain, store)))
        unpaired = np.where(banks == 2, unpaired, by_work)
        bubble = np.where(banks == 2, 0, drained)
        by_load, by_edge = (job_steps * v + np.maximum(0, bubble - (ring - 1) * v) for v in (all_load, edge_load))
        # Loads and stores share the L2, from the first store on
        first_piece = drain * piece / rows + depth_s
        first_store = start_s + job_work + first_piece
        job_load = job_steps * stage_mean * active / chip.l2_rate
        stored = rows * n / gn * value_bytes * active / chip.l2_rate  # seconds to store a tile of every core
        # Loads of a tile are beside stores of the tile before the last, or before: those of the last round, which may
        # have fewer cores, leave time for them
        store_s = np.maximum(0, rounds - 2) * stored
        whole_last, _ = load(last_jobs, last_n)
        store_s += np.clip(job_load * last_jobs / active + stored - job_steps * whole_last, 0, stored)
        store_s = np.minimum(store_s, np.maximum(0, rounds * job_load - first_store)) / np.maximum(1, rounds - 1)
        by_load = np.maximum(by_load, job_load + store_s)
        # From one use of a stage to the next. A stage holds all of a tile's steps in turn, also the shorter last one,
        # unless the numbers of steps and of stages have a common factor
        in_turn = np.gcd(steps.astype(int), ring.astype(int)) == 1
        # The first side of a GLU pair is multiplied while the second arrives
        aside = np.minimum(work, all_alone) / 2 * glu
        each_step = np.where(in_turn, (job_steps * all_alone + job_work) / steps, all_alone + work) - aside
        hit = steps * each_step / ring + bubble
        turn = each_step + turn_load(all_alone) - all_alone
        # Blocks of rows after the first find w in the L2, if it stays there
        before_last = np.ceil(gn / block[1]) - 1  # blocks of rows before the one that reads the last of w
        new_w = before_last * (block[0] - 1) * block[1] + gn  # tiles until all of w was read
        new_w = np.where(w_times > 1, w_times * block[0] * gn, new_w if heads == 1 else block[0] * gn)
        from_w = np.ceil(heads * new_w * split / cores)  # rounds
        by_work, by_load, by_edge, unpaired = (np.maximum(v, hit) for v in (by_work, by_load, by_edge, unpaired))
        _, last_end = end(last_part_n, last_rows)
        next_rows = np.where(edges > 0, last_rows, rows)  # of the tile before the last

        def in_line(load_s: Any) -> Any:
            """Returns the seconds of one tile, if the loads for each step run during the matmuls of the step before.

            load_s: seconds to load one step's operands.
            """
            return (steps - 1) * np.maximum(load_s, work) + np.maximum(load_s * last_part / tk, last_work)

        def loop(rounds: Any, load_s: Any, alone_s: Any, edges: Any) -> Any:
            """Returns the seconds from the start of a core's loop over its tiles to its last matmul.

            A stage is a buffer for the operands of one step. The result is the largest of three times:

            - the start plus the matmuls of all tiles;
            - the loads of all tiles plus the matmuls of the last tile;
            - the start, plus the time of the tiles whose weights come from HBM, with their waits for free stages, plus
              the matmuls of the other tiles.

            Args:
                rounds: number of tiles of the core.
                load_s: seconds to load one step's operands of the last tile while all cores load.
                alone_s: seconds to load one step's operands of the last tile while no other core loads.
                edges: number of tiles before the last that have as few rows as the last.
            """
            last_s = product(1, load_s, alone_s, load_s * part + wait_s, rounds > 1)
            odd = (rounds - 1) % 2
            works = (rounds - 1 - odd) * by_work + odd * unpaired + job_work
            missing = np.minimum(from_w, rounds)
            turns = np.floor((missing * steps - 1) / ring)
            each, last = in_line(all_load), in_line(load_s)
            around = np.where(missing < rounds, missing * each, (rounds - 1) * each + last)
            around -= np.where(steps > 1, np.maximum(all_load, work), each)  # the first step, counted in start_s
            count = missing * steps - 1 - turns * ring
            whole = np.minimum(count, (rounds - 1) * steps)
            by_turns = turns * turn + (whole * each + (count - whole) * last) / steps
            around = np.where(turns > 0, np.maximum(around, by_turns), around)
            odd = (rounds - missing) % 2
            around += (rounds - missing - odd) * by_work + odd * unpaired
            around += last_work + np.minimum(missing, rounds - 1) * bubble
            works = np.maximum(works, around)
            short = np.clip(edges, 0, rounds - 1)
            return np.maximum(start_s + works, (rounds - 1 - short) * by_load + short * by_edge + last_s)

        seconds = loop(rounds, last_load, last_alone, edges) + last_end
        _, next_end = end(1.0, next_rows)
        before = loop(rounds - 1, *load(active, mean_n, next_rows), edges - 1) + next_end
        seconds = np.where(rounds > 1, np.maximum(seconds, before), seconds)
    else:
        groups = np.ceil(rounds / at_once) - 1  # before the last
        tiles = rounds - groups * at_once  # of the last
        between = (all_load * (tiles - 1) + last_load) / tiles
        _, one_end = end()
        last_end = one_end + (tiles - 1) * np.maximum(0, per_tile - last_work)
        all_end = one_end + (at_once - 1) * np.maximum(0, per_tile - last_work)
        seconds = (
            groups * (product(at_once, all_load, all_alone, start_s) + all_end)
            + product(tiles, between, all_alone, start_s)
            + last_end
        )
    if cores > 1 and not lib.persistent:
        last_end = np.maximum(all_end, last_end)  # so one tile more never takes less time where HBM is the bound

    # HBM delivers at its rate, except while too many cores load x from the L2: a core loads x and w in turn, so if both
    # take about as long, HBM is idle at times. The exponent MIXED was chosen so that this agrees with the machine.
    # Stores compete with loads, except those of the last round, and those that start after the last load.
    def transfers(read: Any, last_out: Any) -> Any:
        """Returns the seconds that HBM takes to read operands and, meanwhile, to write results.

        read: bytes that are read. last_out: fraction of the stored bytes that are stored after the last load and so do
        not compete with reads.
        """
        competing = 1 - last_out
        if lib.persistent:
            behind = wait_s + last_work + first_piece  # seconds from a tile's last load to its first store
            competing = np.clip(competing - behind * chip.hbm_rate / np.maximum(hbm, 1), 0, 1)
            # No store starts before the first tile is drained. From then on, loads get at least half of HBM's rate
            loading = np.maximum(0, read / chip.hbm_rate - first_store) * chip.hbm_rate
            competing = np.minimum(competing, loading / np.maximum(out_hbm, 1))
        return (read + out_hbm * competing) / chip.hbm_rate

    from_hbm = transfers(read, last_out)
    if lib.persistent:
        seconds = np.maximum(seconds, first_store + out_hbm / chip.hbm_rate)
    loads = (full * all_load + (rest > 0) * last_load) * job_steps
    if lib.persistent and chip.l2_bytes:
        # HBM serves all cores alike, so those that have a tile of w more than others load it when the others have
        # ended. Then it takes as long as a stage takes to get free
        of_w = heads * gn * split
        alone = np.maximum(job_steps * all_alone, steps * (all_alone + wait_s + work) / ring)
        every, over = waves(of_w, cores)
        by_turns = every * np.maximum(from_hbm / of_w * cores, alone)
        by_turns = by_turns + np.where(over > 0, np.maximum(from_hbm / of_w * over, alone), 0)
        from_hbm = np.where(of_w > cores, by_turns, from_hbm)
    unmixed = from_hbm
    if chip.l2_bytes and cores > 1:
        from_hbm = (from_hbm**MIXED + loads**MIXED) ** (1 / MIXED)
    # Cores that run groups of tiles in step leave HBM idle from the last load of a group to the first of the next.
    # Those of a vendor's kernels end at other times, the more so the more tiles run on a core at a time.
    idle = 0.0
    if not lib.persistent:
        in_step = IN_STEP * (1 - (at_once - 1) / (MOST_GROUPED_TILES - 1))
        idle = in_step * groups * (wait_s + last_work + all_end)

    def to_last_step(loads_s: Any) -> Any:
        """Returns the seconds until a core can begin the matmuls of its last step over K.

        loads_s: seconds of all loads from HBM.
        """
        a_step = loads_s / (rounds * job_steps)
        # The last step's load may be shorter than the matmuls of the step before
        later = np.where((steps > 1) & (last_part < tk), np.maximum(0, work - a_step * last_part / tk), 0)
        if lib.persistent:  # from the load of its first step on, the last tile has all its steps' work left
            loaded = (job_steps - 1) * (last_load if cores == 1 else a_step)
            later = np.maximum(later, job_work - last_work - loaded)
        return loads_s + later

    by_hbm = np.maximum(to_last_step(from_hbm), to_last_step(unmixed + idle)) + last_end
    seconds = np.maximum(seconds, by_hbm + latency_s + last_work)
    seconds = np.maximum(seconds, hbm / chip.hbm_rate)
    if cores == 1 and not chip.l2_bytes and heads == 1:
        # Tiles at the lower edge load and store fewer rows, but multiply as many: HBM may bound only the others
        of_row = n * k * (0 if resident else each[1])
        full_s, edge_s = (
            (gn * r * k * each[0] + of_row + r * n * each[2]) / chip.hbm_rate for r in (tm, m - (gm - 1) * tm)
        )
        by_rows = (gm - 1) * np.maximum(full_s, gn * job_work) + np.maximum(edge_s, gn * job_work)
        seconds = np.maximum(seconds, np.where((split == 1) & (gm > 1), by_rows, 0))
    missed = 0.0 if chip.l2_bytes else 1.0  # the L2 has the partial sums
    partial = partial_seconds(target, m, n, split, out_bytes, glu, missed)
    hbm = hbm + np.where(split > 1, m * n * each[2] * missed, 0)
    seconds = lib.launch_s + latency_s - wait_s + seconds + np.where(split > 1, partial, 0)
    seconds = np.where(allowed, seconds, np.inf)
    moved = jobs * job_steps * stage_mean + heads * m * n * each[2]
    return {"seconds": seconds, "hbm": hbm, "weights": w_hbm, "jobs": jobs, "steps": steps, "work": work,
            "ring": ring, "depth": tk, "run": run, "drain": drain, "tile": (tm, tn, split),
            "at_once": at_once, "banks": banks, "moved": moved,
            "block": block}  # fmt: skip


@lru_cache(maxsize=65536)
def linear_timing(
    target: Target, m: int, n: int, k: int, x_format: str = "bf16", w_format: str = "bf16", w_bits: float = 0.0,
    out_bytes: float = 2.0, glu: bool = False, resident: bool = False, heads: int = 1, grouped: Grouped | None = None,
    prefetched: bool = False, streamed: bool = False,
) -> Timing:  # fmt: skip
    """Returns the Timing of `heads` products x [m, k] @ w.T [k, n] with the fastest choice of tile and K split.

    If `prefetched` is set, the `seconds` of the Timing do not include the loads of weights, while its `hbm_bytes` do.
    The choice is then the one with the smallest maximum of these seconds and HBM's time for all bytes. Among equal
    choices, the one with the fewest seconds is taken.

    Args:
        target: the chip and its kernel library.
        m: rows of x.
        n: rows of w.
        k: columns of x and of w.
        x_format: number format of x.
        w_format: number format of w.
        w_bits: bits per weight with its scales; 0: the bits of `w_format`.
        out_bytes: bytes of a value of the result.
        glu: True if n counts both sides of a GLU pair.
        resident: True if the L2 holds the weights, so that they are not read from HBM.
        heads: number of products, each with its own x and w.
        grouped: None, or the row counts of several products (experts); m and heads are then ignored.
        prefetched: True if the weights are loaded from HBM during earlier ops.
        streamed: True if the L2 keeps neither x nor the result, as in a benchmark that repeats a product larger than
            the L2.
    """
    chip = target.chip
    w_bits = w_bits or formats.bits(w_format)
    w = time_choices(
        target, m, n, k, x_format, w_format, w_bits, out_bytes, glu, resident or prefetched, heads, grouped, streamed
    )
    all_hbm = w["hbm"] + w["weights"] * prefetched
    longer = np.maximum(w["seconds"], all_hbm / chip.hbm_rate) if prefetched else w["seconds"]
    i = int(np.lexsort((w["seconds"], longer))[0])
    tm, tn, split = (int(v[i]) for v in w["tile"])
    cores = chip.cores
    jobs, steps = float(w["jobs"][i]), float(w["steps"][i])
    hbm, moved = float(all_hbm[i]), float(w["moved"][i])
    busy = {
        "MXU": jobs * steps * float(w["work"][i]) / cores,
        "VEC": jobs * float(w["drain"][i]) / cores,
        "HBM": hbm / chip.hbm_rate,
        "L2": moved / chip.l2_rate,
    }
    choice = f"tile {tm}x{tn}" + (f", K in {split}" if split > 1 else "") + f", {jobs:,.0f} tiles on {cores} cores"
    if grouped:
        choice = f"{len(grouped.counts)} experts, {choice}"
    seconds, weights = float(w["seconds"][i]), 0.0 if resident else float(w["weights"][i])
    flops = 2.0 * (sum(grouped.counts) if grouped else heads * m) * n * k
    return Timing(seconds, busy, hbm, moved, 0.0, flops, w["run"], weights, choice, jobs=jobs)


def scale_group(tensor: Tensor) -> int:
    """Returns the number of consecutive weights of a row that share one scale.

    It is the whole row for the format fp8row, and 0 if the weight tensor has no scales.
    """
    k = int(tensor.shape[-1])
    return k if tensor.format == "fp8row" else formats.get(tensor.format).group_of(k)


def bits_per_value(tensor: Tensor) -> float:
    """Returns the number of bits per value of a weight tensor, scales included; it may be a fraction."""
    rows, cols = prod(int(d) for d in tensor.shape[:-1]), int(tensor.shape[-1])
    return formats.get(tensor.format).nbytes(rows, cols) * 8 / (rows * cols)
