"""Ranks on several hosts: two agents on this machine, or in network namespaces, give the same bits as the mesh.

Also after the loss of a rank or a host, with malformed or forged frames, without the token, and over slow links.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from devices.test_worker import gone
from support.tiny import tiny

from intaglio.devices import DeviceError, DeviceLost, HostsDevice
from intaglio.devices.processes.agent import Agent, Port
from intaglio.devices.processes.connections import ConnectionRefused, connect, introduce
from intaglio.devices.processes.hosts import HostsExecutable, Rendezvous
from intaglio.devices.processes.link import HEAD, LONGEST, SILENCE, Link, LinkLost, mac
from intaglio.devices.processes.membership import HELLO, STEP
from intaglio.llm import LLM, RequestOutput
from intaglio.runtime import Grammar, SamplingParams

TOKEN = b"a token of 16 or more bytes"
PATIENT = 60.0  # seconds of silence, where a test is not about it: the machine may be busy
FRAMES = int(os.environ.get("INTAGLIO_FRAMES", "300"))  # malformed ones
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8]]
PARAMS = [
    SamplingParams(max_tokens=12, temperature=0.8, seed=1, ignore_eos=True, n=2),
    SamplingParams(max_tokens=16, ignore_eos=True),
    SamplingParams(max_tokens=8, seed=5, temperature=1.0, grammar=Grammar("regex", "(a|b)+")),
]
NAMESPACES = itertools.count()
OPTIONS = {"kv_tokens": 256, "max_drafts": 2}


@contextmanager
def agents(rendezvous: Rendezvous, count: int, silence: float = PATIENT) -> Iterator[list[Agent]]:
    """Agents in threads of this process; their ranks are processes."""
    made = [Agent(rendezvous.address, TOKEN, f"host{i}", silence) for i in range(count)]
    threads = [threading.Thread(target=a.serve) for a in made]
    for t in threads:
        t.start()
    try:
        yield made
    finally:
        for a in made:
            a.stop()
        for t in threads:
            t.join()


@pytest.fixture
def rendezvous() -> Iterator[Rendezvous]:
    made = Rendezvous("127.0.0.1", 0, TOKEN, PATIENT)
    yield made
    made.close()


@pytest.mark.parametrize("layout", ["tp2", "tp2pp2"])
def test_two_hosts_give_the_tokens_of_one_and_a_lost_host_is_replaced_by_a_spare(
    tmp_path: Path, rendezvous: Rendezvous, layout: str
) -> None:
    tiny("qwen3", tmp_path)
    wanted = LLM(tmp_path, layout=layout, in_process=True, **OPTIONS).generate(PROMPTS, PARAMS)  # type: ignore[arg-type]
    with agents(rendezvous, 3 if layout == "tp2" else 2):
        there = LLM(tmp_path, layout=layout, hosts=HostsDevice(rendezvous, 2, cache=None), **OPTIONS)  # type: ignore[arg-type]
        assert there.generate(PROMPTS, PARAMS) == wanted
        executable = there.engine.executable
        assert isinstance(executable, HostsExecutable)
        if layout == "tp2":
            timer = threading.Timer(random.random() / 4, executable.agents[1].link.close)
            timer.start()
            while not there.engine.counts.restarts:
                assert there.generate(PROMPTS, PARAMS) == wanted
            timer.join()
            names = [a.name for a in there.engine.executable.agents]  # type: ignore[attr-defined]
            assert executable.agents[1].name not in names and there.generate(PROMPTS, PARAMS) == wanted
        there.engine.executable.close()


def test_a_rank_that_dies_on_another_host_is_replaced(tmp_path: Path, rendezvous: Rendezvous) -> None:
    tiny("llama", tmp_path)
    wanted = LLM(tmp_path, layout="pp2", in_process=True, kv_tokens=128).generate(PROMPTS, PARAMS)
    before = children()
    with agents(rendezvous, 2):
        there = LLM(tmp_path, layout="pp2", kv_tokens=128, hosts=HostsDevice(rendezvous, 2, cache=None))
        ranks = children() - before
        assert len(ranks) == 2
        os.kill(max(ranks), signal.SIGKILL)
        assert there.generate(PROMPTS, PARAMS) == wanted
        assert there.engine.counts.restarts == 1
        assert all(gone(pid) for pid in ranks)  # also the other one, before its successor was started
        left = children() - before
    assert all(gone(pid) for pid in left)


def children() -> set[int]:
    """Processes of ranks that this process's fork servers have forked."""
    found = set[int]()
    for p in psutil.Process().children():
        with suppress(psutil.Error):  # it has ended
            if "processes.forkserver" in " ".join(p.cmdline()):
                found |= {child.pid for child in p.children()}
    return found


