"""The plan of a sharded Program: which results are split among lanes, and how."""

from __future__ import annotations

from intaglio.compiler.layout import Layout, LayoutError
from intaglio.compiler.shard.recurrent import Recurrence, plan_recurrence
from intaglio.compiler.shard.shares import Plan, Share, cut, cut_columns, joint, scaled
from intaglio.ops import (
    Attend,
    AttendPooled,
    Embed,
    HeadLinear,
    KvWrite,
    Linear,
    Moment,
    Norm,
    Op,
    Permute,
    Rope,
    Sample,
    ShortConv,
)
from intaglio.program import Program


def make_plan(p: Program, layout: Layout) -> Plan:
    """Decide which results are split among lanes (ranks that hold the same layers): {result: columns of each lane}.

    Attention is split by heads, a block with recurrent state by heads or channels, an MLP by its intermediate columns,
    logits by vocabulary, the embedding by its columns. A K/V cache or a state that is split is in the dict with the
    heads or channels of each lane. Raises LayoutError if tp does not fit the number of heads or channels, or if
    queries, keys or values are computed from anything but projections.
    """
    plan: Plan = {}
    for op in p.ops:
        if isinstance(op, Attend | AttendPooled) and layout.tp > 1:
            plan_heads(p, op, layout, plan)
        elif isinstance(op, Recurrence) and layout.tp > 1:
            plan_recurrence(p, op, layout, plan)
    for op in p.ops:
        if isinstance(op, Linear) and op.out not in plan:  # a result split by heads needs the whole x
            plan_columns(p, op.x, cut_columns(p.tensors[op.w], layout.lanes), plan)
        elif isinstance(op, Sample):
            plan_columns(p, op.logits, cut(int(p.tensors[op.logits].shape[1]), layout.lanes), plan)
        elif isinstance(op, Embed):
            plan[op.out] = cut_columns(p.tensors[op.w], layout.lanes)
    for op in p.ops:
        if isinstance(op, Linear):
            plan_joint(p, op.out, plan)
    for op in p.ops:
        if isinstance(op, ShortConv) and op.state not in plan:
            plan_channels(p, op, plan)
    return plan


def plan_channels(p: Program, op: ShortConv, plan: Plan) -> None:
    """Add the state of a short convolution to `plan`, with the channels of the op's input on each lane (rank).

    Changes nothing if the input is not split, or is computed from linears that are split differently.
    """
    shares = [plan.get(name) for name in roots(p, op.x, ()) or ()]
    if shares and shares[0] and all(share == shares[0] for share in shares):
        plan[op.state] = shares[0]


