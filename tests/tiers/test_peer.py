"""PeerTier: a fetched block equals the one that was saved; one that is damaged, cut off or late is computed instead."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.serving import oracle_engine, request, run_checked, smallest_program, truth

from intaglio.devices.processes.address import TcpAddress
from intaglio.devices.processes.connections import introduce, listen, meet
from intaglio.runtime import BlockKey, BlockNames, BlockScope, Engine
from intaglio.tiers import DiskTier, PeerTier, StoreTier
from intaglio.tiers.block_file import file_bytes
from intaglio.tiers.block_server import COUNT, NAMES_MAX, SIZE, BlockClient
from intaglio.tiers.directory import NoRoom
from intaglio.tiers.memory import BlockMemory
from intaglio.tiers.peer import READERS

SEED = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
TIMEOUT_S = 60.0
TOKENS = 4  # of a block
SCOPE = BlockScope.of(smallest_program(), TOKENS, "oracle", "weights A", "1")
TOKEN = b"a token of the peers, long enough"
Change = Callable[[bytes, int], bytes | None]  # of bytes that begin at a position of the answers; None: close


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Checks that a test leaves no thread and no descriptor."""

    def left() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = left()
    yield
    ends = time.monotonic() + TIMEOUT_S
    while left() > before and time.monotonic() < ends:
        time.sleep(0.01)
    assert left() <= before


@contextmanager
def tier(
    scope: BlockScope = SCOPE, token: bytes = TOKEN, budget: int = 1 << 20
) -> Iterator[tuple[PeerTier, list[str]]]:
    """A peer tier, and the list of what it reports."""
    said = list[str]()
    with closing(PeerTier(TcpAddress("127.0.0.1", 0, token), budget, scope, said.append)) as t:
        yield t, said


def chain(rng: random.Random, n: int) -> list[BlockKey]:
    """`n` BlockKeys, each the child of the one before."""
    tokens, names = [rng.randrange(100) for _ in range(n * TOKENS)], BlockNames(SCOPE.digest, TOKENS)
    parents = [names.root(), *names.of(tokens)]
    return [BlockKey(parents[i + 1], parents[i], tuple(tokens[i * TOKENS : (i + 1) * TOKENS])) for i in range(n)]


def saved(t: PeerTier, rng: random.Random, n: int, size: int = 64) -> tuple[list[BlockKey], list[np.ndarray]]:
    """Blocks that a tier holds, and their contents."""
    keys, contents = chain(rng, n), [np.frombuffer(rng.randbytes(size), np.uint8) for _ in range(n)]
    for key, content in zip(keys, contents, strict=True):
        t.save(key, content.copy())
    t.flush()
    return keys, contents


def loaded(t: PeerTier, keys: list[BlockKey], size: int = 64) -> list[np.ndarray]:
    load = t.load(keys, size)
    assert load.wait(TIMEOUT_S)
    return load.blocks()


def names_of(keys: list[BlockKey]) -> list[str]:
    return [key.name for key in keys]


@contextmanager
def between(server: TcpAddress, change: Change) -> Iterator[TcpAddress]:
    """A relay before a server. What the server sends after the handshake (64 bytes) passes through `change`."""
    listener, sockets = listen(), list[socket.socket]()

    def forward(source: socket.socket, sink: socket.socket, skip: int, change: Change) -> None:
        at = -skip
        with suppress(OSError):
            while data := source.recv(1 << 16):
                new = data if at + len(data) <= 0 else change(data, at)
                if new is None:
                    break
                sink.sendall(new)
                at += len(data)
        for s in (source, sink):
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((server.host, server.port))
                sockets.extend((near, far))
                for how in ((near, far, 0, lambda data, _: data), (far, near, 64, change)):
                    threads.append(threading.Thread(target=forward, args=how, daemon=True))
                    threads[-1].start()

    threads = [threading.Thread(target=accept, daemon=True)]
    threads[0].start()
    try:
        yield TcpAddress("127.0.0.1", listener.getsockname()[1], server.token)
    finally:
        for s in (listener, *sockets):
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(TIMEOUT_S)
        for s in (listener, *sockets):
            s.close()


