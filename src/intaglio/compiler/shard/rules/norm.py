"""The sharding rules of norms and moments of rows."""

from __future__ import annotations

from dataclasses import replace

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.compiler.shard.shares import keeps_whole
from intaglio.ops import Moment, Norm


@sharding_rule(Norm)
def norm(lane: Lane, op: Norm) -> None:
    """Append a Norm op to one rank's Program. Returns nothing.

    The first case that fits applies:

    - All operands are divided by token rows: the op norms the rank's rows.
    - x is not divided by columns, or the norm has a residual, or other ops read the result through views (column
      ranges): the op norms whole rows, and the rank keeps the whole result. A divided x is gathered first.
    - x is divided between groups of columns that are normed separately: the op norms the rank's groups.
    - x is divided in another way: x is gathered and whole rows are normed. The rank keeps a view of its columns of the
      result.
    """
    if lane.has_token_rows(op):
        for name in (op.weight, op.bias):
            if name:
                lane.keep(name)
        return lane.add(op)
    shares = lane.shares.get(op.x)
    if not shares or op.residual or op.out in lane.views:
        return lane.add_whole(op)
    if keeps_whole(shares, op.group):
        long = {x for x in (op.weight, op.bias) if x and lane.p.tensors[x].shape != (op.group,)}  # a value per column
        own = {x: lane.own(op, x, shares, axis=0) if x in long else lane.keep(x) for x in (op.weight, op.bias) if x}
        return lane.add_split(op.rename(own), shares)
    names = {name: lane.keep(name) for name in (op.weight, op.bias) if name}
    lane.wholes[op.out] = f"{op.out}.whole"
    lane.add(op.rename({**names, op.x: lane.whole(op.x), op.out: lane.wholes[op.out]}))
    ((own_columns,),) = (shares[lane.lane],)
    view = (lane.wholes[op.out], own_columns.start)
    shape = (lane.p.tensors[op.x].shape[0], len(own_columns))
    lane.tensors[op.out] = replace(lane.p.tensors[op.out], shape=shape, view=view)
    lane.shares[op.out] = shares
    return None


@sharding_rule(Moment)
def moment(lane: Lane, op: Moment) -> None:
    """Append a Moment op (mean, rms or standard deviation of each row) to one rank's Program. Returns nothing.

    If the input op.x is divided by token rows, the op runs on the rank's rows. Otherwise it runs on all rows; an op.x
    that is divided by columns is gathered first.
    """
    if lane.has_token_rows(op):
        lane.add(op)
    else:
        lane.add_whole(op)
