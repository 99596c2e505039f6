"""Offload: saves full K/V blocks through a connector after a step, and loads those that a sequence starts with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from intaglio.devices import DeviceError, DeviceLost
from intaglio.runtime.clock import MonotonicClock
from intaglio.runtime.connector import BlockKey, Connector, Load
from intaglio.runtime.kv import BlockPool
from intaglio.runtime.sequence import Sequence

LOAD_TIMEOUT = 2.0  # seconds without a further block; then the blocks that have not come are computed
PORTION = 64 << 20  # bytes of blocks that are read from the device at once
POLL = 0.05  # seconds that a wait for a load may take when nothing else can run


class BlockDevice(Protocol):
    """Interface of the device whose K/V blocks are read and written: an Executable, or the launcher of one."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a K/V block on the device."""

    def read_blocks(self, blocks: list[int]) -> np.ndarray:
        """The contents of blocks, uint8 [blocks, block_bytes].

        Raises DeviceError if the device fails, DeviceLost if it is lost.
        """

    def write_blocks(self, blocks: list[int], contents: np.ndarray) -> None:
        """Replace the contents of the K/V blocks with these numbers by `contents`, uint8 [blocks, block_bytes].

        Raises DeviceError if the device fails, DeviceLost if it is lost.
        """


@dataclass
class SequenceLoad:
    """A load of K/V blocks for a waiting sequence.

    Attributes:
        sequence: the sequence that waits.
        first: index, among the sequence's blocks, of the first block that is loaded.
        keys: the BlockKey (name, parent, tokens) of each block that is loaded, in order.
        load: the tier's handle of the transfer, to ask for what has arrived or to cancel it.
        since: when the newest block arrived, or, before the first one, when the load began; in seconds by the engine's
            clock.
        arrived: number of blocks that had arrived at the time `since`.
        kept: None normally. If the load was stopped because no further block came in time: the contents of the blocks
            that had arrived, which are used.
    """

    sequence: Sequence
    first: int
    keys: tuple[BlockKey, ...]
    load: Load
    since: float
    arrived: int = 0
    kept: list[np.ndarray] | None = None


