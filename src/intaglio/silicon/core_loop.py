"""Time of a loop over jobs on all cores: each core loads, computes and stores, and all cores share L2 and HBM.

For kernels whose cores have unlike jobs. This closed form is finer than that of tile_loop.py: it follows every core,
and every tile in the L2. Transfers in flight share the rates of L2 and HBM equally, as in the simulator.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from intaglio.chips import ChipSpec, Target
from intaglio.silicon.cache import LINE
from intaglio.silicon.l2 import RandomL2


@dataclass
class Transfer:
    """One load or store of a core. Times are in seconds since the start of the launch.

    Attributes:
        start: the earliest time at which the transfer starts.
        bytes: number of bytes that it moves, above 0.
        place: key of the tile that it moves, under which the L2 holds the tile. None: the L2 does not hold it, because
            the tile's rows are addressed by index.
        writes: True for a store.
        lines: number of bytes in the L2 lines that hold parts of this tile and of no other tile. It may be more than
            `bytes`, because the L2 moves whole lines. None: the number is `bytes`.
        edges: keys of the L2 lines that hold parts of this tile and of other tiles.
        latency_s: seconds from the end of the transfer until its result can be used.
        ready: for a load, the time when the L2 has the whole tile; 0.0 for a store.
        end: the time when the transfer ends.
    """

    start: float
    bytes: float
    place: Hashable | None = None
    writes: bool = False
    lines: float | None = None
    edges: Sequence[Hashable] = ()
    latency_s: float = 0.0
    ready: float = 0.0
    end: float = 0.0

    @property
    def visible(self) -> float:
        """The time when the result of the transfer can be used."""
        return max(self.end + self.latency_s, self.ready)


Program = Iterator[Transfer | None]  # transfers in order; None: it waits for another program of its core


class TilesInL2(RandomL2):
    """Model of an L2 cache that evicts lines at random.

    It keeps, for each tile, the expected number of bytes of the tile that are in the L2.
    """

    def __init__(self, capacity: float, latency_s: float) -> None:
        super().__init__(capacity)
        self.latency_s = latency_s
        self.tiles: dict[Hashable, tuple[float, float, float]] = {}  # (bytes, evicted before, when there)

    @classmethod
    def of(cls, target: Target) -> TilesInL2:
        """Returns an empty TilesInL2 for a chip. Its capacity is the part of the L2 that kernels can use."""
        return cls(target.chip.l2_bytes * target.library.l2_usable, target.chip.constants.hbm_latency_s)

    def hold(self, place: Hashable, size: float) -> None:
        """Put a tile of `size` bytes into the L2. Call it before the loop, for tiles that the previous op left there.

        Parts of other tiles may be evicted. place: key of the tile.
        """
        if self.capacity:
            self.insert(max(0.0, size - self.left(place)))
            self.tiles[place] = size, self.evicted, 0.0

    def access(self, x: Transfer, now: float) -> float:
        """Record that the transfer `x` starts at time `now`. Returns the number of bytes that HBM moves because of it.

        Sets x.latency_s and x.ready.
        """
        if x.place is None or not self.capacity:
            x.latency_s = 0.0 if x.writes else self.latency_s
            return x.bytes
        ready = max(self.tiles.get(key, (0.0, 0.0, 0.0))[2] for key in (x.place, *x.edges))
        size, touched = self.left(x.place), x.bytes if x.lines is None else x.lines
        missed = max(0.0, touched - size) + sum(LINE - self.left(key) for key in x.edges)
        missed = missed if missed > LINE / 2 else 0.0  # less than a line: probably none
        if missed and not x.writes:
            x.latency_s, ready = self.latency_s * min(1.0, missed / x.bytes), max(ready, now + self.latency_s)
        x.ready = 0.0 if x.writes else ready
        written = self.insert(missed)
        self.dirty = min(self.held, self.dirty + touched * x.writes)
        self.tiles[x.place] = max(size, touched), self.evicted, ready
        for key in x.edges:
            self.tiles[key] = LINE, self.evicted, ready
        return written + (0.0 if x.writes else missed)

    def left(self, place: Hashable) -> float:
        """Returns the expected number of bytes that the L2 still holds of the tile with the key `place`."""
        size, before, _ = self.tiles.get(place, (0.0, 0.0, 0.0))
        return size * self.kept(before)


class CoreLoop:
    """Simulates a loop that all cores of a chip run at the same time, transfer by transfer, to find its duration.

    Each core has three programs, which are generators: one for its loads, one for its computation, one for its stores.
    A program yields a Transfer and continues when the transfer has ended. It yields None to wait for another program of
    its core. The programs of a core exchange times through lists that they share.

    chip: the chip. l2: content of the L2 at the start. programs: for each core, (loads, computation, stores).
    """

    def __init__(self, chip: ChipSpec, l2: TilesInL2, programs: Sequence[tuple[Program, Program, Program]]) -> None:
        self.chip, self.l2, self.programs = chip, l2, programs  # of each core: loads, computation, stores
        self.waiting: list[tuple[float, int, Transfer]] = []  # (start, number of the engine, transfer)
        self.flights: list[Transfer | None] = [None] * (2 * len(programs))  # of each core's loads, then of its stores

    def seconds(self) -> float:
        """Simulate the loop to its end. Returns the seconds until the last transfer has ended. Call it only once."""
        n, now = len(self.programs), 0.0
        left, slowed = np.full(2 * n, np.inf), np.full(2 * n, np.inf)  # bytes; bytes for each byte that HBM moves
        flying = missing = 0  # transfers in flight, and those for which HBM moves bytes
        for c in range(n):
            self.advance(c)
        while flying or self.waiting:
            rate = min(self.chip.port_rate, self.chip.l2_rate / max(1, flying))
            rates = np.minimum(rate, self.chip.hbm_rate / max(1, missing) * slowed)
            after = left / rates
            then = now + float(after.min())
            if self.waiting and self.waiting[0][0] < then:
                then = max(now, self.waiting[0][0])
            ended = np.flatnonzero(now + after <= then * (1 + 1e-12)).tolist()
            left -= (then - now) * rates
            now = then
            for i in ended:
                flying, missing = flying - 1, missing - bool(np.isfinite(slowed[i]))
                left[i] = slowed[i] = np.inf
                if (done := self.flights[i]) is not None:
                    done.end, self.flights[i] = now, None
            for i in ended:
                self.advance(i % n)
            while self.waiting and self.waiting[0][0] <= now:
                _, i, x = heapq.heappop(self.waiting)
                moved = self.l2.access(x, now)
                flying, missing = flying + 1, missing + (moved > 0)
                left[i], slowed[i] = x.bytes, x.bytes / moved if moved else np.inf
        return now

    def advance(self, c: int) -> None:
        """Continue each program of core number `c` to its next transfer, or until it waits for another program."""
        loads, compute, stores = self.programs[c]
        later = c + len(self.programs)  # engine of the core's stores
        for engine, program in ((later, stores), (c, loads), (-1, compute), (c, loads), (later, stores)):
            if engine < 0:
                next(program, None)
            elif self.flights[engine] is None and (x := next(program, None)) is not None:
                self.flights[engine] = x
                heapq.heappush(self.waiting, (x.start, engine, x))


class Move(NamedTuple):
    """A load or store of a Step. Each attribute has the same meaning as in Transfer."""

    bytes: float
    place: Hashable | None = None
    lines: float | None = None
    edges: Sequence[Hashable] = ()


@dataclass(frozen=True)
class Step:
    """One step of a core's loop: the core loads tiles, computes on them, and stores results.

    Attributes:
        loads: the loads, in order.
        array_s: seconds of the matrix array. They start when the result of the last load can be used.
        lanes_s: seconds of the vector lanes, which start after the matrix array has ended.
        stores: the stores, in order. They start after the vector lanes have ended.
        fill_s: seconds in which the load engine sets tiles to a constant.
        in_place: True if the stores read the tiles that were loaded. These tiles are then free only after the stores.
        early_s: seconds of the vector lanes for work that needs only the first `early` loads. It comes before the work
            of lanes_s.
        early: number of loads that the work of early_s needs.
        begins: True for the first step of a job, if its first `early` loads and its fill go to tiles that the job uses
            in all of its steps. `depth` jobs in turn have such tiles. These loads wait until the job `depth` places
            before is computed, and the fill waits until that job's results are stored. The step's other loads wait for
            the step `depth` places before. False: all loads and the fill wait for the step `depth` places before.
        fill_at: number of loads that come before the fill.
        late_fill_s: seconds in which the load engine sets one more tile to a constant, after the fill of fill_s. It
            first waits until the step before is computed, because that step reads the tile.
        drain_s: seconds from the start of the work of lanes_s until the matrix array may overwrite the accumulator. 0:
            the array waits for the end of lanes_s.
    """

    loads: tuple[Move, ...] = ()
    array_s: float = 0.0
    lanes_s: float = 0.0
    stores: tuple[Move, ...] = ()
    fill_s: float = 0.0
    in_place: bool = False
    early_s: float = 0.0
    early: int = 0
    begins: bool = False
    fill_at: int = 0
    late_fill_s: float = 0.0
    drain_s: float = 0.0


def until(times: Sequence[float], number: int) -> Generator[None, None, float]:
    """Wait until times[number] is known, and return it; 0.0 if `number` is below 0.

    This generator yields None while it waits.
    """
    while len(times) <= number:
        yield None
    return times[number] if number >= 0 else 0.0


@dataclass
class _Steps:
    """The steps of one core's loop, with the times at which their parts end, in seconds.

    Attributes:
        steps: the steps in order.
        depth: number of tiles in each ring of buffers. The loads of a step wait until the tiles of the step `depth`
            places before it are free. Its vector lanes wait until the results of that step are stored.
        early: for each step so far, the time when the tiles of its first step.early loads have come.
        loaded: for each step so far, the time when its tiles have come.
        freed: for each step so far, the time when its tiles can be overwritten, unless its stores read them.
        computed: for each step so far, the time when the vector lanes have ended.
        stored: for each step so far, the time when its results are stored.
    """

    steps: Sequence[Step]
    depth: int
    early: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    freed: list[float] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    stored: list[float] = field(default_factory=list)

    def loads(self) -> Program:
        """Yield each load of the core as a Transfer. Yields None while the next load waits for a free tile."""
        now = visible = 0.0
        ends = list[int]()  # numbers of the steps with stores: the last of each job
        for i, step in enumerate(self.steps):
            before, freed = i - self.depth, self.stored if step.in_place else self.freed
            job = ends[-self.depth] if len(ends) >= self.depth else -1
            now = max(now, (yield from until(self.freed, job) if step.begins else until(freed, before)))
            for number in range(len(step.loads) + 1):
                if number == step.fill_at and (step.fill_s or step.late_fill_s):
                    now = max(now, (yield from until(self.stored, job))) if step.begins else now
                    now += step.fill_s
                    if step.late_fill_s:
                        now = max(now, (yield from until(self.computed, i - 1))) + step.late_fill_s
                    visible = max(visible, now)
                if number == step.early:
                    self.early.append(visible)
                    now = max(now, (yield from until(freed, before))) if step.begins else now
                if number < len(step.loads):
                    move = step.loads[number]
                    x = Transfer(now, move.bytes, move.place, lines=move.lines, edges=move.edges)
                    yield x
                    now, visible = x.end, max(visible, x.visible)
            self.loaded.append(max(visible, now))
            ends += [i] * bool(step.stores)

    def compute(self) -> Program:
        """Record when each step is computed. Yields None while the next step waits for its loads or for earlier stores.

        There are two accumulators, so that the matrix array fills one while the vector lanes read the other.
        """
        array = lanes = 0.0
        drained = list[float]()  # when the lanes had read the accumulator of each step
        for i, step in enumerate(self.steps):
            if step.early_s:
                lanes = max(lanes, (yield from until(self.early, i))) + step.early_s
            loaded = yield from until(self.loaded, i)
            stored = yield from until(self.stored, i - self.depth)
            array = max(array, loaded, drained[i - 2] if step.array_s and i >= 2 else 0.0) + step.array_s
            lanes = max(lanes, array, stored)
            drained.append(lanes + (step.drain_s or step.lanes_s))
            lanes += step.lanes_s
            self.freed.append(array if step.array_s else lanes)
            self.computed.append(lanes)

    def stores(self) -> Program:
        """Yield each store of the core as a Transfer. Yields None while the next store waits for the computation."""
        now = 0.0
        for i, step in enumerate(self.steps):
            now = max(now, (yield from until(self.computed, i)))
            for move in step.stores:
                x = Transfer(now, move.bytes, move.place, writes=True, lines=move.lines)
                yield x
                now = x.end
            self.stored.append(now)


def steps_seconds(chip: ChipSpec, l2: TilesInL2, cores: Sequence[Sequence[Step]], depth: int) -> float:
    """Returns the modelled duration of a loop in seconds, from its start until the last store has ended.

    Each core does the steps of its own list.

    Args:
        chip: the chip.
        l2: content of the L2 at the start.
        cores: for each core, its steps in order.
        depth: number of tiles in each ring of buffers. The loads of a step wait until the tiles of the step `depth`
            places before it are free.
    """
    made = [_Steps(steps, depth) for steps in cores]
    return CoreLoop(chip, l2, [(s.loads(), s.compute(), s.stores()) for s in made]).seconds()