@contextmanager
def silent(server: TcpAddress) -> Iterator[TcpAddress]:
    """A relay before a server, which passes on the handshake and then nothing from the server."""
    go = threading.Event()

    def hold(data: bytes, _: int) -> bytes:
        go.wait(TIMEOUT_S)
        return data

    with between(server, hold) as address:
        try:
            yield address
        finally:
            go.set()


def test_blocks_of_a_peer_come_as_they_were_saved() -> None:
    print(f"TEST_SEED={SEED}")
    rng = random.Random(SEED)
    with tier() as (a, said_a), tier() as (b, said_b), tier() as (c, said_c):
        keys, contents = saved(a, rng, 9)
        for key, content in zip(keys[:2], contents[:2], strict=True):
            b.save(key, content.copy())
        b.flush()
        for key, content in zip(keys[6:], contents[6:], strict=True):
            c.save(key, content.copy())
        c.flush()
        a.store.remove(keys[7].name)
        b.announce(names_of(keys[:6]), a.address)
        b.announce(names_of(keys[6:]), c.address)
        assert b.lookup(names_of(keys)) == 9 and b.stored(names_of(keys)) == 2
        for _ in range(2):  # the second time over connections that were kept
            found = loaded(b, keys)
            assert len(found) == 9 and all(map(np.array_equal, found, contents))
        a.store.remove(keys[4].name)
        assert (
            len(loaded(b, keys)) == 4 and b.lookup(names_of(keys)) == 4
        )  # what a peer has lost is not asked for again
        assert b.counts.corrupt == b.counts.errors == 0 and not said_a + said_b + said_c


def test_a_peer_that_was_started_again_is_connected_to_again() -> None:
    rng = random.Random(SEED)
    with tier() as (b, said):
        with tier() as (a, _):
            keys, contents = saved(a, rng, 3)
            b.announce(names_of(keys), a.address)
            assert len(loaded(b, keys)) == 3
            address = a.address
        again = PeerTier(address, 1 << 20, SCOPE, said.append)
        with closing(again):
            for key, content in zip(keys, contents, strict=True):
                again.save(key, content.copy())
            again.flush()
            assert all(map(np.array_equal, loaded(b, keys), contents)) and b.counts.errors == 0 and not said
        assert loaded(b, keys) == [] and b.counts.errors == 1 and b.lookup(names_of(keys)) == 0
        assert len(said) == 1 and "cannot be fetched" in said[0]


def engine_on(t: StoreTier) -> Engine:
    engine = oracle_engine(pages=40, page_tokens=TOKENS, scope=t.scope, connector=t)
    engine.offload.timeout = 1e9  # its clock counts readings, while the tier's threads take real time
    return engine


def ask(engine: Engine, prompt: list[int], **options: Any) -> tuple[list[int], int]:
    """Run a request to its end. Returns its output, which is checked, and its cached tokens."""
    [s] = engine.add(request("r", prompt, **{"max_tokens": 5, **options}))
    run_checked(engine)
    assert s.output == truth(s) and s.finish_reason == "length"
    return s.output, s.cached_tokens


def test_an_engine_goes_on_after_the_blocks_of_another_with_the_same_tokens() -> None:
    rng = random.Random(SEED)
    prompt = [rng.randrange(60) for _ in range(30)]
    with tier() as (a, _), tier() as (b, said):
        first = engine_on(a)
        output, cached = ask(first, prompt)
        a.flush()
        b.announce(first.block_names.of(prompt), a.address)
        assert cached == 0 and ask(engine_on(b), prompt) == (output, 28)
        assert b.counts.hits == 7 and not said


def answered(t: PeerTier, rng: random.Random) -> tuple[list[int], list[int], list[str], int]:
    """(prompt, its output, names of its 7 whole blocks, bytes in which they are sent), of a request saved on a tier."""
    print(f"TEST_SEED={SEED}")
    prompt = [rng.randrange(60) for _ in range(30)]
    engine = engine_on(t)
    output, _ = ask(engine, prompt)
    t.flush()
    names = engine.block_names.of(prompt)[:7]
    return prompt, output, names, sum(SIZE.size + len(t.memory.get(name) or b"") for name in names)


