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
    """Decide which results are divided among lanes, and how. Returns {name of the result: columns of each lane}.

    Lanes are the ranks that have the same layers. Attention is divided by heads, a block with recurrent state by heads
    or channels, an MLP by its intermediate columns, logits by vocabulary, and the embedding by its columns. A divided
    K/V cache or recurrent state is in the dict too, with the heads or channels of each lane. Raises LayoutError if tp
    does not fit the number of heads or channels, or if queries, keys or values are not computed from projections alone.
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
    """Add the state of a short convolution to `plan`, divided like the op's input. Returns nothing.

    The item is {name of the state: channels of each lane (rank)}. Nothing is added if the input is not divided, or if
    it is computed from linears that are divided differently.
    """
    shares = [plan.get(name) for name in roots(p, op.x, ()) or ()]
    if shares and shares[0] and all(share == shares[0] for share in shares):
        plan[op.state] = shares[0]


def plan_heads(p: Program, op: Attend | AttendPooled, layout: Layout, plan: Plan) -> None:
    """Divide an attention op among tp lanes (ranks) by heads. Returns nothing.

    The tensors that the op reads are added to `plan`. Query heads are divided evenly. A lane has the K/V heads that its
    query heads read. Added to `plan` are the results of the projections that compute queries, keys and values, with the
    columns of each lane, and the K/V caches, with the heads of each lane. If there is only one K/V head, keys, values
    and caches are not divided.

    plan: {name: columns or heads of each lane}; changed in place. Raises LayoutError if tp does not fit the number of
    heads, or if queries, keys or values are not computed from projections alone.
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
    """Divide by columns the linears from which `x` is computed: add their results to `plan`. Returns nothing.

    Each lane (rank) then computes only its own columns of `x`. Between the linears and `x` there may be elementwise
    ops, short convolutions, Permute and Moment ops. Nothing is added in these cases: `x` depends on the result of any
    other op; a linear's result is in the plan already, or has another width than `x`; `x` has fewer columns than there
    are lanes.

    Args:
        p: the whole Program.
        x: name of the tensor.
        shares: for each lane, the columns of `x` that it computes.
        plan: {name of a result: columns of each lane}; changed in place.
    """
    found, width = roots(p, x, (Moment, Permute, ShortConv)), int(p.tensors[x].shape[1])
    if found and width >= len(shares) and all(root not in plan and p.tensors[root].shape[1] == width for root in found):
        plan |= dict.fromkeys(found, shares)


def roots(
    p: Program, name: str, through: tuple[type[Op], ...], found: dict[str, set[str] | None] | None = None
) -> set[str] | None:
    """Find the linears from which the tensor `name` is computed. Returns the names of their results as a set, or None.

    The search goes back from `name` through elementwise ops and ops of the types `through`. The result is None if the
    search comes to the result of any other op, or if no op computes `name`. Weights, constants and inputs of the
    Program are ignored. A view of a linear's result counts as a linear's result. found: cache {name: result for this
    tensor}; new results are added.
    """
    found = {} if found is None else found
    if name not in found:
        found[name] = _roots(p, name, through, found)
    return found[name]


def _roots(p: Program, name: str, through: tuple[type[Op], ...], found: dict[str, set[str] | None]) -> set[str] | None:
    """Compute the result of roots() for a tensor that is not in its cache `found` yet.

    It is the set of names of the linears' results from which the tensor is computed. Between these and the tensor there
    may be elementwise ops and ops of the types `through`. The result is None if there are other ops, or if no op
    computes the tensor.

    Args:
        p: the Program.
        name: name of the tensor.
        through: types of ops, besides elementwise ones, through which the search goes back.
        found: cache {name: result of roots() for this tensor}; new results are added.
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
    """Add a linear's result `out` to `plan`, or remove it, to match how its views are divided. Returns nothing.

    A view is a range of columns of `out` that other ops read. `out` is added to the plan if every view is in the plan,
    the views together cover `out`, and no op reads `out` itself. A lane (rank) then computes the columns of `out` that
    are in its parts of the views. Otherwise `out` and its views are removed from the plan, so that each lane computes
    all their columns. If `out` has no views, the plan does not change.

    plan: {name of a result: columns of each lane}; changed in place.
    """
    views = p.views(out)
    shares = joint(p, out, plan)
    if shares and not p.uses(out):
        plan[out] = shares
    elif views:
        for name in (out, *(name for _, name in views)):
            plan.pop(name, None)
