"""Fake replicas of a cluster, without processes: a control socket with the answers that a test sets. Used by tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from intaglio.cluster.backends import Backends
from intaglio.cluster.cluster import Cluster
from intaglio.cluster.link import Link
from intaglio.router import Autoscaler, Role, Router
from intaglio.server.control import FrameBuffer, pack
from intaglio.server.private_socket import private_socket

LOAD = {
    "running": 0, "waiting": 0, "kv_usage": 0.0, "draining": False, "failed": None, "max_batch_tokens": 512,
    "max_sequences": 256, "prompt_tokens": 0, "cached_tokens": 0, "output_tokens": 0,
    "steps": (1.0, 1.0, 0.011, 0.0, 0.0), "incarnation": "life", "tier": {}, "sequence": 0, "snapshot": [],
}  # fmt: skip
Answer = Callable[[dict[str, Any], Callable[..., None]], None]


class FakedProcess:
    """Stands for a ReplicaProcess.

    load: makes the answer to a load call. answer: called with the header of a request and a function that sends a frame
    of the response. before_start: called before each start.
    """

    load: Callable[[], dict[str, Any]] = staticmethod(lambda: dict(LOAD))
    answer: Answer = staticmethod(lambda header, send: None)
    before_start: Callable[[FakedProcess], None] = staticmethod(lambda process: None)

    def __init__(self, name: str, words: list[str], folder: Path) -> None:
        self.name, self.folder, self.pid, self.starts, self.kills, self.stops = name, folder, 1, 0, 0, 0
        self.node = ""
        self.log = folder / f"{name}.log"
        self.server: asyncio.Server | None = None
        self.writers: list[asyncio.StreamWriter] = []
        self.over = asyncio.Event()

    async def start(self) -> Link:
        self.starts += 1
        self.before_start(self)
        self.over.clear()
        path = self.folder / f"{self.name}.{self.starts}"
        self.server = await asyncio.start_unix_server(self._connected, sock=private_socket(path))
        return await Link.connect(path)

    async def wait(self) -> int:
        await self.over.wait()
        return -9

    async def stop(self) -> None:
        self.stops += 1
        self.end()

    def kill(self) -> None:
        self.kills += 1
        self.end()

    def end(self) -> None:
        """End as a process does that is killed."""
        if self.server:
            self.server.close()
        for writer in self.writers:
            writer.transport.abort()
        self.over.set()

    def trim_log(self) -> None:
        pass

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        frames = FrameBuffer()
        try:
            while data := await reader.read(1 << 16):
                for header, _ in frames.feed(data):
                    self._handle(header, writer)
        except ConnectionError:
            pass

    def _handle(self, header: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        call = header["call"]
        if header["do"] == "load":
            writer.write(pack({"call": call, **self.load()}))
        elif header["do"] == "request":
            self.answer(header, lambda fields, body=b"": writer.write(pack({"call": call, **fields}, body)))


@asynccontextmanager
async def faked(
    folder: Path,
    patch: pytest.MonkeyPatch,
    replicas: dict[Role, int],
    autoscaler: Autoscaler | None = None,
    clock: Callable[[], float] = time.monotonic,
    **how: Any,
) -> AsyncIterator[Cluster]:
    """A cluster of FakedProcesses with these attributes, whose load is read every 10 ms. clock: of its requests."""
    kind = type("Process", (FakedProcess,), {name: staticmethod(f) for name, f in how.items()})
    patch.setattr("intaglio.cluster.backends.POLL", 0.01)
    patch.setattr("intaglio.cluster.relayed.POLL", 0.001)
    cluster = Cluster(Backends(Router(), clock=clock), lambda name, _: kind(name, [], folder), autoscaler)
    try:
        await cluster.start(replicas)
        yield cluster
    finally:
        await cluster.stop()


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def run(test: Awaitable[None]) -> None:
    """Run a test's coroutine."""

    async def whole() -> None:
        await test

    asyncio.run(whole())
