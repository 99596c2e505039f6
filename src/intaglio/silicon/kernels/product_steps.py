"""ProductSteps: lists what the cores of a tiled matrix product load, multiply and store, in bytes and seconds.

product_loop.py computes the product's time from these lists. Cores that do the same work at the same times share one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from intaglio import formats
from intaglio.chips import Target
from intaglio.silicon.isa.cycles import matmul_cycles, vector_cycles
from intaglio.silicon.kernels.kernel import WIDE
from intaglio.silicon.kernels.l2_blocks import L2Blocks, fetched_bytes
from intaglio.silicon.kernels.tiling import Job, Tiling

FEW = 4_000  # steps of all jobs, up to which each core is followed by itself
MANY = 150_000  # steps of all jobs, from which cores with the same number of jobs are followed as one or a few
RANKS = 3  # of cores that begin with the same weights, so many are followed apart, and the others together


@dataclass(frozen=True, kw_only=True)
class ProductLoop:
    """Properties shared by all jobs of a kernel that computes one or several matrix products.

    Attributes:
        cut: sizes of tiles, steps and buffers.
        x_format, w_format: number formats of x and of w.
        group: number of consecutive weights of a row of w that share a scale; 0: w has no scales.
        span: number of consecutive values of a row of x that share a scale; 0: x has no scales.
        sides: 2 for a GLU pair, else 1.
        drains: how often a tile is drained: 1, or 2 if the sides of a GLU pair are stored apart.
        out_bytes: bytes of a value of the result.
        scattered: True if rows of the result are stored by index. These stores go to HBM and bypass the L2.
        before: bytes that the kernel before the product read through the L2, divided by the bytes of x that it wrote;
            0: no kernel has just written x.
    """

    cut: Tiling
    x_format: str
    w_format: str
    group: int = 0
    span: int = 0
    sides: int = 1
    drains: int = 1
    out_bytes: float = WIDE
    scattered: bool = False
    before: float = 0.0


def situations(cores: int, jobs: Sequence[Job]) -> list[list[int]]:
    """Returns lists of core numbers. The cores of a list do equal work at the same times, and are modelled as one core.

    Jobs are dealt to the cores in turn. In a product of at most FEW steps each core has a list of its own, which is
    exact. Otherwise the cores of a list have these things in common:

    - Their jobs have the same sizes.
    - In each round, the same number of earlier cores (counted up to RANKS) load the same weights as they do.
    - Their numbers are all even or all odd, since every second core loads x before w.

    In a product of more than MANY steps, the first two conditions are weaker: they have the same number of jobs, and
    the same number of earlier cores in the first round.
    """
    steps = sum(len(job.steps) for job in jobs)
    if steps <= FEW:
        return [[core] for core in range(min(cores, len(jobs)))]
    signs: list[list[Any]] = [[] for _ in range(min(cores, len(jobs)))]
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
    if steps > MANY:
        signs = [[len(sign), *sign[0][1:]] for sign in signs]
    found: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for core, sign in enumerate(signs):
        found[core % 2, *sign].append(core)  # every second core loads x first
    return list(found.values())


def length(part: slice) -> int:
    """Returns the number of integers in a slice start:stop, stop - start."""
    return part.stop - part.start


@dataclass(slots=True)
class Load:
    """One load that each core of a group makes.

    Each core may load its own data.

    Attributes:
        size: bytes that each core loads.
        fetched: bytes that HBM reads for one core if the L2 lacks them.
        keys: keys of the blocks in the L2 that these cores load, each block once.
    """

    size: float
    fetched: float
    keys: list[int]


@dataclass(slots=True)
class Step:
    """One step over K of a job: the loads of its operands, and its matmuls. Each side of a GLU pair has its own Step.

    Attributes:
        job: number of the job on its core.
        loads: the step's loads, in order.
        work_s: seconds of its matmuls.
        first, last: True for the first and the last Step of the job.
        fenced: True if its loads wait for all stores of earlier jobs.
        shared: True if its first load is the x of both sides of a GLU pair, so that its SRAM buffer is free only after
            the second side.
    """

    job: int
    loads: list[Load]
    work_s: float
    first: bool
    last: bool
    fenced: bool
    shared: bool


@dataclass(slots=True)
class Piece:
    """Some rows of a job's result that are drained (moved from accumulators to SRAM) and stored together.

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
    """The work of each core in a group of cores that do the same work at the same times.

    Attributes:
        count: number of cores in the group.
        steps: the steps of each core, in order.
        pieces: the pieces of results that each core drains and stores, in order.
    """

    count: int
    steps: list[Step]
    pieces: list[Piece]


