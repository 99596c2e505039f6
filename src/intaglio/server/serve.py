"""Server process: sockets, connection timeouts, signals, graceful shutdown and exit code."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from intaglio.devices.processes.address import TcpAddress
from intaglio.llm import LLM
from intaglio.server.app import build
from intaglio.server.control import control_channel
from intaglio.server.service import Options, Service

log = logging.getLogger("intaglio.server")
MAX_HEADER_BYTES = 64 << 10  # of one request
CLOSE_TIMEOUT = 5.0  # seconds for connections to close after the last response
POLL_INTERVAL = 0.05  # seconds between checks for the end of the server


class Connection(HttpToolsProtocol):
    """One HTTP connection, with limits against slow clients.

    The connection is closed if a request's headers take longer than `read_timeout` seconds or more than
    MAX_HEADER_BYTES. If the client reads nothing of an answer for `write_timeout` seconds, the connection is aborted
    and its requests are cancelled.
    """

    read_timeout = 30.0
    write_timeout = 60.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._disconnected: asyncio.Future[None] = self.loop.create_future()
        self.app_state = {"disconnected": self._disconnected}  # the `state` of each request, see while_connected()
        self._head = 0
        self._blocked: asyncio.TimerHandle | None = None
        self._expected = self.loop.call_later(self.read_timeout, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._expected, self._blocked):
            if timer:
                timer.cancel()
        self._disconnected.set_result(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._between:
            if self._head > MAX_HEADER_BYTES:
                return self._close()
            self._head += len(data)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """Stop the timer for the request's headers, which are complete, and handle the request."""
        self._head = 0
        self._expected.cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Start the timer within which the next request's headers must arrive."""
        super().on_response_complete()
        self._expected.cancel()
        self._expected = self.loop.call_later(self.read_timeout, self._close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._blocked = self.loop.call_later(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._blocked:
            self._blocked.cancel()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    @property
    def _between(self) -> bool:
        """True if the connection is idle: none of its requests is being answered or waits to be answered."""
        return self.cycle is None or (self.cycle.response_complete and not self.pipeline)

    def _close(self) -> None:
        """Close the connection if it is idle. Returns nothing.

        If closing takes longer than `write_timeout` seconds, the connection is aborted. Nothing is done if a request is
        being answered, or if the connection is closing already.
        """
        if self._between and not self.transport.is_closing():
            self.transport.close()
            self.loop.call_later(self.write_timeout, self.transport.abort)


class QuietServer(uvicorn.Server):
    """A uvicorn server that installs no signal handlers, since serve() installs its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Context manager that does nothing. It replaces uvicorn's context manager, which installs signal handlers."""
        yield


async def serve(
    llms: Mapping[str, LLM], options: Options, listener: socket.socket, announce: Callable[[Service], None],
    signals: bool = True, control: Path | TcpAddress | None = None,
) -> int:  # fmt: skip
    """Serve models over HTTP until a signal or a failure. Returns the process's exit code.

    The first SIGTERM or SIGINT drains the server: admitted requests run to their end and new requests are refused; then
    the exit code is 0. A second signal aborts all requests, and the exit code is 1. The exit code is also 1 if the HTTP
    server fails, or if no model can serve requests any more.

    Args:
        llms: the models by the names that clients use.
        options: options of the server.
        listener: socket on which HTTP is served.
        announce: function that is called with the Service once requests are accepted.
        signals: True to handle SIGTERM and SIGINT.
        control: Unix socket or TCP address at which a router may connect (see control.py); None: no router.

    Raises OSError if `control` cannot be bound.
    """
    service = Service(llms, options)
    timeouts = {"write_timeout": options.write_timeout, "read_timeout": options.read_timeout}
    connection = type("Connection", (Connection,), timeouts)
    app = build(service)
    config = uvicorn.Config(
        app, http=connection, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_graceful_shutdown=int(CLOSE_TIMEOUT), backlog=4096,
    )  # fmt: skip
    server = QuietServer(config)
    shutdown = Shutdown(service)
    loop = asyncio.get_running_loop()
    if signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, shutdown.on_signal)
    service.start()
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(POLL_INTERVAL / 10)
        async with control_channel(app, service, control) if control else nullcontext():
            announce(service)
            await shutdown.wait(serving)
    finally:
        server.should_exit = True
        await asyncio.wait({serving}, timeout=2 * CLOSE_TIMEOUT)
        service.close()
    if error := serving.done() and serving.exception():
        log.critical("the HTTP server crashed", exc_info=error)
        return 1
    return shutdown.code


class Shutdown:
    """Decides when the server ends, and with which process exit code (`code`)."""

    def __init__(self, service: Service) -> None:
        self.service, self.code = service, 0

    def on_signal(self) -> None:
        """Handle SIGTERM or SIGINT. Returns nothing.

        The first signal drains the server: it refuses new requests and finishes the admitted ones. The second signal
        aborts all requests.
        """
        if self.service.draining:
            log.warning("second signal: aborting all requests")
            self.code = 1
            self.service.halt()
        else:
            log.info("draining: no more requests are admitted; a second signal aborts those that run")
            self.service.drain()

    async def wait(self, serving: asyncio.Future[Any]) -> None:
        """Wait until the server should end. Returns nothing.

        The server should end in four cases: it is drained; a second signal has come; the HTTP server has stopped; no
        model can serve requests any more. In the last two cases `code`, the exit code, is set to 1.

        serving: future of the running HTTP server.
        """
        service = self.service
        while not serving.done():
            if service.broken or (service.ended and not service.draining):
                log.critical("no model can serve requests any more: %s", service.broken)
                self.code = 1
                return
            if service.draining and (service.open == 0 or self.code):
                if self.code:  # let the error responses be sent
                    await asyncio.wait_for(service.wait_ended(), CLOSE_TIMEOUT)
                return
            await asyncio.sleep(POLL_INTERVAL)
        self.code = 1


def listen(host: str, port: int) -> socket.socket:
    """Returns a TCP socket that is bound to host and port. It does not listen yet.

    Call the function before loading models, so that a port in use is reported early. Raises OSError, with host and port
    in its message, if they cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as e:
        listener.close()
        raise OSError(f"{host}:{port} cannot be bound: {e.strerror}; choose another --port") from None
    return listener


def raise_file_limit() -> None:
    """Raise the soft limit of open files, usually 1024, to the hard limit, so that it does not limit connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
