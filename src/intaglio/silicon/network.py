"""Collectives over the links of one network: how long they take, read off the schedules of the room `collectives`.

What a chip or a vendor's library adds to a schedule (starts, shares of the links, copies) is said here; steps and their
contention for links are the schedule's. Bytes are the whole tensor's, as collective tests count them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import floor, inf, log2

from intaglio import collectives
from intaglio.chips import ChipError, ChipSpec
from intaglio.collectives import Topology
from intaglio.collectives.clock import chunk_bytes
from intaglio.silicon.timing import Timing

OPS = collectives.COLLECTIVES


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
    Protocol("LL128", 1.15, 1.05, 0.5),
    Protocol("Simple", 4.5, 3.4, 1.0),
)
STATIC = (Protocol("static", 1.0, 1.0, 1.0),)  # a schedule known ahead: no flags, no choice
SUMMED = 3.0  # bytes moved for each byte of a sum: two read, one written
SWITCH_REDUCES = 8  # chips from which a switch adds on the way: every byte goes up once and comes down once
STRAIGHT = ("all_to_all", "send")  # from chip to chip, not by rings
READ = 16  # ranks up to which schedules are read; above, see `seconds_of`
OCTAVE = 8  # sizes an octave at which they are
SOON = 1e-12  # seconds of latency at least: bytes are counted in what a link carries meanwhile


@dataclass(frozen=True)
class Net:
    """A group's network for reading schedules: its kind and number of ranks; a chip's local bytes/s over a link's."""

    kind: str
    ranks: int
    local: float

    def topology(self, ranks: int) -> Topology:
        """So many ranks, links of one byte a second and one second of latency. On a torus rings are laid both ways, in
        both dimensions from nine chips on, each with its share: one ring, whose link stands for all of them."""
        make = {"k44": collectives.bipartite, "switch": collectives.switch, "torus": collectives.ring}[self.kind]
        return make(ranks, 1.0, 1.0)


def links_used(spec: ChipSpec, op: str, chips: int) -> int:
    """Links of a chip that stand as one where its schedules run: all on a switch; one on k44, where each leads to
    another chip; on a torus two in each dimension a group spans, or one where both ways round are taken, not rings
    laid."""
    if spec.links.topology == "k44":
        return 1
    if spec.links.topology == "torus":
        return min(spec.links.count, 2 if chips < 9 else 4) // (2 if op in STRAIGHT else 1)
    return spec.links.count


def menu(spec: ChipSpec, op: str, chips: int) -> list[str]:
    """The algorithms that are weighed: rings, and all_to_all straight from chip to chip, by a library, on a torus and
    in large groups; else all that fit, of which the two-step ones are for two sides."""
    found = collectives.algorithms(op, chips)
    if not spec.prefetch or spec.links.topology == "torus" or chips > READ:
        return [name for name in found if name == ("direct" if op in STRAIGHT else "ring")]
    return [name for name in found if spec.links.topology == "k44" or name != "two_step"]


def written(net: Net, op: str) -> int:
    """Ranks of the schedule that is read: at most READ, but where the load of links grows with the square of them."""
    return net.ranks if net.kind == "torus" and op == "all_to_all" else min(net.ranks, READ)


@lru_cache(maxsize=65536)
def read(net: Net, ranks: int, op: str, algorithm: str, place: int | None) -> float:
    """Seconds of a schedule on links of one byte a second and a latency of one second, with 2 ** (place / OCTAVE) bytes
    a chunk; None: no bytes, which leaves its latencies."""
    s = collectives.schedule(op, algorithm, ranks)
    chunk = 0.0 if place is None else 2.0 ** (place / OCTAVE)
    return collectives.seconds(s, net.topology(ranks), [chunk] * s.chunks, net.local)


def _near(net: Net, ranks: int, op: str, algorithm: str, chunk: float) -> float:
    """The same for any bytes a chunk: on a line between two sizes that are read, which are 9 % apart. Times are lines
    with a few bends, so that is off by 0.2 %, or up to 15 % where another transfer comes first at a link."""
    place = floor(log2(chunk) * OCTAVE) if chunk > 2.0**-OCTAVE else None
    low = 0.0 if place is None else 2.0 ** (place / OCTAVE)
    above = -OCTAVE * OCTAVE if place is None else place + 1
    high = 2.0 ** (above / OCTAVE)
    a, b = read(net, ranks, op, algorithm, place), read(net, ranks, op, algorithm, above)
    return a + (b - a) * (chunk - low) / (high - low)


def piece(net: Net, op: str, algorithm: str) -> float:
    """A chunk as a share of the tensor."""
    few = written(net, op)
    return chunk_bytes(collectives.schedule(op, algorithm, few), 1.0)[0] * few / net.ranks


