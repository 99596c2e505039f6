"""Chip kernels of the collectives and of send/recv: timing over one network, and streams for all chips of a group.

Times are those of the schedules of intaglio.collectives, with their steps and contention for links, plus what the chip
or its library adds: start-up, link efficiency, copies through HBM. Bytes are of the whole tensor, as in nccl-tests.
Long because it holds both the time model of collectives and their streams.

Streams sum in order of rank, so that results equal the op's bit for bit. run_collective() runs those of all chips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import floor, inf, log2
from typing import ClassVar

import numpy as np

from intaglio import collectives, formats
from intaglio.batch import shared_rows
from intaglio.chips import ChipError, ChipSpec, Target
from intaglio.collectives import Schedule, Slot, Step, Topology
from intaglio.collectives.clock import ScheduleClock, chunk_bytes
from intaglio.ops import AllGather, AllReduce, AllToAll, Grouped, Recv, ReduceScatter, Send
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, slices
from intaglio.silicon.kernels.kernel import ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.nodes import nodes_timing
from intaglio.silicon.machine import Machine, RunResult
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Ring, Stream, StreamBuilder
from intaglio.silicon.timing import Timing

OPS = collectives.COLLECTIVES
BYTES_PER_SUMMED_BYTE = 3.0  # memory traffic of a reduction: two bytes read, one written
DIRECT = ("all_to_all", "send")  # collectives that do not run as rings
MAX_SIMULATED_RANKS = 16  # schedules of more ranks are extrapolated, see schedule_seconds()
SIZES_PER_OCTAVE = 8  # chunk sizes at which schedules are simulated; between them times are interpolated
MIN_LATENCY_S = 1e-12  # chunk sizes are measured in bytes that a link carries in one latency, so that must not be 0
ROWS, COLS = 16, 256  # of a tile, at most
SECOND_SHOT = 0.5  # start-up of the second step of an engine's two-shot all_reduce, over that of the first
SUM = (("operand", "a"), ("operand", "b"), ("binary", "+"))


@chip_kernel(AllReduce, AllGather, ReduceScatter, AllToAll)
@dataclass(frozen=True)
class CollectiveKernel(ChipKernel):
    """Chip kernel that models the time of a collective over `ranks` chips.

    It has no instruction streams of its own: run_collective() executes a collective on all chips of a group together.
    """

    by_sequence: ClassVar[bool] = False
    kind: str
    rows: int | str  # of the whole tensor
    width: int  # of the whole tensor
    bits: int  # a value on the links
    ranks: int

    @classmethod
    def of(cls, op: Grouped, t: Tensors) -> CollectiveKernel:
        whole = op.inputs[0] if isinstance(op, AllReduce | ReduceScatter | AllToAll) else op.outputs[0]
        rows, width = t[whole].shape
        return cls(op.kind, rows, int(width), formats.bits(op.wire), len(op.group))

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        moved = sizes.rows_of(self.rows) * self.width * self.bits // 8
        return collective_timing(target, self.kind, self.ranks, moved)

    @classmethod
    def unsupported(cls, op: Grouped, t: Tensors) -> str | None:
        return f"op {op.kind} at {op.site}: a collective runs on all chips of its group together, see run_collective()"


@chip_kernel(Send)
@dataclass(frozen=True)
class SendKernel(CollectiveKernel):
    """Chip kernel of `send`: a message [rows, width] between two chips. It is timed like a collective of two ranks."""

    @classmethod
    def of(cls, op: Send, t: Tensors) -> SendKernel:  # type: ignore[override]
        rows, width = t[op.x].shape
        return cls(op.kind, rows, int(width), formats.bits(op.wire), 2)

    @classmethod
    def unsupported(cls, op: Send | Recv, t: Tensors) -> str | None:  # type: ignore[override]
        return f"op {op.kind} at {op.site}: a message runs on two chips together, see run_collective()"


@chip_kernel(Recv)
@dataclass(frozen=True)
class RecvKernel(ChipKernel):
    """Chip kernel of `recv`. Its time is 0 seconds, because the time of a message is counted at the sender."""

    @classmethod
    def of(cls, op: Recv, t: Tensors) -> RecvKernel:
        return cls()

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        return Timing(0.0)

    @classmethod
    def unsupported(cls, op: Recv, t: Tensors) -> str | None:
        return SendKernel.unsupported(op, t)


@dataclass(frozen=True)
class Network:
    """Description of the links of a group of chips, in the normalised units of simulations.

    In these units every link has a bandwidth of 1 byte/s and a latency of 1 s.
    """

    kind: str  # topology of the chip's links
    ranks: int
    local: float  # bandwidth of a chip's local copies and sums, over that of a link

    def topology(self, ranks: int) -> Topology:
        """Returns a Topology of `ranks` ranks, whose links have a bandwidth of 1 byte/s and a latency of 1 s.

        On a torus, the Topology is a single ring. A real collective runs on several rings at once: one in each
        direction and, from nine chips on, in both dimensions. Each link of the single ring stands for the links of all
        these rings; links_used() counts them.
        """
        make = {
            "k44": collectives.bipartite,
            "mesh": collectives.full,
            "switch": collectives.switch,
            "torus": collectives.ring,
            "pcie_tree": collectives.switch,
        }[self.kind]
        return make(ranks, 1.0, 1.0)


def links_used(chip: ChipSpec, op: str, chips: int) -> int:
    """Returns the number of a chip's real links that the time model treats as one link.

    This one link has the sum of their bandwidths. The number depends on the topology:

    - switch, pcie_tree: all links of the chip.
    - k44 (two halves of the group; each chip is linked to all chips of the other half): 1.
    - mesh: the number of links between two chips.
    - torus: 2 for up to eight chips (two directions), 4 from nine chips on (two dimensions), but not more than the chip
      has. For all_to_all and send it is half of this number, since their model sends in both directions.

    op: name of the collective. chips: number of chips in the group.
    """
    if chip.links.topology == "mesh":
        return chip.links.count // (chip.links.max_chips - 1)
    if chip.links.topology == "k44":
        return 1
    if chip.links.topology == "torus":
        return min(chip.links.count, 2 if chips < 9 else 4) // (2 if op in DIRECT else 1)
    return chip.links.count


def host_share(chip: ChipSpec, chips: int) -> float:
    """Returns the fraction of its link bandwidth that a chip gets while all chips of a group send.

    It is 1, except on a pcie_tree with fewer links to the host (chip.links.host_links) than chips: there it is less.
    chips: number of chips of the group.
    """
    return min(1.0, chip.links.host_links / chips) if chip.links.topology == "pcie_tree" else 1.0


def candidate_algorithms(target: Target, op: str, chips: int) -> list[str]:
    """Returns a list of the names of the algorithms to compare for the collective `op`. The fastest of them is used.

    The list has one name in three cases: the library has only rings, the topology is a torus, or the group has more
    than MAX_SIMULATED_RANKS chips. This name is "direct" for all_to_all and send, and "ring" for other collectives. In
    all other cases the list has every algorithm that works with `chips` chips; "two_step" is left out unless the
    topology is k44.
    """
    found = collectives.algorithms(op, chips)
    topology = target.chip.links.topology
    if target.library.algorithms == "ring" or topology == "torus" or chips > MAX_SIMULATED_RANKS:
        return [name for name in found if name == ("direct" if op in DIRECT else "ring")]
    return [name for name in found if topology == "k44" or name != "two_step"]


def simulated_ranks(network: Network, op: str) -> int:
    """Returns the number of ranks in the simulated schedule: at most MAX_SIMULATED_RANKS.

    Only an all_to_all on a torus is simulated with all ranks of the network. There the load of a link grows with the
    square of the number of ranks, so its time cannot be extrapolated linearly.
    """
    every_rank = network.kind == "torus" and op == "all_to_all"
    return network.ranks if every_rank else min(network.ranks, MAX_SIMULATED_RANKS)


@lru_cache(maxsize=65536)
def unit_seconds(network: Network, ranks: int, op: str, algorithm: str, size: int | None) -> float:
    """Returns the simulated seconds of a collective on links of 1 byte/s and 1 s latency. Results are cached.

    Args:
        network: the links of the group.
        ranks: number of ranks.
        op: name of the collective, such as "all_reduce".
        algorithm: name of the algorithm, such as "ring"; see candidate_algorithms().
        size: gives the size of a chunk: 2 ** (size / SIZES_PER_OCTAVE) bytes. None: 0 bytes.
    """
    clock = unit_clock(network, ranks, op, algorithm)
    return clock.seconds([0.0 if size is None else 2.0 ** (size / SIZES_PER_OCTAVE)] * clock.chunks)


@lru_cache(maxsize=512)
def unit_clock(network: Network, ranks: int, op: str, algorithm: str) -> ScheduleClock:
    """Returns a ScheduleClock, which simulates the time of a collective on links of 1 byte/s and 1 s latency. Cached.

    Its times can be scaled to links of any other rate and latency.
    """
    return ScheduleClock(collectives.schedule(op, algorithm, ranks), network.topology(ranks), network.local)


def _interpolated(network: Network, ranks: int, op: str, algorithm: str, chunk: float) -> float:
    """Returns the seconds of a collective with chunks of `chunk` bytes, on links of 1 byte/s and 1 s latency.

    The value is interpolated linearly between the simulated times of the next smaller and the next larger chunk size.
    It is mostly exact, because times grow linearly with size. The error is up to 15 % where transfers take place in a
    different order at the two sizes. network, ranks, op, algorithm: as in unit_seconds().
    """
    size = floor(log2(chunk) * SIZES_PER_OCTAVE) if chunk > 2.0**-SIZES_PER_OCTAVE else None
    low = 0.0 if size is None else 2.0 ** (size / SIZES_PER_OCTAVE)
    above = -SIZES_PER_OCTAVE * SIZES_PER_OCTAVE if size is None else size + 1
    high = 2.0 ** (above / SIZES_PER_OCTAVE)
    a, b = unit_seconds(network, ranks, op, algorithm, size), unit_seconds(network, ranks, op, algorithm, above)
    return a + (b - a) * (chunk - low) / (high - low)


def chunk_fraction(network: Network, op: str, algorithm: str) -> float:
    """Returns the size of one chunk of a collective's schedule, as a fraction of the whole tensor.

    The whole tensor is the input of a chip, or the output of an all_gather.
    """
    ranks = simulated_ranks(network, op)
    return chunk_bytes(collectives.schedule(op, algorithm, ranks), 1.0)[0] * ranks / network.ranks


def schedule_seconds(network: Network, op: str, algorithm: str, link: float, latency: float, moved: float) -> float:
    """Returns the seconds of a collective for a tensor of `moved` bytes.

    Simulations exist only for links of 1 byte/s and 1 s latency, and for some chunk sizes. The chunk size is therefore
    divided by (link * latency), the simulated seconds are multiplied by `latency`, and times between two simulated
    chunk sizes are interpolated. For more than MAX_SIMULATED_RANKS ranks, the time is extrapolated linearly from two
    smaller numbers of ranks. An all_to_all on a torus is simulated with all its ranks instead.

    Args:
        network: the links of the group.
        op: name of the collective.
        algorithm: name of the algorithm, such as "ring"; see candidate_algorithms().
        link: bandwidth of a link in bytes/s.
        latency: latency of a link in seconds.
        moved: bytes of the whole tensor.
    """
    latency = max(latency, MIN_LATENCY_S)
    chunk = moved * chunk_fraction(network, op, algorithm) / link / latency
    if simulated_ranks(network, op) == network.ranks:
        return latency * _interpolated(network, network.ranks, op, algorithm, chunk)
    most, few = MAX_SIMULATED_RANKS, MAX_SIMULATED_RANKS // 2
    half, whole = (_interpolated(network, n, op, algorithm, chunk) for n in (few, most))
    return latency * (whole + (whole - half) * (network.ranks - most) / (most - few))


@lru_cache(maxsize=4096)
def link_traffic(network: Network, op: str, algorithm: str) -> float:
    """Returns the bytes that one chip sends over its links, divided by the bytes of the whole tensor.

    It is a mean over the chips that send. Bytes that a chip forwards for others are counted too. The whole tensor is
    the input of a chip, or the output of an all_gather.
    """
    ranks = simulated_ranks(network, op)
    s, topology = collectives.schedule(op, algorithm, ranks), network.topology(ranks)
    hops = sum(link.src < ranks for i in s.steps if i.kind == "send" for link in topology.route(i.rank, i.peer))
    senders = 1 if op == "send" else ranks
    # A rank sends equally much to each other rank, which extrapolates to more ranks.
    return hops * chunk_fraction(network, op, algorithm) / senders * (network.ranks - 1) / (ranks - 1)


@lru_cache(maxsize=65536)
def collective_timing(target: Target, op: str, chips: int, moved: int) -> Timing:
    """Returns the Timing of a collective over `chips` chips with its fastest algorithm and protocol.

    Fewer than two chips take 0 seconds. More than chip.links.max_chips chips fill several nodes; nodes_timing()
    computes their time. Raises ChipError if the collective `op` is unknown, or if nodes_timing() raises it.

    moved: bytes of the whole tensor, which is the input of a chip, or the output of an all_gather.
    """
    chip, lib = target.chip, target.library
    if op not in OPS:
        raise ChipError(f"unknown collective {op!r}; use one of {', '.join(OPS)}")
    if chips > chip.links.max_chips:
        return nodes_timing(target, op, chips, moved, collective_timing)
    if chips < 2:
        return Timing(0.0)
    bandwidth = links_used(chip, op, chips) * chip.links.bytes_per_s * host_share(chip, chips) * lib.link_efficiency
    best: tuple[float, str, str, Network] | None = None
    for p in lib.protocols:
        if p.max_bytes_per_chip and moved / chips > p.max_bytes_per_chip:
            continue
        in_switch = op == "all_reduce" and chip.switch_reduces and chips >= lib.switch_reduce_min_chips
        link = bandwidth * (switch_speedup(chips) if in_switch else 1.0)
        link *= p.bandwidth_fraction
        local = inf if lib.through_hbm else chip.l2_rate / BYTES_PER_SUMMED_BYTE / link
        network = Network(chip.links.topology, chips, local)
        handshakes = chips - 2 if op == "all_to_all" and lib.peer_handshakes else 0
        latency = lib.link_latency_s * p.latency_factor
        for algorithm in candidate_algorithms(target, op, chips):
            start = lib.barrier_s * p.barrier_factor + latency * handshakes
            if lib.through_hbm:
                start += moved * hbm_traffic(op, algorithm, chips) / chip.hbm_rate / p.bandwidth_fraction
            seconds = start + schedule_seconds(network, op, algorithm, link, latency, moved)
            if best is None or seconds < best[0]:
                best = seconds, p.name, algorithm, network
    assert best is not None
    seconds, protocol, algorithm, network = best
    sent = moved * link_traffic(network, op, algorithm)
    steps = round(schedule_seconds(network, op, algorithm, 1.0, 1.0, 0.0))
    if op == "all_reduce" and lib.small_reduce_s:
        for name, count, times in (("one_shot", 1, chips - 1), ("two_shot", 2, 2 * (chips - 1) / chips)):
            own = lib.small_reduce_s * (1 + (count - 1) * SECOND_SHOT) + times * moved / (
                links_used(chip, op, chips) * chip.links.bytes_per_s * host_share(chip, chips)
            ) / lib.small_reduce_efficiency  # fmt: skip
            if own < seconds:
                seconds, sent, steps, algorithm, protocol = own, times * moved, count, name, "engine"
    choice = f"{algorithm}, {protocol}, {steps} steps"
    return Timing(seconds, {"NET": sent / group_bytes_per_s(chip, chips)}, 0.0, 0.0, sent, choice=choice, steps=steps)


@lru_cache(maxsize=4096)
def hbm_traffic(op: str, algorithm: str, ranks: int) -> float:
    """Returns the bytes that a chip reads and writes in HBM, divided by the bytes of the whole tensor.

    It is a mean over the chips, for libraries with the option through_hbm. With this option each step of the schedule
    reads and writes input and output chunks in HBM. Temporary chunks are not counted.
    """
    s = collectives.schedule(op, algorithm, min(ranks, MAX_SIMULATED_RANKS))
    slots = [slot for step in s.steps for slot in (*step.reads(), step.dst) if slot and slot.buffer != "tmp"]
    return len(slots) * chunk_bytes(s, 1.0)[0] / s.ranks


def switch_speedup(chips: int) -> float:
    """Returns the speedup of an all_reduce with sums in the switch (NVLink SHARP), relative to an all_reduce on a ring.

    For P chips it is (2 (P - 1) / P) / (1 + 2 / P): bytes per link in a ring, divided by bytes per link with the
    switch. It is below 1 for P < 4.
    """
    return 2 * (chips - 1) / chips / (1 + 2 / chips)


def group_bytes_per_s(chip: ChipSpec, chips: int) -> float:
    """Returns the bytes/s that one chip can send to the other chips of its group, over all its links together.

    chips: number of chips of the group.
    """
    peers = {"k44": max(1, chips // 2), "mesh": chips - 1}.get(chip.links.topology, 1)
    return peers * links_used(chip, "all_reduce", chips) * chip.links.bytes_per_s * host_share(chip, chips)


@dataclass(frozen=True)
class ChunkRegions:
    """The HBM regions of one chip's chunks: `inputs` and `outputs` are both dicts {chunk number: region}."""

    inputs: Mapping[int, Region]
    outputs: Mapping[int, Region]


