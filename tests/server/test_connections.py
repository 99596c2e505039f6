"""Connections that misbehave, and the server as a process: signals, exit codes, files left open, a worker killed."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from support.served import TEST_TIMEOUT_S, Served, Slow, served, wait_for
from support.tiny import tiny

from intaglio import LLM, SamplingParams
from intaglio.server.delivery import ClientDisconnected, while_connected

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(
        "llama", tmp_path_factory.mktemp("connections") / "tiny", num_hidden_layers=2, max_position_embeddings=512
    )


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with served(folder, read_timeout=1.0, write_timeout=1.0) as s:
        yield s


def post(body: bytes, length: int | None = None) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return head.encode() + f"content-length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def connect(s: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", s.port), timeout=TEST_TIMEOUT_S)


def rest(s: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    out = b""
    try:
        while part := s.recv(65536):
            out += part
    except ConnectionError:
        pass
    return out


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"HELO there\r\n\r\n",
        b"GET /\r\n\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /tokenize HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"GET / HTTP/1.1\r\n" + b"a" * 300_000,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 60_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(300),
        random.randbytes(2000),
    ],
)  # fmt: skip
def test_what_is_no_http_is_turned_away(server: Served, sent: bytes) -> None:
    with connect(server) as s:
        with suppress(ConnectionError):
            s.sendall(sent)
        assert b" 500 " not in rest(s).split(b"\r\n")[0]
    assert server.get("/health").status_code == 200
    server.quiet()


def test_slow_senders_are_not_waited_for(server: Served) -> None:
    with connect(server) as head, connect(server) as body, connect(server) as silent:
        head.sendall(b"GET /health HT")
        body.sendall(post(b'{"prompt"', length=500))
        assert rest(head) == b"" and rest(silent) == b""
        assert rest(body).startswith(b"HTTP/1.1 408 ")
    server.quiet()


def test_a_long_body_is_refused_unread(folder: Path) -> None:
    with served(folder, max_body=1000) as s:
        with connect(s) as c:
            c.sendall(post(b"", length=10**12))
            assert rest(c).startswith(b"HTTP/1.1 413 ")
        with connect(s) as c:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            c.sendall(head + b"transfer-encoding: chunked\r\n\r\n" + (b"3e8\r\n" + b" " * 1000 + b"\r\n") * 3)
            assert rest(c).startswith(b"HTTP/1.1 413 ")


def test_requests_in_one_packet_are_answered_in_order(server: Served) -> None:
    with connect(server) as s:
        s.sendall(GET * 3 + GET.replace(b"/health", b"/nowhere"))
        s.sendall(GET.replace(b"host: x", b"connection: close"))
        statuses = re.findall(rb"HTTP/1.1 (\d+)", rest(s))
    assert statuses == [b"200", b"200", b"200", b"404", b"200"]


def test_half_closed_is_gone(server: Served) -> None:
    aborted = server.llm.engine.counts.finished["abort"]
    inner = server.llm.engine.executable
    server.llm.engine.executable = Slow(inner, 0.01)
    with connect(server) as s:
        s.sendall(post(b'{"prompt": "a", "max_tokens": 300, "stream": true, "ignore_eos": true}'))
        assert s.recv(12) == b"HTTP/1.1 200"
        s.shutdown(socket.SHUT_WR)
        wait_for(lambda: server.llm.engine.counts.finished["abort"] == aborted + 1)
    server.llm.engine.executable = inner
    server.quiet()


def test_who_does_not_read_is_dropped(server: Served) -> None:
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of what it accepts from now on
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(("127.0.0.1", server.port))
        body = b'{"prompt": "a", "max_tokens": 60, "n": 8, "stream": true, "logprobs": 20, "ignore_eos": true}'
        s.sendall(post(body))
        wait_for(lambda: server.service.open == 1)
        wait_for(lambda: server.service.open == 0)  # nobody read a byte
        assert b"[DONE]" not in rest(s)
    server.quiet()


def test_many_idle_connections(folder: Path) -> None:
    with served(folder, read_timeout=600.0) as s:
        crowd = [connect(s) for _ in range(300)]
        assert all(s.get("/health").status_code == 200 for _ in range(5))
        assert s.client().completions.create(model="tiny", prompt="a", max_tokens=3).choices[0].text
        for c in crowd:
            c.close()
        mine = psutil.Process()
        wait_for(lambda: sum(c.laddr.port == s.port and c.status == "ESTABLISHED" for c in mine.net_connections()) == 0)


@contextmanager
def process(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`intaglio serve` as a process, and its address."""
    words = [sys.executable, "-m", "intaglio", "serve", str(folder), "--port", "0", "--name", "tiny", *options]
    p = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert p.stdout
        line = p.stdout.readline()
        assert line.startswith("serving tiny at http://"), line + (p.stderr.read() if p.stderr and not line else "")
        yield p, line.split()[-1]
    finally:
        p.kill()
        p.communicate()