def test_missing_hosts_and_uneven_layouts_are_errors(tmp_path: Path, rendezvous: Rendezvous) -> None:
    tiny("llama", tmp_path)
    with pytest.raises(DeviceError, match="2 hosts are wanted, there are after 0.1 s: none; run on each other host"):
        LLM(tmp_path, layout="tp2", hosts=HostsDevice(rendezvous, 2, patience=0.1))
    with pytest.raises(DeviceError, match="2 ranks cannot be dealt out to 3 hosts evenly"):
        LLM(tmp_path, layout="tp2", hosts=HostsDevice(rendezvous, 3))
    with pytest.raises(DeviceError, match="several hosts need device host and a layout"):
        LLM(tmp_path, hosts=HostsDevice(rendezvous, 2))


def test_without_the_token_nobody_gets_in(rendezvous: Rendezvous) -> None:
    other = Agent(rendezvous.address, b"another token of that length")
    with pytest.raises(ConnectionRefused):
        other.serve()
    for address in ("0.0.0.0", "192.0.2.1"):
        with pytest.raises(ValueError, match=f"{address} can be reached from other hosts; give --token-file"):
            Rendezvous(address, 0, None)
        with pytest.raises(ValueError, match="can be reached from other hosts"):
            Agent((address, 1), None).serve()
    with pytest.raises(ValueError, match="the token has 5 bytes"):
        Rendezvous("127.0.0.1", 0, b"short")
    assert not rendezvous.roster.members


