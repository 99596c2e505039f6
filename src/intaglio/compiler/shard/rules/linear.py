"""The sharding rules of matrix products."""

from __future__ import annotations

from dataclasses import replace

from intaglio.compiler.layout import LayoutError
from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.compiler.shard.shares import Share, heads_of, keeps_whole, partners, parts_within, scaled, width_of
from intaglio.ops import AllGather, HeadLinear, Linear, Map, Tensor


@sharding_rule(Linear)
def linear(lane: Lane, op: Linear) -> None:
    """Append a Linear op to one rank's Program: row parallel, column parallel or whole. Returns nothing.

    The first case that fits applies:

    - In parts, if lane.parts has the op: row parallel with several partial sums on each rank, see in_parts().
    - Row parallel, if the input op.x is divided by columns and the op has no activation: each rank computes a partial
      sum over its columns of x, and an all_reduce adds the partial sums.
    - Column parallel, if lane.plan divides the result and the op has no residual: each rank computes its columns of the
      result.
    - Whole: every rank computes all of the result. A divided x is gathered first.

    Raises LayoutError for a linear fused with glu.
    """
    if op.glu:
        raise LayoutError(f"{op.site} is fused with its activation; shard a Program before it is fused")
    cut_x, cut_out = lane.shares.get(op.x), lane.plan.get(op.out)
    if op.site in lane.parts:
        in_parts(lane, op, lane.parts[op.site])
    elif cut_x and not op.activation:
        w, part = lane.own(op, op.w, cut_x, axis=1), f"{op.out}.part"
        group = partners(cut_x, lane.lane)
        lane.divided[op.site] = [cut_x[i] for i in group]
        first = lane.lane == group[0]  # adds bias and residual, which count once
        bias = lane.keep(op.bias) if op.bias and first else None
        residual = lane.whole(op.residual) if op.residual and first else None
        lane.add(replace(op, w=w, bias=bias, residual=residual, out=part))
        lane.total(op.site, part, op.out, group)
    elif cut_out and not op.residual:
        bias = lane.own(op, op.bias, cut_out, axis=0) if op.bias else None
        lane.add_split(replace(op, x=lane.whole(op.x), w=lane.own(op, op.w, cut_out, axis=0), bias=bias), cut_out)
    else:
        lane.add_whole(op)


def in_parts(lane: Lane, op: Linear, parts: list[Share]) -> None:
    """Append a Linear op to one rank's Program as several products, whose results (partial sums) are added up.

    With more tensor parallelism, tp = lane.layout.sums, each rank would compute one of these products. The result has
    the same bits as in that layout. Each product takes some columns of x, called a part. The partial sums are added in
    the order of the parts. A rank that has all of x computes all products, and adds each result to the sum of the
    results before it. Otherwise each rank of a group computes an equal number of products, and an all_gather gives
    every rank all results. Returns nothing.

    parts: the columns of x that belong to each part. Raises LayoutError if the columns of x that a rank has begin or
    end inside a part.
    """
    cut_x, width = lane.shares.get(op.x), int(lane.p.tensors[op.x].shape[1])
    held = cut_x[lane.lane] if cut_x else (range(width),)
    group = partners(cut_x, lane.lane) if cut_x else (lane.lane,)
    own = parts_within(parts, held)
    if not own or len(own) * len(group) != len(parts):
        raise LayoutError(
            f"{op.site}: layout {lane.layout} has columns {held} of {op.x} on lane {lane.lane}, which are not whole "
            f"parts of tp{lane.layout.sums}; use tp1sums{lane.layout.sums}"
        )
    base, at = lane.tensors[op.x].view or (op.x, 0)
    rows, total, names = lane.tensors[op.x].shape[0], None, list[str]()
    for i in own:
        x = f"{op.out}.x{i}"
        lane.tensors[x] = replace(lane.tensors[op.x], name=x, shape=(rows, width_of(parts[i])), view=(base, at))
        at += width_of(parts[i])
        w = lane.keep(op.w, parts, 1, f"{op.site}.{op.w.rpartition('.')[2]}.part{i}", i)
        bias = lane.keep(op.bias) if op.bias and i == 0 else None  # bias and residual count once
        residual = total if len(group) == 1 else None
        if i == 0 and op.residual:
            residual = lane.whole(op.residual)
        last = len(group) == 1 and i == own[-1]
        names.append(op.out if last else f"{op.out}.part{i}")
        site = op.site if last else f"{op.site}.part{i}"
        lane.add(replace(op, site=site, x=x, w=w, bias=bias, residual=residual, out=names[-1]))
        total = names[-1]
    if len(group) > 1:
        add_gathered_parts(lane, op, names, own, group)


def add_gathered_parts(lane: Lane, op: Linear, names: list[str], own: list[int], group: tuple[int, ...]) -> None:
    """Append ops that add the partial sums of a linear on every rank of `group`. Returns nothing.

    They are all_gathers, which give every rank all partial sums, and additions. The sums are added in the order of
    their numbers.

    Args:
        lane: the rank's Program.
        op: the linear.
        names: names of the partial sums that this rank has computed.
        own: numbers of these partial sums in the order of addition.
        group: numbers of the ranks.
    """
    width, each = int(lane.p.tensors[op.out].shape[1]), len(own)
    rows, terms = lane.tensors[names[0]].shape[0], dict[int, str]()
    for j, name in enumerate(names):
        whole = f"{op.out}.whole{j}"
        site = f"{op.site}.all_gather{j}"
        lane.add(AllGather(site=site, x=name, out=whole, group=group, width=width * len(group), wire=lane.wire))
        for r in range(len(group)):
            terms[r * each + j] = term = f"{op.out}.term{r * each + j}"
            lane.tensors[term] = Tensor(term, (rows, width), "f32", "temp", view=(whole, r * width))
    total = terms[0]
    for i in range(1, len(terms)):
        out = op.out if i == len(terms) - 1 else f"{op.out}.sum{i}"
        lane.add(Map(site=f"{op.site}.add{i}", a=total, b=terms[i], out=out, expr="a + b"))
        total = out


@sharding_rule(HeadLinear)
def head_linear(lane: Lane, op: HeadLinear) -> None:
    """Append a HeadLinear op to one rank's Program. Returns nothing.

    A HeadLinear has one matrix per head or group of heads, as in MLA. If the input op.x is divided so that each rank
    has the columns of whole matrices, the rank computes only the products with its own matrices. Otherwise it computes
    all of them.
    """
    shares, heads = lane.shares.get(op.x), int(lane.p.tensors[op.w].shape[0])
    each = int(lane.p.tensors[op.x].shape[1]) // heads
    if not shares or not keeps_whole(shares, each):
        return lane.add_whole(op)
    own = [heads_of(share, each) for share in shares]
    width = int(lane.p.tensors[op.out].shape[1]) // heads
    return lane.add_split(replace(op, w=lane.own(op, op.w, own, axis=0)), scaled(own, width))
