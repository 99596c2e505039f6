"""Chip simulator: executes the instruction streams of a chip's cores, with values and modelled time.

Event-driven. Each engine of a core is an in-order queue; engines synchronise through counters of finished instructions.
Transfers pass the L2, and HBM where they miss it (cache.py). Those in flight share L2, HBM and links equally; the port
of a core limits the rate of each. Programs that hardware would refuse or compute wrongly raise MachineError: checks.py
checks each stream before it runs; during the run, reads of unwritten bytes, cores that share bytes of HBM (sharing.py)
and messages that never come are found.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from operator import ge

import numpy as np

from intaglio.chips import Target
from intaglio.silicon.cache import Cache
from intaglio.silicon.checks import Blocked, check, cycle, location
from intaglio.silicon.isa import ENGINES, Cost, Instruction, Load, Receive, Send, Store
from intaglio.silicon.isa.rules import check_extra_instructions
from intaglio.silicon.memory import CoreMemory, MachineError, Memory, Region
from intaglio.silicon.sharing import SharedHbm
from intaglio.silicon.stream import Stream


@dataclass(frozen=True)
class Span:
    """One executed instruction, with its start and end in seconds since the start of the run.

    Attributes:
        core: number of the core.
        engine: name of the engine of the core that executed the instruction.
        start, end: seconds since the start of the run.
        name: class name of the instruction, such as "Load".
        site: name of the op's place in the model, such as layers.3.mlp.down_proj.
    """

    core: int
    engine: str
    start: float
    end: float
    name: str
    site: str


@dataclass
class RunResult:
    """Modelled time of one run of the machine, and counters summed over its cores.

    Attributes:
        seconds: time at which the last instruction ended.
        busy: {name of an engine: seconds in which it executed instructions}.
        stalls: {(idle engine, other engine): seconds}, how long an engine was idle because it waited for a result of
            the other engine. The other engine is "start" as long as no engine of the core has finished an instruction.
        bytes: bytes moved: "l2" between cores and L2, "hbm" between L2 and HBM, "link" between chips.
        spans: the executed instructions, in the order in which they ended; [] if the machine does not record them.
        label: purpose of this launch, such as "rounding", if a kernel has several launches; "" for its main launch.
    """

    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stalls: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    spans: list[Span] = field(default_factory=list)
    label: str = ""


@dataclass
class Core:
    """State of one core during a run. Times are in seconds since the start of the run.

    Attributes:
        stream: the core's Stream of instructions.
        memory: the memory spaces that the core can address.
        queues: for each engine (in the order of ENGINES), the list of its instructions in order.
        engines: indices into ENGINES of the engines that have instructions.
        started: for each engine, the number of instructions that it has started.
        finished: for each engine, the number of instructions whose results are visible.
        busy: for each engine, True while it executes an instruction.
        free_at: for each engine, the time at which its latest instruction started (if it is busy) or ended (if it is
            idle); 0 before the first.
        visible_at: for each engine, the time at which its latest result becomes visible; 0 before the first.
        last_finished: name of the engine of this core that was the last to finish an instruction; "": none has.
    """

    stream: Stream
    memory: CoreMemory
    queues: list[list[Instruction]]
    engines: list[int]
    started: list[int] = field(default_factory=lambda: [0] * len(ENGINES))
    finished: list[int] = field(default_factory=lambda: [0] * len(ENGINES))
    busy: list[bool] = field(default_factory=lambda: [False] * len(ENGINES))
    free_at: list[float] = field(default_factory=lambda: [0.0] * len(ENGINES))
    visible_at: list[float] = field(default_factory=lambda: [0.0] * len(ENGINES))
    last_finished: str = ""


@dataclass(eq=False)
class Transfer:
    """An instruction in progress that moves bytes between a core and HBM, or over a link.

    Bytes between a core and HBM move through the L2.

    Attributes:
        core: number of the core.
        chip: number of the core's chip.
        engine: number of the engine that executes the instruction.
        cost: the instruction's Cost.
        bytes_left: bytes that are still to be moved.
        start: time at which it started, in seconds since the start of the run.
        hbm_bytes: bytes that the L2 reads from HBM or writes back to HBM because of this transfer.
        ready: earliest time at which the result can be visible, in seconds since the start of the run. It is later than
            the end of the transfer if some bytes are in L2 lines that another transfer is still fetching from HBM.
    """

    core: int
    chip: int
    engine: int
    cost: Cost
    bytes_left: float
    start: float
    hbm_bytes: float = 0.0
    ready: float = 0.0


def l2_of(target: Target) -> Cache:
    """Returns a new, empty Cache that models a chip's L2. Its size is the part of the L2 that can hold operands."""
    return Cache(target.chip.l2_bytes * target.library.l2_usable)


