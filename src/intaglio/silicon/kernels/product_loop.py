"""Time of the instruction streams of a matrix product: the loop of all cores over their tiles and over steps of K.

The closed form of the streams of tiled.py. It finds for each load and store of a core when it starts, which of its
bytes the L2 has then, and when it ends beside the other transfers in flight. The times of matmuls and drains follow
from these. Cores in the same situation are followed as one.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from intaglio.chips import Target
from intaglio.silicon.kernels.l2_blocks import L2Blocks
from intaglio.silicon.kernels.product_steps import CoreSteps, ProductLoop, ProductSteps, situations
from intaglio.silicon.kernels.tiling import Job

ROUNDING = 1e-12  # relative error of times in float64
PARTS = 8  # HBM's bytes of a transfer are rounded to such parts of its size


def product_seconds(target: Target, loop: ProductLoop, jobs: Sequence[Job]) -> tuple[float, float]:
    """The time of a product's streams, as a pair (seconds, fraction of the stored bytes that has left the L2).

    The seconds are from the first load to the last store, without launch overhead. The fraction is 1.0 on a chip
    without an L2.

    Args:
        target: chip and kernel library.
        loop: what the jobs have in common.
        jobs: the jobs of all cores, in the order in which they are dealt to them.
    """
    steps = ProductSteps(loop, target, jobs)
    cores = [_Cores(steps.of(mine)) for mine in situations(target.chip.cores, jobs)]
    run = _Loop(loop, target, steps.l2(), cores)
    seconds = run.run()
    return seconds, run.l2.gone / max(1.0, run.l2.stored) if target.chip.l2_bytes else 1.0


@dataclass(eq=False, slots=True)
class _Cores:
    """Cores in the same situation, followed as one: what each does, and when. Times are seconds since the start.

    Attributes:
        of: the number of cores, their steps and pieces.
        loaded: number of loads of the current step that have ended.
        visible: for each step loaded so far, when its operands can be used.
        latest: when the operands of the latest load can be used.
        products: for each step computed so far, when its matmuls end.
        done: {number of a job: when its product is computed}.
        drained: for each piece drained so far, when it is in SRAM.
        free: for each job drained so far, when its accumulators are free.
        stored: for each piece stored so far, when its store has ended.
        lanes: when the vector lanes are free.
        loading, storing: True while a transfer is in flight.
        alarm: the next time at which a transfer may begin; inf if it is not known.
    """

    of: CoreSteps
    loaded: int = 0
    visible: list[float] = field(default_factory=list)
    latest: float = 0.0
    products: list[float] = field(default_factory=list)
    done: dict[int, float] = field(default_factory=dict)
    drained: list[float] = field(default_factory=list)
    free: list[float] = field(default_factory=list)
    stored: list[float] = field(default_factory=list)
    lanes: float = 0.0
    loading: bool = False
    storing: bool = False
    alarm: float = inf


@dataclass(slots=True)
class _Flows:
    """Transfers in flight that have the same rate: for each of their bytes HBM moves the same number of bytes.

    Attributes:
        moved: bytes that a transfer has moved that was in flight from the beginning.
        rate: bytes/s of each transfer now.
        ends: a heap of transfers, each a tuple: value of `moved` at which it ends; its number; its cores; True for a
            store; number of its cores whose bytes the L2 lacks; seconds from its end until its result can be used; when
            the blocks have arrived that other cores fetch.
    """

    moved: float = 0.0
    rate: float = 0.0
    ends: list[tuple[float, int, _Cores, bool, float, float, float]] = field(default_factory=list)


class _Loop:
    """The loop of all cores over their jobs: the time, what the L2 holds, and the transfers in flight."""

    def __init__(self, loop: ProductLoop, target: Target, l2: L2Blocks, cores: list[_Cores]) -> None:
        self.stages, self.scattered = loop.cut.stages * loop.sides, loop.scattered
        self.cut, self.chip, self.l2, self.cores = loop.cut, target.chip, l2, cores
        self.latency_s, self.delay_s = self.chip.constants.hbm_latency_s, self.chip.array_depth / self.chip.clock_hz
        self.now, self.number = 0.0, 0
        self.users, self.missing = 0, 0.0  # cores with a transfer, for each one; those whose transfer misses the L2
        self.flows: dict[float, _Flows] = defaultdict(_Flows)  # by HBM's bytes for each byte
        self.alarms: list[tuple[float, int, _Cores]] = []

    def run(self) -> float:
        """Follow the loop to its end. Returns the seconds until the last store has ended."""
        for core in self.cores:
            self.advance(core)
        chip = self.chip
        while True:
            then, first = self.alarms[0][0] if self.alarms else inf, None
            rate = min(chip.port_rate, chip.l2_rate / self.users) if self.users else inf
            share = chip.hbm_rate / self.missing if self.missing else inf
            running = [(missed, flow) for missed, flow in self.flows.items() if flow.ends]
            for missed, flow in running:
                flow.rate = min(rate, share / missed) if missed else rate
                end = self.now + max(0.0, flow.ends[0][0] - flow.moved) / flow.rate
                # Of transfers that end together, the one that began first ends first
                if end < then * (1 - ROUNDING) or (
                    end <= then * (1 + ROUNDING) and (first is None or flow.ends[0][1] < first.ends[0][1])
                ):
                    then, first = end, flow
            if then == inf:
                return max(core.stored[-1] for core in self.cores)
            for _, flow in running:
                flow.moved += (then - self.now) * flow.rate
            self.now = then
            if first is not None:
                core = self.end(first)
            else:
                _, _, core = heapq.heappop(self.alarms)
                core.alarm = inf
            self.advance(core)

    def begin(
        self, core: _Cores, size: float, store: bool, missing: float, missed: float, latency_s: float, ready: float
    ) -> None:
        """Begin a transfer of `size` bytes for each of the cores `core`. Returns nothing.

        store: True for a store, False for a load. missing: number of the cores whose bytes the L2 lacks. missed: bytes
        that HBM moves for each byte of the transfer. latency_s: seconds from the end of a load until its operands can
        be used. ready: when the blocks have arrived that other cores fetch.
        """
        flow = self.flows[missed]
        self.number += 1
        heapq.heappush(flow.ends, (flow.moved + size, self.number, core, store, missing, latency_s, ready))
        self.users += core.of.count
        self.missing += missing

    def end(self, flow: _Flows) -> _Cores:
        """End the transfer of `flow` that is the first to end. Returns its cores."""
        _, _, core, store, missing, latency_s, ready = heapq.heappop(flow.ends)
        self.users -= core.of.count
        self.missing -= missing
        if not flow.ends:
            flow.moved = 0.0
        if store:
            core.storing = False
            core.stored.append(self.now)
            return core
        core.loading = False
        core.latest = max(core.latest, self.now + latency_s, ready)  # loads become visible in order
        core.loaded += 1
        while len(core.visible) < len(core.of.steps):
            if core.loaded < len(core.of.steps[len(core.visible)].loads):
                break
            core.visible.append(core.latest)
            core.loaded = 0
        return core

    def advance(self, core: _Cores) -> None:
        """Work out the matmuls and drains whose operands' times are known, and begin the transfers that can begin.

        Returns nothing. For a transfer that can begin later, core.alarm is set.
        """
        while self.multiply(core) or self.drain(core):
            pass
        alarm, stored = inf, core.stored
        if not core.storing and len(stored) < len(core.drained):
            alarm = core.drained[len(stored)]
            if alarm <= self.now:
                core.storing, alarm = True, inf
                self.store(core)
        if not core.loading and len(core.visible) < len(core.of.steps):
            at = self.load_begins(core)
            if at <= self.now:
                core.loading = True
                self.load(core)
            else:
                alarm = min(alarm, at)
        if alarm < core.alarm:
            core.alarm = alarm
            self.number += 1
            heapq.heappush(self.alarms, (alarm, self.number, core))

    def multiply(self, core: _Cores) -> bool:
        """Add to core.products the times of matmuls that can be worked out now. Returns True if there are any."""
        before, products, accs = len(core.products), core.products, self.cut.at_once * self.cut.banks
        while len(products) < len(core.visible):
            step = core.of.steps[len(products)]
            start = max(products[-1] if products else 0.0, core.visible[len(products)])
            if step.first and step.job >= accs:
                if len(core.free) <= step.job - accs:
                    break
                start = max(start, core.free[step.job - accs])
            products.append(start + step.work_s)
            if step.last:
                core.done[step.job] = products[-1]
        return len(products) > before

    def drain(self, core: _Cores) -> bool:
        """Add to core.drained the times of drains that can be worked out now. Returns True if there are any.

        SRAM holds two pieces, so a drain waits until the piece before the last has been stored.
        """
        before, drained, stored = len(core.drained), core.drained, core.stored
        while len(drained) < len(core.of.pieces):
            piece, room = core.of.pieces[len(drained)], len(drained) - 2
            if piece.job not in core.done or room >= len(stored):
                break
            core.lanes = max(core.lanes, core.done[piece.job], stored[room] if room >= 0 else 0.0) + piece.drain_s
            drained.append(core.lanes + self.delay_s)
            if piece.last:
                core.free.append(drained[-1])
        return len(drained) > before

    def load_begins(self, core: _Cores) -> float:
        """The earliest time at which the next load of these cores may begin, in seconds; inf if it is not known yet.

        A step's first load waits until SRAM has a free stage and, if the step is fenced, for the stores of earlier
        jobs.
        """
        if core.loaded:
            return 0.0
        number, at = len(core.visible), 0.0
        if number >= self.stages:
            used = number - self.stages + core.of.steps[number].shared
            at = core.products[used] if used < len(core.products) else inf
        step = core.of.steps[number]
        if step.fenced:
            last = core.of.pieces[len(core.stored) - 1] if core.stored else None
            at = at if last and last.last and last.job == step.job - 1 else inf
        return at

    def store(self, core: _Cores) -> None:
        """Begin to store the next piece of these cores. Returns nothing."""
        size, n = core.of.pieces[len(core.stored)].size, core.of.count
        if not self.chip.l2_bytes or self.scattered:
            self.begin(core, size, True, n, 1.0, 0.0, 0.0)
            return
        written = self.l2.store(size * n)
        missed = round(PARTS * written / (size * n)) / PARTS
        self.begin(core, size, True, n if missed else 0, missed, 0.0, 0.0)

    def load(self, core: _Cores) -> None:
        """Begin the next load of these cores. Returns nothing.

        Loads of a step that the L2 has, and without an L2 all loads of a step, are one transfer.
        """
        loads, n = core.of.steps[len(core.visible)].loads, core.of.count
        if not self.chip.l2_bytes:
            core.loaded = len(loads) - 1
            self.begin(core, sum(load.size for load in loads), False, n, 1.0, self.latency_s, 0.0)
            return
        load = loads[core.loaded]
        absent, read, ready, written = self.l2.load(load.keys, load.fetched, self.now + self.latency_s)
        if absent:
            missed = max(1, round(PARTS * (read + written) / absent / load.size)) / PARTS
            latency_s = self.latency_s * min(1.0, read / absent / load.size)
            late = self.now + self.latency_s if read < absent * load.fetched else 0.0
            self.begin(core, load.size, False, min(n, absent), missed, latency_s, max(ready, late))
            return
        size = load.size
        while core.loaded + 1 < len(loads) and self.l2.has(loads[core.loaded + 1].keys, loads[core.loaded + 1].fetched):
            core.loaded += 1  # loads that the L2 has follow each other at one rate
            load = loads[core.loaded]
            size, ready = size + load.size, max(ready, self.l2.load(load.keys, load.fetched, self.now)[2])
        self.begin(core, size, False, 0, 0.0, 0.0, ready)
