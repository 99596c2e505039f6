"""ChipSpec: the hardware of a chip as frozen data: cores, matrix arrays, memories, links, rates, energy.

Numbers from data sheets are as published; properties of the memories that were fitted to measurements are in Constants.
Software (launch overhead, tiles, heuristics) is in KernelLibrary. intaglio.silicon computes times from both.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from intaglio.chips import ranges
from intaglio.formats import WIDER


class ChipError(ValueError):
    """Raised for an invalid chip, kernel library or target, or an unknown name; the message names the wrong values."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Properties of a chip's memories that data sheets do not give.

    Attributes:
        hbm_latency_s: seconds from a request to HBM until the bytes are in SRAM.
        hbm_efficiency: fraction of the published HBM bandwidth that long streams reach.
        l2_efficiency: fraction of the published L2 bandwidth that long streams reach.
    """

    hbm_latency_s: float
    hbm_efficiency: float
    l2_efficiency: float


@dataclass(frozen=True, kw_only=True)
class Links:
    """Links of one chip to other chips.

    A node is a group of chips that are connected by one network of links. A second network, with one adapter per chip,
    may connect nodes.

    Attributes:
        count: number of links of the chip.
        bytes_per_s: bandwidth of one link, in each direction.
        topology: how the links connect the chips of a node: "switch" (every pair of chips at full rate), "k44"
            (complete bipartite: each of four chips is linked to each of four others), "mesh" (every pair of chips is
            linked, all pairs by equally many links), "torus" (neighbours in two dimensions), "pcie_tree" (the chips
            share the PCIe bridges of one host) or "none" (no links).
        max_chips: largest number of chips of a node.
        node_bytes_per_s: bandwidth of a chip's adapter to other nodes, in each direction; 0: nothing joins nodes.
        node_latency_s: seconds of latency of one step of a collective between nodes.
        host_links: for a pcie_tree, number of links at full rate that the host's bridges carry together.
    """

    count: int
    bytes_per_s: float
    topology: str
    max_chips: int
    node_bytes_per_s: float = 0.0
    node_latency_s: float = 0.0
    host_links: float = 0.0

    @property
    def chip_bytes_per_s(self) -> float:
        """Bandwidth of all links of a chip together, in bytes/s in each direction."""
        return self.count * self.bytes_per_s


TOPOLOGIES = ("switch", "k44", "mesh", "torus", "pcie_tree", "none")


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy per operation and per byte, and idle power, to estimate a step's energy.

    Attributes:
        mac: joules of a multiply-accumulate in bf16; 8-bit formats take half, 4-bit formats a quarter.
        hbm_byte: joules of a byte from or to HBM.
        l2_byte: joules of a byte from or to the L2.
        link_byte: joules of a byte over a link.
        idle_w: idle power in watts.
    """

    mac: float
    hbm_byte: float
    l2_byte: float
    link_byte: float
    idle_w: float


@dataclass(frozen=True, kw_only=True)
class ChipSpec:
    """The hardware of one chip. Raises ChipError for values out of range, or that contradict each other.

    A core has its own SRAM and an in-order queue for each engine. All cores share the L2 (if there is one), HBM and
    links. Rates are for one core and cycle unless the name says otherwise.
    """

    name: str
    description: str  # one line, for listings
    cores: int
    clock_hz: float
    macs: tuple[tuple[str, int], ...]  # (format, multiply-accumulates); other formats run as a wider one, see runs_as()
    array_shape: tuple[int, int, int]  # matmul sizes m, n, k are rounded up to multiples of these
    array_depth: int  # pipeline latency of the array in cycles, from the first operand to the first sum
    sram_bytes: int  # of one core
    sram_bytes_per_cycle: int  # SRAM bandwidth to the array
    acc_bytes: int  # FP32 accumulators of one core
    vec_lanes: int  # FP32 operations
    exp_lanes: int  # exponentials, sines, cosines
    att_lanes: int  # attention scores that the fused attention engine turns into weights; 0: no such engine
    port_bytes_per_cycle: int  # between a core and L2, HBM
    l2_bytes: int  # on-chip memory shared by all cores (L2 cache); 0: none
    l2_bytes_per_cycle: int  # of the whole chip; without an L2, of the on-chip network
    hbm_bytes: int
    hbm_bytes_per_s: float
    links: Links
    tdp_w: float
    energy: Energy
    constants: Constants
    switch_reduces: bool = False  # in-network reduction: the switch sums an all_reduce
    extra_instructions: tuple[str, ...] = ()  # names of optional instructions that it has
    reasons: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # (field, source of its value)

    def __post_init__(self) -> None:
        check(self)

    def mac_rate(self, format: str) -> int:
        """Returns the multiply-accumulates per cycle of one core, for operands in `format`.

        Raises ChipError if the matrix array takes neither `format` nor a wider format.
        """
        return dict(self.macs)[self.runs_as(format)]

    def runs_as(self, format: str) -> str:
        """Returns the format in which the matrix array multiplies values of `format`: `format` itself, or a wider one.

        The result is `format` if the array takes it. Otherwise it is the narrowest format that the array takes and
        that represents all values of `format` exactly. Raises ChipError if there is none.
        """
        rates = dict(self.macs)
        for candidate in (format, *WIDER.get(format, ())):
            if candidate in rates:
                return candidate
        raise ChipError(
            f"{self.name} has no matrix rate for {format}; it has {', '.join(rates)}. "
            "Stored weights can be converted: --weights bf16, int8 or int4"
        )

    def peak_flops(self, format: str) -> float:
        """Returns the peak dense FLOP/s of the chip in `format`.

        Raises ChipError if the matrix array takes neither `format` nor a wider format.
        """
        return 2.0 * self.cores * self.clock_hz * self.mac_rate(format)

    @property
    def hbm_rate(self) -> float:
        """HBM bandwidth that long streams reach, in bytes/s."""
        return self.hbm_bytes_per_s * self.constants.hbm_efficiency

    @property
    def l2_rate(self) -> float:
        """Bandwidth at which all cores together read large data from the L2, in bytes/s.

        On a chip without an L2, the bandwidth of the on-chip network.
        """
        return self.l2_bytes_per_cycle * self.clock_hz * self.constants.l2_efficiency

    @property
    def port_rate(self) -> float:
        """Bandwidth between one core and the memories outside it, in bytes/s."""
        return self.port_bytes_per_cycle * self.clock_hz


