"""Time of the instruction streams of a matrix product: the loop of all cores over their tiles and over steps of K.

The closed form of the streams of tiled.py. For each load and store of a core it finds when the transfer starts, how
many of its bytes are in the L2 then, and when it ends beside the other transfers in flight. The times of matmuls and
drains follow from these. Cores that do the same work at the same times are followed as one.
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
    """Returns two numbers: the seconds of a matrix product, and how much of its result was written to HBM.

    The modelled seconds are those of the product's instruction streams, from the first load to the last store, without
    launch overhead. The second number is the fraction of the result's bytes that were written to HBM by the end of the
    product. It is below 1 if the L2 still holds a part of the result; without an L2 it is 1.0.

    Args:
        target: chip and kernel library.
        loop: properties that all jobs share.
        jobs: the jobs of all cores, in the order in which they are dealt to the cores.
    """
    steps = ProductSteps(loop, target, jobs)
    cores = [_Cores(steps.of(mine)) for mine in situations(target.chip.cores, jobs)]
    run = _Loop(loop, target, steps.l2(), cores)
    seconds = run.run()
    return seconds, run.l2.gone / max(1.0, run.l2.stored) if target.chip.l2_bytes else 1.0


@dataclass(eq=False, slots=True)
class _Cores:
    """State of a group of cores that do the same work at the same times, and so are modelled as one core.

    All times are in seconds since the start of the product.

    Attributes:
        of: the number of cores in the group, and the steps and pieces of each core.
        loaded: number of loads of the current step that have ended.
        visible: for each step loaded so far, the time from which its operands can be used.
        latest: the time from which the operands of the latest load can be used.
        products: for each step computed so far, the time at which its matmuls end.
        done: {number of a job: the time at which its product is computed}.
        drained: for each piece drained so far, the time at which it is in SRAM.
        free: for each job drained so far, the time at which its accumulators are free.
        stored: for each piece stored so far, the time at which its store has ended.
        lanes: the time at which the vector lanes are free.
        loading, storing: True while a load, or a store, is in flight.
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
    """A group of transfers in flight that all run at the same rate.

    The transfers have in common how many bytes HBM moves for each byte that is transferred.

    Attributes:
        moved: number of bytes that a transfer would have moved by now if it had begun when the group was last empty.
        rate: current rate of each transfer in bytes/s.
        ends: a heap with a tuple for each transfer. Its items are: the value of `moved` at which the transfer ends; the
            transfer's number; its group of cores; True for a store; how many of these cores access bytes that the L2
            lacks; seconds from its end until its result can be used; the time at which blocks that other cores fetch
            have arrived.
    """

    moved: float = 0.0
    rate: float = 0.0
    ends: list[tuple[float, int, _Cores, bool, float, float, float]] = field(default_factory=list)


class _Loop:
    """Model of all cores computing their jobs: the current time, the contents of the L2, the transfers in flight."""

    def __init__(self, loop: ProductLoop, target: Target, l2: L2Blocks, cores: list[_Cores]) -> None:
        self.stages, self.scattered = loop.cut.stages * loop.sides, loop.scattered
        self.cut, self.chip, self.l2, self.cores = loop.cut, target.chip, l2, cores
        self.latency_s, self.delay_s = self.chip.constants.hbm_latency_s, self.chip.array_depth / self.chip.clock_hz
        self.now, self.number = 0.0, 0
        self.users, self.missing = 0, 0.0  # cores with a transfer, for each one; those whose transfer misses the L2
        self.flows: dict[float, _Flows] = defaultdict(_Flows)  # by HBM's bytes for each byte
        self.alarms: list[tuple[float, int, _Cores]] = []

    def run(self) -> float:
        """Run the model to its end. Returns the time at which the last store ends, in seconds since the start."""
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
        """Begin a transfer of `size` bytes on each core of the group `core`. Returns nothing.

        Args:
            core: the group of cores.
            size: bytes that each core transfers.
            store: True for a store, False for a load.
            missing: how many of the cores access bytes that the L2 lacks.
            missed: bytes that HBM moves per byte of the transfer.
            latency_s: seconds from the end of a load until its operands can be used.
            ready: the time at which blocks that other cores fetch have arrived.
        """
        flow = self.flows[missed]
        self.number += 1
        heapq.heappush(flow.ends, (flow.moved + size, self.number, core, store, missing, latency_s, ready))
        self.users += core.of.count
        self.missing += missing

    def end(self, flow: _Flows) -> _Cores:
        """End the transfer of `flow` that finishes first, at the current time. Returns its group of cores."""
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
        """Compute the times of all matmuls and drains that are known by now. Begin the transfers that can begin now.

        Returns nothing. If a transfer can begin later, core.alarm is set to that time.
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
        """Append to core.products the end time of each matmul whose end time has become known.

        Returns True if at least one end time was appended.
        """
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
        """Append to core.drained the end times of the drains that are known by now. Returns True if there are any.

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
        """Returns the earliest time in seconds at which these cores can begin their next load.

        The result is inf if the time is not yet known. The first load of a step waits until SRAM has a free stage
        (buffer of a step). If the step is fenced, it also waits for the stores of all earlier jobs.
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
        """Start to store the next piece of the result on each core of the group `core`. Returns nothing."""
        size, n = core.of.pieces[len(core.stored)].size, core.of.count
        if not self.chip.l2_bytes or self.scattered:
            self.begin(core, size, True, n, 1.0, 0.0, 0.0)
            return
        written = self.l2.store(size * n)
        missed = round(PARTS * written / (size * n)) / PARTS
        self.begin(core, size, True, n if missed else 0, missed, 0.0, 0.0)

    def load(self, core: _Cores) -> None:
        """Start the next transfer of operands into the SRAM of the cores of the group `core`. Returns nothing.

        A step has one or several loads of operands, which are done in order. The transfer consists of these loads:

        - On a chip without an L2: all loads of the current step.
        - If the L2 lacks some operands of the next load: only this load.
        - If the L2 has all operands of the next load: this load, and the loads of the step that follow it, up to the
          first load with operands that the L2 lacks.
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
