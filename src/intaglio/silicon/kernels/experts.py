"""Chip kernel of the op `experts`: the feed-forward experts of a mixture-of-experts layer, as grouped products.

Timed after the grouped kernels of serving engines: rows are gathered in blocks of one expert each, and each block is a
product, in the loop of `linear` (product.py); routing, rounding and combination are separate kernels over all rows, and
so is the activation if the library does not fuse it.

The work of a core depends on the router's ids. The chip sorts the routed rows by expert; its sequencer then reads how
many rows each expert has, and from these counts the streams of the products are written (grouped.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from typing import ClassVar

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import ChipError, KernelLibrary, Target
from intaglio.ops import Experts
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, group_of
from intaglio.silicon.kernels.grouped import (
    by_expert,
    combine,
    down,
    gate_up,
    grouped_product,
    grouped_seconds,
    sort_by_expert,
    zero_rows,
)
from intaglio.silicon.kernels.kernel import WIDE, ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.product import Grouped, bits_per_value, linear_timing, scale_group
from intaglio.silicon.kernels.rows import loop_timing, ring_depth
from intaglio.silicon.kernels.tiled import ROUNDING, Codes, rounded
from intaglio.silicon.kernels.tiling import scale_columns
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Stream
from intaglio.silicon.tile_loop import TileLoop
from intaglio.silicon.timing import Timing

SCALE_BLOCK = 128  # rows and columns of an FP8 weight that share one scale
COMBINE_COLUMNS = 512  # columns of a token whose results are summed at a time, at most
ROUTING = "routing"  # label of the launches that choose experts and sort rows
PERMUTATION = "permutation"  # label of the launch that copies rows of x into the order of experts
OPERANDS = 64  # values deep, in two bytes and two stages: what Target asks of a tile's operands in SRAM


@chip_kernel(Experts)
@dataclass(frozen=True)
class ExpertsKernel(ChipKernel):
    """Chip kernel of the op `experts`: the routed experts (MLPs) that one chip holds.

    Its time is modelled for random routing.

    Attributes:
        top: number of experts that each token chooses.
        held: number of experts on the chip.
        experts: number of experts of the layer on all chips.
        hidden, inner: width of x, and width of the values between an expert's two matrix products.
        x_format, w_format: number formats of x and of the weights.
        w_bits: bits of a weight, scales included.
        gated: True if experts have a gate.
        groups: two numbers, for the up weights and for the down weights: how many weights of a row share one scale; 0
            if the weights have no scales.
    """

    by_sequence: ClassVar[bool] = False
    top: int
    held: int
    experts: int
    hidden: int
    inner: int
    x_format: str
    w_format: str
    w_bits: float
    gated: bool = True
    groups: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, op: Experts, t: Tensors) -> ExpertsKernel:
        up, x_format, top = t[op.up], formats.element(op.x_format), int(t[op.ids].shape[1])
        held, inner, hidden = (int(d) for d in up.shape)
        w = formats.element(up.format), bits_per_value(up)
        groups = scale_group(up), scale_group(t[op.down])
        return cls(top, held, op.of or held, hidden, inner, x_format, *w, op.gate is not None, groups)

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        if target.library.activation_bytes < WIDE:
            return experts_timing(target, *self.layer(sizes))
        first, *rest = self.parts(target, sizes).values()
        return sum(rest, first)

    def parts(self, target: Target, sizes: BatchSizes) -> dict[str, Timing]:
        """Returns a dict {label: Timing} with the modelled time of each launch of the op in a step.

        The labels are names such as "gate_up" and "down"; experts_parts() lists them. sizes: sizes of the step's batch.
        """
        found = experts_parts(target, *self.layer(sizes))
        counts, launch_s = self.counts(sizes), target.library.launch_s
        if target.library.activation_bytes < WIDE or not any(counts):
            return found
        on = grouped_target(expert_kernel(target, self.x_format, self.w_format), sizes.tokens, self.held)
        scaled, x_bytes, sides = self.x_format in ("int8", "e4m3"), formats.bits(self.x_format) / 8, 1 + self.gated
        how = self.x_format, self.w_format, self.w_bits
        tokens = sizes.tokens / sum(counts)  # for each row
        seconds = {
            "gate_up": grouped_seconds(
                on, counts, self.inner, self.hidden, *how, self.groups[0], sides, False, WIDE if scaled else x_bytes,
                WIDE / x_bytes * tokens,
            ),
            "down": grouped_seconds(
                on, counts, self.hidden, self.inner, *how, self.groups[1], 1, True, WIDE,
                WIDE / x_bytes if scaled else 0.0,
            ),
        }  # fmt: skip
        return found | {label: replace(found[label], seconds=launch_s + s) for label, s in seconds.items()}

    def layer(self, sizes: BatchSizes) -> tuple[int, int, tuple[int, ...], int, int, int, str, str, float, bool]:
        """Returns the arguments of experts_timing() for a step as a tuple, without `target` and `kernel`.

        The tuple is (tokens, experts that a token chooses, rows of each expert on the chip, experts on all chips,
        hidden width, inner width, format of x, format of weights, bits of a weight, True if experts have a gate).
        """
        counts = self.counts(sizes)
        how = self.experts, self.hidden, self.inner, self.x_format, self.w_format, self.w_bits, self.gated
        return sizes.tokens, self.top, counts, *how

    def counts(self, sizes: BatchSizes) -> tuple[int, ...]:
        """Returns the expected number of rows of each expert on the chip, as expected_rows() computes it."""
        return expected_rows(sizes.tokens, self.top, self.experts, self.held)

    @classmethod
    def unsupported(cls, op: Experts, t: Tensors) -> str | None:
        if op.order or op.down_order:
            return f"{op.site}: chip kernels do not permute columns of experts (act-order); run this model on the host"
        if op.held or op.slots:
            return f"{op.site}: chip kernels have no expert placement; use a layout without r, or the host"
        return None

    @classmethod
    def streams(cls, mem: ChipMemory, op: Experts, t: Tensors, batch: Batch) -> list[Stream]:
        """Returns the Streams of the op's last kernel, which computes the weighted sum of each token's expert results.

        The call itself executes all earlier kernels in `mem`, because each needs the results of the one before. A
        routed row is a pair of a token and one of the experts that it chose. The earlier kernels do this:

        1. Sort the routed rows by expert.
        2. Round the rows of x, in that order.
        3. Compute gate, up and activation.
        4. Round the results, if their format has scales.
        5. Set the rows of experts that other chips hold to zero, if there are any.
        6. Multiply by the down weights, and store the rows in the order before sorting.
        """
        kernel, ids, x_format = cls.of(op, t), mem.region(op.ids), op.x_format
        n, (count, inner, _) = ids.rows * ids.cols, map(int, t[op.up].shape)
        order, tokens = (mem.heap.allocate(1, n, "i32") for _ in range(2))
        counts = mem.heap.allocate(1, count, "i32")
        mem.run(sort_by_expert(mem, op, ids.shaped(1, n), (order, tokens, counts)), label=ROUTING)
        if mem.values:
            sizes = mem.hbm.read(counts)[0]
        else:  # without values there are no ids: the rows that the closed form expects
            sizes = np.array(expected_rows(ids.rows, ids.cols, op.of or count, count))
        rows, parts = int(sizes.sum()), mem.heap.allocate(n, mem.region(op.out).cols, "f32")
        if rows:
            on = grouped_target(expert_kernel(mem.target, kernel.x_format, kernel.w_format), ids.rows, count)
            *sides, last = (mem.regions[w] for w in (op.gate, op.up, op.down) if w)
            spans = [scale_columns(group_of(w), k) for w, k in ((sides[0], mem.region(op.x).cols), (last, inner))]
            codes = rounded(mem, op.site, mem.region(op.x), x_format, spans[0], rows, by_expert(mem, op, order, tokens))
            scaled = codes.scales is not None
            hidden = mem.heap.allocate(rows, inner, "f32" if scaled else codes.x.format)
            product = grouped_product(on, codes, sides, kernel.w_bits, inner, sizes, scattered=False)
            mem.run(gate_up(mem, op, product, hidden), on)
            codes = rounded(mem, op.site, hidden, x_format, spans[1]) if scaled else Codes(hidden, None, inner)
            product = grouped_product(on, codes, (last,), bits_per_value(t[op.down]), parts.cols, sizes, scattered=True)
        if rows < n:
            mem.run(zero_rows(mem, op, order.part(cols=slice(rows, n)), parts))
        if rows:
            mem.run(down(mem, op, product, order, parts), on)
        loop, width = combine_loop(mem.target, ids.rows, ids.cols, parts.cols, bool(op.residual), 4.0)
        return combine(mem, op, parts, width, loop.depth)


def expected_rows(tokens: int, top: int, experts: int, held: int) -> tuple[int, ...]:
    """Returns the expected number of rows of each expert on a chip: a tuple of `held` integers in descending order.

    Every token chooses `top` of all `experts` experts at random. Then `held * (1 - (1 - top / experts) ** tokens)` of
    the chip's experts, rounded, are expected to have rows. They share tokens * top * held / experts rows (at least 1)
    evenly. The other experts have 0 rows.
    """
    rows = max(1, round(tokens * top * held / experts))
    active = min(rows, max(1, round(held * (1 - (1 - top / experts) ** tokens))))
    return tuple(rows // active + (i < rows % active) for i in range(active)) + (0,) * (held - active)


def elementwise_seconds(target: Target, moved: float, held: float = 0.0) -> float:
    """Returns the seconds of an elementwise kernel that reads and writes `moved` bytes in total, launch included.

    The kernel's arithmetic is not counted. All bytes move at the lowest of these rates:

    - core_rate(), the rate of all cores;
    - chip.l2_rate / library.l2_multicast, the L2's rate if each byte is read by one core. (chip.l2_rate counts a read
      once for each of the l2_multicast cores that it serves.)
    - HBM's rate, if the operands do not fit the usable part of the L2.

    Args:
        target: the chip and its kernel library.
        moved: bytes read and written.
        held: bytes of the operands, which are compared with the size of the L2; 0: `moved` is compared instead.
    """
    chip, library = target.chip, target.library
    fits, l2_rate = (held or moved) < chip.l2_bytes * library.l2_usable, chip.l2_rate / library.l2_multicast
    rate = min(l2_rate, core_rate(target))
    return library.launch_s + moved / (rate if fits else min(rate, chip.hbm_rate))


def core_rate(target: Target) -> float:
    """Returns the largest rate, in bytes/s, at which all cores of the chip together can move data.

    It is the library's core_bytes_per_cycle, times cores, times clock rate. Returns inf, which means no limit, if
    core_bytes_per_cycle is 0.
    """
    return target.library.core_bytes_per_cycle * target.chip.cores * target.chip.clock_hz or inf


@dataclass(frozen=True)
class TileMenu:
    """The tile sizes that a kernel library allows for a grouped product.

    Attributes:
        rows, columns: allowed numbers of rows and of columns of a tile; every combination is allowed.
        step_bytes: bytes that one pipeline step loads of each row of an operand.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    step_bytes: int


