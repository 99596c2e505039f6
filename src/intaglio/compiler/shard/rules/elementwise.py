"""The sharding rule of elementwise ops."""

from __future__ import annotations

from dataclasses import replace

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.compiler.shard.shares import Share, heads_of, keeps_whole
from intaglio.ops import Map, Op


@sharding_rule(Map)
def elementwise(lane: Lane, op: Op) -> None:
    """Append an elementwise op to one rank's Program: on the rank's token rows, on its columns, or on whole operands.

    - On token rows if all operands are split by token rows.
    - On columns if all operands of more than one column are split alike. If ops read views (column ranges) of the
      result, lane.plan must also list the result as one to split. An operand with one column per head may be whole: the
      rank then reads the columns of its heads from it.
    - Otherwise on whole operands.

    Returns nothing.
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
    """The op with views in place of whole operands that have a column per head, and the operands left in `wide`.

    A view has the columns of the rank's own heads. An operand stays in `wide` if it has as many columns as the result,
    or if the rank's columns are no whole heads.

    Args:
        lane: the rank's Program, to which the views are added.
        op: an elementwise op.
        wide: its operands of more than one column.
        shares: the columns of the first operand that each rank holds; None: it is whole, and nothing changes.
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
