"""The tile language: a StreamBuilder with which a kernel allocates tiles and emits instructions in program order.

The builder derives the waits between engines: an instruction waits for the last writer of each tile it reads, and for
the last readers of each tile it overwrites. A Ring of tiles gives double buffering: an instruction that overwrites a
tile of the ring waits for the readers of that tile and for nothing else. Heap allocates HBM.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from intaglio.silicon.isa import ENGINES, Instruction
from intaglio.silicon.memory import Region, dense

ALIGN = 64  # bytes: alignment of tiles and of tensors in HBM


@dataclass(frozen=True)
class Stream:
    """The instructions of one core in program order. Each engine executes its own instructions in this order.

    site: name of the op's place in the model, such as layers.3.mlp.down_proj. chip: number of the core's chip.
    """

    site: str
    instructions: tuple[Instruction, ...]
    chip: int = 0


@dataclass
class Ring:
    """A circular buffer of tiles of equal size, so that one tile can be loaded while another is in use.

    tiles: the tiles. used: how many times next() has been called.
    """

    tiles: tuple[Region, ...]
    used: int = 0

    def next(self) -> Region:
        """The next tile of the ring; after the last comes the first again."""
        self.used += 1
        return self.tiles[(self.used - 1) % len(self.tiles)]


@dataclass
class LastAccess:
    """The accesses to one tile since its last write.

    writer: (engine, instruction number) of the last write; None if there was none. readers: {engine: number of its
    last instruction that has read the tile since this write}. Instructions of an engine are numbered from 1.
    """

    writer: tuple[int, int] | None = None
    readers: dict[int, int] = field(default_factory=dict)


class StreamBuilder:
    """Builds a Stream, the instructions of one core, with the waits that order its engines.

    Also allocates SRAM and accumulator tiles, from the start of each memory; none is freed.
    """

    def __init__(self, site: str, chip: int = 0) -> None:
        self.site, self.chip = site, chip
        self.top = {"sram": 0, "acc": 0}
        self.instructions: list[Instruction] = []
        self.count = [0] * len(ENGINES)
        self.fenced = [0] * len(ENGINES)  # of each engine: instructions that every later one waits for
        self.accesses: dict[tuple[str, int], LastAccess] = {}  # by space and number of the tile (HBM: by address)
        self.tiles: dict[str, list[tuple[int, int]]] = {"sram": [], "acc": []}  # first and last address + 1

    def tile(self, rows: int, cols: int, format: str = "f32", space: str = "sram") -> Region:
        """Allocate a [rows, cols] tile in SRAM (space "sram") or in the accumulators ("acc"). Returns its Region.

        The size of the core's memory is not checked here. If the tile ends beyond it, the simulator refuses the first
        instruction that uses the tile.
        """
        region = dense(space, self.top[space], rows, cols, format)
        self.top[space] += -(-region.nbytes // ALIGN) * ALIGN
        self.tiles[space].append(region.span)
        return region

    def ring(self, depth: int, rows: int, cols: int, format: str = "f32", space: str = "sram") -> Ring:
        """Allocate and return a Ring of `depth` tiles [rows, cols]."""
        return Ring(tuple(self.tile(rows, cols, format, space) for _ in range(depth)))

    def emit(self, instruction: Instruction) -> None:
        """Append a copy of `instruction`, with a new value of its field `wait`, to the stream. Returns nothing.

        The new value lets it wait for the earlier instructions that write what it reads, for those that read or write
        what it overwrites, and for all instructions before the last fence().
        """
        engine = ENGINES.index(instruction.engine)
        need = list(self.fenced)
        reads = [self._last_access(r) for r in instruction.regions(written=False)]
        writes = [self._last_access(r) for r in instruction.regions(written=True)]
        for access in (*reads, *writes):
            # An engine's results appear in order, so it needs no wait to overwrite what it has written itself.
            if access.writer is not None and (access in reads or access.writer[0] != engine):
                need[access.writer[0]] = max(need[access.writer[0]], access.writer[1])
        for access in writes:
            for other, n in access.readers.items():
                need[other] = max(need[other], n)
        self.count[engine] += 1
        number = self.count[engine]
        for access in reads:
            access.readers[engine] = number
        for access in writes:
            access.writer, access.readers = (engine, number), {}
        # The waits include the instruction's own engine: it starts instructions in order, but the result of a load
        # becomes visible only after HBM's latency.
        self.instructions.append(replace(instruction, wait=tuple(need)))

    def fence(self) -> None:
        """Make all instructions that are emitted later wait for all instructions emitted so far. Returns nothing."""
        self.fenced = list(self.count)

    def _last_access(self, region: Region) -> LastAccess:
        """The LastAccess record of `region`; an empty one is created and kept if there is none.

        In SRAM and accumulators there is one record for each tile. In HBM there is one for each start address: regions
        that overlap but start elsewhere have different records.
        """
        low, high = region.span
        if region.space == "hbm":
            return self.accesses.setdefault(("hbm", low), LastAccess())
        tile = next((i for i, (a, b) in enumerate(self.tiles[region.space]) if a <= low and high <= b), -1 - low)
        return self.accesses.setdefault((region.space, tile), LastAccess())

    def stream(self) -> Stream:
        """The Stream of all instructions emitted so far."""
        return Stream(self.site, tuple(self.instructions), self.chip)


class Heap:
    """Bump allocator of HBM: gives each tensor an aligned address and never frees."""

    def __init__(self) -> None:
        self.top = 0

    def allocate(self, rows: int, cols: int, format: str) -> Region:
        """Allocate a contiguous [rows, cols] matrix and return its region."""
        region = dense("hbm", self.top, rows, cols, format)
        self.top += -(-max(1, region.nbytes) // ALIGN) * ALIGN
        return region
