"""Link: the router's connection to one replica's control channel (see server/control.py)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from intaglio.devices.processes.address import TcpAddress
from intaglio.server import control_tcp
from intaglio.server.control import FrameBuffer, pack
from intaglio.server.private_socket import short_path

RETRY = 0.2  # seconds between attempts to connect
Frame = tuple[dict[str, Any], bytes]


class LinkLost(ConnectionError):
    """Raised if a replica cannot answer a call: the connection or the process has ended, or the call failed."""


class Moved(Exception):
    """Raised for a call that another replica has to continue, because the replica of the call is being drained."""


class Call:
    """One call to a replica, in progress. Its answer is a sequence of frames (header, body)."""

    def __init__(self, link: Link, number: int) -> None:
        self.link, self.number = link, number
        self._frames: deque[Frame | Exception] = deque()
        self._arrived: asyncio.Future[None] | None = None  # set while frame() waits

    def put(self, frame: Frame | Exception) -> None:
        """Add a frame of the answer, or an exception, to the end of the queue from which frame() reads."""
        self._frames.append(frame)
        if self._arrived and not self._arrived.done():
            self._arrived.set_result(None)

    async def frame(self) -> Frame:
        """Wait for the next frame of the answer. Returns (header, body): a dict and bytes.

        Raises LinkLost if the connection to the replica has ended. Raises Moved if move() was called: another replica
        is to continue the request. Frames that arrived earlier are all returned before an exception is raised.
        """
        while not self._frames:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        got = self._frames.popleft()
        if isinstance(got, Exception):
            raise got
        return got

    async def whole(self) -> tuple[dict[str, Any], bytes]:
        """Wait for the whole answer. Returns (header of the first frame, bodies of all frames joined).

        Raises LinkLost if the connection ends or the first frame has no HTTP status. Raises Moved if move() was called
        meanwhile.
        """
        start, body = await self.frame()
        header, whole = start, bytearray(body)
        while not header.get("end"):
            header, body = await self.frame()
            whole += body
        if "status" not in start:
            raise LinkLost("the replica failed")
        return start, bytes(whole)

    def move(self) -> None:
        """Make frame() raise Moved, once it has returned the frames that have already arrived. Returns nothing.

        Moved tells the task that calls frame() to continue the request at another replica, because the replica of this
        call is being drained.
        """
        self.put(Moved())

    def close(self) -> None:
        """Stop reading the answer to this call. If it is not complete, the replica is told to cancel the call."""
        if self.link.calls.pop(self.number, None) and not self.link.lost:
            self.link.write({"call": self.number, "do": "cancel"})


class Link(asyncio.Protocol):
    """A connection to one replica, over which many calls can run at the same time.

    The owner sets the attribute `on_lost` to a function that is called once, when the connection ends. A Link is an
    asyncio.Protocol, since asyncio's streams would take two more turns of the event loop for each frame.
    """

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.lost = False
        self.on_lost: Callable[[], None] = lambda: None
        self._transport: asyncio.Transport
        self._streams: Any = None  # those that made the connection, if it is over TCP
        self._frames, self._numbers = FrameBuffer(), 0
        self._ended = asyncio.get_running_loop().create_future()

    @classmethod
    async def connect(cls, where: Path | TcpAddress, patience: float = 0.0) -> Link:
        """Connect to a replica's control channel, and return the Link.

        where: path of a Unix socket, or a TCP address. patience: seconds during which a failed attempt is repeated. If
        no attempt succeeds, the error of the last one is raised: NotAuthenticated if the other end does not know the
        token of the address, else another OSError.
        """
        ends = time.monotonic() + patience
        while True:
            try:
                if isinstance(where, TcpAddress):
                    return cls._over(await control_tcp.connect(where))
                with short_path(where) as short:
                    _, link = await asyncio.get_running_loop().create_unix_connection(cls, short)
                return link
            except OSError:
                if time.monotonic() >= ends:
                    raise
            await asyncio.sleep(RETRY)

    @classmethod
    def _over(cls, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> Link:
        """Returns a Link that takes over an open connection, on which the handshake is done.

        streams: the reader and writer of the connection. Nobody else may read from the reader afterwards, because the
        Link receives all data that arrives.
        """
        link, (_, writer) = cls(), streams
        link._streams = streams  # a writer that nobody refers to closes its connection
        writer.transport.set_protocol(link)
        link.connection_made(cast("asyncio.Transport", writer.transport))
        return link

    def call(self, header: dict[str, Any], body: bytes = b"") -> Call:
        """Send a call to the replica, and return the Call.

        The answer can be read from the Call as it arrives. header: a JSON object. Its key `do` names what the replica
        should do; the other keys are arguments. body: bytes sent after the header. Raises LinkLost if the connection
        has ended.
        """
        if self.lost or self._transport.is_closing():
            raise LinkLost("the connection to the replica has ended")
        self._numbers += 1
        call = self.calls[self._numbers] = Call(self, self._numbers)
        self.write({"call": self._numbers, **header}, body)
        return call

    async def ask(self, header: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a call whose answer is one frame, and return the frame's header, a dict.

        Raises LinkLost if the connection ends, TimeoutError after `timeout` seconds.
        """
        call = self.call(header)
        try:
            async with asyncio.timeout(timeout):
                return (await call.frame())[0]
        finally:
            self.calls.pop(call.number, None)

    def write(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send a frame. Returns nothing, and raises no error.

        If the connection has ended, nothing is sent. Calls that wait for an answer over the connection raise LinkLost.
        """
        if not self._transport.is_closing():  # uvloop raises RuntimeError where asyncio drops the bytes
            self._transport.write(pack(header, body))

    def abort(self) -> None:
        """Close the connection to a replica that does not answer. All its calls raise LinkLost soon after."""
        self._transport.abort()

    async def close(self) -> None:
        """Close the connection. All its calls raise LinkLost."""
        self._transport.close()
        await self._ended

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Store `transport`, the connection to write to. asyncio calls this method when the connection is open."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Pass each frame that has arrived to the Call that it answers.

        asyncio calls this method with the bytes that arrive. Bytes that are not a frame end the connection.
        """
        try:
            for header, body in self._frames.feed(data):
                number = header.pop("call")
                if call := self.calls.get(number):
                    if header.get("end"):
                        del self.calls[number]
                    call.put((header, body))
        except (ValueError, KeyError, AttributeError):
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let every open call raise LinkLost, and call `on_lost`.

        asyncio calls this method when the connection has ended.
        """
        self.lost = True
        for call in self.calls.values():
            call.put(LinkLost("the replica has ended"))
        self.calls.clear()
        self._ended.set_result(None)
        self.on_lost()
