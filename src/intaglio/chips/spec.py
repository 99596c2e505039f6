"""Chips: what a piece of silicon is made of, as frozen data, and presets of real parts and of one that does not exist.

Numbers from data sheets stand as they are published; what measurement found (at most eight numbers a chip) stands apart
in Constants. Nothing here computes a time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


class ChipError(ValueError):
    """A chip that could not be built; the message says which numbers contradict each other."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What a data sheet does not say. Shares are of the sheet's figure, between 0 and 1."""

    launch_s: float  # from the end of one kernel to the first instruction of the next
    latency_s: float  # from asking HBM for bytes to having them in SRAM
    hbm_share: float  # of HBM bytes/s, by long streams
    shared_share: float  # of the shared level's bytes/s
    mxu_share: float  # of the matrix rate, by a stream of matmuls
    gather_share: float  # of the matrix rate, where rows are gathered: the grouped products of experts
    meet_s: float  # start of a collective, until all chips know of each other
    hop_s: float  # one step of a collective: signal, wait and copy of nothing


@dataclass(frozen=True, kw_only=True)
class Links:
    """Links of one chip to its peers. `topology`: switch (every pair at full rate), k44 (two sides of four, every chip
    linked to the four opposite), torus (neighbours in two dimensions) or none. Bytes/s are a link's, one direction."""

    count: int
    bytes_per_s: float
    topology: str
    most: int  # chips that one such network joins

    @property
    def chip_bytes_per_s(self) -> float:
        """What one chip can send, and receive at the same time."""
        return self.count * self.bytes_per_s


