"""ProductSteps: the loads, matmuls and stores of each core in a tiled matrix product, with their bytes and seconds.

For the closed form of the streams of tiled.py: product_loop.py times them. Cores in the same situation have one list.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from intaglio import formats
from intaglio.chips import Target
from intaglio.silicon.cache import LINE
from intaglio.silicon.isa.cycles import matmul_cycles, vector_cycles
from intaglio.silicon.kernels.kernel import WIDE
from intaglio.silicon.kernels.l2_blocks import L2Blocks, fetched_bytes
from intaglio.silicon.kernels.tiling import Job, Tiling

RANKS = 3  # of cores that begin with the same weights, so many are followed apart, and the others together


@dataclass(frozen=True, kw_only=True)
class ProductLoop:
    """What the jobs of a product, or of several products, have in common.

    Attributes:
        cut: sizes of tiles, steps and buffers.
        x_format, w_format: formats of the operands.
        group: columns of a row of w that share a scale; 0: w has no scales.
        span: columns of a row of x that share a scale; 0: x has no scales.
        sides: 2 for a GLU pair, else 1.
        drains: drains of a tile: 1, or 2 if the sides of a GLU pair are stored apart.
        before: bytes that the L2 has read, just before, for each byte of x that was then written; 0: x was not written
            but read.
    """

    cut: Tiling
    x_format: str
    w_format: str
    group: int = 0
    span: int = 0
    sides: int = 1
    drains: int = 1
    before: float = 0.0


def situations(cores: int, jobs: Sequence[Job]) -> list[list[int]]:
    """Deal jobs to the cores in turn. Returns lists of the cores that are in the same situation.

    They have jobs of the same sizes, and begin with weights for which as many earlier cores wait.
    """
    signs: list[list[object]] = [[] for _ in range(min(cores, len(jobs)))]
    seen = set[tuple[int, int]]()
    for first in range(0, len(jobs), cores):
        ranks: dict[tuple[int, int], int] = defaultdict(int)
        for core, job in enumerate(jobs[first : first + cores]):
            w = job.index, job.columns.start
            last = job.steps[-1].stop - job.steps[-1].start
            size = length(job.rows), length(job.columns), len(job.steps), last
            signs[core].append((size, min(RANKS, ranks[w]), w in seen))
            ranks[w] += 1
        seen |= set(ranks)
    found: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for core, sign in enumerate(signs):
        found[core % 2, *sign].append(core)  # every second core loads x first
    return list(found.values())


def length(part: slice) -> int:
    """Number of items in a slice of step 1."""
    return part.stop - part.start


@dataclass(slots=True)
class Load:
    """A load of a core: its bytes, those that HBM reads if the L2 lacks them, and keys of the blocks of all cores."""

    size: float
    fetched: float
    keys: list[int]


@dataclass(slots=True)
class Step:
    """A step of a job.

    Attributes:
        job: number of the job on its core.
        loads: its loads, in order.
        work_s: seconds of its matmuls.
        first, last: True for the first and the last step of the job.
        fenced: True if it waits for all stores of earlier jobs.
    """

    job: int
    loads: list[Load]
    work_s: float
    first: bool
    last: bool
    fenced: bool


@dataclass(slots=True)
class Piece:
    """Rows of a job's result that are drained and stored together.

    Attributes:
        job: number of the job on its core.
        drain_s: seconds of the drain.
        size: bytes to store.
        last: True for the last piece of the job.
    """

    job: int
    drain_s: float
    size: float
    last: bool


@dataclass(frozen=True)
class CoreSteps:
    """What each core of a group does: number of cores, steps, and pieces of results, both in order."""

    count: int
    steps: list[Step]
    pieces: list[Piece]


class ProductSteps:
    """Lists what the cores do in a product, and what the L2 has before it.

    loop: the product. target: chip and kernel library. jobs: all jobs, in the order in which they are dealt to cores.
    """

    def __init__(self, loop: ProductLoop, target: Target, jobs: Sequence[Job]) -> None:
        self.loop, self.target, self.jobs = loop, target, jobs
        self.bits = {"x": formats.bits(loop.x_format), "w": formats.bits(loop.w_format)}
        self.k = max(job.steps[-1].stop for job in jobs)
        self.keys: dict[tuple[str, int, int], int] = {}
        self.works: dict[tuple[int, int], float] = {}
        self.fetched: dict[tuple[str, int, int], float] = {}
        # Bytes of a row in a block of the L2: whole lines, or the whole row if its first load touches all lines
        depth = loop.cut.depth
        self.units = {
            of: max(LINE, depth * bits // 8) if (self.k - depth) * bits // 8 >= LINE else self.k * bits
            for of, bits in self.bits.items()
        }

    def key(self, of: str, index: int, start: int) -> int:
        """The first key of an operand's blocks; those of its later steps follow."""
        return self.keys.setdefault((of, index, start), len(self.keys) << 20)

    def l2(self) -> L2Blocks:
        """The L2 as it is before the product: it has x, as far as it fits."""
        loop, chip = self.loop, self.target.chip
        xs = {(job.rows.start, job.index): job for job in self.jobs}
        ws = {(job.columns.start, job.index): job for job in self.jobs}
        depth = {job.index: job.steps[-1].stop - job.steps[0].start for job in self.jobs}
        need = sum(length(job.rows) * depth[job.index] for job in xs.values()) * self.bits["x"] / 8 * (1 + loop.before)
        need += sum(length(job.columns) * depth[job.index] for job in ws.values()) * self.bits["w"] / 8 * loop.sides
        need += sum(length(job.rows) * length(job.columns) for job in self.jobs) * WIDE * loop.drains
        l2 = L2Blocks(chip.l2_bytes * self.target.library.l2_usable, need)
        if not chip.l2_bytes:
            return l2
        blocks: dict[int, float] = defaultdict(float)  # bytes of x by key
        for (start, index), job in sorted(xs.items()):
            for step in job.steps:
                at = (step.start - job.steps[0].start) * self.bits["x"] // 8 // self.units["x"]
                blocks[self.key("x", index, start) + at] += length(job.rows) * length(step) * self.bits["x"] / 8
        if loop.before:  # the op before wrote x before it was rounded, in this order too
            for key, size in blocks.items():
                l2.bring(-1 - key, size * loop.before)
        for key, size in blocks.items():
            if loop.before:
                l2.put(l2.missing(-1 - key, size * loop.before))
            l2.bring(key, size, loop.before > 0)
        for (start, index), job in xs.items():
            for number in range(-(-self.k // loop.span) if loop.span else 0):
                l2.bring(self.key("x scale", index, start) + number, WIDE * length(job.rows), True)
        return l2

    def work_s(self, step: slice) -> float:
        """Seconds of a step's matmuls: one for each scale of w in the step, and for each side."""
        loop, group, n = self.loop, self.loop.group, length(step)
        first = step.start % group if group else 0
        if (first, n) not in self.works:
            cuts = [0, *range(group - first, n, group), n] if group else [0, n]
            run = max(loop.x_format, loop.w_format, key=formats.bits)
            cycles = (
                matmul_cycles(self.target, loop.cut.rows, loop.cut.columns, b - a, run) for a, b in pairwise(cuts)
            )
            self.works[first, n] = loop.sides * float(sum(cycles)) / self.target.chip.clock_hz
        return self.works[first, n]

    def load(self, of: str, rows: int, job: Job, step: slice, bases: Sequence[int]) -> Load:
        """The load of one step's rows of x or of w. bases: first keys of the operands of all cores."""
        bits, place = self.bits[of], (of, step.start, step.stop)
        if place not in self.fetched:
            self.fetched[place] = fetched_bytes(*(-(-v * bits // 8) for v in (step.start, step.stop, self.k)))
        at = (step.start - job.steps[0].start) * bits // 8 // self.units[of]
        return Load(rows * length(step) * bits / 8, rows * self.fetched[place], [base + at for base in bases])

    def loads(self, same: Sequence[Job], w_first: bool, started: bool) -> Iterator[list[Load]]:
        """The loads of each step of a job. same: the jobs of all cores of a group. started: True after a first job."""
        loop, job, scale = self.loop, same[0], range(0)
        rows, columns = length(job.rows), loop.sides * length(job.columns)
        x_keys, xs_keys = ([*{self.key(of, j.index, j.rows.start) for j in same}] for of in ("x", "x scale"))
        w_keys, ws_keys = ([*{self.key(of, j.index, j.columns.start) for j in same}] for of in ("w", "w scale"))
        for step in job.steps:
            out = []
            if loop.group:
                numbers = range(step.start // loop.group, -(-step.stop // loop.group))
                if numbers != scale:
                    scale, size = numbers, WIDE * columns * len(numbers)
                    out.append(Load(size, size, [key + numbers.start for key in ws_keys]))
            x, w = [self.load("x", rows, job, step, x_keys)], [self.load("w", columns, job, step, w_keys)]
            if loop.span and (step is job.steps[0] or (loop.span < self.k and not step.start % loop.span)):
                x.append(Load(WIDE * rows, WIDE * rows, [key + step.start // loop.span for key in xs_keys]))
            out += [*w, *x] if w_first or not started else [*x, *w]
            started = True
            yield out

    def of(self, mine: Sequence[int]) -> CoreSteps:
        """What the cores of a group do, given by their numbers."""
        loop, cores, fences = self.loop, self.target.chip.cores, not self.target.library.persistent
        made = CoreSteps(len(mine), [], [])
        rounds = list(zip(*(self.jobs[core::cores] for core in mine), strict=True))
        for first in range(0, len(rounds), loop.cut.at_once):
            turn = rounds[first : first + loop.cut.at_once]
            loads = [[*self.loads(same, mine[0] % 2 > 0, number > 0)] for number, same in enumerate(turn, first)]
            for s in range(max(map(len, loads))):
                for number, same in enumerate(turn):
                    if s < len(loads[number]):
                        last, fenced = s == len(loads[number]) - 1, fences and first > 0 and s == number == 0
                        work = self.work_s(same[0].steps[s])
                        made.steps.append(Step(first + number, loads[number][s], work, s == 0, last, fenced))
            for number, same in enumerate(turn, first):
                made.pieces.extend(self.pieces(number, length(same[0].rows), length(same[0].columns)))
        return made

    def pieces(self, number: int, rows: int, columns: int) -> list[Piece]:
        """The pieces of a job's result."""
        loop, glu, out = self.loop, self.loop.sides > self.loop.drains, list[Piece]()
        for _ in range(loop.drains):
            for low in range(0, rows, loop.cut.drain_rows):
                n = (min(rows, low + loop.cut.drain_rows) - low) * columns
                cycles = vector_cycles(self.target.chip, n * (3 if glu else 1), n * glu)
                out.append(Piece(number, float(cycles) / self.target.chip.clock_hz, n * WIDE, False))
        out[-1].last = True
        return out
