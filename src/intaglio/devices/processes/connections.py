"""Authenticated TCP connections: between ranks, between coordinator and agents, and for K/V blocks.

Both ends prove by HMAC-SHA256 over each other's random numbers that they know a token; the token itself does not
travel. Ranks of different hosts connect once for each pair and epoch, and give the connection to the native
communicator. What travels between ranks afterwards is neither encrypted nor signed: use a network of your own, or a
tunnel.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

TIMEOUT = 5.0  # seconds that a peer may take to introduce itself
MAGIC = b"intaglio1\0"
HELLO = struct.Struct("!10sQHH32s")  # magic, epoch, from, to, random number
PROOF = 32  # bytes
LOOPBACK_TOKEN = b"anyone on this machine may connect"  # where no other host can


class ConnectionRefused(ConnectionError):
    """Raised if an authenticated connection cannot be made.

    One of the two ends refused the other, does not know the token, or closed the connection.
    """


def proof(token: bytes, role: bytes, challenge: bytes, hello: bytes) -> bytes:
    """Return the HMAC-SHA256 of `role`, `challenge` and `hello` with the key `token`, as bytes.

    It proves that the sender knows the token.
    """
    return hmac.digest(token, role + challenge + hello, "sha256")


def check_token(token: bytes) -> None:
    """Raise ValueError if the token is shorter than 16 bytes, because it could be guessed. Returns None."""
    if len(token) < 16:
        raise ValueError(f"the token has {len(token)} bytes; use 16 or more random ones")


def listen(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Return a TCP socket that listens at the address `host`. With `port` 0, the system chooses a free port."""
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def connect(address: tuple[str, int], token: bytes, epoch: int, rank: int, peer: int) -> socket.socket:
    """Connect as `rank` to the rank `peer`, which listens at `address`. Returns the authenticated socket.

    `token` is the secret that both ends must know. `epoch` is the number of the group of ranks. Raises OSError if no
    connection can be made. Raises its subclass ConnectionRefused if the peer refuses or does not know the token. Raises
    ValueError for a short token.
    """
    return introduce(address, token, epoch, rank, peer)[0]


def introduce(
    address: tuple[str, int], token: bytes, epoch: int, rank: int, peer: int, seconds: float = TIMEOUT
) -> tuple[socket.socket, bytes]:
    """Connect as `rank` to the rank `peer` and authenticate. Returns a tuple (socket, session key).

    The session key has 32 bytes. It is different for each connection, and only the two ends know it.

    Args:
        address: (host, port) at which the peer listens.
        token: the secret that both ends must know.
        epoch: number of the group of ranks. A group that replaces another has a higher number.
        rank: this end's rank.
        peer: the other end's rank.
        seconds: longest time to wait for the connection, and for each of the peer's two answers.

    Raises OSError if no connection can be made. Raises its subclass ConnectionRefused if the peer refuses or does not
    know the token. Raises ValueError for a short token.
    """
    check_token(token)
    s = socket.create_connection(address, timeout=seconds)
    try:
        challenge = receive(s, 32)
        hello = HELLO.pack(MAGIC, epoch, rank, peer, secrets.token_bytes(32))
        s.sendall(hello + proof(token, b"connects", challenge, hello))
        if not hmac.compare_digest(receive(s, PROOF), proof(token, b"accepts", challenge, hello)):
            raise ConnectionRefused(f"rank {peer} at {address[0]}:{address[1]} does not know the token")
    except BaseException:
        s.close()
        raise
    s.settimeout(None)
    return s, proof(token, b"session", challenge, hello)


@dataclass(frozen=True)
class Peer:
    """Description of the other end of an accepted connection.

    Attributes:
        rank: the peer's rank.
        to: the rank to which the peer wants to connect.
        epoch: number of the peer's group of ranks.
        key: session key, which only the two ends know.
    """

    rank: int
    to: int
    epoch: int
    key: bytes


def accept(listener: socket.socket, token: bytes, epoch: int, rank: int) -> tuple[int, socket.socket]:
    """Wait for the next peer that connects to `rank`. Returns a tuple (the peer's rank, socket).

    Args:
        listener: the socket at which `rank` listens.
        token: the secret that both ends must know.
        epoch: number of the group of ranks.
        rank: this end's rank.

    Raises ConnectionRefused, after closing the connection, if the peer wants another rank, is of a group with another
    epoch, or does not know the token. The caller may then call again to wait for the next peer. Raises OSError if the
    listener fails, and ValueError for a short token.
    """

    def check(peer: Peer) -> None:
        if peer.to != rank:
            raise ConnectionRefused(f"rank {peer.rank} wants rank {peer.to} of another group; this is rank {rank}")
        if peer.epoch != epoch:
            raise ConnectionRefused(f"rank {peer.rank} is of epoch {peer.epoch}; this group is of epoch {epoch}")

    check_token(token)
    s, address = listener.accept()
    return meet(s, address[0], token, check).rank, s


