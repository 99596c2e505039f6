"""The sharding rule of elementwise ops."""

from __future__ import annotations

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.ops import Map, Op


@sharding_rule(Map)
def elementwise(lane: Lane, op: Op) -> None:
    """Append an elementwise op to one rank's Program: on the rank's token rows, on its columns, or on whole operands.

    - On token rows if all operands are split by token rows.
    - On columns if all operands of more than one column are split alike. A result that has views (ranges of its columns
      that ops read) must also be in the plan of results to be split.
    - Otherwise on whole operands.

    Returns nothing.
    """
    if lane.has_token_rows(op):
        return lane.add(op)
    out = op.outputs[0]
    wide = [name for name in op.inputs if lane.p.tensors[name].shape[1:] != (1,) or name == op.inputs[0]]
    shares = [lane.shares.get(name) for name in wide]
    if shares[0] and all(s == shares[0] for s in shares) and (out not in lane.views or out in lane.plan):
        return lane.add_split(op, shares[0])
    return lane.add_whole(op)
