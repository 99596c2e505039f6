"""The sharding rules of ops with recurrent state.

A short convolution is split by channels if its operand is. Of the other ops every lane runs the whole op, with the
whole state. Their projections are whole on every lane too, so tensor parallelism splits neither their work nor their
state.
"""

from __future__ import annotations

from dataclasses import replace

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.ops import Decay, LinearAttention, Op, RgLru, SelectiveScan, ShortConv


@sharding_rule(ShortConv)
def short_conv(lane: Lane, op: ShortConv) -> None:
    """Append short_conv to the lane's Program, for this lane's channels if x is split, else for all of them."""
    shares = lane.shares.get(op.x)
    if not shares or shares != lane.plan.get(op.state):
        lane.keep(op.state)
        return lane.add_whole(op)
    bias = lane.own(op, op.bias, shares, axis=0) if op.bias else None
    return lane.add_split(replace(op, w=lane.own(op, op.w, shares, axis=0), bias=bias), shares)


@sharding_rule(Decay, LinearAttention, RgLru, SelectiveScan)
def recurrent(lane: Lane, op: Op) -> None:
    """Append the whole op to the lane's Program, with whole operands and the whole state."""
    lane.add_whole(op)
