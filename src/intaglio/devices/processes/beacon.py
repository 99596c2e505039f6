"""Beacon: heartbeats between two hosts as UDP datagrams, beside the connection that carries frames.

A datagram does not wait behind the frames in a connection, nor until a lost packet is sent again. A native thread sends
them, so that Python code that keeps the interpreter's lock does not silence a host. Each has a number and an
HMAC-SHA256; one that is forged or comes twice does not count. If a network lets no datagrams through,
only the heartbeats in the connection count.
"""

from __future__ import annotations

import hmac
import socket
import struct
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from intaglio.devices.processes.connections import proof

if TYPE_CHECKING:
    from intaglio import _native

NUMBER = struct.Struct("!Q")
SIZE = NUMBER.size + 32  # bytes of a datagram
AHEAD = 50  # datagrams that are signed in advance: for 5 s in which no Python code of this process runs
INTERACTIVE = 6  # priority in the queue of this host's network device
AT_ONCE = 64  # datagrams that one hear() reads at most
LAST = (1 << 64) - 1  # number of the datagram of an end that gives up
LOW_DELAY = 0x10  # the same for routers, as the type of service


class Beacon:
    """Sends heartbeats (UDP datagrams) to another host and receives the heartbeats of that host.

    It receives from the start, and sends after meet() has been called with the port of the other end. If this host does
    not allow the UDP socket, the beacon is off: it neither sends nor receives.

    Args:
        s: the TCP connection between the hosts, whose addresses are used.
        keys: (key for sending, key for receiving), with which heartbeats are signed.
        seconds: time between two heartbeats.

    Attributes:
        port: number of the UDP port at which this end receives heartbeats; 0 if the beacon is off.
        socket: the socket of that port; None if the beacon is off.
        sent: number of the last heartbeat that was signed for sending.
        heard: number of the last heartbeat that was received. The number LAST means that the other end has given up and
            sends no more.
    """

    def __init__(self, s: socket.socket, keys: tuple[bytes, bytes], seconds: float) -> None:
        self.send_key, self.receive_key = (proof(key, b"heartbeats", b"", b"") for key in keys)
        self.seconds, self.sent, self.heard, self.port = seconds, 0, 0, 0
        self.socket: socket.socket | None = None
        self.sender: _native.Datagrams | None = None
        with suppress(OSError):
            self._open(s)

    def _open(self, s: socket.socket) -> None:
        """Open a UDP socket at the local address of the TCP connection `s`, at any free port. Returns None.

        The socket and its port number are stored in the attributes `socket` and `port`. Raises OSError if the host
        refuses it.
        """
        self.peer = s.getpeername()
        with ExitStack() as failed:
            own = failed.enter_context(socket.socket(s.family, socket.SOCK_DGRAM))
            own.setblocking(False)
            own.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, INTERACTIVE)
            if s.family == socket.AF_INET:
                own.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, LOW_DELAY)
            own.bind((s.getsockname()[0], 0, *s.getsockname()[2:]))
            self.socket, self.port = own, int(own.getsockname()[1])
            failed.pop_all()

    def meet(self, port: int) -> None:
        """Start sending heartbeats to UDP port `port` of the other end. Returns None.

        It does nothing if heartbeats are being sent already, if the beacon is off or closed, if `port` is 0 (the other
        end's beacon is off), or if this host refuses to send to that port.
        """
        if self.sender is None and self.fileno() >= 0 and port and self.socket:
            from intaglio import _native

            with suppress(OSError):
                self.socket.connect((self.peer[0], port, *self.peer[2:]))
                self.sender = _native.Datagrams(self.socket.fileno(), self.seconds)

    def fileno(self) -> int:
        """Return the file descriptor of the UDP socket; -1 if the beacon is off or closed."""
        return self.socket.fileno() if self.socket else -1

    def refill(self) -> None:
        """Sign heartbeats in advance, until AHEAD of them wait to be sent. Returns None.

        A native thread sends one heartbeat every `seconds`, even while Python code is busy or waits for the interpreter
        lock. This method does nothing before meet() has been called.
        """
        sender = self.sender
        while sender is not None and sender.waiting() < AHEAD:
            self.sent += 1
            sender.add(signed(self.send_key, self.sent))

    def hear(self) -> bool:
        """Read the datagrams that have arrived, at most AT_ONCE of them.

        Returns True if one of them is a new heartbeat. A new heartbeat is signed with the other end's key and has a
        higher number than all earlier ones.
        """
        new, own = False, self.socket
        if own is None:
            return False
        with suppress(OSError):  # none is left, or the other end has closed its port
            for _ in range(AT_ONCE):
                datagram = own.recv(SIZE + 1)
                if len(datagram) != SIZE:
                    continue
                number = NUMBER.unpack(datagram[: NUMBER.size])[0]
                if number > self.heard and hmac.compare_digest(datagram, signed(self.receive_key, number)):
                    self.heard, new = number, True
        return new

    def given_up(self) -> bool:
        """True if the other end has called give_up(), because it receives nothing from this end."""
        return self.heard == LAST

    def give_up(self) -> None:
        """Tell the other end that this end receives nothing from it and will close the connection. Returns None.

        Closing the TCP connection says this too, but may arrive late, because TCP first delivers all bytes sent before.
        Nothing happens if the beacon is off.
        """
        if own := self.socket:
            for _ in range(3):
                with suppress(OSError):
                    own.send(signed(self.send_key, LAST))

    def close(self) -> None:
        """Stop sending heartbeats and close the UDP socket."""
        self.sender = None
        if self.socket:
            self.socket.close()


def signed(key: bytes, number: int) -> bytes:
    """Return a heartbeat datagram of SIZE bytes: its number, then the HMAC-SHA256 of the number under `key`.

    Heartbeats are numbered from 1. The number LAST means that the sender gives up.
    """
    head = NUMBER.pack(number)
    return head + hmac.digest(key, head, "sha256")