TOPOLOGIES = ("switch", "k44", "torus", "none")


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules, for an estimate: a multiply-accumulate in bf16 (8-bit formats take half, 4-bit a quarter), a byte from
    each memory, and what the chip draws when it does nothing."""

    mac: float
    hbm_byte: float
    shared_byte: float
    link_byte: float
    idle_w: float


@dataclass(frozen=True, kw_only=True)
class ChipSpec:
    """One chip. A core has an in-order queue for each engine and its own SRAM; all cores share the shared level (if
    there is one), HBM and links. Rates are per core and cycle unless the name says otherwise."""

    name: str
    what: str  # one line for people
    cores: int
    clock_hz: float
    macs: tuple[tuple[str, int], ...]  # format -> multiply-accumulates; a format not listed runs as the next wider
    array: tuple[int, int, int]  # m, n, k to which a matmul is rounded up
    tiles: tuple[tuple[int, int], ...]  # accumulator tiles (rows, columns) that kernels may choose
    depth: int  # cycles from the first operand into the array to the first sum out of it
    sram_bytes: int
    sram_bytes_per_cycle: int  # operands into the array
    acc_bytes: int  # accumulators, FP32
    vec_lanes: int  # FP32 operations
    exp_lanes: int  # exponentials and their like
    att_lanes: int  # scores a fused attention engine turns into weights; 0: there is no such engine
    port_bytes_per_cycle: int  # between a core and everything outside it
    shared_bytes: int  # of the shared level; 0: none
    shared_bytes_per_cycle: int  # of the whole chip
    hbm_bytes: int
    hbm_bytes_per_s: float
    links: Links
    tdp_w: float
    energy: Energy
    constants: Constants
    flash: int = 2  # generation of its attention kernels: 3 packs the heads of a group into one tile of queries
    row_cycles: int = 40  # of a core, to bring one row of one head to its page: an address, a wait, a store
    persistent: bool = False  # a core runs its tiles as one stream: the next one's operands come in while this drains
    switch_adds: bool = False  # the switch reduces on the way
    prefetch: bool = False  # weights of the next op are loaded while this one runs
    extra: tuple[str, ...] = ()  # instructions beyond the common set that its lanes have
    reasons: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # field -> where its number is from

    def __post_init__(self) -> None:
        check(self)

    def mac_rate(self, format: str) -> int:
        """Multiply-accumulates a core and cycle in `format`, in the format it runs as."""
        return dict(self.macs)[self.runs_as(format)]

    def runs_as(self, format: str) -> str:
        """The format in which the array multiplies values of `format`: itself, or the first of those that hold all its
        values. Raises ChipError if there is none."""
        rates = dict(self.macs)
        for candidate in (format, *WIDER.get(format, ())):
            if candidate in rates:
                return candidate
        raise ChipError(f"{self.name} has no matrix rate for {format}; it has {', '.join(rates)}")

    def peak_flops(self, format: str) -> float:
        """FLOP/s of the chip by its data sheet, dense."""
        return 2.0 * self.cores * self.clock_hz * self.mac_rate(format)

    @property
    def hbm_rate(self) -> float:
        """Bytes/s that long streams reach."""
        return self.hbm_bytes_per_s * self.constants.hbm_share

    @property
    def shared_rate(self) -> float:
        """Bytes/s of the shared level, or of the network that stands in its place, that streams reach."""
        return self.shared_bytes_per_cycle * self.clock_hz * self.constants.shared_share

    @property
    def port_rate(self) -> float:
        """Bytes/s into one core."""
        return self.port_bytes_per_cycle * self.clock_hz


WIDER = {  # format -> those that hold all its values, narrowest first
    "int4": ("int8", "bf16", "f32"),
    "e2m1": ("e4m3", "bf16", "f16", "f32"),
    "int8": ("bf16", "f16", "f32"),
    "e4m3": ("bf16", "f16", "f32"),
    "bf16": ("f32",),
    "f16": ("f32",),
    "f32": (),
}

POSITIVE = (
    "cores", "clock_hz", "sram_bytes", "sram_bytes_per_cycle", "acc_bytes", "vec_lanes", "exp_lanes",
    "port_bytes_per_cycle", "shared_bytes_per_cycle", "hbm_bytes", "hbm_bytes_per_s", "tdp_w",
)  # fmt: skip


def check(spec: ChipSpec) -> None:
    """Raise ChipError, naming the numbers, for a chip that cannot be."""

    def refuse(bad: bool, why: str) -> None:
        if bad:
            raise ChipError(f"chip {spec.name!r}: {why}")

    for name in POSITIVE:
        refuse(getattr(spec, name) <= 0, f"{name}={getattr(spec, name)}; it must be above 0")
    refuse(not spec.macs, "no matrix rate in any format")
    for format, rate in spec.macs:
        refuse(format not in WIDER or rate <= 0, f"macs lists {format}={rate}; formats are {', '.join(WIDER)}")
    refuse(not spec.tiles, "no accumulator tile for kernels to choose")
    for m, n in spec.tiles:
        refuse(m * n * 4 > spec.acc_bytes, f"tile {m}x{n} takes {m * n * 4} bytes of accumulators, of {spec.acc_bytes}")
        need = 2 * (m + n) * 64 * 2  # two stages of both operands, 64 deep, in bf16
        refuse(need > spec.sram_bytes, f"tile {m}x{n} needs {need} bytes of SRAM for two stages, of {spec.sram_bytes}")
    for name in ("hbm_share", "shared_share", "mxu_share", "gather_share"):
        share = getattr(spec.constants, name)
        refuse(not 0 < share <= 1, f"constants.{name}={share}; a share lies above 0 and is at most 1")
    for name in ("launch_s", "latency_s", "meet_s", "hop_s"):
        refuse(getattr(spec.constants, name) < 0, f"constants.{name} is below 0")
    links = spec.links
    refuse(links.topology not in TOPOLOGIES, f"topology {links.topology!r}; use one of {', '.join(TOPOLOGIES)}")
    refuse(links.most > 1 and links.topology == "none", f"{links.most} chips but no links: none can reach another")
    refuse(links.most > 1 and links.count < 1, f"{links.most} chips but {links.count} links: none can reach another")
    split = links.topology == "k44" and (links.most != 8 or links.count < 4)
    refuse(split, f"k44 joins 8 chips by 4 links each, not {links.most} by {links.count}: some could not be reached")


def replace(spec: ChipSpec, **changes: Any) -> ChipSpec:
    """Another chip: `spec` with fields changed. A name of Constants or Links changes the one inside. Raises ChipError
    for a field there is not, or for a chip that could not be built."""
    own = {f.name for f in dataclasses.fields(ChipSpec)}
    parts: dict[str, dict[str, Any]] = {"constants": {}, "links": {}, "energy": {}}
    mine: dict[str, Any] = {}
    for name, value in changes.items():
        inside = [p for p in parts if any(f.name == name for f in dataclasses.fields(getattr(spec, p)))]
        if name in own:
            mine[name] = value
        elif inside:
            parts[inside[0]][name] = value
        else:
            raise ChipError(f"a chip has no field {name!r}; it has {', '.join(sorted(own))}")
    for part, inner in parts.items():
        if inner:
            mine[part] = dataclasses.replace(mine.get(part, getattr(spec, part)), **inner)
    return dataclasses.replace(spec, **mine)
