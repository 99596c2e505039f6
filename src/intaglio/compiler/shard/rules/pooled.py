"""The sharding rules of compressed attention: attend_pooled is split by heads, entries are pooled on every lane."""

from __future__ import annotations

from dataclasses import replace

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.compiler.shard.shares import heads_of, width_of
from intaglio.ops import AttendPooled, PoolKeys


@sharding_rule(PoolKeys)
def pool_keys(lane: Lane, op: PoolKeys) -> None:
    """Append a PoolKeys op, which writes pooled entries to a cache, to one rank's Program. Returns nothing.

    The op is not divided: every rank has all entries of the cache.
    """
    lane.add_whole(op)


@sharding_rule(AttendPooled)
def attend_pooled(lane: Lane, op: AttendPooled) -> None:
    """Append an AttendPooled op (attention over a window of keys and over pooled entries) to one rank's Program.

    If the queries (op.q) are divided among the ranks by heads, the rank computes only its own heads. Otherwise it
    computes all heads. Returns nothing.
    """
    shares = lane.shares.get(op.q)
    if not shares:
        return lane.add_whole(op)
    heads = [heads_of(share, int(lane.p.tensors[op.q].shape[1]) // op.heads) for share in shares]
    sinks = lane.own(op, op.sinks, heads, axis=0) if op.sinks else None
    chosen = lane.whole(op.chosen) if op.chosen else None  # all heads attend to the same entries
    part = replace(op, chosen=chosen, sinks=sinks, heads=width_of(heads[lane.lane]))
    return lane.add_split(part, shares)
