"""The sharding rules of embed, permute and concat, of residual streams, and of ops that every lane runs whole."""

from __future__ import annotations

from dataclasses import replace

from intaglio.compiler.layout import LayoutError
from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.compiler.shard.shares import Share, parts_within
from intaglio.ops import AllToAll, Concat, Embed, MixStreams, Op, Permute, Route, Sample, Select, Sinkhorn, Sinusoid


@sharding_rule(Route, Sample, Select, Sinusoid)
def whole(lane: Lane, op: Op) -> None:
    """Append an op to one rank's Program so that every rank computes all of it. Returns nothing.

    Operands that are divided among the ranks are gathered first.
    """
    lane.add_whole(op)


@sharding_rule(Embed)
def embed(lane: Lane, op: Embed) -> None:
    """Append to a rank's Program an Embed op for the rank's columns of the table, and an all_gather of all columns.

    The all_gather moves half the bytes of the all_reduce that a table divided by vocabulary would need. With sequence
    parallelism an all_to_all is appended instead, which gives each rank all columns of its own token rows; it moves 1 /
    tp of the all_gather's bytes. If lane.parts has the op, the table is quantised in parts, see embed_in_parts().
    Returns nothing.
    """
    if op.site in lane.parts:
        return embed_in_parts(lane, op, lane.parts[op.site])
    shares = lane.plan[op.out]
    if lane.tears(op.w, shares):
        lane.divided[op.site] = shares
    own = replace(op, w=lane.own(op, op.w, shares, axis=1))
    if not lane.layout.sp or lane.p.tensors[op.out].role != "temp":
        return lane.add_gathered(own, shares)
    lane.add(replace(own, out=f"{op.out}.part"), shares)
    group, width = tuple(range(lane.layout.lanes)), int(lane.p.tensors[op.out].shape[1])
    site, x = f"{op.site}.all_to_all", f"{op.out}.part"
    return lane.add(AllToAll(site=site, x=x, out=op.out, group=group, share=lane.lane, width=width, wire=lane.wire))


def embed_in_parts(lane: Lane, op: Embed, parts: list[Share]) -> None:
    """Append an Embed op for each of the rank's parts of the table, and join their columns. Returns nothing.

    The columns of the rank's parts are joined by Concat ops. If the table is divided among ranks, an all_gather
    follows. parts: the columns of each part of the table, which are quantised separately. Raises LayoutError if the
    rank's columns are not whole parts.
    """
    shares, width = lane.plan.get(op.out), int(lane.p.tensors[op.out].shape[1])
    held = shares[lane.lane] if shares else (range(width),)
    own = parts_within(parts, held)
    if not own:
        raise LayoutError(f"{op.site}: columns {held} are not whole parts of tp{lane.layout.sums}")
    joined = ""
    for i in own:
        w = lane.keep(op.w, parts, 1, f"{op.site}.{op.w.rpartition('.')[2]}.part{i}", i)
        name = f"{op.out}.part{i}"
        lane.add(replace(op, site=f"{op.site}.part{i}", w=w, out=name))
        if joined:
            last = i == own[-1]
            name = (f"{op.out}.own" if shares else op.out) if last else f"{op.out}.joined{i}"
            lane.add(Concat(site=op.site if last else f"{op.site}.join{i}", a=joined, b=f"{op.out}.part{i}", out=name))
        joined = name
    if shares:
        lane.gather(f"{op.site}.all_gather", joined, op.out, shares, width)


@sharding_rule(Permute)
def permute(lane: Lane, op: Permute) -> None:
    """Append a Permute op, which puts columns in another order, to one rank's Program. Returns nothing.

    If the input op.x is divided by token rows, the op runs on the rank's rows. Otherwise it runs on all of op.x: a
    rank's columns alone would not be enough, since columns move between ranks.
    """
    if not lane.has_token_rows(op):
        return lane.add_whole(op)
    lane.keep(op.order)
    return lane.add(op)


@sharding_rule(Concat, MixStreams, Sinkhorn)
def by_token_rows(lane: Lane, op: Op) -> None:
    """Append an op that joins columns or mixes residual streams to one rank's Program. Returns nothing.

    If all operands are divided by token rows, the op runs on the rank's rows. Otherwise the rank computes the whole
    result.
    """
    return lane.add(op) if lane.has_token_rows(op) else lane.add_whole(op)
