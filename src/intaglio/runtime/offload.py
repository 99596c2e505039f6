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
    """Interface for reading and writing the K/V blocks of a device. Executable and Launcher implement it."""

    @property
    def block_bytes(self) -> int:
        """Returns the number of bytes of a K/V block on the device."""

    def read_blocks(self, blocks: list[int]) -> np.ndarray:
        """Returns the contents of K/V blocks, read from the device: uint8 [number of blocks, block_bytes].

        blocks: numbers of the blocks. Raises DeviceError if the device fails, DeviceLost if it is lost.
        """

    def write_blocks(self, blocks: list[int], contents: np.ndarray) -> None:
        """Write `contents` to K/V blocks on the device. Returns nothing.

        blocks: numbers of the blocks. contents: uint8 [number of blocks, block_bytes]. Raises DeviceError if the device
        fails, DeviceLost if it is lost.
        """


@dataclass
class SequenceLoad:
    """A transfer of K/V blocks from the tier for a waiting sequence.

    Attributes:
        sequence: the waiting sequence.
        first: index, among the sequence's blocks, of the first block to load.
        keys: name, parent and tokens (BlockKey) of each block to load, in order.
        load: the tier's object for the transfer, which says what has arrived and can cancel the rest.
        since: time at which the newest block arrived, in seconds by the engine's clock; before the first block, the
            time at which the transfer began.
        arrived: number of blocks that had arrived at the time `since`.
        kept: contents of the blocks that had arrived when the transfer was stopped because it took too long; None if it
            was not stopped. These blocks are used.
    """

    sequence: Sequence
    first: int
    keys: tuple[BlockKey, ...]
    load: Load
    since: float
    arrived: int = 0
    kept: list[np.ndarray] | None = None


class Offload:
    """Copies K/V blocks between an engine's device and a tier, which is a store of blocks outside the engine.

    Blocks are saved to the tier once they are full and in the prefix cache. They are saved again when a sequence starts
    with them and the tier has evicted them. Blocks are loaded for the first waiting sequence only; the sequences behind
    it do not start earlier, while running sequences continue. Blocks that cannot be loaded in time are computed.

    `device` is the device with the blocks; it must be set before the first step.

    Args:
        connector: the tier; None if there is none, and nothing is copied.
        pool: the engine's K/V blocks.
        clock: the engine's clock.
        timeout: seconds without a further block, after which a transfer is stopped and the blocks that have arrived are
            used.
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
        """True if the first waiting sequence may start; False while blocks for it are being loaded from the tier.

        The first call for a sequence begins to load its blocks.

        Args:
            sequence: the first waiting sequence.
            cached: number of blocks at its beginning that are in the prefix cache.
            wait: True if no sequence runs; the call may then wait up to POLL seconds for the transfer.
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
        """Write the contents that were loaded for a sequence to its blocks on the device.

        Returns the number of blocks written. Returns 0 if nothing was loaded for the sequence or if the device refuses
        the contents. Raises DeviceLost if the device is lost.

        Args:
            sequence: the sequence.
            cached: number of blocks at its beginning that are in the prefix cache; the blocks after them are written.
            blocks: numbers of all its blocks, in order.
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
        """Tell the tier that a sequence starts with the given blocks. Returns nothing.

        The tier then counts the blocks as recently used. The blocks are also queued for the next save(), which writes
        those that the tier has evicted. Blocks that are not in the prefix cache are left out.

        blocks: numbers of the blocks.
        """
        self.unsaved += self.touch(blocks)

    def touch(self, blocks: list[int]) -> list[int]:
        """Tell the tier that a sequence uses the given blocks now, so that it evicts other blocks first.

        Returns a list of the numbers in `blocks` whose blocks are in the prefix cache; [] if there is no tier. The
        engine calls this when a sequence starts and again when it ends. The second call is for blocks that were saved
        to the tier while the sequence ran.

        blocks: numbers of the blocks.
        """
        if not self.connector:
            return []
        # a loaded block is not in the prefix cache if another of its name is
        cached = [block for block in blocks if block in self.pool.cached]
        if cached:
            self.connector.touch([self.pool.name(block) for block in cached])
        return cached

    def stored(self, block: int) -> None:
        """Queue the block number `block` for the next save(), because it was added to the prefix cache.

        Returns nothing. Does nothing if there is no tier.
        """
        if self.connector:
            self.unsaved.append(block)

    def save(self) -> None:
        """Read the queued blocks from the device and write them to the tier. Returns nothing.

        started() and stored() queue blocks. A block is left out in these cases:

        - The tier has it.
        - It is no longer in the prefix cache.
        - It was loaded since the last call, so that the tier or the replica that it came from has it.

        If the device fails, or if the tier refuses a block because it is busy or full, the rest of the queue is
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
        """Cancel the transfer in progress, if there is one. None of its blocks are used."""
        if self.loading:
            self.loading.load.cancel()
        self.loading = None

    def _key(self, block: int) -> BlockKey:
        cached = self.pool.cached[block]
        return BlockKey(cached.name, cached.parent, cached.tokens)

    def _begin(self, sequence: Sequence, cached: int) -> SequenceLoad | None:
        """Begin to load blocks of a waiting sequence from the tier. Returns the SequenceLoad.

        Returns None if the tier does not have the first block to load, which is the block after the cached blocks. The
        blocks to load end before the first block that the tier does not have. A block that ends with the sequence's
        last token is not loaded, because this token is always computed.

        sequence: the sequence. cached: number of blocks at its beginning that are in the prefix cache.
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
