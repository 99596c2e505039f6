"""Link: the router's connection to one replica's control channel (see server/control.py)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intaglio.devices.processes.address import TcpAddress
from intaglio.server import control_tcp
from intaglio.server.control import pack, read_frame

RETRY = 0.2  # seconds between attempts to connect
Frame = tuple[dict[str, Any], bytes]


class LinkLost(ConnectionError):
    """Raised for a call that a replica cannot answer: the connection or the process has ended, or the call failed."""


class Moved(Exception):
    """Raised for a call that has to go on at another replica, because its own is being drained."""


class Call:
    """One call to a replica, in progress. Its answer is a sequence of frames (header, body)."""

    def __init__(self, link: Link, number: int) -> None:
        self.link, self.number = link, number
        self.frames: asyncio.Queue[Frame | Exception] = asyncio.Queue()

    async def frame(self) -> Frame:
        """Wait for the next frame of the answer. Returns (header, body): a dict and bytes.

        Raises LinkLost if the connection has ended, and Moved after move(), in both cases once all earlier frames are
        returned.
        """
        got = await self.frames.get()
        if isinstance(got, Exception):
            raise got
        return got

    async def whole(self) -> tuple[dict[str, Any], bytes]:
        """Wait for the whole answer. Returns (header of its first frame, bodies of all frames joined).

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
        """Tell the task that reads this call's answer to go on at another replica, because this one is being drained.

        frame() returns the frames that have already arrived, and then raises Moved.
        """
        self.frames.put_nowait(Moved())

    def close(self) -> None:
        """Take no more frames for the call. If its answer is not complete, the replica is told to cancel it."""
        if self.link.calls.pop(self.number, None) and not self.link.lost:
            self.link.write({"call": self.number, "do": "cancel"})


class Link:
    """A connection to a replica, shared by many calls. Set `on_lost` to a function to call once when it ends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.calls: dict[int, Call] = {}
        self.lost = False
        self.on_lost: Callable[[], None] = lambda: None
        self._numbers = 0
        self._reading = asyncio.ensure_future(self._read(reader))

    @classmethod
    async def connect(cls, where: Path | TcpAddress, patience: float = 0.0) -> Link:
        """Connect to the control channel at a Unix socket's path or a TCP address, and return the Link.

        patience: seconds during which a failed attempt is repeated. Raises OSError if none succeeds: NotAuthenticated,
        a subclass, if the other end does not know the address's token.
        """
        ends = time.monotonic() + patience
        while True:
            try:
                if isinstance(where, TcpAddress):
                    return cls(*await control_tcp.connect(where))
                return cls(*await asyncio.open_unix_connection(where))
            except OSError:
                if time.monotonic() >= ends:
                    raise
            await asyncio.sleep(RETRY)

    def call(self, header: dict[str, Any], body: bytes = b"") -> Call:
        """Send a call and return it as a Call. Raises LinkLost if the connection has ended."""
        if self.lost or self.writer.is_closing():
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
        """Send a frame. Returns nothing, and never fails.

        If the connection has ended, nothing is sent. Calls that wait for an answer over it raise LinkLost.
        """
        if not self.writer.is_closing():  # uvloop raises RuntimeError where asyncio drops the bytes
            self.writer.write(pack(header, body))

    def abort(self) -> None:
        """Close the connection to a replica that does not answer. All its calls raise LinkLost soon after."""
        self.writer.transport.abort()

    async def close(self) -> None:
        """Close the connection. All its calls raise LinkLost."""
        self.writer.close()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                header, body = await read_frame(reader)
                number = header.pop("call")
                if call := self.calls.get(number):
                    if header.get("end"):
                        del self.calls[number]
                    call.frames.put_nowait((header, body))
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            pass
        finally:
            self.lost = True
            self.writer.close()
            for call in self.calls.values():
                call.frames.put_nowait(LinkLost("the replica has ended"))
            self.calls.clear()
            self.on_lost()
