"""The machine: runs the streams of a chip's cores, with values and a clock, and refuses what hardware would refuse.

Event-driven. Engines are in-order queues joined by their counters; HBM and links are shared by whoever uses them at the
moment, in equal parts, each core through its own port.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from intaglio.chips import ChipSpec
from intaglio.silicon.instruction import ENGINES, Cost, Instruction
from intaglio.silicon.instructions import Receive, Send
from intaglio.silicon.kernel import Stream
from intaglio.silicon.memory import MachineError, Memory, Region, Spaces


@dataclass(frozen=True)
class Span:
    """An instruction on an engine: when it started and ended, in seconds."""

    core: int
    engine: str
    start: float
    end: float
    name: str
    site: str


@dataclass
class Run:
    """What came of it. `busy` seconds by engine, and `stalls` by (engine, what it waited for), summed over cores."""

    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stalls: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    spans: list[Span] = field(default_factory=list)


@dataclass
class Core:
    """One core at work."""

    stream: Stream
    spaces: Spaces
    queues: list[list[Instruction]]
    head: list[int] = field(default_factory=lambda: [0] * len(ENGINES))  # started
    done: list[int] = field(default_factory=lambda: [0] * len(ENGINES))  # finished, results there
    busy: list[bool] = field(default_factory=lambda: [False] * len(ENGINES))
    free_at: list[float] = field(default_factory=lambda: [0.0] * len(ENGINES))
    last: str = ""  # the engine whose counter moved last


@dataclass
class Transfer:
    core: int
    engine: int
    cost: Cost
    left: float
    start: float


def check(spec: ChipSpec, stream: Stream) -> None:
    """Refuse a stream that leaves its memory, or in which two engines touch bytes with no order between them. Raises
    MachineError naming site, engine and instruction."""
    limits = {"sram": spec.sram_bytes, "acc": spec.acc_bytes}
    clocks: list[list[list[int]]] = [[[0] * len(ENGINES)] for _ in ENGINES]  # of each engine's n-th: what it knows done
    seen: dict[str, dict[tuple[int, int], list[tuple[int, int, bool]]]] = {"sram": {}, "acc": {}, "hbm": {}}
    for i in stream.instructions:
        engine = ENGINES.index(i.engine)
        known = list(clocks[engine][-1])
        for other, n in enumerate(i.wait):
            if n < len(clocks[other]):
                known = [max(a, b) for a, b in zip(known, clocks[other][n], strict=True)]
                known[other] = max(known[other], n)
        number = len(clocks[engine])
        for region, writes in [(r, False) for r in i.regions(False)] + [(r, True) for r in i.regions(True)]:
            limit = limits.get(region.space)
            if limit is not None and region.span[1] > limit:
                raise MachineError(
                    f"{where(stream, i)}: {region.space} overflow: {region} ends at byte {region.span[1]:,}, "
                    f"{spec.name} has {limit:,} a core; take smaller tiles or fewer stages"
                )
            _race(stream, i, seen[region.space], region, writes, engine, number, known)
        clocks[engine].append(known)


def _race(
    stream: Stream, i: Instruction, seen: dict[tuple[int, int], list[tuple[int, int, bool]]], region: Region,
    writes: bool, engine: int, number: int, known: list[int],
) -> None:  # fmt: skip
    """Compare with who touched these bytes before; note the access."""
    low, high = region.span
    for (a, b), uses in seen.items():
        if a < high and low < b and (region.space != "hbm" or any(w for _, _, w in uses) or writes):
            for other, n, wrote in uses:
                if (writes or wrote) and other != engine and known[other] < n:
                    verb = "writes" if writes else "reads"
                    did = "writes" if wrote else "reads"
                    raise MachineError(
                        f"{where(stream, i)}: race: it {verb} {region}, which instruction {n} of {ENGINES[other]} "
                        f"{did}, and no wait orders the two; it waits for {waits(i) or 'nothing'}"
                    )
    entries = seen.setdefault((low, high), [])
    entries[:] = [e for e in entries if not (e[0] == engine and e[2] == writes)]
    entries.append((engine, number, writes))


def where(stream: Stream, i: Instruction) -> str:
    return f"site {stream.site}, engine {i.engine}, instruction {type(i).__name__}"


def waits(i: Instruction) -> str:
    return ", ".join(f"{ENGINES[e]} to finish {n}" for e, n in enumerate(i.wait) if n)


class Machine:
    """A chip (or several, if streams say so) running streams. `hbm` is each chip's memory; values are computed unless
    it is None."""

    def __init__(self, spec: ChipSpec, hbm: Mapping[int, Memory] | None = None, spans: bool = False) -> None:
        self.spec, self.hbm, self.record = spec, hbm, spans
        self.rates = {
            "hbm": (spec.hbm_rate, spec.port_rate),
            "link": (spec.links.chip_bytes_per_s,) * 2,
        }

    def run(self, streams: Sequence[Stream]) -> Run:
        """Run one stream a core until all have ended. Raises MachineError, naming site, engine and instruction, for an
        overflow, a race, a read of what nobody wrote, and a deadlock (who waits for what)."""
        crowd = max((sum(s.chip == c for s in streams) for c in {s.chip for s in streams}), default=0)
        if crowd > self.spec.cores:
            raise MachineError(f"{crowd} streams for one chip; {self.spec.name} has {self.spec.cores} cores")
        for stream in set(streams):
            check(self.spec, stream)
        self.cores = [self._core(s) for s in streams]
        self.result, self.now = Run(), 0.0
        self.events: list[tuple[float, int, int, int, int]] = []  # time, order, core, engine, 0: free 1: done
        self.order = 0
        self.transfers: list[Transfer] = []
        self.mail: dict[tuple[int, int, int], list[object]] = defaultdict(list)
        for c in range(len(self.cores)):
            self._start(c)
        while self.events or self.transfers:
            self._advance()
        self._all_ended()
        self.result.seconds = self.now
        return self.result

    def _core(self, stream: Stream) -> Core:
        hbm = self.hbm[stream.chip] if self.hbm is not None else Memory("hbm", None)
        queues: list[list[Instruction]] = [[] for _ in ENGINES]
        for i in stream.instructions:
            queues[ENGINES.index(i.engine)].append(i)
        small = self.hbm is None  # without values nobody touches the bytes
        sram, acc = (0, 0) if small else (self.spec.sram_bytes, self.spec.acc_bytes)
        return Core(stream, Spaces(hbm, sram, acc), queues)

    def _advance(self) -> None:
        """Move the clock to the next thing that ends."""
        rates = self._rates()
        ends = [self.now + t.left / r for t, r in zip(self.transfers, rates, strict=True)]
        first = min(ends, default=float("inf"))
        then = min(first, self.events[0][0]) if self.events else first
        for t, r in zip(self.transfers, rates, strict=True):
            t.left -= (then - self.now) * r
        self.now = then
        finished = [t for t, end in zip(self.transfers, ends, strict=True) if end <= then * (1 + 1e-12)]
        self.transfers = [t for t in self.transfers if t not in finished]
        for t in finished:
            self._end(t.core, t.engine, t.start, t.cost)
        while self.events and self.events[0][0] <= self.now:
            _, _, core, engine, done = heapq.heappop(self.events)
            if done:
                self.cores[core].done[engine] += 1
                self.cores[core].last = ENGINES[engine]
                self._start(core)
            else:
                cost = self.cores[core].queues[engine][self.cores[core].head[engine] - 1].cost(self.spec)
                self._end(core, engine, self.cores[core].free_at[engine], cost)

    def _rates(self) -> list[float]:
        users: dict[tuple[str, int], int] = defaultdict(int)
        for t in self.transfers:
            users[t.cost.resource, self.cores[t.core].stream.chip] += 1
        out = []
        for t in self.transfers:
            whole, port = self.rates[t.cost.resource]
            out.append(min(port, whole / users[t.cost.resource, self.cores[t.core].stream.chip]))
        return out

    def _post(self, time: float, core: int, engine: int, done: int) -> None:
        self.order += 1
        heapq.heappush(self.events, (time, self.order, core, engine, done))

    def _end(self, c: int, engine: int, start: float, cost: Cost) -> None:
        """The engine is free; its result is there after the latency."""
        core = self.cores[c]
        i = core.queues[engine][core.head[engine] - 1]
        core.busy[engine] = False
        core.free_at[engine] = self.now
        self.result.busy[i.engine] += self.now - start
        if cost.resource:
            self.result.bytes[cost.resource] += cost.bytes
        if self.record:
            self.result.spans.append(Span(c, i.engine, start, self.now, type(i).__name__, core.stream.site))
        if isinstance(i, Send):
            self._deliver(c, i)
        self._post(self.now + cost.latency_s, c, engine, 1)
        self._start(c)

    def _deliver(self, c: int, i: Send) -> None:
        core = self.cores[c]
        values = core.spaces.read(i.src) if self.hbm is not None else None
        self.mail[core.stream.chip, i.peer, i.tag].append(values)
        for other, receiver in enumerate(self.cores):
            if receiver.stream.chip == i.peer:
                self._start(other)

    def _start(self, c: int) -> None:
        """Start whatever can start on core `c`."""
        core = self.cores[c]
        for engine, queue in enumerate(core.queues):
            if core.busy[engine] or core.head[engine] >= len(queue):
                continue
            i = queue[core.head[engine]]
            if all(core.done[e] >= n for e, n in enumerate(i.wait)) and self._mail_there(core, i):
                self._begin(c, engine, i)

    def _mail_there(self, core: Core, i: Instruction) -> bool:
        return not isinstance(i, Receive) or bool(self.mail[i.peer, core.stream.chip, i.tag])

    def _begin(self, c: int, engine: int, i: Instruction) -> None:
        core = self.cores[c]
        idle = self.now - core.free_at[engine]
        if idle > 0:
            self.result.stalls[i.engine, core.last or "start"] += idle
        core.head[engine] += 1
        core.busy[engine] = True
        if self.hbm is not None:
            try:
                if isinstance(i, Receive):
                    core.spaces.write(i.dst, self.mail[i.peer, core.stream.chip, i.tag].pop(0))  # type: ignore[arg-type]
                i.run(core.spaces)
            except MachineError as e:
                raise MachineError(f"{where(core.stream, i)}: {e}") from None
        elif isinstance(i, Receive):
            self.mail[i.peer, core.stream.chip, i.tag].pop(0)
        cost = i.cost(self.spec)
        core.free_at[engine] = self.now
        if cost.bytes:
            self.transfers.append(Transfer(c, engine, cost, cost.bytes, self.now))
        else:
            self._post(self.now + cost.cycles / self.spec.clock_hz, c, engine, 0)

    def _all_ended(self) -> None:
        """Raise MachineError if something is left that waits for ever."""
        stuck = []
        for core in self.cores:
            for engine, queue in enumerate(core.queues):
                if core.head[engine] < len(queue):
                    i = queue[core.head[engine]]
                    lack = [
                        f"{ENGINES[e]} to finish {n} (it has finished {core.done[e]})"
                        for e, n in enumerate(i.wait) if core.done[e] < n
                    ]  # fmt: skip
                    if isinstance(i, Receive) and not lack:
                        lack = [f"chip {i.peer} to send tag {i.tag}"]
                    stuck.append(f"{where(core.stream, i)} waits for {' and '.join(lack)}")
        if stuck:
            raise MachineError("deadlock: " + "; ".join(stuck))
