"""Control channel of a replica: a socket on which a router sends requests and reads the engine's state.

Many calls share one connection. A frame is a header, JSON, and a body, bytes, with their lengths before them. Calls:

    {"call": N, "do": "request", "method", "path", "headers", "relay"}, body: the request's body
        Answered by frames {"call": N, "status", "headers"}, then {"call": N, "deltas"} with parts of the response, the
        last with "end". One frame may have the fields of several. "over" in the last: the response is not complete.
    {"call": N, "do": "cancel"}
    {"call": N, "do": "load", "incarnation", "after", "renew", "release"}: figures, and the block events after number
        `after`. The lists of leases on handed K/V blocks, which are held and which are to end, may be missing.

Requests pass through the same ASGI application as those over HTTP. The socket is a Unix socket that only this user may
connect to, or TCP with a token (see control_tcp.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any, cast

from starlette.types import ASGIApp, Message

from intaglio.devices.processes.address import TcpAddress
from intaglio.runtime import Counts, Engine, Gauges, Refused
from intaglio.server.control_tcp import tcp_server
from intaglio.server.driver import Inspect
from intaglio.server.prefill import HeldLeases
from intaglio.server.private_socket import private_socket
from intaglio.server.relay import NOTE, Relay, encode, write_delta
from intaglio.server.served_model import ServedModel
from intaglio.server.service import Service

log = logging.getLogger("intaglio.server")
LENGTHS = struct.Struct("!II")
FRAME_MAX = 1 << 28  # bytes of a frame's header or body
ENGINE_WAIT = 1.0  # seconds that a load report waits for the engine, which answers between steps


def pack(header: dict[str, Any], body: bytes = b"") -> bytes:
    """Returns the bytes of one frame of the control channel.

    A frame consists of the lengths of header and body, the header as JSON, and the body.
    """
    head = encode(header)
    return LENGTHS.pack(len(head), len(body)) + head + body


class FrameBuffer:
    """Collects the bytes that arrive on a control channel and takes whole frames out of them."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Add bytes that have arrived, and yield each frame that is complete now, as (header, body).

        Raises ValueError if the bytes are not a frame or the frame is too large.
        """
        self._bytes += data
        at, size = 0, LENGTHS.size
        while len(self._bytes) >= at + size:
            head, body = LENGTHS.unpack_from(self._bytes, at)
            if max(head, body) > FRAME_MAX:
                raise ValueError(f"a frame has {max(head, body)} bytes; allowed: up to {FRAME_MAX}")
            middle, end = at + size + head, at + size + head + body
            if len(self._bytes) < end:
                break
            head_text = str(self._bytes[at + size : middle], "utf-8")  # json.loads() of bytes guesses the encoding
            yield json.loads(head_text), bytes(self._bytes[middle:end])
            at = end
        del self._bytes[:at]


@asynccontextmanager
async def control_channel(app: ASGIApp, service: Service, where: Path | TcpAddress) -> AsyncIterator[None]:
    """Async context manager that serves the control channel, over which a router sends requests to this replica.

    It yields None, and ends the channel when the block ends. For a TCP channel, the bound address is written to the
    log.

    where: path of a Unix socket that only processes of this user may connect to, or a TCP address with a token. Raises
    OSError if the path or address cannot be bound.
    """
    connections: set[Connection] = set()

    def connection() -> Connection:
        return Connection(app, service, connections)

    async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken = connection()
        writer.transport.set_protocol(taken)  # nothing has arrived yet: the router waits for the end of the handshake
        taken.connection_made(cast("asyncio.Transport", writer.transport))
        await taken.ended  # a writer that nobody refers to closes its connection

    def refused(why: str) -> None:
        log.warning("control channel: %s", why)

    try:
        if isinstance(where, TcpAddress):
            async with tcp_server(where, connected, refused) as bound:
                log.info("control channel at %s", bound)
                yield
        else:
            server = await asyncio.get_running_loop().create_unix_server(connection, sock=private_socket(where))
            try:
                yield
            finally:
                server.close()
                where.unlink(missing_ok=True)  # the router has done so once it is connected
    finally:
        for open_one in list(connections):
            open_one.close()


class Connection(asyncio.Protocol):
    """One router's connection to this replica's control channel. It runs the calls (requests) that the router sends.

    Each call runs in a task of its own. When the connection ends, all its calls are cancelled. The class is an
    asyncio.Protocol because asyncio's streams would take two more turns of the event loop for each frame.

    connections: set of all open connections; this connection adds itself when it opens and removes itself when it ends.
    `ended`: future that is done once the connection has ended.
    """

    def __init__(self, app: ASGIApp, service: Service, connections: set[Connection]) -> None:
        self.app, self.service, self.connections = app, service, connections
        self.calls: dict[int, Call] = {}
        self.leases: HeldLeases | None = None  # those of the router; None until it names some
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport
        self._frames = FrameBuffer()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Store the connection's transport, and add the connection to the set of open connections."""
        self._transport = transport
        self.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Handle the frames that are complete with the new bytes `data`.

        A frame starts a call, cancels a call, or asks for a load report, which is sent back (see load_report()). Closes
        the connection if the bytes are not valid frames.
        """
        try:
            for header, body in self._frames.feed(data):
                self._handle(header, body)
        except (ValueError, KeyError, TypeError) as e:
            log.error("control channel: %r is no call; the connection is closed", e)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all calls, and remove the connection from the set of open connections."""
        self.close()
        self.connections.discard(self)
        self.ended.set_result(None)

    def close(self) -> None:
        """Cancel all calls, end the leases that the router holds on K/V blocks, and close the connection."""
        for call in list(self.calls.values()):
            call.disconnect()
        if self.leases:
            self.leases.update((), ())
        self._transport.close()

    def write(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send a frame, unless the connection is closed."""
        if not self._transport.is_closing():
            self._transport.write(pack(header, body))

    def _handle(self, header: dict[str, Any], body: bytes) -> None:
        number = header["call"]
        match header["do"]:
            case "request":
                call = self.calls[number] = Call(self, number, header, body)
                call.task.add_done_callback(lambda _: self.calls.pop(number, None))
            case "cancel" if number in self.calls:
                self.calls[number].disconnect()
            case "load":
                task = asyncio.ensure_future(self._load(header))
                task.add_done_callback(lambda t: t.cancelled() or t.exception())

    async def _load(self, header: dict[str, Any]) -> None:
        model, longest = next(iter(self.service.models.values())), self.service.options.step_timeout
        try:
            if (header.get("renew") or header.get("release")) and model.llm.tier and not self.leases:
                self.leases = HeldLeases(model.llm.tier)
            if self.leases:
                self.leases.update(header.get("renew", ()), header.get("release", ()))
            report = await load_report(model, header["incarnation"], header["after"], longest)
        except Exception as e:  # such as an engine that has ended; the router is to know at once
            log.error("control channel: no load report", exc_info=None if isinstance(e, Refused) else e)
            report = {"failed": model.broken or str(e) or type(e).__name__}
        self.write({"call": header["call"], **report})


class Call:
    """A request that a router has sent over its connection to this replica.

    The request is passed to the ASGI application as if it had come over HTTP.
    """

    def __init__(self, connection: Connection, number: int, header: dict[str, Any], body: bytes) -> None:
        self.connection, self.number, self.body = connection, number, body
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.read = self.ended = False
        self.held: dict[str, Any] = {}  # fields for the next frame: each frame wakes the router, while the engine works
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in header["headers"]]
        headers += [(b"authorization", b"Bearer " + key.encode()) for key in connection.service.options.keys[:1]]
        self.scope: dict[str, Any] = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": header["method"],
            "scheme": "http", "path": header["path"], "raw_path": header["path"].encode(), "root_path": "",
            "query_string": header.get("query", "").encode("latin-1"), "headers": headers, "server": None,
            "client": None, "state": {"disconnected": self.left},
        }  # fmt: skip
        if header.get("relay"):
            self.scope["relay"] = Relay.from_dict(header["relay"])
        self.task = asyncio.ensure_future(self._run())

    def disconnect(self) -> None:
        """Tell the application that the client has disconnected, which cancels this call's request."""
        if not self.left.done():
            self.left.set_result(None)

    async def _run(self) -> None:
        try:
            await self.connection.app(self.scope, self._receive, self._send)
        except Exception as e:
            log.error("control channel: %s failed", self.scope["path"], exc_info=e)
        if not self.ended:
            self.connection.write({"call": self.number, "end": True, "over": True})

    async def _receive(self) -> Message:
        if not self.read:
            self.read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await asyncio.shield(self.left)
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        header, self.held = {"call": self.number, **self.held}, {}
        if deltas := message.get("deltas"):
            header["deltas"] = [write_delta(d) for d in deltas]
        match message["type"]:
            case "http.response.start":
                names = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
                header |= {"status": message["status"], "headers": names}
                if any(name == "content-length" for name, _ in names):  # the body follows at once
                    self.held = header
                    return
            case "http.response.body":
                if not message.get("more_body", False):
                    self.ended = header["end"] = True
                if message.get("code"):
                    header["code"] = message["code"]
            case "relay.head":
                self.held = {"head": message["head"]}
                return
            case kind:
                assert kind == NOTE, kind
                if message["last"]:
                    self.held = header
                    return
        self.connection.write(header, message.get("body", b""))


async def load_report(model: ServedModel, incarnation: str | None, after: int, step_timeout: float) -> dict[str, Any]:
    """Returns the load report of a model's engine, a dict for the router.

    It has the engine's queue and pace (see engine_report()), the reason if the engine has failed, counts of the K/V
    tier, and the changes of the K/V cache. The changes are the cache's events (blocks gained or lost) with numbers
    above `after`. The dict has a snapshot of all blocks instead if `incarnation` is not the id of the engine's present
    cache, or if the engine no longer keeps these events. If the engine does not answer within ENGINE_WAIT seconds, the
    dict has neither events nor a snapshot.

    Args:
        model: the model.
        incarnation: id of the K/V cache whose events the router has received so far; None if it has received none. Each
            start of an engine makes a new id.
        after: number of the last event that the router has received.
        step_timeout: if the engine's current step has taken this many seconds, the engine is reported as failed.

    Raises Refused if the engine has ended.
    """
    snapshot = model.driver.snapshot
    report = engine_report(model.driver.engine, snapshot.gauges, snapshot.counts) | {
        "failed": model.broken or model.hanging(step_timeout),
        "tier": dict(vars(model.llm.tier.counts)) if model.llm.tier else {},
    }
    known = after if incarnation == report["incarnation"] else None
    try:
        async with asyncio.timeout(ENGINE_WAIT):
            return report | await Inspect.ask(model.driver, lambda engine: block_changes(engine, known))
    except TimeoutError:
        return report


def engine_report(engine: Engine, gauges: Gauges, counts: Counts) -> dict[str, Any]:
    """Returns the part of a load report that describes the engine, as a dict.

    The dict has the queue's length, limits, token counts, step times, the use of the K/V cache and the cache's id.

    gauges, counts: the engine's latest gauges and counters. The function can be called from any thread: from `engine`
    it reads only values that any thread may read.
    """
    return {
        "running": gauges.running, "waiting": gauges.waiting, "kv_usage": gauges.kv_usage, "draining": gauges.draining,
        "max_batch_tokens": engine.admission.max_batch_tokens, "max_sequences": engine.scheduler.max_sequences,
        "prompt_tokens": counts.prompt_tokens, "cached_tokens": counts.cached_tokens,
        "output_tokens": counts.output_tokens, "steps": astuple(engine.latency.steps),
        "incarnation": engine.pool.events.incarnation,
    }  # fmt: skip


def block_changes(engine: Engine, after: int | None) -> dict[str, Any]:
    """Returns the part of a load report that says which K/V blocks an engine's cache has gained or lost, as a dict.

    The dict has the key `events`: a list of the events with numbers above `after`, each as (number, kind, block name).
    If `after` is None, or if the engine no longer keeps these events, the dict has two other keys: `snapshot`, the
    names of all blocks in the cache, and `sequence`, the number of the last event that the snapshot includes.

    Call it in the engine's thread.
    """
    events = None if after is None else engine.block_events(after)
    if events is not None:
        return {"events": [(e.sequence, e.kind, e.name) for e in events]}
    snapshot = engine.block_snapshot()
    return {"sequence": snapshot.sequence, "snapshot": snapshot.names}
