"""Time of a loop over tiles of rows: load a tile, compute on it, store the result, on all cores at once.

The closed form of the kernels that work row by row. It follows one core instead of all: cores that run the same loop
are at the same place at the same time, so each gets an equal share of the L2 and of HBM. After a few tiles the loop
repeats itself, so the rest of a long loop is extrapolated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from typing import Literal

from intaglio.chips import Target

FOLLOWED = 4  # depths of the ring after which a loop repeats itself; of a longer one, these and the last are followed


@dataclass(frozen=True, kw_only=True)
class TileLoop:
    """A loop of equal jobs, dealt to the cores in turn; each loads a tile, computes on it and stores the result.

    Attributes:
        jobs: number of jobs, of all cores together.
        load: bytes that a job loads.
        work_s: seconds that a job computes on the vector lanes.
        read_s: the first part of work_s, in which the job reads its tile. After it the next load may overwrite the
            tile. 0: all of work_s.
        store: bytes that a job stores.
        depth: number of tile buffers that a core has for loads; it has as many for results. This is also the largest
            number of jobs that overlap on a core.
        once: bytes that each core loads before its first job, in addition to its jobs' bytes.
        pieces: parts of a job's bytes that are loaded, computed and stored one after the other, each from a ring of its
            own; they sum to 1.
        in_place: True if a tile is stored from where it was loaded, so that it is free only after its store.
        load_missed: bytes that HBM moves for each loaded byte; 0: the L2 has all operands.
        store_missed: bytes that HBM moves for each stored byte; 0: the L2 keeps all results.
        store_s: minimum seconds of a job's store; 0: no minimum.
        one_ring: True if the pieces use one ring of `depth` tiles, in turn.
        wait_s: minimum seconds from the end of a job's load until its tile can be used.
    """

    jobs: int
    load: float
    work_s: float
    store: float
    depth: int = 2
    once: float = 0.0
    pieces: tuple[float, ...] = (1.0,)
    in_place: bool = False
    read_s: float = 0.0
    load_missed: float = 0.0
    store_missed: float = 0.0
    store_s: float = 0.0
    one_ring: bool = False
    wait_s: float = 0.0

    def seconds(self, target: Target) -> float:
        """Seconds from the first load to the last store, without launch overhead."""
        if self.jobs <= 0:
            return 0.0
        full, rest = divmod(self.jobs, target.chip.cores)
        one, period = replace(self, jobs=0), FOLLOWED * max(6, self.depth)
        skipped = max(0, full // period - 1)
        seconds = followed(one, target, full - skipped * period, rest)
        if skipped:
            seconds += skipped * (followed(one, target, 2 * period, 0) - followed(one, target, period, 0))
        return seconds

    def through_l2(self, target: Target, l2: L2) -> tuple[float, float]:
        """Simulate the loop together with the L2. Returns (seconds, bytes that HBM moves); (0.0, 0.0) without jobs.

        `l2` decides which accesses miss the L2, instead of load_missed and store_missed. The call changes `l2` to its
        state at the end of the loop. The seconds are from the first load to the last store, without launch overhead.
        """
        if self.jobs <= 0:
            return 0.0, 0.0
        core = _Core(self, target, *divmod(self.jobs, target.chip.cores), l2)
        return core.run(), core.hbm_bytes


@lru_cache(maxsize=16384)
def followed(loop: TileLoop, target: Target, full: int, rest: int) -> float:
    """Seconds of a loop, found by following one core through all of its jobs.

    full: number of jobs that every core has. rest: number of cores that have one more job. loop.jobs is not used.
    """
    return _Core(loop, target, full, rest).run()


class L2:
    """Content of the L2 during a loop, in bytes. The least recently used bytes are evicted first.

    All cores access a tile each at the same time, so an access is counted for all of them together.

    reads: bytes of all operands. writes: bytes of all results. capacity: bytes of the L2, above 0. source: where the
    operands are before the loop:

    - "l2": in the L2, since the op before has just written them. Loads hit until the L2 is full. From then on a stored
      result evicts the least recently used bytes. These are the operand bytes that are loaded next, so all later loads
      miss.
    - "hbm": only in HBM. All loads miss, and bring their bytes into the L2.
    - "gathered": in HBM, and read by index. All loads count as misses, and bring nothing into the L2.
    """

    def __init__(
        self, reads: float, writes: float, capacity: float, source: Literal["l2", "hbm", "gathered"] = "l2"
    ) -> None:
        self.capacity, self.gathered = capacity, source == "gathered"
        self.unread = min(reads, capacity) if source == "l2" else 0.0  # bytes of operands that no load has read yet
        self.misses = source != "l2" or reads > capacity  # True if loads miss
        self.held = self.unread
        self.written_part = writes / (writes + reads * (not self.gathered))  # of the bytes that the loop accesses
        self.ahead = 0.0  # bytes of the loop that are evicted before any that a store has written
        self.stores = False  # True if a store has begun

    def load(self, size: float, stored: float) -> tuple[float, float, float]:
        """Record that all cores together load `size` bytes.

        Returns (fraction of the bytes that miss, bytes that HBM reads, bytes that HBM writes for evictions). stored:
        bytes that all cores together store at the same time, which may evict some of the bytes to load.
        """
        if self.gathered:
            return 1.0, size, 0.0
        missed = 1.0
        if not self.misses:
            missed = min(1.0, max(0.0, self.held + stored - self.capacity) / stored) if stored else 0.0
            self.unread -= min(self.unread, (1 - missed) * size)
        self.ahead += size * (not self.stores)
        self.held += missed * size
        return missed, missed * size, self.evict()

    def store(self, size: float) -> float:
        """Record that all cores together store `size` bytes. Returns the bytes that HBM writes for evictions."""
        self.held, self.stores = self.held + size, True
        return self.evict()

    def evict(self) -> float:
        """Evict bytes until the others fit the L2. Returns how many of the evicted bytes HBM must write.

        HBM writes evicted bytes that a store of this loop wrote. Evicted operands need no write.
        """
        over = max(0.0, self.held - self.capacity)
        self.held -= over
        if over and self.unread:
            self.misses = True
            taken = min(self.unread, over)
            self.unread, over = self.unread - taken, over - taken
        clean = min(self.ahead, over)
        self.ahead -= clean
        return (over - clean) * self.written_part


class _Core:
    """Simulation of the core of a TileLoop that has the largest number of jobs, so that its time is the loop's time.

    A TileLoop may divide its jobs into pieces (TileLoop.pieces). This class treats each piece as a job of its own, and
    numbers them from 0 on each core; only `full` and `rest` count whole jobs.

    full: number of whole jobs that every core has. rest: number of cores that have one more. l2: model of the L2, which
    decides which accesses miss; None: loop.load_missed and loop.store_missed are used instead.
    """

    def __init__(self, loop: TileLoop, target: Target, full: int, rest: int, l2: L2 | None = None) -> None:
        self.loop, self.target, self.full, self.rest, self.l2 = loop, target, full, rest, l2
        self.count = (full + (rest > 0)) * len(loop.pieces)
        self.hbm_bytes = 0.0  # of all cores, counted if there is an L2

    def active(self, job: int) -> int:
        """Number of cores that have at least `job` + 1 jobs, and so run a job number `job`."""
        return self.target.chip.cores if job < self.full * len(self.loop.pieces) else self.rest

    def piece(self, job: int) -> float:
        """Size of the piece with the number `job`, as a fraction of a whole job of the loop."""
        return self.loop.pieces[job % len(self.loop.pieces)]

    def begin_load(self, job: int, storing: int | None) -> _Flow:
        """The _Flow (a transfer of this core) that loads the tile of job number `job`. Records the load in self.l2.

        storing: number of the job whose store begins at the same time; None: no store does.
        """
        loop, users = self.loop, self.active(job)
        own = loop.load * self.piece(job)
        size = own + (0 if job else loop.once)
        if self.l2 is None:
            return _Flow(size, users, users * (loop.load_missed > 0), loop.load_missed)
        stored = self.active(storing) * loop.store * self.piece(storing) if storing is not None else 0.0
        missed, read, written = self.l2.load(users * own, stored)  # what cores load once is always there
        self.hbm_bytes += read + written
        if not missed:
            return _Flow(size, users)
        return _Flow(size, users, missed * users, (read + written) / (missed * users * size))

    def begin_store(self, job: int) -> _Flow:
        """The _Flow (a transfer of this core) that stores the result of job number `job`.

        The store is also recorded in self.l2, the account of what the L2 holds, if there is one.
        """
        loop, users = self.loop, self.active(job)
        size = loop.store * self.piece(job)
        if self.l2 is None:
            return _Flow(size, users, users * (loop.store_missed > 0), loop.store_missed)
        written = self.l2.store(users * size)
        self.hbm_bytes += written
        return _Flow(size, users, users * (written > 0), written / (users * size))

    def rates(self, load: _Flow | None, store: _Flow | None) -> tuple[float, float]:
        """The bandwidth of this core's current transfers: (bytes/s of its load, bytes/s of its store).

        Other cores make the same transfers at the same time and share the bandwidth of the L2 and of HBM equally; a
        _Flow has their number. load, store: the core's transfers. None: there is no such transfer, and its rate is 0.
        """
        chip, loop = self.target.chip, self.loop
        flows = [flow for flow in (load, store) if flow is not None]
        users, missing = sum(flow.users for flow in flows), sum(flow.missing for flow in flows)
        rate = min(chip.port_rate, chip.l2_rate / users) if users else 0.0
        share = chip.hbm_rate / missing if missing else inf
        load_rate, store_rate = (
            0.0 if flow is None else min(rate, share / flow.missed) if flow.missed else rate for flow in (load, store)
        )
        return load_rate, min(store_rate, loop.store / loop.store_s) if loop.store_s else store_rate

    def run(self) -> float:
        """Seconds until the core's last store has ended."""
        loop, count, now = self.loop, self.count, 0.0
        depth = loop.depth * (1 if loop.one_ring else len(loop.pieces))
        latency_s = self.target.chip.constants.hbm_latency_s
        next_load = next_work = next_store = 0  # number of the next job of each engine
        visible: list[float] = []  # when the tile of each loaded job can be used
        load_left = store_left = 0.0  # bytes of the transfers that run; 0 if none does
        load: _Flow | None = None
        store: _Flow | None = None
        load_rate = store_rate = 0.0
        work_ends = read_ends = inf
        read = worked = stored = 0
        changed = True  # True if a transfer has begun or ended
        while stored < count:
            begins = store is None and next_store < worked  # a store
            changed |= begins
            if load is None and next_load < count:
                free = stored if loop.in_place else read
                if next_load < depth or free > next_load - depth:
                    load = self.begin_load(next_load, next_store if begins else None)
                    load_left, next_load, changed = load.size, next_load + 1, True
            ready = next_work < len(visible) and visible[next_work] <= now
            room = loop.in_place or next_work < depth or stored > next_work - depth
            if work_ends == inf and ready and room:
                work_ends, read_ends = now + loop.work_s, now + (loop.read_s or loop.work_s)
                next_work += 1
            if begins:
                store = self.begin_store(next_store)
                store_left, next_store = store.size, next_store + 1
            if changed:
                load_rate, store_rate = self.rates(load, store)
                changed = False
            load_ends = now + load_left / load_rate if load is not None else inf
            store_ends = now + store_left / store_rate if store is not None else inf
            waits = visible[next_work] if next_work < len(visible) and visible[next_work] > now else inf
            then = min(load_ends, store_ends, work_ends, read_ends, waits)
            load_left -= (then - now) * load_rate
            store_left -= (then - now) * store_rate
            now = then
            if load_ends <= now and load is not None:
                arrives = now + max(loop.wait_s, latency_s * min(1.0, load.missed))
                visible.append(max(arrives, visible[-1]) if visible else arrives)  # in order
                load, changed = None, True
            if read_ends <= now:
                read, read_ends = read + 1, inf
            if work_ends <= now:
                worked, work_ends = worked + 1, inf
            if store_ends <= now:
                stored, store, changed = stored + 1, None, True
        return now


@dataclass(frozen=True)
class _Flow:
    """A transfer of one core, while other cores make an equal transfer.

    Attributes:
        size: bytes that one core moves.
        users: number of cores that make the transfer, this core included.
        missing: number of these cores whose transfers miss the L2, so that HBM moves bytes for them; may be a fraction.
            If it is above 0, this core is one of them.
        missed: for each of the `missing` cores, bytes that HBM moves for each byte of `size`.
    """

    size: float
    users: int
    missing: float = 0.0
    missed: float = 0.0
