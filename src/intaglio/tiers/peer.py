"""PeerTier: keeps K/V blocks in memory, gives them to other replicas over TCP, and fetches theirs.

Prefill and decode replicas on several hosts hand blocks over through it, without a shared folder. Which replica has a
block is announced with the request that needs it; a block that does not come is computed.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile

import numpy as np

from intaglio.devices.processes.address import TcpAddress
from intaglio.runtime import BlockKey, BlockScope
from intaglio.tiers.block_file import BlockFileError, check_block, file_size
from intaglio.tiers.block_server import NAMES_MAX, BlockClient, BlockServer
from intaglio.tiers.memory import BlockMemory
from intaglio.tiers.store import StoreLoad, StoreTier

TOKEN_VARIABLE = "INTAGLIO_KV_TOKEN"  # environment variable with the token of --kv-peer tcp://HOST:PORT
READERS = 4  # loads at a time: one from a peer that does not answer must not hold up the others
CONNECTING = 1.0  # seconds in which a peer must accept a connection, and answer each message of the handshake
SILENCE = 1.5  # seconds without a byte from a peer, after which its blocks are given up: before the engine does
ANNOUNCED_MAX = 1 << 16  # blocks of others that are remembered; the oldest are forgotten
BLOCKS_BYTES, BLOCKS_SHARE = 8 << 30, 8  # default budget: 1/8 of the machine's memory, at most 8 GiB
IDLE_MAX = 64  # connections to peers that are kept open


def default_budget(memory: int, engines: int) -> int:
    """Returns the default number of bytes of K/V blocks that one engine keeps in memory for its peers.

    1/8 of the machine's memory is divided equally among its engines; each engine gets at most 8 GiB.

    Args:
        memory: bytes of the machine's memory.
        engines: number of engines on the machine that keep blocks for peers.
    """
    return max(1, min(BLOCKS_BYTES, memory // BLOCKS_SHARE // engines))


class PeerLoad(StoreLoad):
    """A load of K/V blocks in progress. Blocks come from this process's own memory or, over the network, from peers."""

    def __init__(self) -> None:
        super().__init__()
        self.client: BlockClient | None = None  # that a thread waits for
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Stop the load. If it waits for an answer from a peer, the connection to the peer is closed."""
        with self._lock:
            super().cancel()
            if self.client:
                self.client.abort()

    def wait_for(self, client: BlockClient | None) -> None:
        """Record the connection on which the load waits for a peer.

        cancel() closes this connection. If cancel() is running in another thread, wait_for() first waits for its end.
        client: the connection; None: the load waits for no peer.
        """
        with self._lock:
            self.client = client


class PeerTier(StoreTier):
    """A Connector that keeps K/V blocks in memory, gives them to other replicas, and fetches blocks from them.

    A peer is another replica. Blocks are fetched from a peer only after announce() has said that the peer has them.

    Args:
        address: TcpAddress at which this tier gives its blocks to peers, with the token that all peers know.
        budget: largest number of bytes of the blocks in memory.
        scope: BlockScope of the engine's blocks; blocks of another scope are never returned.
        report: function that is called with a message for the operator. Only the first message of each kind is
            reported. By default the function issues a warning.

    Raises OSError, which names the address, if the tier cannot listen there.
    """

    def __init__(
        self, address: TcpAddress, budget: int, scope: BlockScope, report: Callable[[str], None] = warnings.warn
    ) -> None:
        self.memory = BlockMemory(budget)
        super().__init__(self.memory, scope, report, READERS)
        self.server = BlockServer(address, self.memory.get, lambda why: self.say("peer", f"K/V blocks: {why}"))
        self._announced: OrderedDict[str, TcpAddress] = OrderedDict()  # by block: who has it
        self._idle: dict[TcpAddress, BlockClient] = {}  # connections that are kept, the longest unused first
        self._peers = threading.Lock()  # of the two above

    @property
    def address(self) -> TcpAddress:
        """The TcpAddress from which peers fetch this tier's blocks."""
        return self.server.address

    def announce(self, names: Iterable[str], address: TcpAddress) -> None:
        """Record that the peer at `address` has the blocks `names`.

        Nothing is fetched now. A later load() fetches those of the blocks from the peer that are not in this tier's own
        memory. At most ANNOUNCED_MAX names are remembered; the oldest are forgotten.
        """
        with self._peers:
            for name in names:
                self._announced[name] = address
                self._announced.move_to_end(name)
            while len(self._announced) > ANNOUNCED_MAX:
                self._announced.popitem(last=False)

    def lookup(self, names: Sequence[str]) -> int:
        """Returns the number of blocks in `names` before the first block that load() cannot get.

        This is the first block that is neither in this process's memory nor announced to be at a peer. A later load()
        may get fewer, since blocks may be evicted. names: names of the blocks, each the parent of the next.
        """
        here = (at for at, name in enumerate(names) if name not in self._announced and not self.store.has(name))
        return next(here, len(names))

    def load(self, keys: Sequence[BlockKey], block_bytes: int) -> PeerLoad:
        """Begin to load the blocks `keys` in another thread. Returns a PeerLoad, which collects the loaded blocks.

        Blocks in this process's memory are read from there; the others are fetched from the peers that announce() has
        named for them. After close() nothing is loaded: the PeerLoad has ended and has no blocks. block_bytes: bytes of
        each block.
        """
        return self._begin(PeerLoad(), keys, block_bytes)

    def close(self) -> None:
        """Close the connections and end the threads. It must not be called during a step of the engine."""
        self.server.close()
        super().close()
        for client in self._idle.values():
            client.close()

    def _contents(self, load: StoreLoad, keys: Sequence[BlockKey], block_bytes: int) -> Iterator[np.ndarray]:
        assert isinstance(load, PeerLoad)
        while keys:
            part = keys[: self.stored([key.name for key in keys])]
            source = super()._contents(load, part, block_bytes)
            if not part:
                if (address := self._announced.get(keys[0].name)) is None:
                    return
                part = self._announced_by(address, keys[:NAMES_MAX])
                source = self._fetched(load, address, part, block_bytes)
            got = 0
            for content in source:
                got += 1
                yield content
            if got < len(part):
                return
            keys = keys[got:]

    def _announced_by(self, address: TcpAddress, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Returns a list of the keys before the first key whose block is not announced to be at the peer `address`.

        The list is empty if the first block is not announced there.
        """
        return list(takewhile(lambda key: self._announced.get(key.name) == address, keys))

    def _fetched(
        self, load: PeerLoad, address: TcpAddress, keys: Sequence[BlockKey], block_bytes: int
    ) -> Iterator[np.ndarray]:
        """Fetch blocks from a peer. Yields their contents in order, up to the first that is missing or fails a check.

        Args:
            load: the load to which the blocks belong; if it is cancelled, no more blocks are fetched.
            address: the peer's address.
            keys: the blocks, in order.
            block_bytes: bytes of a block's contents; each is yielded as uint8 [block_bytes].
        """
        names, sizes = [key.name for key in keys], [file_size(self.scope, key, block_bytes) for key in keys]
        client, got, received, began = None, 0, 0, time.monotonic()
        try:
            if load.cancelled.is_set():
                return
            client = self._connected(address)
            received = client.received
            load.wait_for(client)
            if load.cancelled.is_set():  # before it could be aborted
                raise ConnectionAbortedError("the load was cancelled")
            client.ask(names)
            for held, size in client.answers(sizes):
                content = check_block(held, size, str(address), self.scope, keys[got], block_bytes)
                got += 1
                yield content
            self._forget(names[got:])  # which it has not, or not any more
            load.wait_for(None)
            if not load.cancelled.is_set():  # else it may have been aborted
                self._keep(client)
                client = None
        except BlockFileError as e:
            self._forget(names[got : got + 1])
            self.damaged(e)
        except OSError as e:
            answered = client is not None and client.received > received
            if load.cancelled.is_set() and (answered or time.monotonic() - began < CONNECTING):
                return  # cancelled for a reason of its own
            with self._peers:
                gone = [name for name, peer in self._announced.items() if peer == address]
            self._forget(gone)  # other loads must not wait for it too
            with self.lock:
                self.counts.errors += 1
            self.say("fetch", f"K/V blocks cannot be fetched from {address} and are computed: {e or type(e).__name__}")
        finally:
            load.wait_for(None)
            if client:
                client.close()

    def _forget(self, names: Iterable[str]) -> None:
        """Forget which peer has the blocks `names`, so that they are no longer fetched from it. Returns nothing."""
        with self._peers:
            for name in names:
                self._announced.pop(name, None)

    def _connected(self, address: TcpAddress) -> BlockClient:
        """Returns a connection to the peer at `address`, either a kept one or a new one.

        Raises OSError if the peer cannot be reached or refuses the connection.
        """
        with self._peers:
            client = self._idle.pop(address, None)
        if client and client.alive:
            return client
        if client:
            client.close()
        return BlockClient(address, CONNECTING, SILENCE)

    def _keep(self, client: BlockClient) -> None:
        """Keep a connection open for the next load from the same peer. An older kept connection to this peer is closed.

        If more than IDLE_MAX connections are kept then, the oldest is closed. Returns nothing.
        """
        with self._peers:
            surplus = [self._idle.pop(client.address)] if client.address in self._idle else []
            self._idle[client.address] = client
            if len(self._idle) > IDLE_MAX:
                surplus.append(self._idle.pop(next(iter(self._idle))))
        for other in surplus:
            other.close()
