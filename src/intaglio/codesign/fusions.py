"""Graphs of serving engines: where the kernels of a step differ from the ops of a Program.

A Program has one op for each step of a model's definition. An engine launches some of them as one kernel, replaces some
by cheaper ones, and splits others. A profile of data/engines names the differences that its engine has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from intaglio.chips import Target
from intaglio.ops import AllGather, AllReduce, Experts, KvWrite, Map, Norm, Op, Rope
from intaglio.program import Program
from intaglio.silicon.kernels import ChipKernel, kernel_class
from intaglio.silicon.kernels.collectives import CollectiveKernel
from intaglio.silicon.kernels.linear import LinearKernel
from intaglio.silicon.kernels.norm import NormKernel
from intaglio.silicon.kernels.rows import RowsKernel
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.timing import Timing

FUSIONS = {
    "add_norm": "the sum with the residual stream and the norm that follows are one kernel",
    "reduce_norm": "an all_reduce, the sum with the residual stream and the norm are one kernel",
    "rope": "queries and keys are rotated by one kernel",
    "rope_write": "rotation and the write to the K/V cache are one kernel",
    "shared_sum": "routed and shared experts are summed before one all_reduce, not after two",
    "glu": "the activation of a gate/up product is a kernel of its own",
    "quantise": "rows are rounded to the 8 or 4 bits of a product by a kernel of their own",
    "norm_sums": "norms of rows that are split over chips exchange sums of squares in one all_reduce, not the rows",
}
ADD = "a + b"


@dataclass(frozen=True)
class FusedKernel(ChipKernel):
    """Several kernels fused into one launch. The time is the sum of their times, with only one launch overhead."""

    parts: tuple[ChipKernel, ...]

    @property
    def by_sequence(self) -> bool:  # type: ignore[override]
        """True if the time of any of the fused kernels depends on the sequences' lengths, not only on token counts."""
        return any(part.by_sequence for part in self.parts)

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        times = [part.time(target, sizes, prefetched) for part in self.parts]
        whole = sum(times[1:], times[0])
        return replace(whole, seconds=whole.seconds - (len(times) - 1) * target.library.launch_s)


