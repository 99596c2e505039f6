"""The sharding rules of ops with recurrent state: split by heads or channels where the plan splits their state.

Where it does not, every lane runs the whole op, with the whole state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.compiler.shard.shares import heads_of, keeps_whole, scaled, width_of
from intaglio.ops import Decay, LinearAttention, RgLru, SelectiveScan, ShortConv


@sharding_rule(ShortConv)
def short_conv(lane: Lane, op: ShortConv) -> None:
    """Append a ShortConv op (short causal convolution) to one rank's Program. Returns nothing.

    If the input op.x and the op's state are divided among the ranks by the same channels, the rank computes only its
    own channels. Otherwise it computes all channels.
    """
    shares = lane.shares.get(op.x)
    if not shares or shares != lane.plan.get(op.state):
        lane.keep(op.state)
        return lane.add_whole(op)
    lane.keep(op.state, shares, axis=2)
    bias = lane.own(op, op.bias, shares, axis=0) if op.bias else None
    return lane.add_split(replace(op, w=lane.own(op, op.w, shares, axis=0), bias=bias), shares)


@sharding_rule(Decay)
def decay(lane: Lane, op: Decay) -> None:
    """Append a Decay op (step sizes and log decays of a recurrence) to one rank's Program. Returns nothing.

    If the input op.x is divided among the ranks at head boundaries, the rank computes only its own columns. Otherwise
    it computes all columns.
    """
    shares, columns = lane.shares.get(op.x), int(lane.p.tensors[op.x].shape[1])
    each = columns // int(lane.p.tensors[op.rate].shape[0])
    if not shares or not keeps_whole(shares, each):
        return lane.add_whole(op)
    rate = lane.own(op, op.rate, [heads_of(share, each) for share in shares], axis=0)
    bias = lane.own(op, op.bias, shares, axis=0) if op.bias else None
    return lane.add(replace(op, rate=rate, bias=bias), shares)


@sharding_rule(LinearAttention)
def linear_attention(lane: Lane, op: LinearAttention) -> None:
    """Append a LinearAttention op to one rank's Program. Returns nothing.

    If lane.plan divides the op's state by heads, the rank computes only its own heads. Otherwise it computes all heads.
    """
    heads = lane.plan.get(op.state)
    lane.keep(op.state, heads, axis=1)
    if not heads:
        return lane.add_whole(op)
    rates, skip = (lane.own(op, name, heads, axis=0) if name else None for name in (op.rates, op.skip))
    values = int(lane.p.tensors[op.state].shape[3])
    part = replace(op, heads=width_of(heads[lane.lane]), rates=rates, skip=skip)
    return lane.add_split(part, scaled(heads, values))


@sharding_rule(SelectiveScan)
def selective_scan(lane: Lane, op: SelectiveScan) -> None:
    """Append a SelectiveScan op (the recurrence of Mamba) to one rank's Program. Returns nothing.

    If lane.plan divides the op's state by channels, the rank computes only its own channels. Otherwise it computes all
    channels.
    """
    add_channels(lane, op, whole=(op.b, op.c))


@sharding_rule(RgLru)
def rg_lru(lane: Lane, op: RgLru) -> None:
    """Append an RgLru op (real-gated linear recurrent unit) to one rank's Program. Returns nothing.

    If lane.plan divides the op's state by channels, the rank computes only its own channels. Otherwise it computes all
    channels.
    """
    add_channels(lane, op)


def add_channels(lane: Lane, op: SelectiveScan | RgLru, whole: Sequence[str] = ()) -> None:
    """Append a recurrent op whose state is kept per channel to one rank's Program. Returns nothing.

    If lane.plan divides the op's state by channels, the rank computes only its own channels. Otherwise it computes all
    channels. whole: names of the op's inputs that each channel needs whole; these are gathered.
    """
    shares = lane.plan.get(op.state)
    lane.keep(op.state, shares, axis=1)
    if not shares:
        return lane.add_whole(op)
    names = {name: lane.own(op, name, shares, axis=0) for name in op.operands("vector")}
    names |= {name: lane.whole(name) for name in whole}
    return lane.add_split(op.rename(names), shares)
