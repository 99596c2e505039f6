"""Heartbeats as datagrams: which ones count, and a link whose connection is busy is not taken for a dead one."""

from __future__ import annotations

import hmac
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from intaglio.devices.processes.beacon import NUMBER, Beacon
from intaglio.devices.processes.link import Link, LinkLost
from intaglio.devices.processes.membership import HELLO

KEYS = (b"a" * 32, b"b" * 32)


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

        def signed(number: int, key: bytes = mine.send_key) -> bytes:
            return NUMBER.pack(number) + hmac.digest(key, NUMBER.pack(number), "sha256")

        assert heard(signed(5)) and not heard(signed(5)) and not heard(signed(4)) and heard(signed(4), signed(6))
        assert not heard(signed(7, mine.receive_key)) and not heard(signed(7)[:-1]) and not heard(signed(7) + b"x")
        assert not heard(b"") and not heard(b"x" * 40) and heard(signed(1 << 63)) and not heard(signed(8))
        assert heard(signed((1 << 64) - 1)) and beacon.given_up() and not mine.given_up()
        mine.close()
        beacon.close()


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
        while beacon.heard < mine.sent:
            beacon.hear()
        assert mine.sent == beacon.heard > 0
        mine.close()
        beacon.close()


def test_a_connection_in_which_nothing_moves_is_kept_by_datagrams_and_lost_without() -> None:
    """As if a long frame waited for a slow link: nobody else can send, heartbeats in the connection included."""
    with connected() as (a, b):
        near, far = Link(a, b"k" * 32, True, 1.0), Link(b, b"k" * 32, False, 1.0)
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
        while far.beacon.heard == 0:
            time.sleep(0.01)
        with near.lock:
            first = far.beacon.heard
            while far.beacon.heard < first + 20 and not lost:  # two seconds of them: twice the silence allowed
                near.beacon.refill()
                time.sleep(0.01)
            assert not lost
            near.beacon.close()
            readers[0].join()
        assert "nothing came in 1 s" in str(lost[0])
        near.close()
        readers[1].join()