class ProductSteps:
    """Lists the loads, matmuls and stores of each core in a matrix product, and models the L2 at its start.

    Args:
        loop: properties that all jobs of the product share.
        target: chip and kernel library.
        jobs: all jobs in the order in which they are dealt to the cores. A job is one tile of the result, for one part
            of K.
    """

    def __init__(self, loop: ProductLoop, target: Target, jobs: Sequence[Job]) -> None:
        self.loop, self.target, self.jobs = loop, target, jobs
        self.bits = {"x": formats.bits(loop.x_format), "w": formats.bits(loop.w_format)}
        self.k = max(job.steps[-1].stop for job in jobs)
        self.keys: dict[tuple[str, int, int], int] = {}
        self.works: dict[tuple[int, int], float] = {}
        self.places: dict[tuple[str, int, int], list[tuple[int, float]]] = {}

    def key(self, of: str, index: int, start: int) -> int:
        """Returns the key of the L2 block that holds an operand's rows from `start` on, for the first step over K.

        The blocks of later steps have the keys that follow.

        of: name of the operand, such as "x" or "w scale". index: number of the part of K, of the expert or of the head.
        start: number of the first row.
        """
        return self.keys.setdefault((of, index, start), len(self.keys) << 20)

    def l2(self) -> L2Blocks:
        """Returns a model of the L2 at the start of the product, as an L2Blocks.

        The L2 then holds x, as far as x fits. On a chip without an L2 it holds nothing.
        """
        loop, chip = self.loop, self.target.chip
        xs = {(job.rows.start, job.index): job for job in self.jobs}
        ws = {(job.columns.start, job.index): job for job in self.jobs}
        depth = {job.index: job.steps[-1].stop - job.steps[0].start for job in self.jobs}
        need = sum(length(job.rows) * depth[job.index] for job in xs.values()) * self.bits["x"] / 8 * (1 + loop.before)
        need += sum(length(job.columns) * depth[job.index] for job in ws.values()) * self.bits["w"] / 8 * loop.sides
        if not loop.scattered:
            results = sum(length(job.rows) * length(job.columns) for job in self.jobs)
            need += results * loop.out_bytes * loop.drains
        l2 = L2Blocks(chip.l2_bytes * self.target.library.l2_usable, need)
        if not chip.l2_bytes:
            return l2
        blocks: dict[int, float] = defaultdict(float)  # bytes of x by key
        for (start, index), job in sorted(xs.items()):
            for at, bytes_of_row in self.blocks("x", job):
                blocks[self.key("x", index, start) + at] += length(job.rows) * bytes_of_row
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
        """Returns the seconds of a step's matmuls, for one side of a GLU pair.

        There is one matmul for each group of columns of w that share a scale. step: the step's slice of K.
        """
        loop, group, n = self.loop, self.loop.group, length(step)
        first = step.start % group if group else 0
        if (first, n) not in self.works:
            cuts = [0, *range(group - first, n, group), n] if group else [0, n]
            run = max(loop.x_format, loop.w_format, key=formats.bits)
            cycles = (
                matmul_cycles(self.target, loop.cut.rows, loop.cut.columns, b - a, run) for a, b in pairwise(cuts)
            )
            self.works[first, n] = float(sum(cycles)) / self.target.chip.clock_hz
        return self.works[first, n]

    def blocks(self, of: str, job: Job) -> list[tuple[int, float]]:
        """Returns a list with one pair for each step: (number of an L2 block, bytes of each row in it).

        The block holds the operand's part for the step. A step loads only the cache lines that no earlier step has
        loaded. If there are none, its pair is (block number of the step before, 0.0). of: name of the operand, "x" or
        "w".
        """
        place, bits = (of, job.steps[0].start, job.steps[-1].stop), self.bits[of]
        if place not in self.places:
            out = self.places[place] = list[tuple[int, float]]()
            for i, step in enumerate(job.steps):
                ends = step.start, step.stop, self.k, length(job.steps[0])
                size = fetched_bytes(*(-(-v * bits // 8) for v in ends))
                out.append((i, size) if size or not i else (out[-1][0], 0.0))
        return self.places[place]

    def load(self, rows: int, bits: int, step: slice, block: tuple[int, float], bases: Sequence[int]) -> Load:
        """Returns the Load of one step's part of x or of w.

        Args:
            rows: number of rows that a core loads.
            bits: bits of a value.
            step: the step's slice of K.
            block: the item of blocks() for this step.
            bases: keys of the first blocks of the operand that the cores load, see key(); each key once.
        """
        return Load(rows * length(step) * bits / 8, rows * block[1], [base + block[0] for base in bases])

    def loads(self, same: Sequence[Job], w_first: bool, started: bool) -> Iterator[list[list[Load]]]:
        """Yields the Loads of each step of a job. They are grouped into lists, one for each side of a GLU pair.

        The first list has the Loads before the first side's matmul, the second those before the second side's. Without
        a GLU pair there is only the first. Loads are in the order in which a core makes them.

        Args:
            same: the jobs that the cores of a group compute at this time.
            w_first: True if w is loaded before x.
            started: False for the first job of a core, which loads w first in any case.
        """
        loop, job, scale = self.loop, same[0], range(0)
        rows, columns = length(job.rows), length(job.columns)
        x_keys, xs_keys = ([*{self.key(of, j.index, j.rows.start) for j in same}] for of in ("x", "x scale"))
        ws_keys, *w_keys = (
            [*{self.key(of, j.index, j.columns.start) for j in same}]
            for of in ("w scale", "w", "w of up")[: 1 + loop.sides]
        )
        for step, x_block, w_block in zip(job.steps, self.blocks("x", job), self.blocks("w", job), strict=True):
            out = []
            if loop.group:
                numbers = range(step.start // loop.group, -(-step.stop // loop.group))
                if numbers != scale:
                    scale, size = numbers, WIDE * columns * loop.sides * len(numbers)
                    out.append(Load(size, size, [key + numbers.start for key in ws_keys]))
            x = [self.load(rows, self.bits["x"], step, x_block, x_keys)]
            w = [self.load(columns, self.bits["w"], step, w_block, keys) for keys in w_keys]
            if loop.span and (step is job.steps[0] or (loop.span < self.k and not step.start % loop.span)):
                x.append(Load(WIDE * rows, WIDE * rows, [key + step.start // loop.span for key in xs_keys]))
            if w_first or not started:
                yield [[*out, *w, *x], *([] for _ in w[1:])]
            else:
                yield [[*out, *x, w[0]], *([load] for load in w[1:])]
            started = True

    def of(self, mine: Sequence[int]) -> CoreSteps:
        """Returns the CoreSteps of a group of cores.

        A CoreSteps has the number of cores, and the steps and pieces of each core. mine: the numbers of these cores,
        which do the same work at the same times.
        """
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
                        work, sides = self.work_s(same[0].steps[s]), enumerate(loads[number][s], 1)
                        made.steps.extend(
                            Step(
                                first + number,
                                own,
                                work,
                                s == 0 and side == 1,
                                last and side == loop.sides,
                                fenced and side == 1,
                                any(loads[number][s][side:]),  # the second side has loads of its own: x came first
                            )
                            for side, own in sides
                        )
            for number, same in enumerate(turn, first):
                made.pieces.extend(self.pieces(number, length(same[0].rows), length(same[0].columns)))
        return made

    def pieces(self, number: int, rows: int, columns: int) -> list[Piece]:
        """Returns a list of Pieces: the parts in which a job's result is drained to SRAM and stored.

        number: number of the job on its core. rows, columns: size of the result.
        """
        loop, glu, out = self.loop, self.loop.sides > self.loop.drains, list[Piece]()
        for _ in range(loop.drains):
            for low in range(0, rows, loop.cut.drain_rows):
                n = (min(rows, low + loop.cut.drain_rows) - low) * columns
                cycles = vector_cycles(self.target.chip, n * (3 if glu else 1), n * glu)
                out.append(Piece(number, float(cycles) / self.target.chip.clock_hz, n * loop.out_bytes, False))
        out[-1].last = True
        return out