def accepted(listener: socket.socket) -> Iterator[tuple[socket.socket, str]]:
    """Accept connections at `listener` until it is closed. Yields a tuple (socket, host of the other end) for each."""
    while True:
        try:
            s, address = listener.accept()
        except OSError:
            if listener.fileno() < 0:
                return
            time.sleep(0.05)  # no descriptors are left; some will be
            continue
        yield s, address[0]


def stop_accepting(listener: socket.socket) -> None:
    """Close the socket `listener`, and wake the thread that waits in accepted()."""
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def meet(s: socket.socket, where: str, token: bytes, check: Callable[[Peer], None]) -> Peer:
    """Authenticate the other end of the accepted connection `s`. Returns a Peer, which describes it.

    `where` is the address of the other end, for error messages. `check` is a function that raises ConnectionRefused for
    a Peer that is not wanted. Raises ConnectionRefused, after closing the connection, if `check` raises it, if the
    other end does not know the token, or if it does not answer in TIMEOUT seconds.
    """
    try:
        s.settimeout(TIMEOUT)
        challenge = secrets.token_bytes(32)
        s.sendall(challenge)
        hello = receive(s, HELLO.size)
        if not hmac.compare_digest(receive(s, PROOF), proof(token, b"connects", challenge, hello)):
            raise ConnectionRefused(f"{where} does not know the token")
        magic, epoch, rank, to, _ = HELLO.unpack(hello)
        if magic != MAGIC:
            raise ConnectionRefused(f"{where} is of another version")
        peer = Peer(rank, to, epoch, proof(token, b"session", challenge, hello))
        check(peer)
        s.sendall(proof(token, b"accepts", challenge, hello))
    except OSError as e:
        s.close()
        raise e if isinstance(e, ConnectionError) else ConnectionRefused(f"{where}: {e}") from e
    except BaseException:
        s.close()
        raise
    s.settimeout(None)
    return peer


def check_binding(host: str, token: bytes | None) -> bytes:
    """Return the token to use for connections at the IP address `host`.

    It is `token`, or LOOPBACK_TOKEN if `token` is None. Raises ValueError if `token` is None and `host` can be reached
    from other hosts, and if `token` is too short.
    """
    if token is None:
        if not ipaddress.ip_address(host).is_loopback:
            raise ValueError(f"{host} can be reached from other hosts; give --token-file with 16 or more random bytes")
        return LOOPBACK_TOKEN
    check_token(token)
    return token


def receive(s: socket.socket, size: int) -> bytes:
    """Receive exactly `size` bytes from the socket `s` and return them.

    Raises ConnectionRefused if the peer closes the connection before all of these bytes have arrived.
    """
    got = b""
    while len(got) < size:
        if not (part := s.recv(size - len(got))):
            raise ConnectionRefused("the peer closed the connection: it was refused, or has another token")
        got += part
    return got


def join(
    listener: socket.socket, addresses: Mapping[int, tuple[str, int]], token: bytes, epoch: int, rank: int
) -> dict[int, int]:
    """Connect `rank` with each rank in `addresses`. Returns {other rank: file descriptor of the socket}.

    The caller must close the descriptors. The lower rank of a pair connects, the higher rank accepts. An incoming
    connection is closed and ignored if the other end does not know the token, is of another group, or is a rank that
    should not connect.

    Args:
        listener: the socket at which `rank` listens.
        addresses: {other rank: (host, port)}.
        token: the secret that all ranks must know.
        epoch: number of the group of ranks.
        rank: this end's rank.

    Raises OSError if a connection cannot be made.
    """
    made: dict[int, socket.socket] = {}
    try:
        for peer, address in addresses.items():
            if peer > rank:
                made[peer] = connect(address, token, epoch, rank, peer)
        while len(made) < len(addresses):
            try:
                peer, s = accept(listener, token, epoch, rank)
            except ConnectionError:
                continue
            if peer in made or peer not in addresses or peer > rank:
                s.close()
                continue
            made[peer] = s
    except BaseException:
        for s in made.values():
            s.close()
        raise
    return {peer: s.detach() for peer, s in made.items()}