@pytest.mark.parametrize("trials", [int(os.environ.get("CORRUPTIONS", "60"))])
def test_no_flipped_bit_reaches_an_answer(trials: int) -> None:
    rng = random.Random(SEED)
    with tier() as (a, _):
        prompt, output, names, whole = answered(a, rng)
        bad = 0

        def flip(data: bytes, at: int) -> bytes:
            changed = bytearray(data)
            if 0 <= bad - at < len(data):
                changed[bad - at] ^= 1 << rng.randrange(8)
            return bytes(changed)

        for trial in range(trials):
            bad = rng.randrange(whole)
            with between(a.address, flip) as address, tier() as (b, said):
                b.announce(names, address)
                assert ask(engine_on(b), prompt) == (output, b.counts.hits * TOKENS)
                assert b.counts.corrupt == len(said) == 1 and b.counts.hits < 7, f"{trial=} {bad=}"


def test_a_peer_that_is_killed_while_it_sends_costs_only_time() -> None:
    rng = random.Random(SEED)
    with tier() as (a, _):
        prompt, output, names, whole = answered(a, rng)
        end = 0

        def cut(data: bytes, at: int) -> bytes | None:
            return None if at + len(data) > end else data

        for _ in range(20):
            end = rng.randrange(whole)
            with between(a.address, cut) as address, tier() as (b, said):
                b.announce(names, address)
                assert ask(engine_on(b), prompt)[0] == output
                assert b.counts.errors == len(said) == 1 and b.counts.corrupt == 0
                assert b.lookup(names) == b.stored(names)  # the peer is not asked again


def test_a_peer_that_is_silent_is_given_up_and_a_cancelled_load_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(SEED)
    with tier() as (a, _), tier() as (b, said):
        keys, _ = saved(a, rng, 3)
        with silent(a.address) as address:
            b.announce(names_of(keys), address)
            for name in ("SILENCE", "CONNECTING"):
                monkeypatch.setattr(f"intaglio.tiers.peer.{name}", 1e6)
            load = b.load(keys, 64)
            while load.client is None:
                time.sleep(0.001)
            load.cancel()
            assert load.wait(TIMEOUT_S) and load.blocks() == [] and b.counts.errors == 0 and not said
            monkeypatch.setattr("intaglio.tiers.peer.SILENCE", 0.05)
            assert loaded(b, keys) == [] and b.counts.errors == 1 and "timed out" in said[0]
            b.announce(names_of(keys), a.address)
            assert len(loaded(b, keys)) == 3


def test_a_peer_that_hangs_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(SEED)
    keys = chain(rng, 3)
    with closing(listen()) as hung, tier() as (b, said):  # the system accepts connections for it
        monkeypatch.setattr("intaglio.tiers.peer.CONNECTING", 0.05)
        b.announce(names_of(keys), TcpAddress("127.0.0.1", hung.getsockname()[1], TOKEN))
        assert loaded(b, keys) == [] and b.lookup(names_of(keys)) == 0 and b.counts.errors == 1 and len(said) == 1
    with tier() as (a, _), tier() as (b, said), silent(a.address) as address:
        for name in ("SILENCE", "CONNECTING"):
            monkeypatch.setattr(f"intaglio.tiers.peer.{name}", 1e6)
        b.announce(names_of(keys), address)
        load = b.load(keys, 64)
        while load.client is None:
            time.sleep(0.001)
        monkeypatch.setattr("intaglio.tiers.peer.CONNECTING", 0.0)  # it has had more time than that
        load.cancel()
        assert load.wait(TIMEOUT_S) and b.lookup(names_of(keys)) == 0 and b.counts.errors == 1 and len(said) == 1


