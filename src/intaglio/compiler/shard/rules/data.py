"""The sharding rules of embed, permute and select, and of the ops that every lane runs whole."""

from __future__ import annotations

from dataclasses import replace

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.ops import AllToAll, Embed, Op, Permute, Route, Sample, Select, Sinusoid


@sharding_rule(Route, Sample, Select, Sinusoid)
def whole(lane: Lane, op: Op) -> None:
    """Append an op to the lane's Program on whole operands, so that every lane computes all of it."""
    lane.add_whole(op)


@sharding_rule(Embed)
def embed(lane: Lane, op: Embed) -> None:
    """Append embed to the lane's Program: for this lane's columns of the table, with an all_gather after it.

    The all_gather moves half the bytes of the all_reduce that a table split by vocabulary would need. With sequence
    parallelism an all_to_all takes its place, and gives each lane all columns of its own rows: 1 / tp of the bytes.
    """
    shares = lane.plan[op.out]
    own = replace(op, w=lane.own(op, op.w, shares, axis=1))
    if not lane.layout.sp or lane.p.tensors[op.out].role != "temp":
        return lane.add_gathered(own, shares)
    lane.add(replace(own, out=f"{op.out}.part"), shares)
    group, width = tuple(range(lane.layout.lanes)), int(lane.p.tensors[op.out].shape[1])
    site, x = f"{op.site}.all_to_all", f"{op.out}.part"
    return lane.add(AllToAll(site=site, x=x, out=op.out, group=group, share=lane.lane, width=width, wire=lane.wire))


@sharding_rule(Permute)
def permute(lane: Lane, op: Permute) -> None:
    """Append permute to the lane's Program: on this lane's token rows if x is split by rows, else on the whole x.

    A share of the columns is not enough, since permute moves columns between shares.
    """
    if not lane.has_token_rows(op):
        return lane.add_whole(op)
    lane.keep(op.order)
    return lane.add(op)
