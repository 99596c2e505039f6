"""The tile language: a kernel names tiles and says what to do with them, in the order in which it would be done.

Waits are derived from that: an instruction waits for the last writer of what it reads, and for the last readers of what
it overwrites. Double buffering is a Ring of tiles: the wait for its oldest reader is all the synchronisation there is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from intaglio.chips import ChipSpec
from intaglio.silicon.instruction import ENGINES, Instruction
from intaglio.silicon.memory import FORMATS, Region, dense

ALIGN = 64  # bytes: tiles start where a burst does


@dataclass(frozen=True)
class Stream:
    """What one core runs: instructions in the order they were written, each queue of an engine a part of it."""

    site: str
    instructions: tuple[Instruction, ...]
    chip: int = 0


@dataclass
class Ring:
    """Tiles used in turn: while one is worked on, the next is loaded."""

    tiles: tuple[Region, ...]
    used: int = 0

    def next(self) -> Region:
        self.used += 1
        return self.tiles[(self.used - 1) % len(self.tiles)]


@dataclass
class Use:
    """Who touched a block last: (engine, number) of the writer, and the last number of each engine that read it."""

    writer: tuple[int, int] | None = None
    readers: dict[int, int] = field(default_factory=dict)


class Kernel:
    """A stream being written for one core. Tiles are allocated from the start of each space and never freed."""

    def __init__(self, spec: ChipSpec, site: str, chip: int = 0) -> None:
        self.spec, self.site, self.chip = spec, site, chip
        self.top = {"sram": 0, "acc": 0}
        self.instructions: list[Instruction] = []
        self.count = [0] * len(ENGINES)
        self.uses: dict[tuple[str, int], Use] = {}  # by space and block
        self.blocks: dict[str, list[tuple[int, int]]] = {"sram": [], "acc": [], "hbm": []}

    def tile(self, rows: int, cols: int, format: str = "f32", space: str = "sram") -> Region:
        """A block of SRAM or of accumulators. Whether it fits is judged by the machine, which names who touches it."""
        region = dense(space, self.top[space], rows, cols, format)
        self.top[space] += -(-region.nbytes // ALIGN) * ALIGN
        self.blocks[space].append(region.span)
        return region

    def ring(self, depth: int, rows: int, cols: int, format: str = "f32", space: str = "sram") -> Ring:
        """`depth` tiles in turn."""
        return Ring(tuple(self.tile(rows, cols, format, space) for _ in range(depth)))

    def do(self, instruction: Instruction) -> None:
        """Append it, with the waits that its tiles ask for."""
        engine = ENGINES.index(instruction.engine)
        need = [0] * len(ENGINES)
        reads = [self._use(r) for r in instruction.regions(written=False)]
        writes = [self._use(r) for r in instruction.regions(written=True)]
        for use in (*reads, *writes):
            if use.writer is not None:
                need[use.writer[0]] = max(need[use.writer[0]], use.writer[1])
        for use in writes:
            for other, n in use.readers.items():
                need[other] = max(need[other], n)
        self.count[engine] += 1
        mine = self.count[engine]
        for use in reads:
            use.readers[engine] = mine
        for use in writes:
            use.writer, use.readers = (engine, mine), {}
        # An engine starts in order but a load ends late: its own results are waited for like any other's
        self.instructions.append(replace(instruction, wait=tuple(need)))

    def _use(self, region: Region) -> Use:
        low, high = region.span
        if region.space == "hbm":
            return self.uses.setdefault(("hbm", low), Use())
        block = next((i for i, (a, b) in enumerate(self.blocks[region.space]) if a <= low and high <= b), -1 - low)
        return self.uses.setdefault((region.space, block), Use())

    def stream(self) -> Stream:
        """What was written."""
        return Stream(self.site, tuple(self.instructions), self.chip)


class Heap:
    """Where tensors stand in HBM: each at its own address, aligned."""

    def __init__(self) -> None:
        self.top = 0

    def place(self, rows: int, cols: int, format: str) -> Region:
        """Room for a [rows, cols] matrix."""
        region = dense("hbm", self.top, rows, cols, format)
        self.top += -(-max(1, region.nbytes) // ALIGN) * ALIGN
        return region


def stages(spec: ChipSpec, stage_bytes: int, most: int = 8) -> int:
    """How many stages of so many bytes a ring may have: as many as SRAM holds, 2 to `most`."""
    return max(2, min(most, spec.sram_bytes // max(1, stage_bytes)))


def bits(format: str) -> int:
    """Bits of a value in memory."""
    return FORMATS[format][0]