def test_a_tier_that_is_closed_waits_for_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(SEED)
    for name in ("SILENCE", "CONNECTING"):
        monkeypatch.setattr(f"intaglio.tiers.peer.{name}", 1e6)
    with tier() as (a, _), silent(a.address) as address:
        with tier() as (b, _):
            keys = chain(rng, 3)
            b.announce(names_of(keys), address)
            loads = [b.load(keys, 64) for _ in range(3 * READERS)]
            while not any(load.client for load in loads):
                time.sleep(0.001)
        assert all(load.wait(0) and not load.blocks() for load in loads)


def test_announced_blocks_that_are_computed_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(SEED)
    for name in ("SILENCE", "CONNECTING"):
        monkeypatch.setattr(f"intaglio.tiers.peer.{name}", 1e6)
    prompt = [rng.randrange(60) for _ in range(30)]
    with tier() as (a, _), tier() as (b, _), silent(a.address) as address:
        engine = engine_on(b)
        engine.offload.timeout = 3.0  # readings of its clock
        names = engine.block_names.of(prompt)
        b.announce(names, address)
        assert ask(engine, prompt)[1] == 0 and b.counts.late == len(names) == 7
        b.flush()
        assert b.stored(names) == 7


@pytest.mark.parametrize("kind", ["peer", "disk"])
def test_blocks_that_only_the_pool_has_are_handed_over(tmp_path: Path, kind: str) -> None:
    rng = random.Random(SEED)
    prompts = [[rng.randrange(60) for _ in range(30)] for _ in range(2)]
    with tier() as (probe, _):
        ask(engine_on(probe), prompts[0])
        probe.flush()
        one = probe.memory.held or 0
    said = list[str]()

    def opened() -> StoreTier:
        if kind == "disk":
            return DiskTier(tmp_path, int(one * 1.3), SCOPE, said.append)
        return PeerTier(TcpAddress("127.0.0.1", 0, TOKEN), int(one * 1.3), SCOPE, said.append)

    with closing(opened()) as a:  # it has room for one prompt
        engine = engine_on(a)
        for n in (0, 1, 0, 0, 1):
            names = engine.block_names.of(prompts[n])
            lease = a.pin(names, 15.0)
            ask(engine, prompts[n])
            a.flush()
            assert a.handed(lease, names) == len(names) == 7
            a.release(lease)
        assert a.counts.evicted and not said


def test_who_does_not_know_the_token_gets_nothing() -> None:
    rng = random.Random(SEED)
    with tier() as (a, said_a), tier(token=b"another token that is long enough") as (b, said_b):
        keys, _ = saved(a, rng, 3)
        b.announce(names_of(keys), replace(a.address, token=b.address.token))
        assert loaded(b, keys) == [] and b.counts.errors == 1 and len(said_b) == 1
        with socket.create_connection((a.address.host, a.address.port)) as s:
            s.sendall(bytes(1000))
            s.settimeout(TIMEOUT_S)
            with suppress(ConnectionResetError):
                got = b""
                while part := s.recv(1000):
                    got += part
                assert len(got) == 32  # the challenge
        assert len(said_a) == 1 and "is refused" in said_a[0]


def test_blocks_of_another_model_and_blocks_that_are_too_long_are_refused() -> None:
    rng = random.Random(SEED)
    keys = chain(rng, 2)
    other = BlockScope.of(smallest_program(), TOKENS, "oracle", "weights B", "1")
    content = np.zeros(64, np.uint8)
    head_to_tail = b"".join(file_bytes(other, keys[0], content))
    right = b"".join(file_bytes(SCOPE, keys[0], content))
    answers = [
        SIZE.pack(len(head_to_tail)) + head_to_tail, SIZE.pack(1 << 60), SIZE.pack(len(right) + 1) + right + b"x",
        SIZE.pack(len(right) - 1) + right[:-1],
    ]  # fmt: skip
    with tier() as (b, said), closing(listen()) as listener:
        address = TcpAddress("127.0.0.1", listener.getsockname()[1], TOKEN)

        def serve() -> None:
            for answer in answers:
                s, _ = listener.accept()
                meet(s, "test", TOKEN, lambda _: None)
                with s, suppress(ConnectionResetError):
                    s.recv(1 << 16)
                    s.sendall(answer)
                    while s.recv(1 << 16):
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        for i in range(len(answers)):
            b.announce(names_of(keys), address)
            assert loaded(b, keys) == [] and b.counts.corrupt == i + 1
        thread.join(TIMEOUT_S)
        assert len(said) == 1 and b.counts.errors == 0


