"""Connections between ranks of several hosts: refused without the token, robust to any bytes at the port, same bits."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from devices.test_communicator import segment, together
from support.tiny import tiny

from intaglio import _native
from intaglio.batch import Chunk, bind
from intaglio.compiler import build_mesh
from intaglio.devices import MeshDevice, StateSpec, StepRequest
from intaglio.devices.host import HostDevice
from intaglio.devices.processes.connections import (
    HELLO,
    MAGIC,
    PROOF,
    ConnectionRefused,
    accept,
    connect,
    join,
    listen,
    proof,
    receive,
)
from intaglio.models import Checkpoint, port

TOKEN = b"a token of 16 or more bytes"
GARBAGE = int(os.environ.get("INTAGLIO_FRAMES", "200"))


@pytest.fixture(scope="module", params=[(0, 1), (0, 0, 1, 1)], ids=["tcp", "mixed"])
def ends(request: pytest.FixtureRequest) -> list[_native.Communicator]:
    """The communicators of a group: ranks of one host by shared memory, others by TCP."""
    hosts = request.param
    listeners = [listen() for _ in hosts]
    addresses = [s.getsockname() for s in listeners]
    memory = {host: segment(len(hosts), 1 << 16) for host in set(hosts)}

    def one(rank: int) -> _native.Communicator:
        others = {r: a for r, a in enumerate(addresses) if hosts[r] != hosts[rank]}
        return _native.Communicator(memory[hosts[rank]], rank, join(listeners[rank], others, TOKEN, 1, rank))

    made = together(len(hosts), one)
    for s in listeners:
        s.close()
    return made


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_a_group_over_tcp_has_the_bits_of_the_mesh(
    tmp_path: Path, ends: list[_native.Communicator], family: str
) -> None:
    c = Checkpoint.open(tiny(family, tmp_path))
    layout = "tp2" if len(ends) == 2 else "tp2pp2"
    mesh, state = build_mesh(port(c), layout), StateSpec(6, 16)
    here = MeshDevice(HostDevice(1)).load(mesh, c, state)
    ranks = [HostDevice(1, communicator=e).load(p, c, state) for p, e in zip(mesh.programs, ends, strict=True)]
    tokens = np.random.default_rng(3).integers(0, 263, 14).tolist()
    for start, end in ((0, 9), (9, 12), (12, 13), (13, 14)):
        request = StepRequest(bind([Chunk(tokens[start:end], start, [4, 1], range(end - start))], 16), logits=True)
        wanted = here.step(request).logits
        got = together(len(ranks), lambda r: ranks[r].step(request))[-1].logits  # noqa: B023
        assert got is not None and wanted is not None
        np.testing.assert_array_equal(got, wanted)


def refused(listener: socket.socket, **options: object) -> str:
    """Why a peer with these options is refused, at the end that accepts."""
    given = {"token": TOKEN, "epoch": 4, "rank": 0, "peer": 1, **options}
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(connect, listener.getsockname(), **given)  # type: ignore[arg-type]
        with pytest.raises(ConnectionRefused) as caught:
            accept(listener, TOKEN, 4, 1)
        assert isinstance(theirs.exception(), OSError)
    return str(caught.value)


def test_a_peer_without_the_token_or_of_another_epoch_is_refused() -> None:
    with listen() as listener:
        assert "does not know the token" in refused(listener, token=b"another token of that length")
        assert "rank 0 is of epoch 3; this group is of epoch 4" in refused(listener, epoch=3)
        assert "wants rank 2" in refused(listener, peer=2)
        with pytest.raises(ValueError, match="the token has 5 bytes; use 16 or more"):
            connect(listener.getsockname(), b"short", 4, 0, 1)


def test_who_accepts_must_know_the_token_too() -> None:
    with listen() as listener, ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(connect, listener.getsockname(), TOKEN, 4, 0, 1)
        s, _ = listener.accept()
        with s:
            s.sendall(bytes(32))
            hello = receive(s, HELLO.size)
            receive(s, PROOF)
            s.sendall(proof(b"another token of that length", b"accepts", bytes(32), hello))
            with pytest.raises(ConnectionRefused, match="rank 1 at .* does not know the token"):
                theirs.result()


def test_garbage_at_the_port_leaves_it_serving() -> None:
    seed = int.from_bytes(os.urandom(4))
    random = np.random.default_rng(seed)
    hello = HELLO.pack(MAGIC, 4, 0, 1, bytes(32))
    with listen() as listener:
        address = listener.getsockname()
        for _ in range(GARBAGE):
            frame = random.bytes(int(random.integers(0, 3 * HELLO.size)))
            if random.random() < 0.5:  # a right beginning
                frame = hello[: int(random.integers(0, len(hello) + 1))] + frame
            with socket.create_connection(address) as s:
                s.sendall(frame)
                s.shutdown(socket.SHUT_WR)
                with pytest.raises(ConnectionError):
                    accept(listener, TOKEN, 4, 1)
        with ThreadPoolExecutor(1) as pool:
            theirs = pool.submit(connect, address, TOKEN, 4, 0, 1)
            peer, mine = accept(listener, TOKEN, 4, 1)
            with mine, theirs.result() as s:
                assert peer == 0
                s.sendall(b"x")
                assert receive(mine, 1) == b"x"