def tile_menu(library: KernelLibrary, tokens: int, experts: int) -> TileMenu:
    """Returns the TileMenu of the library for a step of `tokens` tokens and a layer of `experts` experts.

    It depends on library.expert_tiles:

    - "best": all tiles of the library, as with a static schedule or a kernel tuned for each size;
    - "by_experts": one tile, which get_default_config of an older vLLM chooses by tokens and experts;
    - "by_tokens": one tile, which get_default_config of vLLM 0.17 chooses by tokens.
    """
    if library.expert_tiles == "best":
        return TileMenu(library.expert_rows, library.expert_columns, library.burst_bytes)
    if library.expert_tiles == "by_experts":
        return TileMenu((16,), (32,), 128) if tokens <= experts else TileMenu((64,), (64,), 64)
    rows = next((rows for most, rows in ((32, 16), (96, 32), (512, 64)) if tokens <= most), 128)
    return TileMenu((rows,), (64,), 256) if tokens <= 64 else TileMenu((rows,), (128,), 128)


def expert_kernel(target: Target, x_format: str, w_format: str, name: str = "") -> Target:
    """Returns a Target for one kernel of the library: the one for experts in the given number formats.

    A library may list kernels that differ from its own fields (library.kernels). The result is a copy of `target` whose
    library describes only the one kernel. If the library lists no kernels, the result is `target` itself. Raises
    ChipError if the library lists kernels, but none called `name`.

    x_format: number format of x. w_format: number format of the weights. name: name of the kernel; "": the library's
    default kernel for the wider of the two formats.
    """
    return target.kernel("experts", max(x_format, w_format, key=formats.bits), name=name)


