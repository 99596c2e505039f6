"""Collectives over the links of one network: how long they take, by protocol as vendors' libraries have them.

Time alone; schedules that move values are another room's. Bytes are the whole tensor's, as collective tests count them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from intaglio.chips import ChipError, ChipSpec
from intaglio.silicon.timing import Timing

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


@dataclass(frozen=True)
class Shape:
    """What a collective of n chips does, as shares of the tensor: bytes each chip sends, bytes it reads and writes in
    its own memory, and steps that follow each other."""

    wire: float
    local: float
    steps: int


def shape(op: str, n: int, topology: str) -> Shape:
    """Rings on a switched network, where each step waits for the one before. On k44 the two-step schedules: all to the
    opposite side, then on to the own side, at the bound of (n - 1) / n; an all-to-all relays three of seven."""
    ring = topology != "k44"
    part = (n - 1) / n
    if op == "all_reduce":
        return Shape(2 * part, 3.0, 2 * (n - 1) if ring else 4)
    if op in ("all_gather", "reduce_scatter"):
        return Shape(part, 2.0, n - 1 if ring else 2)
    if op == "all_to_all":
        return Shape(part if ring else 1.25, 2.0, n - 1 if ring else 2)
    if op == "send":
        return Shape(1.0, 2.0, 1)
    raise ChipError(f"no collective called {op!r}; there are {', '.join(OPS)}")


@dataclass(frozen=True)
class Protocol:
    """How a library moves data: starts of `meets`, steps of `hops`, bytes at `share` of what the links could carry, and
    the largest piece of one chip it is used for (0: any)."""

    name: str
    meets: float
    hops: float
    share: float
    piece: int = 0


# NCCL's three. LL: data and flag in one store, by one channel's threads. LL128: a flag each 128 bytes, about half
# of the copies that would fill the links in flight. Simple: whole buffers, fences between.
LIBRARY = (
    Protocol("LL", 1.0, 1.0, 0.5, 2048),
    Protocol("LL128", 1.1, 1.45, 0.55),
    Protocol("Simple", 4.5, 3.5, 1.0),
)
STATIC = (Protocol("static", 1.0, 1.0, 1.0),)  # a schedule known ahead: no flags, no choice
SWITCH_REDUCES = 8  # chips from which a switch adds on the way: every byte goes up once and comes down once


def links_used(spec: ChipSpec, chips: int) -> int:
    """Links of a chip that lead to others of its group: all on a switch, those to the group's opposite half on k44, two
    in each dimension the group spans on a torus."""
    if spec.links.topology == "k44":
        return max(1, chips // 2)
    if spec.links.topology == "torus":
        return min(spec.links.count, 2 if chips < 9 else 4)
    return spec.links.count


@lru_cache(maxsize=65536)
def collective_timing(spec: ChipSpec, op: str, chips: int, moved: int) -> Timing:
    """One collective of a tensor of `moved` bytes over `chips` chips. Raises ChipError for more chips than a network
    joins."""
    if chips > spec.links.most:
        raise ChipError(f"{op} over {chips} chips: one network of {spec.name} joins {spec.links.most}")
    if chips < 2 and op != "send":
        return Timing(0.0)
    c, what = spec.constants, shape(op, chips, spec.links.topology)
    wire = what.wire
    if op == "all_reduce" and spec.switch_adds and chips >= SWITCH_REDUCES:
        wire = 1 + 2 / chips
    rate = links_used(spec, chips) * spec.links.bytes_per_s
    full = moved * wire / rate + (0.0 if spec.prefetch else moved * what.local / spec.hbm_rate)
    best = None
    for p in STATIC if spec.prefetch else LIBRARY:
        if p.piece and moved / chips > p.piece:
            continue
        seconds = c.meet_s * p.meets + what.steps * c.hop_s * p.hops + full / p.share
        if best is None or seconds < best[0]:
            best = seconds, p.name
    assert best is not None
    busy = {"NET": moved * wire / rate}
    return Timing(best[0], busy, 0.0, 0.0, moved * wire, why=f"{best[1]}, {what.steps} steps", steps=what.steps)
