"""From start to exit: sockets, connections that misbehave, signals, and what the process's exit code says."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from intaglio.llm import LLM
from intaglio.server.app import build
from intaglio.server.service import Options, Service

log = logging.getLogger("intaglio.server")
HEADERS = 64 << 10  # bytes of a request's headers at most
CLOSING = 5.0  # seconds that connections get to close after the last answer
TICK = 0.05  # seconds between looks at whether to end


class Connection(HttpToolsProtocol):
    """One connection. Closed if a request's headers do not come in `patience` seconds, or are over HEADERS bytes and
    one read long; dropped, with all it asked for, if its reader takes nothing for `stall` seconds."""

    patience = 30.0
    stall = 60.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head = 0
        self._blocked: asyncio.TimerHandle | None = None
        self._expected = self.loop.call_later(self.patience, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._expected, self._blocked):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._between:
            if self._head > HEADERS:
                return self._close()
            self._head += len(data)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._head = 0
        self._expected.cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expected.cancel()
        self._expected = self.loop.call_later(self.patience, self._close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._blocked = self.loop.call_later(self.stall, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._blocked:
            self._blocked.cancel()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    @property
    def _between(self) -> bool:
        """No request is under way."""
        return self.cycle is None or (self.cycle.response_complete and not self.pipeline)

    def _close(self) -> None:
        """Close; and if the last answer cannot even be sent, drop it."""
        if self._between and not self.transport.is_closing():
            self.transport.close()
            self.loop.call_later(self.stall, self.transport.abort)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to serve()."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    llm: LLM, options: Options, listener: socket.socket, announce: Callable[[Service], None], signals: bool = True
) -> int:
    """Serve until told to end; the exit code. `announce` is told when requests can come. The first SIGTERM or SIGINT
    drains: nothing more is admitted, what was admitted goes on to its end, then 0. The second ends everything at once:
    1. So does an engine that breaks."""
    service = Service(llm, options)
    connection = type("Connection", (Connection,), {"stall": options.stall, "patience": options.reading})
    config = uvicorn.Config(
        build(service), http=connection, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_graceful_shutdown=int(CLOSING), backlog=4096,
    )  # fmt: skip
    server = _Uvicorn(config)
    end = Ending(service)
    loop = asyncio.get_running_loop()
    if signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end.asked)
    service.start()
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(TICK / 10)
        announce(service)
        await end.reached(serving)
    finally:
        server.should_exit = True
        await asyncio.wait({serving}, timeout=2 * CLOSING)
        service.close()
    if error := serving.done() and serving.exception():
        log.critical("the HTTP server crashed", exc_info=error)
        return 1
    return end.code


class Ending:
    """When to end, and with what exit code."""

    def __init__(self, service: Service) -> None:
        self.service, self.code = service, 0

    def asked(self) -> None:
        """A signal to end."""
        if self.service.draining:
            log.warning("told again: everything ends now")
            self.code = 1
            self.service.halt()
        else:
            log.info("draining: nothing more is admitted; again to end at once")
            self.service.drain()

    async def reached(self, serving: asyncio.Future[Any]) -> None:
        """Wait for the end: all drained, told twice, or something that broke."""
        service = self.service
        while not serving.done():
            if service.broken or (service.driver.ended.is_set() and not service.draining):
                log.critical("nothing can be served any more: %s", service.broken)
                self.code = 1
                return
            if service.draining and (service.open == 0 or self.code):
                if self.code:  # let the last words out
                    await asyncio.wait_for(service.driver.ended.wait(), CLOSING)
                return
            await asyncio.sleep(TICK)
        self.code = 1


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, before a model is loaded for nothing. Raises OSError naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as e:
        listener.close()
        raise OSError(f"{host}:{port} cannot be listened on: {e.strerror}; choose another --port") from None
    return listener


def raise_file_limit() -> None:
    """Let the process hold as many connections as the system lets it: the usual soft limit is 1024 files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
