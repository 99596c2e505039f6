"""The sharding rule of elementwise ops."""

from __future__ import annotations

from dataclasses import replace

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.compiler.shard.shares import Share, heads_of, keeps_whole
from intaglio.ops import Map, Op


@sharding_rule(Map)
def elementwise(lane: Lane, op: Op) -> None:
    """Append an elementwise op to one rank's Program. Returns nothing.

    The first case that fits applies:

    - Rows: if all operands are divided by token rows, the op computes the rank's rows.
    - Columns: if all operands with more than one column are divided in the same way, the op computes the rank's
      columns. An operand with one column per head may be whole; the rank then reads the columns of its heads. If the
      result has views (column ranges), this case applies only if lane.plan has the result.
    - Whole: the op computes the whole result, from whole operands.
    """
    if lane.has_token_rows(op):
        return lane.add(op)
    out = op.outputs[0]
    wide = [name for name in op.inputs if lane.p.tensors[name].shape[1:] != (1,) or name == op.inputs[0]]
    op, wide = by_head(lane, op, wide, lane.shares.get(op.inputs[0]))
    shares = [lane.shares.get(name) for name in wide]
    if shares[0] and all(s == shares[0] for s in shares) and (out not in lane.views or out in lane.plan):
        return lane.add_split(op, shares[0])
    return lane.add_whole(op)


def by_head(lane: Lane, op: Op, wide: list[str], shares: list[Share] | None) -> tuple[Op, list[str]]:
    """Make an elementwise op read only the rank's heads of an operand that has one column per head.

    Such an operand is whole on every rank, while the op's first operand is divided by columns. If the rank has a run of
    whole heads, the operand is replaced by a view of the columns of these heads. The view is added to the Program of
    `lane`. Returns (the op with the views as operands, the names in `wide` that were not replaced).

    Args:
        lane: the rank's Program.
        op: the elementwise op.
        wide: names of the op's operands with more than one column.
        shares: for each rank, the columns of the first operand that it has. None: the operand is whole, and `op` and
            `wide` are returned unchanged.
    """
    if not shares:
        return op, wide
    width, left = int(lane.p.tensors[op.inputs[0]].shape[1]), list[str]()
    for name in wide:
        each = width // int(lane.p.tensors[name].shape[1])
        whole = name not in lane.shares and keeps_whole(shares, each)
        own = heads_of(shares[lane.lane], each) if whole else ()
        if each == 1 or len(own) != 1:
            left.append(name)
            continue
        t = lane.tensors[name]
        base, start = t.view or (name, 0)
        part = f"{op.site}.{name.rpartition('.')[2]}.heads"
        lane.tensors[part] = replace(t, name=part, shape=(t.shape[0], len(own[0])), view=(base, start + own[0].start))
        op = op.rename({name: part})
    return op, left
