"""The sharding rule of rotary positions."""

from __future__ import annotations

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.ops import Rope


@sharding_rule(Rope)
def rope(lane: Lane, op: Rope) -> None:
    """Append rope to one rank's Program: for the rank's heads if x is split by heads, else for all. Returns nothing."""
    shares = lane.shares.get(op.x)
    return lane.add_split(op, shares) if shares else lane.add_whole(op)