class Offload:
    """Moves K/V blocks between an engine's pool and a tier, a store outside the engine.

    Full blocks are saved once they are in the prefix cache, and again if a sequence starts with them and the tier has
    evicted them. Blocks are loaded for one sequence at a time, the first that waits; the waiting sequences behind it do
    not start before it. Running sequences go on meanwhile. Blocks that cannot be loaded, or not in time, are computed.

    Args:
        connector: the tier; None: there is none, and nothing is moved.
        pool: the engine's K/V blocks.
        clock: the engine's clock.
        timeout: seconds without a further block after which a load is stopped and the blocks that have come are used.

    `device`, the device with the blocks, must be set before the first step.
    """

    def __init__(
        self, connector: Connector | None, pool: BlockPool, clock: MonotonicClock, timeout: float = LOAD_TIMEOUT
    ) -> None:
        self.connector, self.pool, self.clock, self.timeout = connector, pool, clock, timeout
        self.device: BlockDevice | None = None
        self.loading: SequenceLoad | None = None
        self.unsaved: list[int] = []  # blocks noted since the last save()
        self.fetched: set[str] = set()  # names of the blocks loaded since then: where they came from has them

    def ready(self, sequence: Sequence, cached: int, wait: bool) -> bool:
        """True if a waiting sequence may start; False while blocks for it are being loaded. Begins the load if needed.

        Args:
            sequence: the first that waits.
            cached: number of its leading blocks that are in the prefix cache.
            wait: True if nothing else can run; then up to POLL seconds are spent waiting for the load.
        """
        if not self.connector:
            return True
        if self.loading and self.loading.sequence is not sequence:
            self._give_up()  # it was aborted, or another goes before it
        if not self.loading:
            self.loading = self._begin(sequence, cached)
        loading = self.loading
        if not loading or loading.load.wait(POLL if wait else 0.0):
            return True
        found, now = loading.load.blocks(), self.clock.read()
        if len(found) == len(loading.keys):
            return True
        if len(found) > loading.arrived:
            loading.arrived, loading.since = len(found), now
        if now - loading.since <= self.timeout:
            return False
        loading.load.cancel()
        loading.kept = found
        self.connector.counts.late += len(loading.keys) - len(found)
        self.connector.say("late", f"no K/V block was loaded for {self.timeout:g} s; those that are left are computed")
        return True

    def fill(self, sequence: Sequence, cached: int, blocks: list[int]) -> int:
        """Write the contents loaded for a sequence to its blocks, from index `cached` on. Returns the number written.

        cached: number of the sequence's leading blocks that are in the prefix cache. blocks: numbers of all its blocks.
        Returns 0 if nothing was loaded for it or the device refuses the contents. Raises DeviceLost.
        """
        done, self.loading = self.loading, None
        if not self.connector or not self.device or not done:
            return 0
        if done.sequence is not sequence:
            done.load.cancel()
            return 0
        counts, found = self.connector.counts, done.kept
        if found is None:
            found = done.load.blocks()
            counts.misses += len(done.keys) - len(found)
        # while it was loading, the prefix cache may have come to hold more of the prompt, or less
        contents = found[cached - done.first :] if done.first <= cached else []
        if not contents:
            return 0
        try:
            self.device.write_blocks(blocks[cached : cached + len(contents)], np.stack(contents))
        except DeviceLost:
            raise
        except DeviceError as e:
            self.connector.say("device", f"the device did not take loaded K/V blocks, which are computed: {e}")
            counts.errors += 1
            return 0
        self.fetched.update(key.name for key in done.keys[cached - done.first :][: len(contents)])
        counts.hits += len(contents)
        counts.loaded_bytes += sum(x.nbytes for x in contents)
        return len(contents)

    def started(self, blocks: list[int]) -> None:
        """Tell the tier that a sequence starts with these blocks, so that it counts them as recently used.

        They are also queued for the next save(), which writes those that the tier has evicted. blocks: their numbers;
        those that are not in the prefix cache are left out.
        """
        self.unsaved += self.touch(blocks)

    def touch(self, blocks: list[int]) -> list[int]:
        """Tell the tier that a sequence uses these blocks now, so that it evicts them later than others.

        Returns a list of the blocks that are in the prefix cache; [] without a tier. Called when a sequence starts and
        again when it ends: blocks that were saved while it ran were not in the tier at its start.
        """
        if not self.connector:
            return []
        # a loaded block is not in the prefix cache if another of its name is
        cached = [block for block in blocks if block in self.pool.cached]
        if cached:
            self.connector.touch([self.pool.name(block) for block in cached])
        return cached

    def stored(self, block: int) -> None:
        """Note that a K/V block has been added to the prefix cache, so that the next save() copies it to the tier.

        Does nothing without a tier. block: number of the block.
        """
        if self.connector:
            self.unsaved.append(block)

    def save(self) -> None:
        """Write the queued blocks to the tier, reading them from the device. Returns nothing.

        started() and stored() queue blocks. A block is left out if the tier has it, or if it is not in the prefix cache
        any more. It is also left out if it was loaded since the last call, because the tier or peer that it came from
        has it. If the device fails, or the tier refuses a block because it is busy or full, the rest of the queue is
        dropped. Raises DeviceLost if the device is lost.
        """
        noted, self.unsaved = self.unsaved, []
        fetched, self.fetched = self.fetched, set()
        if not self.connector or not self.device:
            return
        names = {block: self.pool.name(block) for block in noted if block in self.pool.cached}
        blocks = [b for b, name in names.items() if name not in fetched and not self.connector.stored([name])]
        if not blocks:
            return
        portion = max(1, PORTION // self.device.block_bytes)
        for at in range(0, len(blocks), portion):
            part = blocks[at : at + portion]
            try:
                contents = self.device.read_blocks(part)
            except DeviceLost:
                raise
            except DeviceError as e:
                self.connector.say("device", f"the device did not give K/V blocks to save: {e}")
                self.connector.counts.errors += 1
                return
            taken = [self.connector.save(self._key(b), content) for b, content in zip(part, contents, strict=True)]
            if not all(taken):  # nor would it take more; what is not read takes no time
                self.connector.counts.dropped += len(blocks) - at - len(part)
                return

    def _give_up(self) -> None:
        """Cancel the load. None of its blocks are used."""
        if self.loading:
            self.loading.load.cancel()
        self.loading = None

    def _key(self, block: int) -> BlockKey:
        cached = self.pool.cached[block]
        return BlockKey(cached.name, cached.parent, cached.tokens)

    def _begin(self, sequence: Sequence, cached: int) -> SequenceLoad | None:
        """Begin to load a sequence's blocks from index `cached` on, as many as the tier has. Returns the SequenceLoad.

        Returns None if the tier does not have the first of them. The sequence's last token is always computed, so a
        block that ends with it is not loaded.
        """
        assert self.connector and self.device
        size = self.pool.block_size
        tokens, salt = sequence.tokens(0, sequence.length - 1), sequence.salt
        parents = [self.pool.names.root(salt), *self.pool.names.of(tokens, salt)]
        wanted = [
            BlockKey(parents[i + 1], parents[i], tuple(tokens[i * size : (i + 1) * size]))
            for i in range(cached, len(parents) - 1)
        ]
        there = self.connector.lookup([key.name for key in wanted])
        self.connector.counts.misses += len(wanted) - there
        if not there:
            return None
        keys = tuple(wanted[:there])
        load = self.connector.load(keys, self.device.block_bytes)
        return SequenceLoad(sequence, cached, keys, load, self.clock.read())
