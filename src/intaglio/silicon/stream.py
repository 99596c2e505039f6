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
    """The instructions of one core in program order. Each engine of the core executes its instructions in this order.

    site: name of the op's place in the model, such as layers.3.mlp.down_proj. chip: number of the core's chip.
    """

    site: str
    instructions: tuple[Instruction, ...]
    chip: int = 0


@dataclass
class Ring:
    """A circular buffer of tiles of equal size.

    While one tile is in use, another can be loaded. tiles: the tiles. used: how many times next() has been called.
    """

    tiles: tuple[Region, ...]
    used: int = 0

    def next(self) -> Region:
        """Returns the next tile of the ring. After the last tile it returns the first again."""
        self.used += 1
        return self.tiles[(self.used - 1) % len(self.tiles)]


@dataclass
class LastAccess:
    """Record of the last write to one tile, and of the reads since then. Instructions of an engine are numbered from 1.

    Attributes:
        writer: (engine, instruction number) of the last write; None: there was none.
        readers: {engine: number of its latest instruction that has read the tile since the last write}.
    """

    writer: tuple[int, int] | None = None
    readers: dict[int, int] = field(default_factory=dict)


class StreamBuilder:
    """Builds the Stream of one core. Derives for each instruction which instructions of other engines it must wait for.

    It also allocates tiles in SRAM and accumulators, one after the other from the start of the memory; none is freed.
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
        """Allocate a Ring of `depth` tiles, each [rows, cols]. Returns the Ring."""
        return Ring(tuple(self.tile(rows, cols, format, space) for _ in range(depth)))

    def emit(self, instruction: Instruction) -> None:
        """Append `instruction` to the stream, as a copy whose field `wait` is set. Returns nothing.

        With this `wait`, the instruction waits for three kinds of earlier instructions: those that write what it reads,
        those that read or write what it overwrites, and all before the last fence().
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
        """Make every instruction that is emitted later wait for all instructions emitted so far. Returns nothing."""
        self.fenced = list(self.count)

    def _last_access(self, region: Region) -> LastAccess:
        """Returns the LastAccess record of `region`. If there is none, an empty record is created, kept and returned.

        SRAM and accumulators have one record for each tile. HBM has one for each start address, so regions that overlap
        but have different start addresses have different records.
        """
        low, high = region.span
        if region.space == "hbm":
            return self.accesses.setdefault(("hbm", low), LastAccess())
        tile = next((i for i, (a, b) in enumerate(self.tiles[region.space]) if a <= low and high <= b), -1 - low)
        return self.accesses.setdefault((region.space, tile), LastAccess())

    def stream(self) -> Stream:
        """Returns a Stream with all instructions emitted so far."""
        return Stream(self.site, tuple(self.instructions), self.chip)


class Heap:
    """Allocator of HBM. Each tensor gets the next free aligned address; no memory is ever freed."""

    def __init__(self) -> None:
        self.top = 0

    def allocate(self, rows: int, cols: int, format: str) -> Region:
        """Allocate a contiguous [rows, cols] matrix in HBM. Returns its Region."""
        region = dense("hbm", self.top, rows, cols, format)
        self.top += -(-max(1, region.nbytes) // ALIGN) * ALIGN
        return region
