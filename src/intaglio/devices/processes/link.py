"""Link: frames between two hosts over an authenticated connection, with heartbeats in both directions.

A frame is a head (length, kind, sequence number), the payload and an HMAC-SHA256 over both with the key of the session,
so a frame that was changed, left out or sent twice ends the link. The payload is not encrypted.
"""

from __future__ import annotations

import hmac
import select
import socket
import struct
import threading
import time
from contextlib import suppress

from intaglio.devices.processes.beacon import Beacon
from intaglio.devices.processes.connections import proof
from intaglio.devices.processes.membership import BEAT, FrameOrder, OutOfOrder, Silence

HEAD = struct.Struct("!IBQ")  # bytes of the payload, kind, number of the frame
PORT = struct.Struct("!H")  # payload of a heartbeat: the port where datagrams are heard
MAC = 32  # bytes
LONGEST = 1 << 30  # bytes of a payload
INTERVAL = 0.1  # seconds between two heartbeats
SILENCE = 0.8  # seconds without a byte after which a host counts as gone
STALL = 10  # times the silence: a connection in which no byte moves for so long is dead, whatever datagrams come


class LinkLost(ConnectionError):
    """Raised if the other host has closed the connection, is silent, or sent bytes that are not a valid frame."""


class Link:
    """One end of a connection between two hosts that carries frames. Any thread may send; only one may receive.

    Each end sends heartbeats every INTERVAL seconds, over the TCP connection and as UDP datagrams (Beacon). The link is
    lost if nothing comes from the other end for `silence` seconds. If datagrams come but the TCP connection is stuck,
    the link is lost after STALL * `silence` seconds.

    Args:
        s: the authenticated TCP connection.
        key: the session key.
        connected: True at the end that opened the connection.
        silence: seconds without a message from the other end after which the link is lost.
    """

    def __init__(self, s: socket.socket, key: bytes, connected: bool, silence: float = SILENCE) -> None:
        self.socket, self.silence = s, Silence(silence, 0.0)
        self.looked, self.now = time.monotonic(), 0.0  # now: seconds in which this end looked and nothing came
        self.stalled, self.stall = 0.0, STALL * silence  # seconds without a byte in the connection; most of them
        keys = [proof(key, way, b"", b"") for way in (b"from who connected", b"to who connected")]
        self.send_key, self.receive_key = keys if connected else reversed(keys)
        self.order = FrameOrder()
        self.lock, self.closed = threading.Lock(), threading.Event()
        s.settimeout(silence)
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.beacon = Beacon(s, (self.send_key, self.receive_key), INTERVAL)
        self.poll = select.poll()
        for one in (s, self.beacon.socket):
            if one:
                self.poll.register(one, select.POLLIN)
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Send a frame of kind `kind` with `payload`. Returns None.

        Raises LinkLost if the frame cannot be sent, and ValueError for a payload longer than LONGEST bytes.
        """
        if len(payload) > LONGEST:
            raise ValueError(f"a frame of {len(payload)} bytes; at most {LONGEST} are allowed")
        with self.lock:
            head = HEAD.pack(len(payload), kind, self.order.next_number())
            left = memoryview(head + payload + mac(self.send_key, head, payload))
            timeouts = 0  # in a row
            try:
                while left:
                    try:
                        left, timeouts = left[self.socket.send(left) :], 0
                    except TimeoutError:  # a slow link; if it is cut, receive() closes it
                        timeouts += 1
                        if timeouts == STALL:
                            raise
                    if self.closed.is_set():
                        raise LinkLost("the link is closed")
            except OSError as e:
                self.close()
                raise LinkLost(f"nothing can be sent: {e}") from e

    def receive(self) -> tuple[int, bytes]:
        """Wait for the next frame that is not a heartbeat. Returns a tuple (kind, payload).

        Raises LinkLost, after closing the link, if nothing comes for `silence` seconds or a frame is invalid.
        """
        try:
            while True:
                head = self._take(HEAD.size)
                size, kind, number = HEAD.unpack(head)
                if size > LONGEST:
                    raise LinkLost(f"a frame of {size} bytes came; at most {LONGEST} are allowed")
                payload = self._take(size)
                if not hmac.compare_digest(self._take(MAC), mac(self.receive_key, head, payload)):
                    raise LinkLost("a frame came that the other end did not send")
                try:
                    self.order.check(number)
                except OutOfOrder as e:
                    raise LinkLost(str(e)) from e
                if kind != BEAT:
                    return kind, payload
                if size == PORT.size:
                    self.beacon.meet(*PORT.unpack(payload))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection. Calls of send() and receive() then raise LinkLost at both ends."""
        self.closed.set()
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.beacon.close()

    def _take(self, size: int) -> bytes:
        got, at = bytearray(min(size, 1 << 20)), 0
        while at < size:
            if at == len(got):  # grows as bytes come, whatever the head says
                got += bytes(min(size - at, len(got)))
            if not self._arrived():
                continue
            try:
                n = self.socket.recv_into(memoryview(got)[at:])
            except OSError as e:
                raise LinkLost(str(e)) from e
            if not n:
                raise LinkLost("the other end closed the connection")
            self.silence.heard(self.now)
            self.stalled = 0.0
            at += n
        return bytes(got)

    def _arrived(self) -> bool:
        """Wait up to INTERVAL seconds for the other end. Returns True if bytes can be read from the TCP connection.

        Heartbeat datagrams are read by this method. A pause of this process counts as at most INTERVAL seconds of
        silence. Raises LinkLost if the link is closed, or if the other end says that it receives nothing. Raises it
        also if neither bytes nor datagrams came for `silence` seconds, or no bytes for STALL * `silence` seconds.
        """
        ready = {file for file, _ in self.poll.poll(INTERVAL * 1000)} - {self.beacon.fileno()}
        before, self.looked = self.looked, time.monotonic()
        quiet = 0.0 if ready else min(INTERVAL, self.looked - before)
        self.stalled += quiet
        if self.closed.is_set():
            raise LinkLost("the link is closed")
        if self.beacon.hear():
            self.silence.heard(self.now)
        else:
            self.now += quiet
        if self.beacon.given_up():
            raise LinkLost("the other end hears nothing")
        if self.silence.left(self.now) <= 0:
            self.beacon.give_up()
            raise LinkLost(f"nothing came in {self.silence.allowed:g} s")
        if self.stalled >= self.stall:
            self.beacon.give_up()
            raise LinkLost(f"no byte came in the connection in {self.stall:g} s, though heartbeats came beside it")
        return bool(ready)

    def _beat(self) -> None:
        with suppress(LinkLost):
            while not self.closed.wait(INTERVAL):
                self.beacon.refill()
                self.send(BEAT, PORT.pack(self.beacon.port))


def mac(key: bytes, head: bytes, payload: bytes) -> bytes:
    """Return the authentication code of a frame: HMAC-SHA256 of `head` and `payload` with `key`, 32 bytes."""
    code = hmac.new(key, head, "sha256")
    code.update(payload)
    return code.digest()
