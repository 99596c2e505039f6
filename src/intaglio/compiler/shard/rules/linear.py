"""The sharding rules of matrix products."""

from __future__ import annotations

from dataclasses import replace

from intaglio.compiler.layout import LayoutError
from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.compiler.shard.shares import heads_of, keeps_whole, partners, scaled
from intaglio.ops import HeadLinear, Linear


@sharding_rule(Linear)
def linear(lane: Lane, op: Linear) -> None:
    """Append a Linear op to one rank's Program: row parallel, column parallel, or whole.

    It is row parallel if its input op.x is split by columns, column parallel if lane.plan splits its result, else
    whole.

    - Row parallel: each rank computes a partial sum over its columns of x, and an all_reduce adds the sums. A linear
      with an activation cannot be row parallel.
    - Column parallel: each rank computes its columns of the result. A linear with a residual cannot be column parallel.
    - Whole: every rank gathers x, if x is split, and computes all of the result.

    Returns nothing. Raises LayoutError for a linear fused with glu.
    """
    if op.glu:
        raise LayoutError(f"{op.site} is fused with its activation; shard a Program before it is fused")
    cut_x, cut_out = lane.shares.get(op.x), lane.plan.get(op.out)
    if cut_x and not op.activation:
        w, part = lane.own(op, op.w, cut_x, axis=1), f"{op.out}.part"
        group = partners(cut_x, lane.lane)
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


@sharding_rule(HeadLinear)
def head_linear(lane: Lane, op: HeadLinear) -> None:
    """Append a HeadLinear op (one matrix per head or group of heads, as in MLA) to one rank's Program. Returns nothing.

    If the op's input op.x is split between ranks so that each has the columns of whole matrices, the rank's op computes
    only the rank's matrices. Otherwise it computes all of them.
    """
    shares, heads = lane.shares.get(op.x), int(lane.p.tensors[op.w].shape[0])
    each = int(lane.p.tensors[op.x].shape[1]) // heads
    if not shares or not keeps_whole(shares, each):
        return lane.add_whole(op)
    own = [heads_of(share, each) for share in shares]
    width = int(lane.p.tensors[op.out].shape[1]) // heads
    return lane.add_split(replace(op, w=lane.own(op, op.w, own, axis=0)), scaled(own, width))
