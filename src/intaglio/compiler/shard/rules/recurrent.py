"""The sharding rule of ops with recurrent state: every lane runs the whole op, with the whole state.

Their projections are whole on every lane too, so tensor parallelism splits neither their work nor their state.
"""

from __future__ import annotations

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.ops import Decay, LinearAttention, Op, RgLru, SelectiveScan, ShortConv


@sharding_rule(Decay, LinearAttention, RgLru, SelectiveScan, ShortConv)
def recurrent(lane: Lane, op: Op) -> None:
    """Append the whole op to the lane's Program, with whole operands and the whole state."""
    lane.add_whole(op)
