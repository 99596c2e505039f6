"""The sharding rule of experts."""

from __future__ import annotations

from dataclasses import replace

from intaglio.compiler.layout import LayoutError
from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.compiler.shard.shares import cut, cut_columns
from intaglio.ops import Experts


@sharding_rule(Experts)
def experts(lane: Lane, op: Experts) -> None:
    """Append experts to the lane's Program: this lane's share of the experts, and an all_reduce of the partial sums.

    Experts are divided among the ep groups of lanes, and the intermediate columns of each among tp lanes. Raises
    LayoutError if there are too few for the layout, or if tp would split the column order of a down matrix.
    """
    layout, at = lane.layout, divmod(lane.lane, lane.layout.tp)
    count, inner, _ = map(int, lane.p.tensors[op.gate].shape)
    if count < layout.ep or inner < layout.tp:
        raise LayoutError(f"{op.site} has {count} experts of {inner} columns, too few for layout {layout}")
    if op.down_order and layout.tp > 1:
        raise LayoutError(
            f"{op.site}: the down matrix of each expert has its own column order, which tp={layout.tp} would split; "
            "divide whole experts instead, with ep"
        )
    own, parts = cut(count, layout.ep, ())[at[0]], cut_columns(lane.p.tensors[op.down], layout.tp)
    stacks = {op.gate: 1, op.up: 1, op.down: 2, op.gate_bias: 1, op.up_bias: 1}
    for name, axis in stacks.items():
        if name:
            lane.slab(name, own, parts, at[1], axis)
    for name in (op.order, op.down_order):
        if name:
            lane.slab(name, own)
    if op.down_bias and at[1] == 0:  # it is added once for each expert
        lane.slab(op.down_bias, own)
    share = replace(
        op,
        x=lane.whole(op.x),
        weights=lane.whole(op.weights),
        ids=lane.whole(op.ids),
        down_bias=op.down_bias if at[1] == 0 else None,
        residual=lane.whole(op.residual) if op.residual and lane.lane == 0 else None,
        out=f"{op.out}.part",
        first=own[0].start,
        of=count,
    )
    lane.add(share)
    lane.total(op.site, share.out, op.out, tuple(range(layout.lanes)))