def plan_heads(p: Program, op: Attend | AttendPooled, layout: Layout, plan: Plan) -> None:
    """Split an attention op by heads: add to `plan` how the tensors before it are divided among tp lanes (ranks).

    Query heads are divided evenly; a lane has the kv heads that its query heads read. Two kinds of items are added: the
    columns of each lane, for the results of the projections that compute queries, keys and values; and the heads of
    each lane, for the K/V caches. If there is one kv head, keys, values and caches stay whole.

    plan: {name: columns or heads of each lane}; changed. Raises LayoutError if tp does not fit the number of heads, or
    if queries, keys or values are computed from anything but projections.
    """
    lanes, cache = layout.tp, op.cache if isinstance(op, AttendPooled) else op.k_cache
    kv = int(p.tensors[cache].shape[2])
    if not (kv % lanes == 0 or (lanes % kv == 0 and op.heads % lanes == 0)):
        fit = [str(n) for n in range(1, op.heads + 1) if kv % n == 0 or (n % kv == 0 and op.heads % n == 0)]
        raise LayoutError(
            f"{op.site} has {op.heads} heads over {kv} kv heads, which tp={lanes} does not divide; "
            f"use tp={', '.join(fit)}"
        )
    heads = [(range(op.heads * i // lanes, op.heads * (i + 1) // lanes),) for i in range(lanes)]
    shared: list[Share] = [
        (range(kv * i // lanes, max(kv * (i + 1) // lanes, kv * i // lanes + 1)),) for i in range(lanes)
    ]
    queries = roots(p, op.q, (Rope, Norm, HeadLinear))
    if queries is None:
        raise LayoutError(
            f"{op.site} reads {op.q}, which is not made of projections alone, so it cannot be split by heads"
        )
    heads, shared = heads * layout.ep, shared * layout.ep  # expert-parallel lanes repeat attention
    plan |= {q: scaled(heads, int(p.tensors[q].shape[1]) // op.heads) for q in queries}
    if kv == 1:
        return  # every lane holds the only one
    for write in (w for w in p.ops if isinstance(w, KvWrite) and w.k_cache == cache):
        for x, cache in ((write.k, write.k_cache), (write.v, write.v_cache)):
            found = roots(p, x, (Rope, Norm))
            if found is None:
                raise LayoutError(
                    f"{write.site} writes {x}, which is not made of projections alone, so it cannot be split by heads"
                )
            plan[cache] = shared
            plan |= {root: scaled(shared, int(p.tensors[root].shape[1]) // kv) for root in found}


def plan_columns(p: Program, x: str, shares: list[Share], plan: Plan) -> None:
    """Add to `plan` a split by columns of the linears from which `x` is computed. Returns nothing.

    Each lane (rank) then computes only its own columns of `x`. The linears and `x` may be separated by ops that work on
    each column alone: elementwise ops, short convolutions, Permute and Moment. Nothing is added if `x` depends on
    results of any other op, if a linear's result is in the plan already or has another width than `x`, or if `x` has
    fewer columns than there are lanes.

    Args:
        p: the whole Program.
        x: name of the tensor.
        shares: the columns of `x` that each lane computes.
        plan: {name of a result: columns of each lane}; changed in place.
    """
    found, width = roots(p, x, (Moment, Permute, ShortConv)), int(p.tensors[x].shape[1])
    if found and width >= len(shares) and all(root not in plan and p.tensors[root].shape[1] == width for root in found):
        plan |= dict.fromkeys(found, shares)


def roots(
    p: Program, name: str, through: tuple[type[Op], ...], found: dict[str, set[str] | None] | None = None
) -> set[str] | None:
    """Names of the linears' results from which tensor `name` is computed, as a set.

    It follows operands back through elementwise ops and ops of the types `through`. None if it meets the result of any
    other op, or if `name` is no op's result. Weights, constants and inputs of the Program do not count. A view of a
    linear's result counts as a linear's result. found: roots of tensors already visited; new ones are added.
    """
    found = {} if found is None else found
    if name not in found:
        found[name] = _roots(p, name, through, found)
    return found[name]


def _roots(p: Program, name: str, through: tuple[type[Op], ...], found: dict[str, set[str] | None]) -> set[str] | None:
    """Compute the result of roots() for a tensor that is not in `found` yet.

    Returns the names of the linears' results from which the tensor is computed, as a set. Between these and the tensor
    there may be elementwise ops, and ops of the types `through`. The result is None if there are others, or if no op
    computes the tensor.

    Args:
        p: the Program.
        name: name of the tensor.
        through: types of ops, besides elementwise ones, whose operands are followed back.
        found: results of roots() for tensors already visited; new ones are added.
    """
    op = p.producer(name)
    if isinstance(op, Linear):
        return {name}
    if op is None or not (op.elementwise or isinstance(op, through)) or p.tensors[name].view:
        return None
    parts = set[str]()
    for x in op.inputs:
        if p.tensors[x].role in ("temp", "output"):
            part = roots(p, x, through, found)
            if part is None:
                return None
            parts |= part
    return parts


def plan_joint(p: Program, out: str, plan: Plan) -> None:
    """Make `plan` consistent for `out`, a linear's result that other ops read through views (ranges of its columns).

    A lane is a rank of the tensor-parallel group. `out` is added to the plan if three conditions hold: every view is in
    the plan, the views together cover `out`, and no op reads `out` itself. Then a lane computes the columns of `out`
    that the views give it. Otherwise `out` and its views are removed from the plan, so that each lane computes all
    their columns. If `out` has no views, the plan stays as it is.

    plan: {name of a result: columns of each lane}; changed in place. Returns nothing.
    """
    views = p.views(out)
    shares = joint(p, out, plan)
    if shares and not p.uses(out):
        plan[out] = shares
    elif views:
        for name in (out, *(name for _, name in views)):
            plan.pop(name, None)