def fused_kernels(program: Program, fusions: Sequence[str]) -> list[ChipKernel]:
    """Returns the kernels that an engine launches for a Program's ops, as a list of ChipKernels in order.

    Ops of routed experts are left out, because the caller times them with the tokens of all chips.

    fusions: names in FUSIONS, each a way in which the engine fuses, splits or replaces ops; (): one kernel for each op.
    Raises ValueError for another name, ChipError for an op without a chip kernel.
    """
    if unknown := sorted(set(fusions) - set(FUSIONS)):
        raise ValueError(f"unknown fusion {', '.join(unknown)}; there are {', '.join(FUSIONS)}")
    ops = [op for op in program.ops if not isinstance(op, Experts)]
    users: dict[str, list[Op]] = {}
    for op in program.ops:
        for name in op.inputs:
            users.setdefault(name, []).append(op)
    makers = {name: op for op in program.ops for name in op.outputs}
    dropped = set[str]()  # sites of ops that are part of another kernel, or are not needed
    groups: dict[str, list[Op]] = {}  # site of the op that stands for a group -> ops before it in its kernel
    kernels: dict[str, ChipKernel] = {}  # site -> kernel that replaces the op's own

    if "shared_sum" in fusions:
        for op in ops:
            if isinstance(op, Map) and op.expr == ADD:
                both = [makers.get(name) for name in op.inputs]
                if all(isinstance(m, AllReduce) and len(users[m.outputs[0]]) == 1 for m in both):
                    dropped.add(both[0].site if both[0] else "")
    if "norm_sums" in fusions:
        drop, kernels = split_norms(program, ops, users)
        dropped |= drop
    if "add_norm" in fusions or "reduce_norm" in fusions:
        for op in ops:
            add = makers.get(op.inputs[0]) if isinstance(op, Norm) else None
            if not isinstance(add, Map) or add.expr != ADD:
                continue
            reduced = [m for m in map(makers.get, add.inputs) if isinstance(m, AllReduce) and m.site not in dropped]
            before = [*(reduced[:1] if "reduce_norm" in fusions else ()), add]
            groups[op.site] = before
            dropped |= {one.site for one in before}
    if "rope" in fusions or "rope_write" in fusions:
        for ropes, write in rotations(ops):
            last: Op = write if write and "rope_write" in fusions else ropes[-1]
            before = [r for r in ropes if r is not last]
            if before:
                groups[last.site] = [*before]
                dropped |= {one.site for one in before}
    found = list[ChipKernel]()
    for op in ops:
        if op.site in dropped:
            continue
        parts = [
            kernels.get(one.site) or kernel_class(one).of(one, program.tensors)
            for one in (*groups.get(op.site, ()), op)
        ]
        found.append(FusedKernel(tuple(parts)) if len(parts) > 1 else parts[0])
        if isinstance(product := parts[-1], LinearKernel) and product.glu and "glu" in fusions:
            found[-1:] = [replace(product, glu=False), RowsKernel(product.rows, product.n // 2, 3)]
    return found


def rotations(ops: Sequence[Op]) -> list[tuple[list[Rope], KvWrite | None]]:
    """Find the rotary embeddings of each layer. Returns a list with one tuple for each layer that has Rope ops.

    The tuple is (list of the layer's Rope ops, the op that writes to the layer's K/V cache). The second item is None if
    the layer has no such write.
    """
    layers: dict[str, tuple[list[Rope], list[KvWrite]]] = {}
    for op in ops:
        if isinstance(op, Rope | KvWrite):
            ropes, writes = layers.setdefault(op.site.rpartition(".")[0], ([], []))
            if isinstance(op, Rope):
                ropes.append(op)
            else:
                writes.append(op)
    return [(ropes, writes[0] if writes else None) for ropes, writes in layers.values() if ropes]


def split_norms(
    program: Program, ops: Sequence[Op], users: dict[str, list[Op]]
) -> tuple[set[str], dict[str, ChipKernel]]:
    """Choose kernels that compute norms without the all-gathers before them. Returns (dropped, kernels).

    A norm qualifies if it is the only op that reads the result of an all-gather. Instead of gathering, each chip sums
    the squares of its own columns. One all_reduce in float32 for each layer then adds up these sums over the chips, for
    all qualifying norms of the layer. The Program is not changed.

    `dropped` is a set of sites (names of an op's place in the model) of ops that are not launched. `kernels` is {site
    of an op: kernel that replaces the op's own}. The first all-gather of a layer is replaced by the all_reduce, the
    layer's other all-gathers are dropped, and each norm is replaced by a norm over one chip's columns. Both results are
    empty if no norm qualifies.

    program: the Program of one rank. ops: its ops, without experts. users: {tensor name: list of ops that read the
    tensor}.
    """
    layers: dict[str, list[tuple[AllGather, Norm]]] = {}
    for op in ops:
        if isinstance(op, AllGather):
            after = users.get(op.outputs[0], [])
            if len(after) == 1 and isinstance(after[0], Norm) and not after[0].group:
                layers.setdefault(after[0].site.rpartition(".")[0], []).append((op, after[0]))
    dropped, kernels = set[str](), dict[str, ChipKernel]()
    for pairs in layers.values():
        first, ranks = pairs[0][0], len(pairs[0][0].group)
        rows = program.tensors[first.outputs[0]].shape[0]
        kernels[first.site] = CollectiveKernel("all_reduce", rows, len(pairs), 32, ranks)
        dropped |= {gather.site for gather, _ in pairs[1:]}
        for _, norm in pairs:
            whole = NormKernel.of(norm, program.tensors)
            kernels[norm.site] = replace(whole, width=whole.width // ranks)
    return dropped, kernels