@dataclass(frozen=True)
class ChunkTile:
    """A part of a chunk, small enough for SRAM. A core runs all steps of the schedule for one ChunkTile at a time.

    Attributes:
        chunk: number of the chunk.
        rows, cols: the part, as slices of the chunk's rows and columns.
        first_tag: number that is added to the message tag of each step, so that no two ChunkTiles share a tag.
    """

    chunk: int
    rows: slice
    cols: slice
    first_tag: int


class CollectiveBuilder:
    """Builds the instruction stream of one core of one chip for a collective.

    Each SRAM buffer has two tiles, used in turn: the core can work on one part of a chunk while it still stores the
    result of the part before.
    """

    def __init__(self, op: Grouped | Send, chip: int, regions: ChunkRegions, tile: tuple[int, int]) -> None:
        self.builder = StreamBuilder(op.site, chip)
        self.wire, self.regions, self.tile = op.wire, regions, tile
        self.rings: dict[tuple[int, str], Ring] = {}
        self.used = 0
        self.values: dict[Slot, Region] = {}

    def buffer(self, rows: int, cols: int, format: str) -> Region:
        """Returns the SRAM tile to write next, a Region [rows, cols] in the number format `format`.

        The calls for one ChunkTile all return different tiles. The calls for the next ChunkTile return a second set of
        tiles, those for the one after it the first set again. So a ChunkTile can still be stored while the next is
        processed. `rows` and `cols` must not exceed self.tile.
        """
        self.used += 1
        key = self.used, format
        if key not in self.rings:
            self.rings[key] = self.builder.ring(2, *self.tile, format)
        return self.rings[key].next().shaped(rows, cols)

    def in_wire_format(self, tile: Region) -> Region:
        """Returns a tile with the values of `tile` in the number format in which messages are sent (self.wire).

        If `tile` has this format, it is returned unchanged. Otherwise a Convert instruction into a new tile is emitted.
        """
        if tile.format == self.wire:
            return tile
        rounded = self.buffer(tile.rows, tile.cols, self.wire)
        self.builder.emit(isa.Convert(dst=rounded, src=tile))
        return rounded

    def value(self, slot: Slot, part: ChunkTile) -> Region:
        """Returns the SRAM tile that holds the current values of the schedule's buffer `slot` for the ChunkTile `part`.

        Inputs are in HBM. The first call for an input emits the load into SRAM and the conversion to the wire format.

        slot: an input, output or temporary buffer of the schedule. part: the ChunkTile that is processed now.
        """
        if slot not in self.values:
            src = self.regions.inputs[slot.number].part(part.rows, part.cols)
            tile = self.buffer(src.rows, src.cols, src.format)
            self.builder.emit(isa.Load(dst=tile, src=src))
            self.values[slot] = self.in_wire_format(tile)
        return self.values[slot]

    def set_value(self, slot: Slot, tile: Region, part: ChunkTile) -> None:
        """Record that `tile` now holds the values of the schedule's buffer `slot`. Returns nothing.

        For an output, also emits the conversion to the wire format, if needed, and the store of the tile to HBM. part:
        the ChunkTile that is processed now.
        """
        self.values[slot] = self.in_wire_format(tile) if slot.buffer == "out" else tile
        if slot.buffer == "out":
            dst = self.regions.outputs[slot.number].part(part.rows, part.cols)
            self.builder.emit(isa.Store(dst=dst, src=self.values[slot]))

    def emit_steps(self, steps: Sequence[Step], job: ChunkTile) -> None:
        """Emit the instructions that run the schedule's steps for one ChunkTile. Returns nothing.

        steps: this chip's steps for the chunk of `job`, in order. job: the ChunkTile.
        """
        self.used, self.values = 0, {}
        shape = job.rows.stop - job.rows.start, job.cols.stop - job.cols.start
        for step in steps:
            tag = job.first_tag + step.tag
            if step.kind == "send" and step.src:
                self.builder.emit(isa.Send(src=self.value(step.src, job), peer=step.peer, tag=tag))
            elif step.kind == "recv" and step.dst:
                tile = self.buffer(*shape, self.wire)
                self.builder.emit(isa.Receive(dst=tile, peer=step.peer, tag=tag))
                self.set_value(step.dst, tile, job)
            elif step.kind == "copy" and step.src and step.dst:
                self.set_value(step.dst, self.value(step.src, job), job)
            elif step.src and step.add and step.dst:
                a, b = self.value(step.src, job), self.value(step.add, job)
                total = self.buffer(*shape, "f32")
                self.builder.emit(isa.Map(dst=total, a=a, b=b, steps=SUM))
                self.set_value(step.dst, total, job)