def seconds_of(net: Net, op: str, algorithm: str, link: float, latency: float, moved: float) -> float:
    """Seconds of a schedule over links of `link` bytes/s and `latency` seconds.

    What is read depends on the chunk over what a link carries in a latency, so one reading serves all speeds. Schedules
    of more than READ ranks are not written out: at chunks of one size a ring, and all_to_all on a switch, take equally
    longer with each rank more (a test holds that), so two readings say how long.
    """
    latency = max(latency, SOON)
    chunk = moved * piece(net, op, algorithm) / link / latency
    if written(net, op) == net.ranks:
        return latency * _near(net, net.ranks, op, algorithm, chunk)
    half, whole = (_near(net, n, op, algorithm, chunk) for n in (READ // 2, READ))
    return latency * (whole + (whole - half) * (net.ranks - READ) / (READ - READ // 2))


@lru_cache(maxsize=4096)
def traffic(net: Net, op: str, algorithm: str) -> float:
    """Bytes that leave a chip, of its own and handed on, as a share of the tensor, on average over chips."""
    ranks = written(net, op)
    s, topology = collectives.schedule(op, algorithm, ranks), net.topology(ranks)
    hops = sum(link.src < ranks for i in s.steps if i.kind == "send" for link in topology.route(i.rank, i.peer))
    givers = 1 if op == "send" else ranks
    return hops * piece(net, op, algorithm) / givers * (net.ranks - 1) / (ranks - 1)  # so many to each rank


@lru_cache(maxsize=65536)
def collective_timing(spec: ChipSpec, op: str, chips: int, moved: int) -> Timing:
    """One collective of a tensor of `moved` bytes over `chips` chips, by the quickest schedule and protocol. Raises
    ChipError for more chips than a network joins."""
    if op not in OPS:
        raise ChipError(f"no collective called {op!r}; there are {', '.join(OPS)}")
    if chips > spec.links.most:
        raise ChipError(f"{op} over {chips} chips: one network of {spec.name} joins {spec.links.most}")
    if chips < 2:
        return Timing(0.0)
    c = spec.constants
    wire = links_used(spec, op, chips) * spec.links.bytes_per_s
    best: tuple[float, str, str, Net] | None = None
    for p in STATIC if spec.prefetch else LIBRARY:
        if p.piece and moved / chips > p.piece:
            continue
        link = wire * (added(chips) if op == "all_reduce" and spec.switch_adds else 1.0)
        link *= p.share
        net = Net(spec.links.topology, chips, spec.shared_rate / SUMMED / link if spec.prefetch else inf)
        peers = chips - 2 if op == "all_to_all" and not spec.prefetch else 0
        for algorithm in menu(spec, op, chips):
            start = c.meet_s * p.meets + c.hop_s * p.hops * peers
            if not spec.prefetch:
                start += moved * touched(op, algorithm, chips) / spec.hbm_rate / p.share
            seconds = start + seconds_of(net, op, algorithm, link, c.hop_s * p.hops, moved)
            if best is None or seconds < best[0]:
                best = seconds, p.name, algorithm, net
    assert best is not None
    seconds, protocol, algorithm, net = best
    sent = moved * traffic(net, op, algorithm)
    steps = round(seconds_of(net, op, algorithm, 1.0, 1.0, 0.0))
    why = f"{algorithm}, {protocol}, {steps} steps"
    return Timing(seconds, {"NET": sent / used_rate(spec, chips)}, 0.0, 0.0, sent, why=why, steps=steps)


@lru_cache(maxsize=4096)
def touched(op: str, algorithm: str, ranks: int) -> float:
    """Bytes of what it brings and gets that a chip's steps read and write, as a share of the tensor: a library's
    kernels move these between memory and links one after the other; what is on its way stays in its buffers."""
    s = collectives.schedule(op, algorithm, min(ranks, READ))
    slots = [slot for step in s.steps for slot in (*step.reads(), step.dst) if slot and slot.buffer != "tmp"]
    return len(slots) * chunk_bytes(s, 1.0)[0] / s.ranks


def added(chips: int) -> float:
    """What a switch that sums saves: a byte goes up once and comes down once, not 2 (P - 1) / P times round a ring."""
    return 2 * (chips - 1) / chips / (1 + 2 / chips) if chips >= SWITCH_REDUCES else 1.0


def used_rate(spec: ChipSpec, chips: int) -> float:
    """Bytes/s of the links of a chip that lead into its group."""
    count = max(1, chips // 2) if spec.links.topology == "k44" else links_used(spec, "all_reduce", chips)
    return count * spec.links.bytes_per_s
