"""The sharding rules of hyper-connections: residual streams are whole on every lane, or divided by token rows."""

from __future__ import annotations

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.ops import MixStreams, Op, Sinkhorn


@sharding_rule(MixStreams, Sinkhorn)
def streams(lane: Lane, op: Op) -> None:
    """Append an op of residual streams to one rank's Program. Returns nothing.

    If all operands are split between ranks by token rows, the op runs on the rank's rows. Otherwise it runs on the
    whole operands.
    """
    return lane.add(op) if lane.has_token_rows(op) else lane.add_whole(op)