class CollectiveRun:
    """One execution of a collective on the simulator. Each chip has a memory with its input "x" and its output "out".

    parts: the inputs of the chips, one f32 array [rows, width] for each. Raises ChipError for an all_reduce whose field
    `slots` is above 1.
    """

    def __init__(self, op: Grouped | Send, target: Target, parts: Sequence[np.ndarray]) -> None:
        if isinstance(op, AllReduce) and op.slots > 1:
            raise ChipError(f"{op.site}: chip kernels add no slots; use a layout without r, or the host")
        self.op, self.target, self.n = op, target, len(parts)
        self.memories = [ChipMemory(target) for _ in parts]
        for memory, part in zip(self.memories, parts, strict=True):
            memory.put("x", part.astype(np.float32))

    @cached_property
    def schedule(self) -> Schedule:
        """The Schedule of this collective, with the steps of all ranks. It adds inputs in the order of the ranks."""
        return collectives.schedule(self.op.kind, "one_shot" if isinstance(self.op, AllReduce) else "direct", self.n)

    @cached_property
    def regions(self) -> list[ChunkRegions]:
        """A list with one ChunkRegions for each chip: the HBM regions of the chip's input and output chunks.

        The first access allocates "out" in the memories.
        """
        n, x = self.n, [memory.region("x") for memory in self.memories]
        total, runs = x[0].rows, [shared_rows(x[0].rows, i, n) for i in range(n)]
        rows = [slice(run.start, run.stop) for run in runs]
        match self.op:
            case AllReduce():
                outs = [memory.allocate("out", total, x[0].cols, "f32") for memory in self.memories]
                return [ChunkRegions({0: a}, {0: b}) for a, b in zip(x, outs, strict=True)]
            case Send():
                out = self.memories[-1].allocate("out", total, x[0].cols, "f32")
                return [ChunkRegions({0: x[0]}, {}), ChunkRegions({}, {0: out})]
            case ReduceScatter():
                outs = [
                    b.allocate("out", len(run), x[0].cols, "f32") for b, run in zip(self.memories, runs, strict=True)
                ]
                return [ChunkRegions({c: a.part(rows[c]) for c in range(n)}, {i: outs[i]}) for i, a in enumerate(x)]
            case AllToAll():
                ends = np.cumsum([0, *(a.cols for a in x)]).tolist()
                outs = [
                    b.allocate("out", len(run), ends[-1], "f32") for b, run in zip(self.memories, runs, strict=True)
                ]
                return [
                    ChunkRegions(
                        {i * n + to: a.part(rows[to]) for to in range(n)},
                        {g * n + i: outs[i].part(cols=slice(ends[g], ends[g + 1])) for g in range(n)},
                    )
                    for i, a in enumerate(x)
                ]
            case AllGather(tokens=along):
                ends = np.cumsum([0, *(a.rows if along else a.cols for a in x)]).tolist()
                tall, wide = (ends[-1], x[0].cols) if along else (total, ends[-1])
                outs = [memory.allocate("out", tall, wide, "f32") for memory in self.memories]
                cuts = [slice(a, b) for a, b in pairwise(ends)]
                return [
                    ChunkRegions(
                        {i: a}, {c: outs[i].part(s) if along else outs[i].part(cols=s) for c, s in enumerate(cuts)}
                    )
                    for i, a in enumerate(x)
                ]

    def chunk_tiles(self) -> list[ChunkTile]:
        """Returns a list of the ChunkTiles of all chunks: each chunk is cut into parts of at most self.tile in size."""
        found: list[ChunkTile] = []
        messages = sum(step.kind == "send" for step in self.schedule.steps)
        chunks = {c: r for regions in self.regions for c, r in regions.inputs.items()}
        for c, region in sorted(chunks.items()):
            for rows in slices(region.rows, self.tile[0]):
                for cols in slices(region.cols, self.tile[1]):
                    found.append(ChunkTile(c, rows, cols, len(found) * messages))
        return found

    @cached_property
    def tile(self) -> tuple[int, int]:
        """The size (rows, columns) of the SRAM tiles.

        It is at most (ROWS, COLS). The rows are halved until all tiles of a core fit SRAM.
        """
        widest, rows = max(r.cols for regions in self.regions for r in regions.inputs.values()), ROWS
        cols = min(COLS, max(1, widest))
        buffers = 2 * (3 * self.n + 2)  # rings of two: parts, sums, and each in the wire format
        while rows > 1 and rows * cols * 4 * buffers > self.target.chip.sram_bytes:
            rows //= 2
        return rows, cols

    def streams(self) -> list[Stream]:
        """Returns a list of the Streams of all chips, one for each core with work.

        ChunkTiles are dealt round-robin to the cores, in the same way on every chip.
        """
        tiles, steps = self.chunk_tiles(), dict[tuple[int, int], list[Step]]()
        for step in self.schedule.steps:
            steps.setdefault((step.rank, step.chunk), []).append(step)
        out = []
        for chip, regions in enumerate(self.regions):
            for core in range(min(len(tiles), self.target.chip.cores)):
                builder = CollectiveBuilder(self.op, chip, regions, self.tile)
                for tile in tiles[core :: self.target.chip.cores]:
                    builder.emit_steps(steps.get((chip, tile.chunk), []), tile)
                out.append(builder.builder.stream())
        return out

    def run(self) -> tuple[list[np.ndarray], RunResult]:
        """Execute the collective. Returns (list of outputs, RunResult with time and counters).

        The outputs are f32 arrays [rows, width], one for each chip in order. A send has only the receiver's output.
        """
        memories = {chip: memory.hbm for chip, memory in enumerate(self.memories)}
        result = Machine(self.target, memories).run(self.streams())
        outputs = [memory.read("out") for memory, r in zip(self.memories, self.regions, strict=True) if r.outputs]
        return outputs, result


def run_collective(
    target: Target, op: Grouped | Send, parts: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], RunResult]:
    """Execute a collective on the simulator, on all chips of its group. Returns (list of outputs, RunResult).

    The outputs are f32 arrays [rows, width] in the order of the ranks; a send has only the receiver's output. The
    RunResult has the modelled time and counters.

    parts: the inputs of the ranks, one f32 array [rows, width] for each. For a send, the sender's input and an empty
    array.
    """
    return CollectiveRun(op, target, parts).run()