@lru_cache(maxsize=4096)
def grouped_target(target: Target, tokens: int, experts: int) -> Target:
    """Returns a copy of `target` with the library's values for grouped products (one product for each expert).

    With the copy, a function that times a plain product gives the time of a grouped product. A library has separate
    fields for grouped products, such as expert_stages. In the copy, the values of tiles, matmul_stages, mxu_efficiency
    and burst_bytes come from these fields. split_k is (1,), so K is not split. Raises ChipError if all of the library's
    tiles for grouped products are too large for the chip's accumulators or SRAM.

    tokens, experts: numbers of tokens and of experts in the step; some libraries choose tiles by them.
    """
    chip, lib = target.chip, target.library
    menu = tile_menu(lib, tokens, experts)
    tiles = tuple(
        (m, n) for m in menu.rows for n in menu.columns
        if m * n * 8 <= chip.acc_bytes and 4 * (m + n) * OPERANDS <= chip.sram_bytes
    )  # fmt: skip
    if not tiles:
        raise ChipError(
            f"no tile of experts in library {lib.name!r}, rows {menu.rows} by columns {menu.columns}, fits chip "
            f"{chip.name!r}: its accumulators hold two in {chip.acc_bytes:,} bytes, its SRAM two stages in "
            f"{chip.sram_bytes:,}; give the library smaller expert_rows or expert_columns"
        )
    return target.with_library(
        tiles=tiles, split_k=(1,), matmul_stages=lib.expert_stages, mxu_efficiency=lib.grouped_mxu_efficiency,
        burst_bytes=max(menu.step_bytes, lib.burst_bytes if lib.activation_bytes >= WIDE else 0),
    )  # fmt: skip


