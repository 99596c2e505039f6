"""The sharding rule of the op Rope: a rank rotates only its own heads if the input is split by heads."""

from __future__ import annotations

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.ops import Rope


@sharding_rule(Rope)
def rope(lane: Lane, op: Rope) -> None:
    """Append a Rope op (rotary position embedding) to one rank's Program. Returns nothing.

    If the input op.x is divided among the ranks by heads, the rank rotates only its own heads. Otherwise it rotates all
    heads.
    """
    shares = lane.shares.get(op.x)
    return lane.add_split(op, shares) if shares else lane.add_whole(op)
