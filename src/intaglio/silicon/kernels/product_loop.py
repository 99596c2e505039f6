"""Time of the instruction streams of a matrix product: the loop of all cores over their tiles and over steps of K.

The closed form of the streams of tiled.py. It follows the transfers of the cores: when each load and store starts, what
the L2 has by then, and when it ends at the rates that the transfers in flight leave. Matmuls and drains follow from
these times. Cores that are in the same situation are followed once.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd, inf

from intaglio import formats
from intaglio.chips import Target
from intaglio.silicon.cache import LINE
from intaglio.silicon.isa.cycles import matmul_cycles, vector_cycles
from intaglio.silicon.kernels.kernel import WIDE
from intaglio.silicon.kernels.tiling import Job, Tiling

# One step's rows of x or of w: (bytes of one core, bytes that HBM reads for them, keys of the blocks of all cores)
Operand = tuple[float, float, list[int]]
RANKS = 3  # cores that load the same weights are followed apart: so many first ones, and the others together


@dataclass(frozen=True, kw_only=True)
class ProductLoop:
    """What the jobs of a product have in common.

    Attributes:
        cut: sizes of tiles, steps and buffers.
        x_format, w_format: formats of the operands.
        group: columns of a row of w that share a scale; 0: w has no scales.
        sides: 2 for a GLU pair, else 1.
        drains: drains of a tile: 1, or 2 if the sides of a GLU pair are stored apart.
        before: bytes of each value of x that the L2 has seen before the product: x itself, and what was read to
            compute it.
    """

    cut: Tiling
    x_format: str
    w_format: str
    group: int = 0
    sides: int = 1
    drains: int = 1
    before: float = 0.0

    def follow(self, target: Target, jobs: Sequence[Job]) -> tuple[float, float]:
        """Follow the streams of these jobs. Returns (seconds, part of the stored bytes that has left the L2).

        The seconds are from the first load to the last store, without launch overhead.
        """
        loop = _Loop(self, target, jobs)
        seconds = loop.run()
        return seconds, loop.written_part()


def fetched_bytes(start: int, stop: int, width: int) -> float:
    """Mean bytes of HBM's lines that a load of the bytes start .. stop - 1 of each row fetches, a row.

    width: bytes of a row. Rows need not start at a line. Lines that earlier loads of the same rows touch are not
    counted again, as in cache.py.
    """
    if width - (stop - start) < LINE:  # lines are neighbours, so the first load touches all
        return stop - start
    found = [
        -(-(stop + at) // LINE) - (start + at) // LINE - (start > 0) * ((start + at) % LINE > 0)
        - (start > 0) * (stop == width) * ((stop + at) % LINE > 0)
        for at in range(0, LINE, gcd(width, LINE))
    ]  # fmt: skip
    return LINE * sum(max(0, n) for n in found) / len(found)


@dataclass
class _Step:
    """A step of a job: its operands' bytes, blocks and matmul.

    Attributes:
        job: number of the job on its core.
        x, w: the operands.
        work: seconds of the matmul.
        first, last: True for the first and last step of the job.
        begins: True if it follows a fence.
    """

    job: int
    x: Operand
    w: Operand
    work: float
    first: bool
    last: bool
    begins: bool


@dataclass(eq=False)
class _Cores:
    """Cores in the same situation, and the times of one of them, in seconds since the start.

    Attributes:
        count: number of cores.
        w_first: True if weights are loaded first.
        steps: its steps, in the order of their loads.
        pieces: (job, seconds to drain, bytes to store, last of its job) of each piece of its results.
    """

    count: int
    w_first: bool
    steps: list[_Step]
    pieces: list[tuple[int, float, float, bool]]
    operand: int = 0  # number of loads of the step that have ended
    ends: list[float] = field(default_factory=list)  # of matmuls
    visible: list[float] = field(default_factory=list)  # of the operands of each step
    latest: float = 0.0  # when the latest load is visible
    products: dict[int, float] = field(default_factory=dict)  # when the product of each job is done
    ready: list[float] = field(default_factory=list)  # of drained pieces
    drained: list[float] = field(default_factory=list)  # of jobs
    stored: list[float] = field(default_factory=list)  # of pieces
    array: float = 0.0
    lanes: float = 0.0
    next: int = 0  # step
    loading: bool = False
    storing: bool = False
    alarm: float = inf


class _Memory:
    """What the L2 has: blocks of operands by key, the least recently used first."""

    def __init__(self, capacity: float, need: float) -> None:
        self.capacity, self.held, self.tight = capacity, 0.0, need > capacity
        self.blocks: OrderedDict[int, tuple[float, float, bool]] = OrderedDict()  # (arrival, bytes, dirty)
        self.results = 0
        self.stored = self.gone = 0.0  # bytes of results: stored, and written back to HBM since

    def put(self, key: int, size: float, dirty: bool, arrival: float = 0.0) -> None:
        """Put a block into the L2."""
        self.blocks[key] = arrival, size, dirty
        self.held += size

    def evict(self) -> float:
        """Evict blocks until the others fit. Returns the bytes that are written back to HBM."""
        written = 0.0
        while self.held > self.capacity and len(self.blocks) > 1:
            key, (_, size, dirty) = self.blocks.popitem(last=False)
            self.gone += size * (dirty and key < 0)
            self.held -= size
            written += size * dirty
        return written

    def load(self, keys: Sequence[int], size: float, arrival: float) -> tuple[int, float, float]:
        """Load blocks. Returns (blocks that were absent, when the others have arrived, bytes written back)."""
        absent, ready, blocks = 0, 0.0, self.blocks
        for key in keys:
            found = blocks.get(key)
            if found is None:
                absent += 1
                self.put(key, size, False, arrival)
            else:
                if found[0] > ready:
                    ready = found[0]
                if self.tight:
                    blocks.move_to_end(key)
        return absent, ready, self.evict() if absent and self.tight else 0.0

    def store(self, size: float) -> float:
        """Store results. Returns the bytes that are written back to HBM."""
        if not self.tight:
            return 0.0
        self.results -= 1
        self.stored += size
        self.put(self.results, size, True)
        return self.evict()


class _Loop:
    """The loop of all cores."""

    def __init__(self, loop: ProductLoop, target: Target, jobs: Sequence[Job]) -> None:
        self.loop, self.target, self.chip = loop, target, target.chip
        chip, self.hz = target.chip, target.chip.clock_hz
        self.latency_s, self.delay_s = chip.constants.hbm_latency_s, chip.array_depth / self.hz
        self.fenced = not target.library.persistent
        self.works: dict[tuple[int, int], float] = {}
        self.make_memory(jobs)
        self.cores = self.groups(jobs)
        self.now = 0.0
        self.users = self.missing = 0.0
        self.flows: dict[float, list] = {}  # by HBM bytes of each byte: [bytes moved so far, heap of ends]
        self.alarms: list[tuple[float, int, _Cores]] = []
        self.number = 0

    def make_memory(self, jobs: Sequence[Job]) -> None:
        loop = self.loop
        xs = dict.fromkeys((job.index, job.rows.start) for job in jobs)
        ws = dict.fromkeys((job.index, job.columns.start) for job in jobs)
        k = max(job.steps[-1].stop for job in jobs)
        self.bits = bits = formats.bits(loop.x_format), formats.bits(loop.w_format)
        self.k = k
        self.lines: dict[tuple[int, int, int], float] = {}
        # Bytes of a row in a block. Where all lines of a row are fetched by its first load, it is one block
        self.units = tuple(
            max(LINE, loop.cut.depth * b // 8) if (k - loop.cut.depth) * b // 8 >= LINE else k * b // 8 for b in bits
        )
        self.across = [-(-k * b // 8 // u) + 1 for b, u in zip(bits, self.units, strict=True)]
        self.x_key = {key: i * self.across[0] for i, key in enumerate(xs)}
        base = len(xs) * self.across[0]
        self.w_key = {key: base + i * self.across[1] for i, key in enumerate(ws)}
        x_rows: dict[tuple[int, int], Job] = {}
        x_bytes = w_bytes = out_bytes = 0.0
        seen_w = set[tuple[int, int]]()
        for job in jobs:
            rows, columns = job.rows.stop - job.rows.start, job.columns.stop - job.columns.start
            depth = job.steps[-1].stop - job.steps[0].start
            if (job.index, job.rows.start) not in x_rows:
                x_rows[job.index, job.rows.start] = job
                x_bytes += rows * depth * bits[0] / 8
            if (job.index, job.columns.start) not in seen_w:
                seen_w.add((job.index, job.columns.start))
                w_bytes += columns * depth * bits[1] / 8 * loop.sides
            out_bytes += rows * columns * WIDE * loop.drains
        chip, library = self.chip, self.target.library
        other = x_bytes * loop.before
        self.l2 = _Memory(chip.l2_bytes * library.l2_usable, other + x_bytes + w_bytes + out_bytes)
        if not chip.l2_bytes:
            return
        count = 0
        for (index, start), job in sorted(x_rows.items(), key=lambda i: (i[0][1], i[0][0])):
            rows = job.rows.stop - job.rows.start
            for key, size in self.blocks(self.x_key[index, start], job.steps, rows, bits[0], self.units[0]).items():
                if self.l2.tight and loop.before:
                    count -= 1
                    self.l2.put(count, size * loop.before, False)
                self.l2.put(key, size, loop.before > 0)
                self.l2.evict()
        self.l2.results = count

    def blocks(self, base: int, steps: Sequence[slice], rows: int, bits: int, unit: int) -> dict[int, float]:
        out: dict[int, float] = defaultdict(float)
        for step in steps:
            out[base + (step.start - steps[0].start) * bits // 8 // unit] += rows * (step.stop - step.start) * bits / 8
        return out

    def work(self, step: slice) -> float:
        """Seconds of a step's matmuls."""
        loop, group = self.loop, self.loop.group
        first = step.start % group if group else 0
        at = first, step.stop - step.start
        if at not in self.works:
            cuts = [0, *range(group - first, at[1], group), at[1]] if group else [0, at[1]]
            run = max(loop.x_format, loop.w_format, key=formats.bits)
            self.works[at] = loop.sides * sum(
                float(matmul_cycles(self.target, loop.cut.rows, loop.cut.columns, b - a, run)) / self.hz
                for a, b in pairwise(cuts)
            )
        return self.works[at]

    def groups(self, jobs: Sequence[Job]) -> list[_Cores]:
        """Deal jobs to the cores, and join the cores that are in the same situation."""
        cores = self.chip.cores
        signs = [list[object]() for _ in range(min(cores, len(jobs)))]
        seen_x, seen_w = set[tuple[int, int]](), set[tuple[int, int]]()
        for first in range(0, len(jobs), cores):
            turn = jobs[first : first + cores]
            ranks: dict[tuple[int, int], int] = defaultdict(int)
            for core, job in enumerate(turn):
                w, x = (job.index, job.columns.start), (job.index, job.rows.start)
                last = job.steps[-1]
                shape = (
                    job.rows.stop - job.rows.start,
                    job.columns.stop - job.columns.start,
                    len(job.steps),
                    last.stop - last.start,
                )
                signs[core].append((shape, min(RANKS, ranks[w]), w in seen_w, x in seen_x))
                ranks[w] += 1
            seen_w |= set(ranks)
            seen_x |= {(job.index, job.rows.start) for job in turn}
        if self.chip.l2_bytes:
            for core, sign in enumerate(signs):
                sign.append(core % 2)
        found: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for core, sign in enumerate(signs):
            found[tuple(sign)].append(core)
        return [self.core(mine, jobs) for mine in found.values()]

    def core(self, mine: Sequence[int], jobs: Sequence[Job]) -> _Cores:
        loop, steps, pieces, cores = self.loop, list[_Step](), list[tuple[int, float, float, bool]](), self.chip.cores
        turns = [[jobs[c] for c in range(first, len(jobs), cores)] for first in mine]
        rounds = list(zip(*turns, strict=True))
        for first in range(0, len(rounds), loop.cut.at_once):
            group = rounds[first : first + loop.cut.at_once]
            for s in range(max(len(same[0].steps) for same in group)):
                for number, same in enumerate(group):
                    job = same[0]
                    if s >= len(job.steps):
                        continue
                    step = job.steps[s]
                    rows, columns = job.rows.stop - job.rows.start, job.columns.stop - job.columns.start
                    begin = job.steps[0].start
                    x = self.operand(rows, step, begin, 0, {self.x_key[j.index, j.rows.start] for j in same})
                    w = self.operand(
                        columns * loop.sides, step, begin, 1, {self.w_key[j.index, j.columns.start] for j in same}
                    )
                    steps.append(
                        _Step(
                            first + number,
                            x,
                            w,
                            self.work(step),
                            s == 0,
                            s == len(job.steps) - 1,
                            self.fenced and s == 0 and number == 0 and first > 0,
                        )
                    )
            for number, same in enumerate(group):
                job = same[0]
                rows, columns = job.rows.stop - job.rows.start, job.columns.stop - job.columns.start
                for side in range(loop.drains):
                    for low in range(0, rows, loop.cut.drain_rows):
                        size = (min(rows, low + loop.cut.drain_rows) - low) * columns
                        glu = loop.sides > loop.drains
                        drain = float(vector_cycles(self.chip, size * (3 if glu else 1), size * glu)) / self.hz
                        last = low + loop.cut.drain_rows >= rows and side == loop.drains - 1
                        pieces.append((first + number, drain, size * WIDE, last))
        return _Cores(len(mine), bool(mine[0] % 2), steps, pieces)

    def operand(self, rows: int, step: slice, first: int, which: int, bases: set[int]) -> Operand:
        """A step's operand: `rows` rows of x or of w (which: 0 or 1) of the job whose K begins at `first`."""
        if (step.start, step.stop, which) not in self.lines:
            bits = self.bits[which]
            a, b, width = (-(-v * bits // 8) for v in (step.start, step.stop, self.k))
            self.lines[step.start, step.stop, which] = fetched_bytes(a, b, width)
        n, at = step.stop - step.start, (step.start - first) * self.bits[which] // 8 // self.units[which]
        return rows * n * self.bits[which] / 8, rows * self.lines[step.start, step.stop, which], [b + at for b in bases]

    def run(self) -> float:
        """Seconds until the last store has ended."""
        for core in self.cores:
            self.advance(core)
        flows, chip = self.flows, self.chip
        while True:
            rate = min(chip.port_rate, chip.l2_rate / self.users) if self.users else inf
            share = chip.hbm_rate / self.missing if self.missing else inf
            then, which = self.alarms[0][0] if self.alarms else inf, -1.0
            for missed, flow in flows.items():
                if flow[1]:
                    flow[2] = min(rate, share / missed) if missed else rate
                    end = self.now + max(0.0, flow[1][0][0] - flow[0]) / flow[2]
                    if end <= then:
                        then, which = end, missed
            if then == inf:
                break
            for flow in flows.values():
                if flow[1]:
                    flow[0] += (then - self.now) * flow[2]
            self.now = then
            if which >= 0:
                _, _, core, store, missing, latency_s, ready = heapq.heappop(flows[which][1])
                self.users -= core.count
                self.missing -= missing
                if not flows[which][1]:
                    flows[which][0] = 0.0
                if self.missing < 1e-6:
                    self.missing = 0.0
                if store:
                    core.storing = False
                    core.stored.append(then)
                else:
                    self.loaded(core, then + latency_s, ready)
            else:
                _, _, core = heapq.heappop(self.alarms)
                core.alarm = inf
            self.advance(core)
        for core in self.cores:
            assert len(core.stored) == len(core.pieces), (len(core.stored), len(core.pieces))
        return max(core.stored[-1] for core in self.cores)

    def begin(self, core: _Cores, size: float, store: bool, missing: float, missed: float, latency_s: float,
              ready: float) -> None:  # fmt: skip
        """Begin a transfer of `size` bytes of each core."""
        flow = self.flows.setdefault(missed, [0.0, [], 0.0])
        self.number += 1
        heapq.heappush(flow[1], (flow[0] + size, self.number, core, store, missing, latency_s, ready))
        self.users += core.count
        self.missing += missing

    def loaded(self, core: _Cores, visible: float, ready: float) -> None:
        core.loading = False
        core.latest = max(core.latest, visible, ready)
        core.operand += 1
        if core.operand == 2:
            core.visible.append(core.latest)
            core.operand = 0
            core.next += 1

    def advance(self, core: _Cores) -> None:
        """Work out the matmuls and drains whose operands' times are known; begin transfers that can begin."""
        loop, now = self.loop, self.now
        accs, steps, pieces = loop.cut.at_once * loop.cut.banks, core.steps, core.pieces
        ends, visible, ready, stored = core.ends, core.visible, core.ready, core.stored
        changed = True
        while changed:
            changed = False
            while len(ends) < len(visible):
                step = steps[len(ends)]
                start = max(core.array, visible[len(ends)])
                if step.first and step.job >= accs:
                    if len(core.drained) <= step.job - accs:
                        break
                    start = max(start, core.drained[step.job - accs])
                core.array = start + step.work
                ends.append(core.array)
                if step.last:
                    core.products[step.job] = core.array
                changed = True
            while len(ready) < len(pieces):
                job, drain, _, last = pieces[len(ready)]
                q = len(ready) - 2
                if job not in core.products or q >= len(stored):
                    break
                core.lanes = max(core.lanes, core.products[job], stored[q] if q >= 0 else 0.0) + drain
                ready.append(max(core.lanes + self.delay_s, ready[-1] if ready else 0.0))
                if last:
                    core.drained.append(ready[-1])
                changed = True
        alarm = inf
        if not core.storing and len(stored) < len(ready):
            at = ready[len(stored)]
            if at <= now:
                core.storing = True
                self.store(core)
            else:
                alarm = at
        if not core.loading and core.next < len(steps):
            step, n = steps[core.next], core.next - loop.cut.stages
            at = 0.0
            if n >= 0:
                at = ends[n] if n < len(ends) else inf
            if step.begins:
                done = len(stored)
                at = max(at, now) if done and pieces[done - 1][0] == step.job - 1 and pieces[done - 1][3] else inf
            if core.operand or at <= now:
                core.loading = True
                self.load(core, step)
            else:
                alarm = min(alarm, at)
        if alarm < core.alarm:
            core.alarm = alarm
            self.number += 1
            heapq.heappush(self.alarms, (alarm, self.number, core))

    def written_part(self) -> float:
        """Part of the stored bytes that the L2 has written back to HBM."""
        if not self.chip.l2_bytes:
            return 1.0
        return self.l2.gone / max(1.0, self.l2.stored)

    def store(self, core: _Cores) -> None:
        size, n = core.pieces[len(core.stored)][2], core.count
        if not self.chip.l2_bytes:
            self.begin(core, size, True, n, 1.0, 0.0, 0.0)
            return
        written = self.l2.store(size * n)
        self.begin(core, size, True, n if written else 0, round(8 * written / (size * n)) / 8, 0.0, 0.0)

    def load(self, core: _Cores, step: _Step) -> None:
        """Begin the next load of a step: of x or of w, or of both if neither waits for HBM."""
        order = (step.w, step.x) if core.w_first or not core.next else (step.x, step.w)
        n = core.count
        if not self.chip.l2_bytes:
            core.operand += 1
            self.begin(core, step.x[0] + step.w[0], False, n, 1.0, self.latency_s, 0.0)
            return
        size, lines, keys = order[core.operand]
        absent, ready, written = self.l2.load(keys, lines, self.now + self.latency_s)
        if absent:
            missed = max(1, round(8 * (absent * lines + written) / (absent * size))) / 8
            self.begin(core, size, False, absent, missed, self.latency_s * min(1.0, lines / size), ready)
            return
        self.begin(core, size, False, 0.0, 0.0, 0.0, ready)