class Machine:
    """Simulator of one chip, or of several chips of the same kind that exchange messages.

    Args:
        target: chip and kernel library.
        hbm: {chip number: the chip's HBM}; None: instructions are timed, but no values are computed.
        spans: True to list every executed instruction in the result.
        l2: {chip number: the chip's L2 as earlier runs left it}; None: all are empty.
        checks: False to run streams without check(), for streams that are timed many times.

    Raises ChipError if the chip's extra_instructions names anything but optional instructions.
    """

    def __init__(
        self, target: Target, hbm: Mapping[int, Memory] | None = None, spans: bool = False,
        l2: MutableMapping[int, Cache] | None = None, checks: bool = True,
    ) -> None:  # fmt: skip
        check_extra_instructions(target.chip)
        self.checks = checks
        self.target, self.chip, self.hbm, self.record_spans = target, target.chip, hbm, spans
        self.l2 = l2 if l2 is not None else defaultdict(lambda: l2_of(target))

    def run(self, streams: Sequence[Stream]) -> RunResult:
        """Execute all streams, each on a core of its own. Returns a RunResult with the modelled time and counters.

        Raises MachineError, which names the op's site, the engine and the instruction, in these cases:

        - there are more streams than cores;
        - check() refuses a stream;
        - an instruction reads bytes that were never written;
        - two cores access the same bytes of HBM, and one of them writes;
        - cores or chips wait for each other (deadlock).
        """
        most = max((sum(s.chip == c for s in streams) for c in {s.chip for s in streams}), default=0)
        if most > self.chip.cores:
            raise MachineError(f"{most} streams for one chip; {self.chip.name} has {self.chip.cores} cores")
        for stream in {id(s): s for s in streams}.values() if self.checks else ():
            check(self.target, stream)
        self.shared: dict[int, SharedHbm] = defaultdict(SharedHbm)  # by chip
        self.cores = [self._core(c, s) for c, s in enumerate(streams)]
        self.result, self.now = RunResult(), 0.0
        for chip in {s.chip for s in streams}:
            self.l2[chip].begin()
        # Events: (time, sequence number, core, engine, 0 if the engine becomes free or 1 if a result becomes visible)
        self.events: list[tuple[float, int, int, int, int]] = []
        self.event_count = 0
        self.transfers: list[Transfer] = []
        self.messages: dict[tuple[int, int, int], list[np.ndarray]] = defaultdict(list)  # by (sender, receiver, tag)
        for c in range(len(self.cores)):
            self._start_ready(c)
        while self.events or self.transfers:
            self._advance()
        self._check_all_ended()
        self.result.seconds = self.now
        return self.result

    def _core(self, number: int, stream: Stream) -> Core:
        hbm = self.hbm[stream.chip] if self.hbm is not None else Memory("hbm", None)
        queues: list[list[Instruction]] = [[] for _ in ENGINES]
        for i in stream.instructions:
            queues[ENGINES.index(i.engine)].append(i)
        timing_only = self.hbm is None  # no bytes are read or written, so none are allocated
        sram, acc = (0, 0) if timing_only else (self.chip.sram_bytes, self.chip.acc_bytes)

        def watch(region: Region, indices: np.ndarray, writes: bool) -> None:
            if did := self.shared[stream.chip].access(number, indices, writes):
                verb, other = "writes" if writes else "reads", self._other_user(number, region, did == "writes")
                raise MachineError(
                    f"core {number} {verb} {region}, which {other} {did} in the same run; cores have no order among "
                    "them, so give the bytes to one core or make it two runs"
                )

        return Core(stream, CoreMemory(hbm, sram, acc, watch), queues, [e for e, q in enumerate(queues) if q])

    def _other_user(self, core: int, region: Region, writes: bool) -> str:
        """Returns words for an error message that name another core that accessed `region`, and its instruction.

        Only other cores of the same chip are searched. Returns "another core" if none is found. core: number of the
        core that found the conflict. writes: True to look for a write, False to look for a read.
        """
        chip = self.cores[core].stream.chip
        for c, other in enumerate(self.cores):
            if c == core or other.stream.chip != chip:
                continue
            for engine, queue in enumerate(other.queues):
                for n, i in enumerate(queue[: other.started[engine]], 1):
                    if any(r.overlaps(region) for r in i.regions(writes)):
                        return f"core {c} (instruction {n} of {ENGINES[engine]}, {type(i).__name__})"
        return "another core"

    def _advance(self) -> None:
        """Advance the clock to the next event or the next end of a transfer, and process all that is due then."""
        rates = self._rates()
        ends = [self.now + t.bytes_left / r for t, r in zip(self.transfers, rates, strict=True)]
        first = min(ends, default=float("inf"))
        then = min(first, self.events[0][0]) if self.events else first
        for t, r in zip(self.transfers, rates, strict=True):
            t.bytes_left -= (then - self.now) * r
        self.now = then
        limit, running = then * (1 + 1e-12), self.transfers
        self.transfers = [t for t, end in zip(running, ends, strict=True) if end > limit]
        for t in (t for t, end in zip(running, ends, strict=True) if end <= limit):
            self._end(t.core, t.engine, t.start, t.cost, t.ready)
        while self.events and self.events[0][0] <= self.now:
            _, _, core, engine, visible = heapq.heappop(self.events)
            if visible:
                self.cores[core].finished[engine] += 1
                self.cores[core].last_finished = ENGINES[engine]
                self._start_ready(core)
            else:
                cost = self.cores[core].queues[engine][self.cores[core].started[engine] - 1].cost(self.target)
                self._end(core, engine, self.cores[core].free_at[engine], cost)

    def _rates(self) -> list[float]:
        """Returns the current rate in bytes/s of each transfer in self.transfers, as a list.

        A transfer over a link gets an equal share of the bandwidth of the chip's links. Any other transfer has the
        lowest of these rates:

        - the rate of its core's port;
        - an equal share of the L2's rate;
        - if it moves HBM bytes: an equal share of HBM's rate, divided by (HBM bytes / bytes of the transfer);
        - if its instruction has a minimum time: its bytes divided by this time.
        """
        users: dict[tuple[str, int], int] = defaultdict(int)
        for t in self.transfers:
            users[t.cost.resource, t.chip] += 1
            users["missed", t.chip] += t.hbm_bytes > 0
        shares = {  # of each (resource, chip)
            (of, chip): min(self.chip.port_rate, self.chip.l2_rate / n) if of == "hbm"
            else (self.chip.links.chip_bytes_per_s if of == "link" else self.chip.hbm_rate) / max(1, n)
            for (of, chip), n in users.items()
        }  # fmt: skip
        out = []
        for t in self.transfers:
            rate = shares[t.cost.resource, t.chip]
            if t.hbm_bytes:
                rate = min(rate, shares["missed", t.chip] * t.cost.bytes / t.hbm_bytes)
            if t.cost.cycles:
                rate = min(rate, t.cost.bytes * self.chip.clock_hz / t.cost.cycles)
            out.append(rate)
        return out

    def _schedule(self, time: float, core: int, engine: int, visible: int) -> None:
        self.event_count += 1
        heapq.heappush(self.events, (time, self.event_count, core, engine, visible))

    def _end(self, c: int, engine: int, start: float, cost: Cost, ready: float = 0.0) -> None:
        """Free an engine at the end of its instruction, and count what the instruction used. Returns nothing.

        The instruction's result becomes visible to other instructions cost.latency_s from now, but not before `ready`.

        Args:
            c: number of the core.
            engine: number of the engine.
            start: time at which the instruction started, in seconds since the start of the run.
            cost: what the instruction used.
            ready: earliest time at which the result is visible, in seconds since the start of the run.
        """
        core = self.cores[c]
        i = core.queues[engine][core.started[engine] - 1]
        core.busy[engine] = False
        core.free_at[engine] = self.now
        self.result.busy[i.engine] += self.now - start
        if cost.resource:
            self.result.bytes["l2" if cost.resource == "hbm" else cost.resource] += cost.bytes
        if self.record_spans:
            self.result.spans.append(Span(c, i.engine, start, self.now, type(i).__name__, core.stream.site))
        if isinstance(i, Send):
            self._deliver(c, i)
        # The counter counts in order, so a result is never visible before that of an earlier instruction.
        core.visible_at[engine] = max(core.visible_at[engine], self.now + cost.latency_s, ready)
        self._schedule(core.visible_at[engine], c, engine, 1)
        self._start_ready(c)

    def _deliver(self, c: int, i: Send) -> None:
        """Deliver the message of a finished Send to the receiving chip. Start the instructions that can start now.

        c: number of the sending core. i: the Send.
        """
        core = self.cores[c]
        values = core.memory.read(i.src) if self.hbm is not None else np.zeros((0, 0))
        self.messages[core.stream.chip, i.peer, i.tag].append(values)
        for other, receiver in enumerate(self.cores):
            if receiver.stream.chip == i.peer:
                self._start_ready(other)

    def _start_ready(self, c: int) -> None:
        """Start the next instruction on each idle engine of core number `c`, if it can start. Returns nothing.

        An instruction can start when each engine has finished as many instructions as the field `wait` demands. A
        Receive also needs its message to have arrived.
        """
        core = self.cores[c]
        for engine in core.engines:
            queue = core.queues[engine]
            if core.busy[engine] or core.started[engine] >= len(queue):
                continue
            i = queue[core.started[engine]]
            if all(map(ge, core.finished, i.wait)) and self._message_arrived(core, i):
                self._start(c, engine, i)

    def _message_arrived(self, core: Core, i: Instruction) -> bool:
        return not isinstance(i, Receive) or bool(self.messages[i.peer, core.stream.chip, i.tag])

    def _start(self, c: int, engine: int, i: Instruction) -> None:
        """Start instruction `i` on an engine of core number `c`: compute its values, schedule its end. Returns nothing.

        Values are computed only in a run with values. Raises MachineError if the instruction's run() raises it, or if
        the shape of a received message differs from the region for it. The error names the site (the op's place in the
        model), the engine and the instruction.
        """
        core = self.cores[c]
        idle = self.now - core.free_at[engine]
        if idle > 0:
            self.result.stalls[i.engine, core.last_finished or "start"] += idle
        core.started[engine] += 1
        core.busy[engine] = True
        if self.hbm is not None:
            try:
                if isinstance(i, Receive):
                    message = self.messages[i.peer, core.stream.chip, i.tag].pop(0)
                    if message.shape != (i.dst.rows, i.dst.cols):
                        rows, cols = message.shape
                        raise MachineError(f"dst is {i.dst}; the message of chip {i.peer} has shape [{rows}, {cols}]")
                    core.memory.write(i.dst, message)
                i.run(core.memory)
            except MachineError as e:
                raise MachineError(f"{location(core.stream, i)}: {e}") from None
        elif isinstance(i, Receive):
            self.messages[i.peer, core.stream.chip, i.tag].pop(0)
        cost = i.cost(self.target)
        core.free_at[engine] = self.now
        if cost.bytes:
            missed = ready = 0.0
            if cost.resource == "hbm":
                missed, part, ready = self._through_l2(core, i, cost)
                cost = replace(cost, latency_s=cost.latency_s * part)
            self.transfers.append(Transfer(c, core.stream.chip, engine, cost, cost.bytes, self.now, missed, ready))
        else:
            self._schedule(self.now + cost.cycles / self.chip.clock_hz, c, engine, 0)

    def _through_l2(self, core: Core, i: Instruction, cost: Cost) -> tuple[float, float, float]:
        """Record a transfer in the L2 model. Returns (HBM bytes, fraction that misses, time when the L2 has all lines).

        - HBM bytes: bytes that the L2 reads from HBM, or writes back to HBM, because of this transfer.
        - Fraction that misses: for a Load, the fraction of its bytes that the L2 fetches from HBM. The latency of the
          Load is this fraction of HBM's latency. (The L2's own latency is part of the launch overhead.) For any other
          instruction it is 1.
        - Time: for a Load, when the last of its lines arrives or arrived from HBM, in seconds since the start of the
          run. It may wait for lines that an earlier transfer is still fetching. For any other instruction it is 0.

        Gather and Scatter always miss the L2 in this model, since their addresses depend on values.
        """
        cache, part, ready = self.l2[core.stream.chip], 1.0, 0.0
        if isinstance(i, Load):
            missed = cache.access(i.src, writes=False, arrival=self.now + cost.latency_s)
            part, ready = min(1.0, cache.fetched / cost.bytes), cache.ready
        elif isinstance(i, Store):
            missed = cache.access(i.dst, writes=True)
        else:
            missed = float(cost.bytes)
        self.result.bytes["hbm"] += missed
        return missed, part, ready

    def _check_all_ended(self) -> None:
        """Raise MachineError (deadlock) if an instruction has not started although nothing runs any more."""
        blocked: dict[Hashable, Blocked] = {}
        for c, core in enumerate(self.cores):
            for engine, queue in enumerate(core.queues):
                if core.started[engine] < len(queue):
                    blocked[c, engine] = self._blocked(c, queue[core.started[engine]])
        if blocked:
            raise MachineError(f"deadlock: {cycle(blocked)}")

    def _blocked(self, c: int, i: Instruction) -> Blocked:
        """Returns a Blocked record about an instruction that cannot start, for the error message of a deadlock.

        The record says in words what the instruction waits for. It also has (core, engine) of the engine that has to
        act first, or None if the instruction is a Receive whose message no stream sends. c: number of the instruction's
        core.
        """
        core = self.cores[c]
        what = f"chip {core.stream.chip}, core {c}, {location(core.stream, i)} waits for "
        for e, n in enumerate(i.wait):
            if core.finished[e] < n:
                return Blocked(f"{what}{ENGINES[e]} to finish {n}", (c, e))
        assert isinstance(i, Receive)  # all else can start when its waits are met
        what, net = f"{what}chip {i.peer} to send tag {i.tag}", ENGINES.index("NET")
        for s, sender in enumerate(self.cores):
            left = sender.queues[net][sender.started[net] :] if sender.stream.chip == i.peer else []
            if any(isinstance(m, Send) and (m.peer, m.tag) == (core.stream.chip, i.tag) for m in left):
                return Blocked(what, (s, net))
        return Blocked(f"{what}, which no stream sends", None)