def stream(url: str, **body: Any) -> Any:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TEST_TIMEOUT_S)
    extra = {"ignore_eos": True}
    return client.completions.create(model="tiny", prompt="abc", stream=True, temperature=0, extra_body=extra, **body)


def test_a_process_from_start_to_exit(folder: Path) -> None:
    with process(folder, "--device", "reference") as (p, url):
        files = psutil.Process(p.pid).num_fds
        httpx.get(f"{url}/health")
        for i in range(30):
            running = stream(url, max_tokens=20)
            if i % 3:
                next(iter(running))
                running.close()
            else:
                assert len(list(running)) > 1
        gauges = ("running", "waiting", "blocks_held")
        wait_for(lambda: [httpx.get(f"{url}/state").json()[g] for g in gauges] == [0, 0, 0])
        wait_for(lambda: len([c for c in psutil.Process(p.pid).net_connections() if c.status == "CLOSE_WAIT"]) == 0)
        before = files()
        assert before < 60
        running = stream(url, max_tokens=300)
        first = next(iter(running))
        p.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
        text = first.choices[0].text + "".join(c.choices[0].text for c in running)
        [wanted] = LLM(folder, device="reference").generate("abc", SamplingParams(300, ignore_eos=True))
        assert text == wanted.text
        assert p.wait(TEST_TIMEOUT_S) == 0


def test_a_process_told_twice(folder: Path) -> None:
    with process(folder, "--device", "oracle") as (p, url):
        running = stream(url, max_tokens=400, n=60)
        next(iter(running))
        p.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
        p.send_signal(signal.SIGTERM)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(running)
        assert p.wait(TEST_TIMEOUT_S) == 1


def test_a_killed_worker_is_not_noticed(folder: Path) -> None:
    with process(folder, "--device", "reference", "--worker") as (p, url):
        running = iter(stream(url, max_tokens=200))
        text = next(running).choices[0].text
        [worker] = psutil.Process(p.pid).children()
        os.kill(worker.pid, signal.SIGKILL)
        text += "".join(c.choices[0].text for c in running)
        [wanted] = LLM(folder, device="reference").generate("abc", SamplingParams(200, ignore_eos=True))
        assert text == wanted.text
        restarts = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if "device_restarts_total{" in line]
        assert restarts[0].endswith(" 1.0")


def test_what_keeps_it_from_starting_is_said(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = [sys.executable, "-m", "intaglio", "serve", str(folder), "--port", str(taken.getsockname()[1])]
        done = subprocess.run(words, capture_output=True, text=True, timeout=TEST_TIMEOUT_S)
    assert done.returncode == 2 and "choose another --port" in done.stderr and len(done.stderr.splitlines()) == 1


def test_nothing_is_asked_of_the_clock_when_idle(server: Served) -> None:
    steps = server.llm.engine.counts.steps
    time.sleep(0.2)
    assert server.llm.engine.counts.steps == steps  # the engine's thread sleeps on its inbox


@pytest.mark.parametrize("first", ["client", "work", "client alone"])
def test_a_client_that_leaves_as_the_work_ends_cancels_nothing_else(first: str) -> None:
    async def run() -> None:
        gone, done = (asyncio.get_running_loop().create_future() for _ in range(2))

        async def work() -> None:
            await done

        async def answer() -> str:
            try:
                await while_connected({"state": {"disconnected": gone}}, work())
            except ClientDisconnected:
                return "disconnected"
            await asyncio.sleep(0)  # to which a cancellation that comes late would be raised
            return "ended"

        task = asyncio.ensure_future(answer())
        for _ in range(3):
            await asyncio.sleep(0)
        for end in {"client": [gone, done], "client alone": [gone]}.get(first, [done, gone]):
            end.set_result(None)
        assert await task == ("ended" if first == "work" else "disconnected")
        assert not task.cancelling()

    asyncio.run(run())