def test_malformed_frames_leave_both_ports_serving(rendezvous: Rendezvous) -> None:
    seed = int.from_bytes(os.urandom(4))
    rng = random.Random(seed)
    port = Port("127.0.0.1", TOKEN)
    port.begin(5)
    for i in range(FRAMES):
        address = (rendezvous if i % 2 else port).address
        kind = rng.randrange(3)
        with socket.create_connection(address) as s, suppress(OSError):  # the port may have closed it already
            if kind:  # the length of a greeting
                s.sendall(rng.randbytes(rng.randrange(300)))
            s.shutdown(socket.SHUT_WR) if kind == 1 else None
    for _ in range(FRAMES // 10):  # a peer with the token, and then garbage
        s, _ = introduce(rendezvous.address, TOKEN, 0, 0, 0xFFFF)
        with s, suppress(OSError):
            s.sendall(rng.randbytes(rng.randrange(1, 300)))
    with pytest.raises(ConnectionRefused):
        connect(port.address, TOKEN, 4, 0, 1)  # of an earlier epoch
    with connect(port.address, TOKEN, 5, 0, 1) as mine, port.take(5, 1, 0) as theirs:
        mine.sendall(b"x")
        assert theirs.recv(1) == b"x", seed
    port.close()
    with agents(rendezvous, 1):
        assert [a.name for a in rendezvous.wait(1, PATIENT)] == ["host0"], seed


def test_an_agent_without_udp_connects(rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = socket.socket.connect

    def refuse(s: socket.socket, where: tuple[str, int]) -> None:
        if s.type == socket.SOCK_DGRAM:
            raise PermissionError("no datagrams here")
        allowed(s, where)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with agents(rendezvous, 1) as (agent,):
        (there,) = rendezvous.wait(1, PATIENT)
        end = time.monotonic() + PATIENT
        while agent.link.order.received < 3 or there.link.order.received < 3:  # type: ignore[union-attr]
            assert time.monotonic() < end and there.alive
            time.sleep(0.01)
        assert agent.link and not agent.link.closed.is_set() and agent.link.beacon.sender is None


def linked() -> tuple[socket.socket, Link]:
    """A raw end and a Link at the other."""
    listener = socket.create_server(("127.0.0.1", 0))
    mine = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
    listener.close()
    return mine, Link(theirs, b"k" * 32, False, PATIENT)


@pytest.mark.parametrize(
    ("forge", "why"),
    [
        (lambda key: HEAD.pack(LONGEST + 1, STEP, 0), "a frame of 1073741825 bytes came"),
        (lambda key: HEAD.pack(1, STEP, 0) + b"x" + bytes(32), "a frame came that the other end did not send"),
        (lambda key: (h := HEAD.pack(1, STEP, 7)) + b"x" + mac(key, h, b"x"), "frame 7 came, 0 was due"),
    ],
    ids=["over-long", "forged", "repeated"],
)
def test_a_frame_that_is_over_long_forged_or_repeated_ends_the_link(forge: object, why: str) -> None:
    mine, link = linked()
    with mine:
        mine.sendall(forge(link.receive_key))  # type: ignore[operator]
        with pytest.raises(LinkLost, match=why):
            link.receive()
    assert link.closed.is_set()


def test_frames_arrive_as_they_were_sent_and_silence_ends_the_link() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    near = Link(socket.create_connection(listener.getsockname()), b"k" * 32, True, PATIENT)
    far = Link(listener.accept()[0], b"k" * 32, False, PATIENT)
    rng = random.Random(0)
    for size in (0, 1, 1000, 3 << 20):
        payload = rng.randbytes(size)
        sent = threading.Thread(target=near.send, args=(HELLO, payload))
        sent.start()
        assert far.receive() == (HELLO, payload)
        sent.join()
    near.closed.set()  # its heart stops
    near.beacon.close()
    far.silence.allowed = 0.3
    with pytest.raises(LinkLost, match="nothing came in 0.3 s"):
        far.receive()
    near.close()
    listener.close()


def test_launch_starts_agents_and_runs_a_command(tmp_path: Path) -> None:
    tiny("llama", tmp_path / "model")
    (tmp_path / "token").write_bytes(TOKEN)
    words = ["generate", str(tmp_path / "model"), "--prompt", "abc", "--max-tokens", "5", "--layout", "pp2", "--json"]
    alone = subprocess.run([sys.executable, "-m", "intaglio", *words, "--in-process"], capture_output=True, text=True)
    start = ["launch", "--hosts", "localhost,localhost", "--rendezvous", "127.0.0.1:0"]
    start += ["--token-file", str(tmp_path / "token")]
    done = subprocess.run([sys.executable, "-m", "intaglio", *start, *words], capture_output=True, text=True)
    assert done.returncode == 0 == alone.returncode, done.stderr
    assert done.stdout == alone.stdout
    wrong = [sys.executable, "-m", "intaglio", "agent", "--rendezvous", "203.0.113.1:29500"]
    refused = subprocess.run(wrong, capture_output=True, text=True)
    assert refused.returncode == 2 and "give --token-file" in refused.stderr


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def namespace(stack: ExitStack) -> Iterator[tuple[str, str, str]]:
    """A network namespace that is joined to this one by a pair of links: its name, this end's address and link."""
    if os.getuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command ip")
    number = (16 * os.getpid() + next(NAMESPACES)) % 60000  # a link of an earlier one may still be there
    name, near, far = f"intaglio{number}", f"in{number}a", f"in{number}b"
    block = f"10.{200 + number // 256 % 50}.{number % 256}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as e:
        pytest.skip(f"network namespaces are not allowed here: {e.stderr.decode().strip()}")
    stack.callback(ip, "netns", "del", name)
    try:
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
    except subprocess.CalledProcessError as e:
        pytest.skip(f"pairs of links are not allowed here: {e.stderr.decode().strip()}")
    ip("addr", "add", f"{block}.1/24", "dev", near)
    ip("link", "set", near, "up")
    for words in (
        ["addr", "add", f"{block}.2/24", "dev", far],
        ["link", "set", far, "up"],
        ["link", "set", "lo", "up"],
    ):
        ip("-n", name, *words)
    yield name, f"{block}.1", near


@contextmanager
def two_hosts(tmp_path: Path, silence: float) -> Iterator[tuple[str, str, str, LLM]]:
    """An LLM on this host and on one in a namespace: the namespace, this end's address and link, and the LLM."""
    (tmp_path / "token").write_bytes(TOKEN)
    with ExitStack() as stack, namespace(stack) as (name, here, cable):
        meeting = Rendezvous(here, 0, TOKEN, silence)
        stack.callback(meeting.close)
        command = [sys.executable, "-m", "intaglio", "agent", "--rendezvous", f"{here}:{meeting.address[1]}"]
        command += ["--token-file", str(tmp_path / "token")]
        for prefix in ([], ["ip", "netns", "exec", name]):
            process = subprocess.Popen([*prefix, *command])
            stack.callback(process.wait)
            stack.callback(process.kill)
        device = HostsDevice(meeting, 2, cache=None, patience=PATIENT)
        there = LLM(tmp_path / "model", layout="pp2", kv_tokens=128, hosts=device)
        yield name, here, cable, there
        there.engine.executable.close()


def undisturbed(tmp_path: Path) -> list[RequestOutput]:
    """The outputs of the model in one process."""
    tiny("llama", tmp_path / "model")
    return LLM(tmp_path / "model", layout="pp2", in_process=True, kv_tokens=128).generate(PROMPTS, PARAMS)


def pull(name: str, here: str, cable: str) -> Callable[[], None]:
    """Pull the cable. Returns what puts it back."""
    ip("link", "set", cable, "down")
    return lambda: ip("link", "set", cable, "up")


def swallow_there(name: str, here: str, cable: str) -> Callable[[], None]:
    """Swallow what the other host sends: its neighbour has another hardware address. Returns what ends that."""
    far = [cable[:-1] + "b", "nud"]
    ip("-n", name, "neigh", "replace", here, "lladdr", "02:00:00:00:00:01", "dev", *far, "permanent")
    return lambda: ip("-n", name, "neigh", "del", here, "dev", far[0])


def swallow_here(name: str, here: str, cable: str) -> Callable[[], None]:
    """Swallow what this host sends. Returns what ends that."""
    other = here[: here.rindex(".")] + ".2"
    ip("neigh", "replace", other, "lladdr", "02:00:00:00:00:01", "dev", cable, "nud", "permanent")
    return lambda: ip("neigh", "del", other, "dev", cable)


@pytest.mark.parametrize("cut", [pull, swallow_there, swallow_here], ids=lambda f: f.__name__)
def test_a_host_that_is_cut_off_changes_no_stream(
    tmp_path: Path, cut: Callable[[str, str, str], Callable[[], None]], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = undisturbed(tmp_path)
    with two_hosts(tmp_path, SILENCE) as (name, here, cable, there):
        assert there.generate(PROMPTS, PARAMS) == wanted
        executable = there.engine.executable
        assert isinstance(executable, HostsExecutable)
        mend, began = cut(name, here, cable), time.monotonic()
        while not executable.epoch.failed and time.monotonic() < began + PATIENT:
            time.sleep(0.01)
        with capsys.disabled():
            print(f" noticed after {time.monotonic() - began:.2f} s ", end="")
        with pytest.raises(DeviceLost, match="its connection is lost|nothing can be sent"):
            executable.check_alive()
        mend()
        assert there.generate(PROMPTS, PARAMS) == wanted
        assert there.engine.counts.restarts >= 1


def test_a_slow_link_is_not_taken_for_a_dead_host(tmp_path: Path) -> None:
    """10 Mbit/s in both directions.

    A process of a busy machine may not run for SILENCE seconds, and then its host rightly counts as lost. So losses are
    allowed, but not in every attempt.
    """
    wanted = undisturbed(tmp_path)
    if not shutil.which("tc"):
        pytest.skip("a slow link needs the command tc")
    with two_hosts(tmp_path, SILENCE) as (name, _here, cable, there):
        slow = ["root", "tbf", "rate", "10mbit", "burst", "32kbit", "latency", "400ms"]
        for words in (
            ["qdisc", "add", "dev", cable, *slow],
            ["-n", name, "qdisc", "add", "dev", cable[:-1] + "b", *slow],
        ):
            try:
                subprocess.run(["tc", *words], check=True, capture_output=True)
            except subprocess.CalledProcessError as e:
                pytest.skip(f"links cannot be slowed here: {e.stderr.decode().strip()}")
        undisturbed_runs = 0
        for _ in range(12):
            before = there.engine.counts.restarts
            assert there.generate(PROMPTS, PARAMS) == wanted
            undisturbed_runs += there.engine.counts.restarts == before
            if undisturbed_runs == 3:
                break
        assert undisturbed_runs == 3
