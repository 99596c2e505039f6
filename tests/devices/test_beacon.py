"""Heartbeats over UDP: which datagrams count, and a link whose TCP connection is busy is not taken for a dead one."""

from __future__ import annotations

import hmac
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from intaglio.devices.processes.beacon import AT_ONCE, NUMBER, Beacon, signed
from intaglio.devices.processes.link import PORT, STALL, Link, LinkLost
from intaglio.devices.processes.membership import BEAT, HELLO

KEYS = (b"a" * 32, b"b" * 32)
PATIENT = 60.0  # seconds after which a test fails that waits for datagrams


def until(condition: Callable[[], object]) -> None:
    """Wait until the condition is true; fail after PATIENT seconds, as where UDP is blocked."""
    end = time.monotonic() + PATIENT
    while not condition():
        assert time.monotonic() < end, "no datagrams came on loopback"
        time.sleep(0.005)


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far = listener.accept()[0]
        with near, far:
            yield near, far


def test_only_new_datagrams_of_the_other_end_count() -> None:
    with connected() as (near, far), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        mine, beacon = Beacon(near, KEYS, 0.01), Beacon(far, (KEYS[1], KEYS[0]), 0.01)

        def heard(*datagrams: bytes) -> bool:
            for datagram in datagrams:
                other.sendto(datagram, ("127.0.0.1", beacon.port))
            return beacon.hear()  # on loopback a datagram is there when it is sent

        def made(number: int, key: bytes = mine.send_key) -> bytes:
            return NUMBER.pack(number) + hmac.digest(key, NUMBER.pack(number), "sha256")

        assert heard(made(5)) and not heard(made(5)) and not heard(made(4)) and heard(made(4), made(6))
        assert not heard(made(7, mine.receive_key)) and not heard(made(7)[:-1]) and not heard(made(7) + b"x")
        assert not heard(b"") and not heard(b"x" * 40) and heard(made(1 << 63)) and not heard(made(8))
        assert heard(made((1 << 64) - 1)) and beacon.given_up() and not mine.given_up()
        mine.close()
        beacon.close()


def test_a_look_reads_a_limited_number_of_datagrams() -> None:
    """So that a flood of them does not keep this end from the connection."""
    with connected() as (near, far), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        mine, beacon = Beacon(near, KEYS, 0.01), Beacon(far, (KEYS[1], KEYS[0]), 0.01)
        for i in range(2 * AT_ONCE):
            other.sendto(b"x" * (i % 60), ("127.0.0.1", beacon.port))
        other.sendto(signed(mine.send_key, 1), ("127.0.0.1", beacon.port))
        assert [beacon.hear() for _ in range(3)] == [False, False, True]
        mine.close()
        beacon.close()


@pytest.mark.parametrize("call", ["bind", "connect"])
def test_a_host_without_udp_uses_the_connection_alone(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    allowed = getattr(socket.socket, call)

    def refuse(s: socket.socket, *args: object) -> None:
        if s.type == socket.SOCK_DGRAM:
            raise PermissionError("not here")
        allowed(s, *args)

    with connected() as (a, b):
        monkeypatch.setattr(socket.socket, call, refuse)
        near, far = Link(a, b"k" * 32, True, 60.0), Link(b, b"k" * 32, False, 60.0)
        near.beacon.meet(far.beacon.port or 9)
        assert near.beacon.sender is None and (near.beacon.port == 0) == (call == "bind")
        for _ in range(3):
            far.send(BEAT, PORT.pack(far.beacon.port))
            far.send(HELLO, b"x")
            assert near.receive() == (HELLO, b"x")
        assert not near.beacon.hear() and not near.closed.is_set()
        near.close()
        far.close()


def test_an_end_that_hears_nothing_tells_the_other() -> None:
    """The other would not notice by itself: it hears this end."""
    with connected() as (a, b):
        near, far = Link(a, b"k" * 32, True, 60.0), Link(b, b"k" * 32, False, 0.5)
        near.beacon.meet(far.beacon.port)
        far.beacon.meet(near.beacon.port)
        far.beacon.hear = bool  # type: ignore[method-assign]
        with near.lock, pytest.raises(LinkLost, match="nothing came in 0.5 s"):  # nothing of `near` arrives
            far.receive()
        with pytest.raises(LinkLost):
            near.receive()
        assert near.beacon.given_up()
        near.close()


def test_the_native_thread_sends_what_was_signed_before() -> None:
    """Also while no Python code of this end runs: nothing is signed anew here."""
    with connected() as (near, far):
        mine, beacon = Beacon(near, KEYS, 0.001), Beacon(far, (KEYS[1], KEYS[0]), 0.001)
        mine.meet(beacon.port)
        mine.refill()
        until(lambda: beacon.hear() and beacon.heard >= mine.sent)
        assert mine.sent == beacon.heard > 0
        mine.close()
        beacon.close()


def test_a_connection_in_which_nothing_moves_is_kept_by_datagrams_and_lost_without() -> None:
    """As if a long frame waited for a slow link: nobody else can send, heartbeats in the connection included."""
    with connected() as (a, b):
        near, far = Link(a, b"k" * 32, True, PATIENT), Link(b, b"k" * 32, False, PATIENT)
        near.send(HELLO, b"x")
        assert far.receive() == (HELLO, b"x")
        lost: list[LinkLost] = []

        def receive() -> None:
            with pytest.raises(LinkLost) as caught:
                far.receive()
            lost.append(caught.value)

        def drain() -> None:
            with suppress(LinkLost):
                near.receive()

        readers = [threading.Thread(target=receive), threading.Thread(target=drain)]
        for reader in readers:
            reader.start()
        until(lambda: far.beacon.heard)
        with near.lock:

            def kept() -> bool:
                """No byte has come for half a second, and yet there is no silence: a datagram has just come."""
                near.beacon.refill()
                return far.stalled >= 0.5 and far.silence.last == far.now

            until(kept)
            assert not lost
            near.beacon.close()
            far.silence.allowed = 0.5
            readers[0].join()
        assert "nothing came in 0.5 s" in str(lost[0])
        near.close()
        readers[1].join()


def test_datagrams_do_not_keep_a_connection_that_is_dead() -> None:
    with connected() as (a, b):
        near, far = Link(a, b"k" * 32, True, PATIENT), Link(b, b"k" * 32, False, PATIENT)
        assert far.stall == STALL * PATIENT
        near.beacon.meet(far.beacon.port)
        far.stall = 0.3
        with near.lock, pytest.raises(LinkLost, match="no byte came in the connection in 0.3 s"):
            near.beacon.refill()
            far.receive()
        near.close()


def test_a_frame_that_cannot_be_sent_ends_the_link() -> None:
    """The other end takes no bytes, but sends some."""
    with connected() as (a, b):
        near = Link(a, b"k" * 32, True, PATIENT)
        a.settimeout(0.01)
        with pytest.raises(LinkLost, match="nothing can be sent: timed out"):
            near.send(HELLO, bytes(64 << 20))
        assert near.closed.is_set() and b.recv(1)
