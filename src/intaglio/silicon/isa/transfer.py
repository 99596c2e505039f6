"""Instructions that move bytes: from HBM to a core (DMA, also fills), from a core to HBM (OUT), between chips (NET)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from intaglio.chips import ChipSpec, Target
from intaglio.silicon.isa.instruction import Cost, Instruction, Shapes
from intaglio.silicon.memory import CoreMemory, MachineError, Region


def hbm_cost(chip: ChipSpec, r: Region, store: bool) -> Cost:
    """Returns the Cost of a transfer of the region `r` between HBM and a core.

    store: True for a transfer to HBM. A load has HBM's latency; a store has no latency (posted write).
    """
    return Cost(bytes=r.nbytes, resource="hbm", latency_s=0.0 if store else chip.constants.hbm_latency_s)


def check_within(what: str, ids: np.ndarray, count: int, of: Region) -> None:
    """Raise MachineError if one of `ids` is outside 0 .. count - 1. Returns nothing.

    what: words for the error text, such as "gathers row". of: the region in which the ids are row or column numbers.
    """
    bad = ids[(ids < 0) | (ids >= count)]
    if len(bad):
        raise MachineError(f"{what} {bad[0]} of {of}, which has {count}")


@dataclass(frozen=True, kw_only=True)
class Load(Instruction, engine="DMA", opcode=0x10):
    """Copy a matrix from HBM to the core: dst = src, with the same shape and format.

    If `padded` is set, dst may have more rows and columns than src. The additional elements of dst are set to zero.
    """

    dst: Region
    src: Region
    padded: bool = False
    hbm = ("src",)
    writes = ("dst",)

    def shapes(self) -> Shapes:
        if self.padded:
            return {"dst": (max(self.dst.rows, self.src.rows), max(self.dst.cols, self.src.cols))}
        return {"dst": ("m", "n"), "src": ("m", "n")}

    def run(self, mem: CoreMemory) -> None:
        values = mem.read(self.src)
        more = (0, self.dst.rows - self.src.rows), (0, self.dst.cols - self.src.cols)
        mem.write(self.dst, np.pad(values, more) if self.padded else values)

    def cost(self, target: Target) -> Cost:
        return hbm_cost(target.chip, self.src, store=False)


@dataclass(frozen=True, kw_only=True)
class Gather(Instruction, engine="DMA", opcode=0x11):
    """Load rows of a table in HBM by row number: dst[i] = table[index[0, i]].

    dst [m, n], table [rows, n], index i32 [1, m]. Kernels use it to read embeddings and K/V slots. Raises MachineError
    for an index outside 0 .. rows - 1.
    """

    dst: Region
    table: Region
    index: Region
    hbm = ("table",)
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {"dst": ("m", "n"), "table": ("rows", "n"), "index": (1, "m")}

    def run(self, mem: CoreMemory) -> None:
        ids = mem.read(self.index)[0]
        check_within("gathers row", ids, self.table.rows, self.table)
        for i, row in enumerate(ids.tolist()):
            mem.write(self.dst.part(slice(i, i + 1)), mem.read(self.table.part(slice(row, row + 1))))

    def cost(self, target: Target) -> Cost:
        return hbm_cost(target.chip, self.dst, store=False)


@dataclass(frozen=True, kw_only=True)
class Fill(Instruction, engine="DMA", opcode=0x12):
    """Set every element of dst, a matrix in the core, to `value`."""

    dst: Region
    value: float = 0.0
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {}

    def run(self, mem: CoreMemory) -> None:
        mem.write(self.dst, np.full((self.dst.rows, self.dst.cols), self.value, np.float32))

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=self.dst.nbytes / target.chip.sram_bytes_per_cycle)


@dataclass(frozen=True, kw_only=True)
class Store(Instruction, engine="OUT", opcode=0x18):
    """Copy a matrix from the core to HBM: dst = src, with the same shape, rounded to dst's format."""

    dst: Region
    src: Region
    hbm = ("dst",)
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {"dst": ("m", "n"), "src": ("m", "n")}

    def run(self, mem: CoreMemory) -> None:
        mem.write(self.dst, mem.read(self.src))

    def cost(self, target: Target) -> Cost:
        return hbm_cost(target.chip, self.dst, store=True)


@dataclass(frozen=True, kw_only=True)
class Scatter(Instruction, engine="OUT", opcode=0x19):
    """Store rows into a table in HBM by row number: table[index[0, i]] = src[i].

    src [m, n], table [rows, n], index i32 [1, m]. Kernels use it to write new keys and values into their K/V slots.
    Each row takes at least `row_cycles` cycles, the time in which a kernel's threads compute the row's address. Raises
    MachineError for an index outside 0 .. rows - 1.
    """

    table: Region
    src: Region
    index: Region
    row_cycles: float = 0.0
    hbm = ("table",)
    writes = ("table",)

    def shapes(self) -> Shapes:
        return {"table": ("rows", "n"), "src": ("m", "n"), "index": (1, "m")}

    def run(self, mem: CoreMemory) -> None:
        ids = mem.read(self.index)[0]
        check_within("scatters to row", ids, self.table.rows, self.table)
        values = mem.read(self.src)
        for i, row in enumerate(ids.tolist()):
            mem.write(self.table.part(slice(row, row + 1)), values[i : i + 1])

    def cost(self, target: Target) -> Cost:
        return replace(hbm_cost(target.chip, self.src, store=True), cycles=self.src.rows * self.row_cycles)


@dataclass(frozen=True, kw_only=True)
class Send(Instruction, engine="NET", opcode=0x50):
    """Send a matrix, src, to the chip number `peer`.

    Messages between two chips are distinguished by `tag`. The instruction has finished when the last byte has left this
    chip.
    """

    src: Region
    peer: int
    tag: int = 0
    writes = ()

    def shapes(self) -> Shapes:
        return {}

    def run(self, mem: CoreMemory) -> None:
        mem.read(self.src)  # raises for unwritten bytes; the machine delivers the message

    def cost(self, target: Target) -> Cost:
        return Cost(bytes=self.src.nbytes, resource="link")


@dataclass(frozen=True, kw_only=True)
class Receive(Instruction, engine="NET", opcode=0x51):
    """Receive a matrix: dst = the matrix that the chip number `peer` has sent to this chip with the same `tag`.

    The instruction starts when the message has arrived, and finishes one link latency later. Messages from one chip
    with the same tag are received in the order in which they were sent. Raises MachineError if the shape of the message
    is not the shape of dst.
    """

    dst: Region
    peer: int
    tag: int = 0
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {}

    def run(self, mem: CoreMemory) -> None:
        """Do nothing: when the message arrives, the Machine itself copies its values to `dst`."""

    def cost(self, target: Target) -> Cost:
        return Cost(latency_s=target.library.link_latency_s)
