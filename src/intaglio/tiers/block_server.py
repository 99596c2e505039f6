"""BlockServer: gives K/V blocks to other replicas over TCP. BlockClient: asks such a server for blocks.

Both ends prove that they know a token (see devices/processes/connections.py). What travels afterwards is neither
encrypted nor signed: use a network of your own, or a tunnel. All numbers are big-endian:

    request    the number of blocks (4 bytes), at most NAMES_MAX, and the name of each (32 bytes)
    answer     for each block in order: the number of its bytes (8 bytes) and its bytes, as in its file; 0 for a block
               that is not here, after which nothing follows
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np

from intaglio.devices.processes.address import TcpAddress
from intaglio.devices.processes.connections import accepted, introduce, listen, meet, receive, stop_accepting

COUNT, SIZE = struct.Struct("!I"), struct.Struct("!Q")
NAME_BYTES = 32
NAMES_MAX = 4096  # blocks of one request
TRANSFER_TIMEOUT = 10.0  # seconds in which the rest of a request must come, and a block be received
CONNECTIONS_MAX = 256  # one more ends the oldest that has not proved that it knows the token, or is refused


class BlockServer:
    """A TCP server from which other replicas fetch K/V blocks. A client must prove that it knows the server's token.

    Each connection has a thread.

    Args:
        address: host, port and token of the server. Port 0 stands for any free port.
        get: function from a block's name to the bytes of its file; returns None if this server does not have the block.
        refused: function called with the reason for each connection that is refused or ended.

    Raises OSError, which names the address, if the server cannot listen there.
    """

    def __init__(self, address: TcpAddress, get: Callable[[str], bytes | None], refused: Callable[[str], None]) -> None:
        try:
            self.listener = listen(address.host, address.port)
        except OSError as e:
            raise OSError(f"{address} cannot be bound: {e.strerror or e}; choose another address") from None
        self.address = TcpAddress(address.host, self.listener.getsockname()[1], address.token)
        self.get, self.refused = get, refused
        self._connections: dict[socket.socket, bool] = {}  # True: it has proved that it knows the token
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="intaglio-kv-server", daemon=True).start()

    def close(self) -> None:
        """Stop listening and end all connections."""
        stop_accepting(self.listener)
        with self._lock:
            connections, self._connections = list(self._connections), {}
        for s in connections:
            _end(s)

    def _accept(self) -> None:
        for s, where in accepted(self.listener):
            if self._take(s):
                threading.Thread(target=self._serve, args=(s, where), name="intaglio-kv-peer", daemon=True).start()
            else:
                self.refused(f"a connection from {where} is refused: there are {CONNECTIONS_MAX} already")
                s.close()

    def _take(self, s: socket.socket) -> bool:
        """Accept a new connection if there is room. Returns True, or False if the caller has to refuse and close it.

        If there are CONNECTIONS_MAX connections, the oldest one whose client has not yet proved that it knows the token
        is ended to make room. If all clients have proved it, there is no room.
        """
        with self._lock:
            if len(self._connections) >= CONNECTIONS_MAX:
                oldest = next((other for other, known in self._connections.items() if not known), None)
                if oldest is None:
                    return False
                del self._connections[oldest]
                _end(oldest)
            self._connections[s] = False
        return True

    def _serve(self, s: socket.socket, where: str) -> None:
        try:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a peer that has vanished keeps no thread for ever
            meet(s, where, self.address.token, lambda _: None)
            with self._lock:
                if s not in self._connections:
                    return
                self._connections[s] = True
            while names := _request(s, where):
                self._answer(s, names)
        except _Wrong as e:
            self.refused(f"a connection from {where} is ended: {e}")
        except OSError as e:
            if not self._connections.get(s):
                self.refused(f"a connection from {where} is refused: {e}")
        finally:
            with self._lock:
                self._connections.pop(s, None)
            s.close()

    def _answer(self, s: socket.socket, names: Sequence[str]) -> None:
        for name in names:
            block = self.get(name)
            s.sendall(SIZE.pack(len(block or b"")))
            if not block:
                return
            s.sendall(block)


class _Wrong(Exception):
    """Raised when a client sends an invalid request."""


def _request(s: socket.socket, where: str) -> list[str]:
    """Wait for the next request on a connection. Returns a list of the names of the K/V blocks that it asks for.

    The list is empty if the client has closed the connection. Raises _Wrong if the number of names is 0 or too large,
    and OSError if the connection fails. where: the client's address.
    """
    s.settimeout(None)
    first = s.recv(COUNT.size)
    if not first:
        return []
    s.settimeout(TRANSFER_TIMEOUT)
    [count] = COUNT.unpack(first + receive(s, COUNT.size - len(first)))
    if not 0 < count <= NAMES_MAX:
        raise _Wrong(f"it asks for {count} blocks at once; allowed: 1 to {NAMES_MAX}")
    names = receive(s, count * NAME_BYTES)
    return [names[at : at + NAME_BYTES].hex() for at in range(0, len(names), NAME_BYTES)]


class BlockClient:
    """A connection to a BlockServer. The constructor connects, and proves that this side knows the token.

    Args:
        address: address and token of the server.
        connecting: largest number of seconds to connect, and to wait for each message of the handshake.
        silence: largest number of seconds without a byte from the server; after it, methods raise OSError.

    Raises OSError if the connection cannot be made or is refused.
    """

    def __init__(self, address: TcpAddress, connecting: float, silence: float) -> None:
        self.address = address
        self.received = 0  # bytes of answers, ever
        self.socket, _ = introduce((address.host, address.port), address.token, 0, 0, 0, connecting)
        self.socket.settimeout(silence)

    @property
    def alive(self) -> bool:
        """True unless the server has closed the connection. Use it only while no answer is expected."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return not poll.poll(0)

    def ask(self, names: Sequence[str]) -> None:
        """Send the server a request for blocks by name, at most NAMES_MAX. answers() receives them. Returns nothing.

        Raises OSError if the connection fails.
        """
        self.socket.sendall(COUNT.pack(len(names)) + b"".join(map(bytes.fromhex, names)))

    def answers(self, sizes: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
        """Receive the requested blocks. Yields (contents, size) of each block before the first that the server lacks.

        `contents` is the block's file, uint8 [size]. If the server announces a size that differs from `sizes`, the pair
        is (uint8 [0], announced size); the block is then not received, and the connection cannot be used any more.
        Raises OSError if the connection fails.

        Call ask() first. sizes: for each block in that request, the number of bytes that its file must have.
        """
        for wanted in sizes:
            [size] = SIZE.unpack(self._receive(SIZE.size).tobytes())
            if not size:
                return
            yield self._receive(wanted if size == wanted else 0), size

    def abort(self) -> None:
        """End the connection. One thread may call this while another thread waits for an answer.

        The waiting thread gets an OSError, and then has to call close().
        """
        _end(self.socket)

    def close(self) -> None:
        """End the connection."""
        self.socket.close()

    def _receive(self, size: int) -> np.ndarray:
        held, at = np.empty(size, np.uint8), 0
        while at < size:
            if not (got := self.socket.recv_into(held[at:].data)):
                raise ConnectionResetError(f"{self.address} has closed the connection")
            at += got
            self.received += got
        return held


def _end(s: socket.socket) -> None:
    """End a connection that another thread may be using. That thread gets an error and closes the socket."""
    with suppress(OSError):
        s.shutdown(socket.SHUT_RDWR)