def grouped_timing(
    target: Target, tokens: int, counts: tuple[int, ...], n: int, k: int, x_format: str, w_format: str, w_bits: float,
    out_bytes: float, glu: bool = False, scattered: bool = False,
) -> Timing:  # fmt: skip
    """Returns the Timing of one grouped product, which multiplies the rows of each expert by this expert's weights.

    For expert e the product is x [counts[e], k] @ w[e].T [k, n]. The tile is the fastest that tile_menu() allows. A
    partial tile at the edge takes as long as a whole one. If no expert has rows, the time is that of a launch.

    Args:
        target: the chip and its kernel library.
        tokens: number of tokens of the step.
        counts: number of rows of each expert.
        n: columns of the result; with `glu`, columns of gate and up together.
        k: columns of x.
        x_format: number format of x.
        w_format: number format of the weights.
        w_bits: bits of a weight with its share of the scales.
        out_bytes: bytes of a value of the result.
        glu: True if the product applies the activation to gate and up.
        scattered: True if rows of the result are stored by index.

    Raises ChipError for a format that the chip's matrix array does not multiply, and if no allowed tile fits the chip.
    """
    chip, lib = target.chip, target.library
    run = max(chip.runs_as(x_format), chip.runs_as(w_format), key=formats.bits)
    run = run if lib.experts_native else "bf16"
    step_bytes, active = tile_menu(lib, tokens, len(counts)).step_bytes, tuple(c for c in counts if c)
    if not active:
        return Timing(lib.launch_s)
    overfetch = from_l2 = 1.0  # bytes that HBM moves for each byte of the weights; cores, for each byte of HBM's
    if lib.activation_bytes < WIDE:  # a vendor's kernel, which may load short or unaligned rows
        if k % lib.vector_load_values:
            overfetch = lib.unaligned_row_cost
        elif step_bytes == lib.burst_bytes // 2:
            overfetch, from_l2 = lib.half_burst_cost, 1 / lib.half_burst_cost
    groups, least = Grouped(active, scattered, from_l2), 0.0
    if formats.bits(w_format) < 8 and formats.bits(x_format) >= 16:
        groups = replace(groups, convert_ops=lib.w4_dequant_ops)
    if w_format == "e4m3" and run == "bf16":  # FP8 weights are converted to BF16 by the vector lanes
        # Blocks of 128 by 128 weights share a scale and are read whole
        blocks = -(-n // SCALE_BLOCK) * SCALE_BLOCK / n * -(-k // SCALE_BLOCK) * SCALE_BLOCK / k
        groups = Grouped(active, scattered, lib.fp8_overfetch / overfetch / blocks, lib.fp8_dequant_ops, run)
        overfetch *= blocks
        if lib.fp8_load_bytes_per_cycle:
            least = len(active) * n * k * w_bits / 8 * overfetch / (
                lib.fp8_load_bytes_per_cycle * chip.cores * chip.clock_hz)  # fmt: skip
    on, bits = grouped_target(target, tokens, len(counts)), w_bits * overfetch
    found = linear_timing(on, 0, n, k, x_format, w_format, bits, out_bytes, glu, grouped=groups)
    return replace(found, seconds=max(found.seconds, least + lib.launch_s + chip.constants.hbm_latency_s))


def combine_loop(
    target: Target, tokens: int, top: int, columns: int, residual: bool, value_bytes: float
) -> tuple[TileLoop, int]:
    """Returns a time model of the kernel that sums the experts' results of each token: (TileLoop, columns of a job).

    A job of the TileLoop is one token and some of its columns. The second value is the largest number of columns of a
    job.

    Args:
        target: the chip and its kernel library.
        tokens: number of tokens.
        top: number of results that are summed for each token.
        columns: columns of a result.
        residual: True if a residual is added.
        value_bytes: bytes of a value.
    """
    parts = -(-columns // COMBINE_COLUMNS)
    width = -(-columns // parts)
    load = (top + residual) * columns / parts * value_bytes + 4 * top
    depth = ring_depth(target, (top * width, top, width, width), load)
    seconds = float(vector_cycles(target.chip, (2 * top + residual) * width)) / target.chip.clock_hz
    store = columns / parts * value_bytes
    return TileLoop(jobs=tokens * parts, load=load, work_s=seconds, store=store, depth=depth), width


def experts_parts(
    target: Target, tokens: int, top_k: int, counts: tuple[int, ...], n_experts: int, hidden: int, inner: int,
    x_format: str, w_format: str, w_bits: float = 0.0, gated: bool = True, kernel: str = "",
) -> dict[str, Timing]:  # fmt: skip
    """Returns a dict {label: Timing} with the modelled time of each launch of a layer of routed experts.

    These are the launches on one rank. The labels, in this order, are:

    - ROUTING: the router and the sort of rows;
    - ROUNDING: the launches that round x and the inner rows, added up;
    - PERMUTATION: rows of x are copied into the order of experts;
    - "gate_up", "activation", "down": the matrix products and the activation of the experts;
    - "zero": rows of other ranks' experts are set to zero;
    - "combine": the weighted sum for each token.

    Launches that the library's kernel does not need are left out. Arguments and errors are the same as for
    experts_timing().
    """
    target = expert_kernel(target, x_format, w_format, kernel)
    chip, lib, sides = target.chip, target.library, 2 if gated else 1
    w_bits, value = w_bits or formats.bits(w_format), lib.activation_bytes
    own = float(sum(counts))
    rows = tokens * top_k if lib.expert_all_rows else own
    score = float(vector_cycles(chip, lib.routing_ops * tokens * n_experts)) / chip.cores / chip.clock_hz
    out = {ROUTING: Timing(lib.routing_launches * lib.launch_s + score, {"VEC": score})}
    eight_bit, fused = formats.bits(x_format) < 16, lib.expert_fused_activation and gated
    if eight_bit:  # quantise the inputs: read 2 bytes, write 1
        out[ROUNDING] = Timing(elementwise_seconds(target, tokens * hidden * 3.0))
    if lib.expert_permute:
        out[PERMUTATION] = Timing(
            elementwise_seconds(target, own * hidden * 2 * min(value, formats.bits(x_format) / 8))
        )
    how = x_format, w_format, w_bits
    inner_bytes = value if eight_bit or not fused else formats.bits(x_format) / 8
    out["gate_up"] = grouped_timing(target, tokens, counts, sides * inner, hidden, *how, inner_bytes, fused)
    if not lib.expert_fused_activation:
        out["activation"] = Timing(elementwise_seconds(target, rows * inner * 2.0 * (sides + 1)))
        if eight_bit:
            out[ROUNDING] += Timing(elementwise_seconds(target, rows * inner * 3.0))
    out["down"] = grouped_timing(target, tokens, counts, hidden, inner, *how, value, scattered=True)
    elsewhere = tokens * top_k - own
    if elsewhere > 0 and lib.expert_all_rows:  # rows of experts that other ranks hold are set to zero
        out["zero"] = Timing(elsewhere * (sides * inner + hidden) * 2 / chip.hbm_rate)
    if value < WIDE:
        out["combine"] = Timing(elementwise_seconds(target, rows * hidden * 2.0 + tokens * hidden * 2.0))
    else:
        loop, _ = combine_loop(target, tokens, top_k, hidden, False, value)
        out["combine"] = loop_timing(target, loop, "hbm")
    return out


@lru_cache(maxsize=4096)
def experts_timing(
    target: Target, tokens: int, top_k: int, counts: tuple[int, ...], n_experts: int, hidden: int, inner: int,
    x_format: str, w_format: str, w_bits: float = 0.0, gated: bool = True, kernel: str = "",
) -> Timing:  # fmt: skip
    """Returns the Timing of a layer of routed experts on one rank, router included.

    If the library has expert_all_rows set, the activation and the combination process all tokens * top_k rows, and all
    are counted. Otherwise only the rows of the rank's own experts are counted.

    Args:
        target: chip and kernel library.
        tokens: number of tokens of the step.
        top_k: number of experts that each token chooses.
        counts: for each expert on this rank, the number of rows that it computes.
        n_experts: number of experts on all ranks.
        hidden: width of x.
        inner: width of the values between an expert's two matrix products.
        x_format: number format of x.
        w_format: number format of the weights.
        w_bits: bits per weight including scales; 0: the bits of `w_format` without scales.
        gated: True if experts have a gate.
        kernel: name of the library's kernel; "": its default.

    Raises ChipError for an unknown kernel.
    """
    layer = target, tokens, top_k, counts, n_experts, hidden, inner, x_format, w_format, w_bits, gated, kernel
    first, *rest = experts_parts(*layer).values()
    return sum(rest, first)
