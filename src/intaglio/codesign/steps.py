"""StepTimes: the modelled time of any step of a server, from a table that is filled as steps are asked for.

The table has the steps' exact times (those of the chip's kernels) at certain numbers of decoding sequences and context
lengths, about 9 % apart; times between them are interpolated. `StepTimes.exact()` is the time without the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from intaglio.chips import ChipError, Target
from intaglio.codesign.fusions import fused_kernels
from intaglio.codesign.memory import KvLimit, KvRoom, free_bytes, memory_use, page_bytes
from intaglio.codesign.placement import Placement
from intaglio.codesign.simulate import stages
from intaglio.ops import Experts
from intaglio.program import Program
from intaglio.runtime.windows import longest_window, reservations
from intaglio.silicon.kernels import ChipKernel, timing
from intaglio.silicon.kernels.attend import AttendKernel
from intaglio.silicon.kernels.collectives import collective_timing
from intaglio.silicon.kernels.experts import ExpertsKernel
from intaglio.silicon.kernels.linear import LinearKernel
from intaglio.silicon.kernels.rows import RowsKernel
from intaglio.silicon.plan import Plan
from intaglio.silicon.sizes import BLOCK, BatchSizes
from intaglio.silicon.timeline import joules
from intaglio.silicon.timing import Timing

PER_OCTAVE = 8  # entries of the table between one number and its double
Chunks = tuple[tuple[int, int, int], ...]  # (new tokens, keys up to and including them, prompts with both)
NARROW = ("e4m3", "e2m1", "int8")  # formats to which rows are rounded before a product
WIRE = 2  # bytes a value that travels between chips


@dataclass(frozen=True)
class Formats:
    """The number formats of a served model: weights, K/V cache, activations and routed experts.

    Attributes:
        weights: format of weight matrices; "auto": as stored in the checkpoint.
        kv: format of the K/V cache; "auto": it follows from `weights`, see compiler.weights.set_weight_formats().
        activations: format of activations in matrix products. "auto": the format in the model's Program. "fp8": fp8
            where the weights are fp8. "weights": the format of the weights, if the chip's arrays can multiply it.
        experts: format of the matrices of routed experts; "": the format in `weights`.
    """

    weights: str = "auto"
    kv: str = "auto"
    activations: str = "auto"
    experts: str = ""


@dataclass(frozen=True)
class Server:
    """One server of a serving system, with the model compiled for it.

    The compiled model is one rank's Program of each pipeline stage.

    Attributes:
        program: the whole model.
        placement: how the chips share the model.
        stages: for each pipeline stage, the Program whose ops are timed, except the ops of routed experts.
        experts: for each pipeline stage, the Program whose ops of routed experts are timed. This is `stages` itself,
            unless experts have a layout or number format of their own.
        activations: format of activations in matrix products. "auto": the format in the Programs. "weights": the format
            of the weights, if the chip's arrays can multiply it.
        kv_rooms: cache {arguments of kv_room(): its result}.
    """

    program: Program
    placement: Placement
    stages: tuple[Program, ...]
    experts: tuple[Program, ...]
    activations: str = "auto"
    kv_rooms: dict[tuple[object, ...], KvRoom] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, program: Program, placement: Placement, how: Formats) -> Server:
        """Compile a whole model for one server of a placement. Returns the Server.

        program: the model, not compiled, for example from simulate.ported(). how: number formats. Raises LayoutError if
        the placement does not fit the model, FormatError for an unknown format, and ChipError if the placement has a
        layout for experts but the model has none.
        """
        eight = "fp8" if how.weights.startswith("fp8") else "auto"
        plain = eight if how.activations == "weights" else how.activations
        own = stages(program, str(placement.attention), how.weights, how.kv, plain)
        activations = "weights" if how.activations == "weights" else "auto"
        routed = any(isinstance(op, Experts) for op in program.ops)
        if placement.experts is not None and not routed:
            raise ChipError(
                f"{program.name} has no experts; for copies of a whole model leave out /{placement.experts}"
            )
        layout = placement.attention if placement.experts is None else replace(placement.experts, pp=len(own))
        weights = how.experts or how.weights
        if not routed or (layout, weights) == (placement.attention, how.weights):
            return cls(program, placement, own, own, activations)
        return cls(program, placement, own, stages(program, str(layout), weights, how.kv, "auto"), activations)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the weights on one chip: the chip that holds the most."""
        return max(
            sum(p.tensors[w].nbytes({}) for w in weights_of(p, False))
            + sum(e.tensors[w].nbytes({}) for w in weights_of(e, True))
            for p, e in zip(self.stages, self.experts, strict=True)
        )

    def kv_room(
        self, target: Target, share: float, max_tokens: int, max_sequences: int, open_sequences: int | None = None,
        states: int = 2, gives_back: bool = True,
    ) -> KvRoom:  # fmt: skip
        """The K/V capacity of one server in tokens, as a KvRoom.

        It is what fits beside weights and activations, on all DP ranks together. A DP rank is a data-parallel copy of
        the attention layers, with sequences and a K/V cache of its own.

        Args:
            target: the chip.
            share: fraction of each chip's HBM that may be filled.
            max_tokens: maximum tokens of a step on one DP rank.
            max_sequences: maximum sequences of a step on one DP rank.
            open_sequences: a limit on the K/V cache of a DP rank: it is at most as large as this number of sequences
                need if each has the model's full context. None: the number is max_sequences.
            states: number of recurrent states kept for each sequence, if the model has recurrent state: 2 if a step
                reads one and writes another, 1 in engines that update the state in place.
            gives_back: True if layers with a sliding window keep only the last tokens. False for servers that send K/V
                to other servers or receive it from them: all their layers keep the K/V of all tokens.

        Raises ChipError if not even one K/V block fits.
        """
        hbm = int(target.chip.hbm_bytes * share)
        asked = hbm, max_tokens, max_sequences, open_sequences, states, gives_back
        if asked in self.kv_rooms:
            return self.kv_rooms[asked]
        step = BatchSizes(max_tokens, min(max_tokens, max_sequences), ())
        slots = states * max_sequences if any(p.recurrent for p in self.stages) else 0
        context, copies, window = self.program.context, self.placement.copies, longest_window(self.stages)
        most, of_steps = reservations(
            window, BLOCK, context=context, max_batch_tokens=max_tokens, depth=len(self.stages)
        )
        gives_back = gives_back and window > 0 and most * BLOCK < context
        used = (open_sequences or max_sequences) * -(-context // BLOCK) * BLOCK * copies  # more tokens are never used
        limits = [KvLimit(used, BLOCK)]
        for p in self.stages:
            use = replace(memory_use(p, step, 1, hbm), weights=self.weight_bytes)
            full, windowed = page_bytes(p)
            free = free_bytes(p, use, slots) - gives_back * of_steps * windowed
            whole = full + windowed
            if free < max(1, whole):
                raise ChipError(
                    f"{target.chip.name}, {self.placement}: no room for a K/V cache: {use}, of which {share:.0%} may "
                    "be used. Use more chips, a smaller format or fewer tokens a step"
                )
            if whole:
                room = free // whole * whole * copies
                limits.append(KvLimit(room, full, windowed) if gives_back else KvLimit(room, whole))
        self.kv_rooms[asked] = KvRoom(tuple(limits), most * BLOCK if gives_back else 0)
        return self.kv_rooms[asked]

    @cached_property
    def kv_bytes_per_token(self) -> float:
        """Bytes of K/V per token on one chip: the sum over the chip's layers, for the chip with the largest sum."""
        return max(sum(page_bytes(p)) for p in self.stages) / BLOCK

    def kv_bytes(self, length: float, room: KvRoom) -> float:
        """K/V bytes of a sequence of `length` tokens on the chip that stores the most of them.

        room: the server's KvRoom, which says how many tokens layers with a sliding window keep.
        """
        sizes = [page_bytes(p) for p in self.stages]
        return max(length * full + room.kept(length) * windowed for full, windowed in sizes) / BLOCK


def weights_of(p: Program, of_experts: bool) -> set[str]:
    """Names of the weights of routed experts if `of_experts` is True, otherwise of all other weights, as a set.

    Weights of routed experts are the weights that ops of class Experts read. The router's weights are not among them.
    """
    routed = {n for op in p.ops if isinstance(op, Experts) for n in op.inputs if p.tensors[n].role == "weight"}
    return routed if of_experts else {w.name for w in p.of_role("weight")} - routed


class Costs(Protocol):
    """Interface of an object that gives the seconds and joules of a server's steps to the queue simulation.

    Attributes:
        copies: number of data-parallel copies of the attention layers (DP ranks) in the server.
    """

    copies: int

    def cost(self, decoding: int, context: float, chunks: Sequence[tuple[int, int, int]] = ()) -> tuple[float, float]:
        """The time and energy of one step, as a pair (seconds, joules of all chips of the server).

        decoding: number of decoding sequences in the step. context: their mean number of keys (tokens in the cache).
        chunks: the step's prompt chunks as (new tokens, keys including the new tokens, number of such prompts).
        """


@dataclass(frozen=True)
class Part:
    """A kernel of one pipeline stage, with the number of times that it runs in a step.

    Attributes:
        kernel: the kernel.
        count: number of times that the kernel runs in a step.
        shared: True if the kernel processes the tokens of all data-parallel copies of attention (DP ranks), as experts
            do. False if it processes the tokens of one copy.
    """

    kernel: ChipKernel
    count: int
    shared: bool


@dataclass
class StepTimes:
    """The modelled seconds and joules of one server's steps. Computed values are kept in a table.

    Attributes:
        server: the compiled model.
        target: chip and kernel library.
        fusions: names in FUSIONS. Each names a way in which the engine fuses, splits or replaces ops of the Program.
        queries: number of tokens that a step computes for each decoding sequence: 1, plus the number of draft tokens
            that it verifies.
        copies: number of data-parallel copies of the attention layers (DP ranks) in the server.
        overlaps: True if the kernel library prefetches weights or hides collectives, so that a step takes less time
            than the sum of its kernels. Steps are then timed by self.plans. In three cases the kernels' times are
            summed although `overlaps` is True: `fusions` is not empty; routed experts have a layout or weight format of
            their own; the model has routed experts and server.activations is not "auto".
        tables: cache {(decoding, context, chunks): result of exact()}.
        others: cache {target: StepTimes of the same server on this target}, filled by on().

    Raises ChipError if a chip cannot hold the weights, or its arrays do not take a format.
    """

    server: Server
    target: Target
    fusions: tuple[str, ...] = ()
    queries: int = 1
    tables: dict[tuple[object, ...], tuple[float, float]] = field(default_factory=dict, repr=False)
    others: dict[Target, StepTimes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        library, self.copies = self.target.library, self.server.placement.copies
        self.overlaps = library.prefetches_weights or library.dual_batch_overlap
        if self.server.weight_bytes > self.target.chip.hbm_bytes:
            raise ChipError(
                f"{self.server.weight_bytes / 1e9:,.1f} GB of weights a chip; {self.target.chip.name} has "
                f"{self.target.chip.hbm_bytes / 1e9:,.3g} GB of HBM; use more chips or fewer bits"
            )
        self.count = len(self.server.stages)
        self.parts = [self._parts(*pair) for pair in zip(self.server.stages, self.server.experts, strict=True)]
        routed = [[op for op in p.ops if isinstance(op, Experts)] for p in self.server.stages]
        self.exchanges = [len(ops) for ops in routed]
        widths = [
            int(p.tensors[op.outputs[0]].shape[-1])
            for p, ops in zip(self.server.stages, routed, strict=True)
            for op in ops
        ]
        self.width = max(widths, default=0)
        self.chips_per_stage = self.server.placement.chips_per_server // self.count

    def on(self, target: Target) -> StepTimes:
        """The StepTimes of the same server on another target (chip and kernel library).

        Calls with equal targets return the same object, so its table of step times is kept. Raises ChipError if a chip
        of the target cannot hold the weights, or if the chip's arrays do not take a number format.
        """
        if target == self.target:
            return self
        if target not in self.others:
            self.others[target] = StepTimes(self.server, target, self.fusions, self.queries)
        return self.others[target]

    @cached_property
    def plans(self) -> tuple[Plan, ...]:
        """The Plan of each pipeline stage, as a tuple. A Plan is an object that times steps whose ops overlap.

        Read this property only if `overlaps` is True. If ops do not overlap, a step's time is the sum of its kernels'
        times, which needs no Plan and less computation.
        """
        return Plan.of(self.server.stages, self.target)

    def _parts(self, own: Program, experts: Program) -> list[Part]:
        counts: dict[tuple[ChipKernel, bool], int] = {}
        routed = [ExpertsKernel.of(op, experts.tensors) for op in experts.ops if isinstance(op, Experts)]
        for kernels, shared in ((fused_kernels(own, self.fusions), False), (routed, True)):
            for kernel in kernels:
                key = self._kernel(kernel), shared
                counts[key] = counts.get(key, 0) + 1
                linear = key[0]
                if isinstance(linear, LinearKernel) and linear.x_format in NARROW and "quantise" in self.fusions:
                    rounding = RowsKernel(linear.rows, linear.k, 2), False
                    counts[rounding] = counts.get(rounding, 0) + 1
        return [Part(kernel, n, shared) for (kernel, shared), n in counts.items()]

    def _kernel(self, kernel: Any) -> ChipKernel:
        """A copy of the kernel with the number formats that this server's chips use for its weights and activations.

        Only kernels of matrix products and of experts are copied; any other kernel is returned unchanged. In the copy,
        weights in nvfp4 (e2m1 codes with scales) have the format e2m1. The format of the activations depends on
        self.server.activations:

        - "auto": the activations keep their format.
        - "weights": it depends on the weights' format. For e4m3, e2m1 and int8 weights, the activations get the same
          format if the chip's arrays multiply it, and otherwise bf16. For int4 weights they get bf16. For all other
          weights, f32 activations become bf16, and other activations keep their format.

        Raises ChipError if the arrays do not take the weights' format.
        """
        if not isinstance(kernel, LinearKernel | ExpertsKernel):
            return kernel
        w = "e2m1" if kernel.w_format == "nvfp4" else kernel.w_format
        x = kernel.x_format
        narrow = self.server.activations == "weights"
        if narrow and w in ("e4m3", "e2m1", "int8"):
            x = w if w in dict(self.target.chip.macs) else "bf16"
        elif narrow and w == "int4":
            x = "bf16"  # only the weights are narrow
        elif narrow and x == "f32":
            x = "bf16"  # routers: only their sums are in float32
        self.target.chip.runs_as(w)  # raises ChipError if the arrays do not take the format
        return replace(kernel, w_format=w, x_format=x)

    def exact(self, decoding: int, context: int, chunks: Chunks = ()) -> tuple[float, float]:
        """Compute the time and energy of one step. Returns (seconds, joules of all chips of the server).

        No figure comes from the table of step times. decoding: number of decoding sequences, spread evenly over the
        data-parallel copies of attention (DP ranks) and the pipeline's micro-batches. context: number of keys of each
        decoding sequence. chunks: the step's prompt chunks as (new tokens, keys including the new tokens, number of
        such prompts).
        """
        n = self.count
        own, everything = self._sizes(decoding, context, chunks)
        with_chunks = [self._stage(i, own, everything) for i in range(n)]
        ranks = self.chips_per_stage
        seconds, spent = sum(s for s, _ in with_chunks), sum(j for _, j in with_chunks)
        if n > 1 and decoding:  # the other micro-batches only decode
            plain = [self._stage(i, *self._sizes(decoding, context, ())) for i in range(n)]
            slowest = max(s for s, _ in plain)
            seconds = max(seconds, (n - 1) * slowest + max(s for s, _ in with_chunks))
            spent += (n - 1) * sum(j for _, j in plain)
        return seconds, spent * ranks

    def _sizes(self, decoding: int, context: int, chunks: Chunks) -> tuple[BatchSizes, int]:
        """The sizes of one micro-batch: (BatchSizes of the busiest DP rank, number of tokens of all DP ranks).

        A DP rank is a data-parallel copy of the attention layers. The busiest rank is the rank with the most prompt
        tokens. All prompts of the step are in this micro-batch: the longest prompt comes first, and each goes to the
        rank with the fewest prompt tokens so far. Decoding sequences are spread evenly over DP ranks and micro-batches.
        Their number per rank is rounded up.

        Args:
            decoding: number of decoding sequences of the whole step.
            context: number of keys of each decoding sequence.
            chunks: the step's prompt chunks as (new tokens, keys including the new tokens, number of such prompts).
        """
        stages = self.count
        each, ranks = -(-decoding // (self.copies * stages)), [0] * self.copies
        lists: list[dict[tuple[int, int], int]] = [{} for _ in ranks]
        for q, keys, n in sorted(chunks, reverse=True):
            for _ in range(n):
                i = ranks.index(min(ranks))
                ranks[i] += q
                lists[i][q, keys] = lists[i].get((q, keys), 0) + 1
        heavy = ranks.index(max(ranks))
        mine = tuple((q, keys, n) for (q, keys), n in lists[heavy].items())
        sequences = (((1, context, each * self.passes),) if each else ()) + mine
        rows = each * self.queries
        tokens = rows + sum(q * n for q, _, n in mine)
        total = min(
            self.copies * tokens, -(-decoding // stages) * self.queries + sum(q * n for q, _, n in chunks)
        )  # fmt: skip
        return BatchSizes(tokens, rows + sum(n for *_, n in mine), sequences), max(tokens, total)

    @cached_property
    def passes(self) -> int:
        """Factor by which several tokens per sequence increase the K/V bytes that a decode step reads.

        The step has self.queries tokens per sequence and is compared with a step of one token per sequence. The result
        is a whole number of 1 or more. The rows of all queries, and of all heads that share a K/V head, are multiplied
        in tiles of library.min_query_rows rows. Each tile reads the keys and values once. The result is therefore the
        number of tiles for self.queries tokens, divided by the number of tiles for one token and rounded down.
        """
        tile = self.target.library.min_query_rows
        shared = [
            k.heads.group for parts in self.parts for k in (p.kernel for p in parts) if isinstance(k, AttendKernel)
        ]
        group = max(shared, default=1)
        return -(-group * self.queries // tile) // -(-group // tile)

    def _stage(self, i: int, own: BatchSizes, tokens: int) -> tuple[float, float]:
        """Time and energy of one micro-batch in pipeline stage number `i`, as (seconds, joules of one chip).

        The result is (0, 0) for a micro-batch without tokens. own: sizes of the micro-batch on one data-parallel copy
        of attention (DP rank). tokens: number of tokens of all DP ranks, which the experts compute together.
        """
        if not own.tokens:
            return 0.0, 0.0
        if (
            self.overlaps
            and self.server.stages is self.server.experts
            and not (self.width and self.server.activations != "auto")
            and not self.fusions
        ):
            return self.plans[i].cost(own)
        everything = BatchSizes(tokens, tokens, ((tokens, tokens, 1),))
        done: list[tuple[Timing, int]] = []
        for part in self.parts[i]:
            sizes = everything if part.shared else own if part.kernel.by_sequence else own.counts
            done.append((timing(part.kernel, self.target, sizes), part.count))
        if self.copies > 1 and self.exchanges[i]:
            done.append((self._exchange(tokens), self.exchanges[i]))
        seconds = sum(t.seconds * n for t, n in done)
        return seconds, sum(joules(self.target.chip, done, seconds).values())

    def _exchange(self, tokens: int) -> Timing:
        """The modelled Timing (seconds, bytes and busy times) of the two collectives around a layer's experts.

        They are an all_gather before and a reduce_scatter after the experts. They run one after the other, so their
        times are added. tokens: number of rows that each collective moves.
        """
        chips, moved = self.chips_per_stage, tokens * self.width * WIRE
        return collective_timing(self.target, "all_gather", chips, moved) + collective_timing(
            self.target, "reduce_scatter", chips, moved
        )

    def cost(self, decoding: int, context: float, chunks: Sequence[tuple[int, int, int]] = ()) -> tuple[float, float]:
        """The time and energy of one step, from a table: (seconds, joules of all chips of the server).

        The table has results of exact(). For a step that only decodes, the result is interpolated between four entries.
        For a step with chunks, it is the entry with the nearest sizes, scaled by the number of tokens. The result is
        (0, 0) for a step with neither sequences nor chunks.

        decoding: number of decoding sequences in the step. context: their mean number of keys (tokens in the cache).
        chunks: the step's prompt chunks as (new tokens, keys including the new tokens, number of such prompts).
        """
        if not chunks:
            if not decoding:
                return 0.0, 0.0
            (d0, d1, u), (c0, c1, v) = around(decoding, self.copies * self.count), around(context, 16)
            corners = ((d0, c0, (1 - u) * (1 - v)), (d0, c1, (1 - u) * v), (d1, c0, u * (1 - v)), (d1, c1, u * v))
            parts = [(self._entry(d, c, ()), w) for d, c, w in corners if w]
            return sum(w * s for (s, _), w in parts), sum(w * j for (_, j), w in parts)
        tokens = sum(q * n for q, _, n in chunks)
        rounded = tuple((nearest(q, 16), nearest(max(q, keys), 16), n) for q, keys, n in chunks)
        near = nearest(decoding, 4) if decoding else 0
        seconds, spent = self._entry(near, nearest(context, 16), rounded)
        scale = (tokens + decoding * self.queries) / (sum(q * n for q, _, n in rounded) + near * self.queries)
        return seconds * scale, spent * scale

    def _entry(self, decoding: int, context: int, chunks: Chunks) -> tuple[float, float]:
        key = (decoding, context, chunks)
        if key not in self.tables:
            self.tables[key] = self.exact(decoding, context, chunks)
        return self.tables[key]


def around(x: float, step: int) -> tuple[int, int, float]:
    """The grid points around `x` for an interpolation: (lower point, next point, fraction of the way between the two).

    Step times are computed only for sizes on a grid, and interpolated for sizes between two grid points. Grid points up
    to `step` are 1 apart. Grid points from `step` to 2 * PER_OCTAVE * `step` are `step` apart. From there to 4 *
    PER_OCTAVE * `step` they are 2 * `step` apart, and so on: with each doubling of the size, the distance doubles. For
    `x` below 1 the result is (1, 2, 0.0).
    """
    if x <= step:
        low = max(1, math.floor(x))
        return low, low + 1, min(1.0, max(0.0, x - low))
    width = step
    while width * PER_OCTAVE * 2 <= x:
        width *= 2
    low = int(x // width) * width
    return low, low + width, (x - low) / width


def nearest(x: float, step: int) -> int:
    """The size nearest to `x` for which step times are computed, as an int of 1 or more.

    The sizes are the grid points of around(x, step). In the middle between two points, the result is the lower point.
    """
    low, high, way = around(x, step)
    return high if way > 0.5 else low
