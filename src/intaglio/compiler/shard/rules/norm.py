"""The sharding rule of norms."""

from __future__ import annotations

from dataclasses import replace

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.ops import Norm


@sharding_rule(Norm)
def norm(lane: Lane, op: Norm) -> None:
    """Append norm to the lane's Program: on this lane's token rows, on its heads, or on whole rows.

    It runs on token rows if all operands are split by rows, and on heads if x is split by heads and each head is normed
    by itself. Before a norm over whole rows a split x is gathered, and this lane keeps a view of its own columns of the
    result. A norm with a residual, with views of its result, or with a weight per column of all heads runs on whole
    rows.
    """
    if lane.has_token_rows(op):
        for name in (op.weight, op.bias):
            if name:
                lane.keep(name)
        return lane.add(op)
    shares = lane.shares.get(op.x)
    whole = bool(op.group and op.weight and lane.p.tensors[op.weight].shape != (op.group,))  # a weight per column
    if not shares or op.residual or op.out in lane.views or whole:
        return lane.add_whole(op)
    names = {name: lane.keep(name) for name in (op.weight, op.bias) if name}
    if op.group:
        return lane.add_split(op.rename(names), shares)
    lane.wholes[op.out] = f"{op.out}.whole"
    lane.add(op.rename({op.x: lane.whole(op.x), op.out: lane.wholes[op.out]}))
    ((own,),) = (shares[lane.lane],)
    view = (lane.wholes[op.out], own.start)
    lane.tensors[op.out] = replace(lane.p.tensors[op.out], shape=(lane.p.tensors[op.x].shape[0], len(own)), view=view)
    lane.shares[op.out] = shares
    return None