def test_requests_that_no_client_sends_end_the_connection() -> None:
    rng = random.Random(SEED)
    with tier() as (a, said):
        keys, _ = saved(a, rng, 3)
        for n, bad in enumerate((COUNT.pack(NAMES_MAX + 1), COUNT.pack(0), COUNT.pack(2**32 - 1))):
            s, _ = introduce((a.address.host, a.address.port), TOKEN, 0, 0, 0)
            with s:
                s.settimeout(TIMEOUT_S)
                s.sendall(bad)
                assert s.recv(100) == b""
            assert n > 2 or len(said) == 1  # the first is reported
        assert f"allowed: 1 to {NAMES_MAX}" in said[0]
        client = BlockClient(a.address, TIMEOUT_S, TIMEOUT_S)
        client.ask(names_of(keys))
        with closing(client):
            sizes = [len(a.memory.get(key.name) or b"") for key in keys]
            assert [size for _, size in client.answers(sizes)] == sizes


def test_connections_that_say_nothing_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intaglio.tiers.block_server.CONNECTIONS_MAX", 3)
    rng = random.Random(SEED)
    with tier() as (a, _), tier() as (b, _):
        keys, _ = saved(a, rng, 2)
        silent = [socket.create_connection((a.address.host, a.address.port)) for _ in range(6)]
        b.announce(names_of(keys), a.address)
        assert len(loaded(b, keys)) == 2
        for s in silent:
            s.close()


def test_pinned_blocks_stay_in_memory_and_the_others_leave_by_use() -> None:
    print(f"TEST_SEED={SEED}")
    rng = random.Random(SEED)
    for _ in range(30):
        memory = BlockMemory(12 * 100)
        held, leases = list[str](), dict[str, list[str]]()  # held: the least recently used first
        for step in range(60):
            pinned = {name for names in leases.values() for name in names}
            match rng.randrange(5):
                case 0 if leases:
                    lease = rng.choice(list(leases))
                    memory.leases.release(lease)
                    del leases[lease]
                case 1 if held:
                    names = rng.sample(held, rng.randint(1, min(3, len(held))))
                    leases[memory.leases.take(names, 60.0)] = names
                case 2 if held:
                    names = rng.sample(held, min(2, len(held)))
                    memory.touch(names)
                    held = [name for name in held if name not in names] + names[::-1]
                case _:
                    name = f"{step:064x}"
                    free = [other for other in held if other not in pinned]
                    if len(held) - len(free) == 12:
                        with pytest.raises(NoRoom):
                            memory.write(name, [bytes(100)])
                        held = [other for other in held if other in pinned]
                    else:
                        deleted = memory.write(name, [bytes(100)])
                        gone = free[: 2 if len(held) == 12 else 0]  # down to 1/32 below the budget
                        assert deleted == len(gone)
                        held = [other for other in held if other not in gone] + [name]
            assert [name for name in held if memory.has(name)] == held and memory.held == 100 * len(held)


def test_a_lease_in_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("intaglio.tiers.memory.time.monotonic", lambda: now)
    leases = BlockMemory(100).leases
    lease = leases.take(["a"], 5.0)
    assert leases.names(lease) == {"a"} == leases.pinned() and leases.renew(lease, 6.0)
    now += 5.5
    assert leases.names(lease) == {"a"}
    now += 1.0
    assert leases.names(lease) is None and not leases.renew(lease, 5.0) and not leases.pinned()
    with pytest.raises(ValueError, match="allowed: above 0"):
        leases.take(["a"], 0.0)