def check(spec: ChipSpec) -> None:
    """Raise ChipError, naming field and value, if a chip's values are out of range or contradict each other."""

    def refuse(bad: bool, why: str) -> None:
        if bad:
            raise ChipError(f"chip {spec.name!r}: {why}")

    parts = ((spec, ranges.CHIP), (spec.links, ranges.LINKS), (spec.energy, ranges.ENERGY))
    for part, allowed in (*parts, (spec.constants, ranges.CONSTANTS)):
        why = ranges.outside(vars(part), allowed)
        refuse(bool(why), why)
    pairs = isinstance(spec.macs, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in spec.macs)
    refuse(not pairs, f"macs={spec.macs!r}; give (format, multiply-accumulates) pairs, such as (('bf16', 2048),)")
    refuse(not spec.macs, "macs is empty; give the multiply-accumulates of at least one format")
    for format, rate in spec.macs:
        why = f"macs lists {format}={rate}; formats are {', '.join(WIDER)}, rates whole numbers from 1 to 1e9"
        refuse(format not in WIDER or not 1 <= rate <= 1e9, why)
    for name in ("hbm_efficiency", "l2_efficiency"):
        value = getattr(spec.constants, name)
        refuse(not 0 < value <= 1, f"constants.{name}={value}; it must be above 0 and at most 1")
    links = spec.links
    refuse(links.topology not in TOPOLOGIES, f"topology {links.topology!r}; use one of {', '.join(TOPOLOGIES)}")
    most, count = links.max_chips, links.count
    refuse(
        most > 1 and links.topology == "none", f"max_chips={most} but topology 'none'; one chip cannot reach another"
    )
    refuse(most > 1 and count < 1, f"max_chips={most} but {count} links; one chip cannot reach another")
    tree = links.topology == "pcie_tree"
    refuse(tree and links.host_links <= 0, f"host_links={links.host_links}; a pcie_tree needs more than 0")
    wrong = links.topology == "mesh" and (most < 2 or count % (most - 1) != 0)
    refuse(wrong, f"count={count} links to {most - 1} other chips; a mesh needs equally many to each, max_chips >= 2")
    wrong = links.topology == "k44" and (most != 8 or count < 4)
    refuse(wrong, f"k44 connects 8 chips with 4 links each; got max_chips={most}, count={count}")


# The nested parts of a ChipSpec, which are sections of a chip file: field of the part -> its class
PARTS: dict[str, type[Any]] = {"links": Links, "energy": Energy, "constants": Constants}


def part_of(name: str) -> str | None:
    """Returns the name of the part of a ChipSpec that has the field `name`.

    The parts are "links", "energy" and "constants". None: no part has the field.
    """
    return next((part for part, kind in PARTS.items() if name in kind.__dataclass_fields__), None)


def replace(spec: ChipSpec, **changes: Any) -> ChipSpec:
    """Returns a copy of `spec` with fields changed. changes: the new values, by field.

    Fields inside spec.constants, spec.links and spec.energy are given by their own names, such as bytes_per_s. Raises
    ChipError for an unknown field, and for values that ChipSpec refuses.
    """
    own = {f.name for f in dataclasses.fields(ChipSpec)}
    changed: dict[str, Any] = {name: value for name, value in changes.items() if name in own}
    for name in changes.keys() - own:
        if part_of(name) is None:
            raise ChipError(f"a chip has no field {name!r}; it has {', '.join(sorted(own))}")
    for part in PARTS:
        nested = {name: value for name, value in changes.items() if name not in own and part_of(name) == part}
        if nested:
            changed[part] = dataclasses.replace(changed.get(part, getattr(spec, part)), **nested)
    return dataclasses.replace(spec, **changed)
