"""The sharding rules of attention and of the K/V cache (split by heads), and of choose_keys (whole on every rank)."""

from __future__ import annotations

from dataclasses import replace

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.compiler.shard.shares import heads_of, scaled, width_of
from intaglio.ops import Attend, ChooseKeys, KvWrite


@sharding_rule(KvWrite)
def kv_write(lane: Lane, op: KvWrite) -> None:
    """Append a KvWrite op, which writes keys and values to K/V caches, to one rank's Program. Returns nothing.

    If the op's K/V caches are divided among the ranks, the rank writes only its own heads. If a cache is not divided,
    the rank writes all heads.
    """
    names = {x: x if c in lane.plan else lane.whole(x) for x, c in ((op.k, op.k_cache), (op.v, op.v_cache))}
    scales = {}
    for field, c in (("k_scale", op.k_cache), ("v_scale", op.v_cache)):
        if scale := getattr(op, field):
            scales[field] = lane.own(op, scale, lane.plan[c], axis=0) if c in lane.plan else lane.whole(scale)
    lane.add(replace(op.rename(names), **scales))


@sharding_rule(Attend)
def attend(lane: Lane, op: Attend) -> None:
    """Append an Attend op (attention over a K/V cache) to one rank's Program. Returns nothing.

    If the queries (op.q) are divided among the ranks by heads, the rank computes only its own heads. Otherwise it
    computes all heads.
    """
    shares, whole = lane.shares.get(op.q), lane.p.tensors
    if not shares:
        return lane.add_whole(op)
    head_dim, v_dim = int(whole[op.q].shape[1]) // op.heads, int(whole[op.out].shape[1]) // op.heads
    heads = [heads_of(share, head_dim) for share in shares]
    sinks = lane.own(op, op.sinks, heads, axis=0) if op.sinks else None
    slopes = lane.own(op, op.slopes, heads, axis=0) if op.slopes else None
    kept = lane.plan.get(op.k_cache)  # this lane's heads of the caches; none: all
    k, v = (lane.own(op, s, kept, axis=0) if kept and s else s for s in (op.k_scale, op.v_scale))
    chosen = lane.whole(op.chosen) if op.chosen else None  # all heads attend to the same positions
    part = replace(
        op, chosen=chosen, heads=width_of(heads[lane.lane]), sinks=sinks, slopes=slopes, k_scale=k, v_scale=v
    )
    return lane.add_split(part, scaled(heads, v_dim))


@sharding_rule(ChooseKeys)
def choose_keys(lane: Lane, op: ChooseKeys) -> None:
    """Append a ChooseKeys op, which picks the keys for sparse attention, to one rank's Program. Returns nothing.

    The op is not divided: every rank runs it with all heads and the whole cache of keys.
    """
    lane.add_whole(op)
