"""ReplicaProcess: one `intaglio serve` process of a cluster on this machine, with its control channel."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from intaglio.cluster.link import Link
from intaglio.devices.processes import child_environment
from intaglio.devices.processes.address import TcpAddress
from intaglio.server.control_tcp import TOKEN_VARIABLE

T = TypeVar("T")

STARTING = 600.0  # seconds that a replica may take to load its model
STOPPING = 10.0  # seconds between SIGTERM and SIGKILL
LOOK = 0.02  # seconds between looks for the control socket
TAIL = 2000  # characters of a log that an error shows
LOG_BYTES = 8 << 20  # a log that is longer is moved to NAME.log.1, in place of the one there


class ReplicaFailed(ValueError):
    """Raised if the process of a replica was started, but ended or did not serve in time."""


class Launched(Protocol):
    """Interface of a replica's process, on this machine or another. The cluster restarts the process when it ends.

    name: the replica's name. log: path of the process's log on its node. node: name of the node; "": this machine.
    """

    name: str
    log: Path
    node: str

    @property
    def pid(self) -> int | None:
        """Process id of the process on its node; None before start()."""

    async def start(self) -> Link:
        """Start the process, wait until it serves, and return the Link to it.

        Raises ReplicaFailed if it does not serve in time, OSError if it cannot be started or connected to.
        """

    async def wait(self) -> int:
        """Wait until the process has ended. Returns its exit code."""

    async def stop(self) -> None:
        """Ask the process to end, and kill it if it has not ended after some seconds."""

    def kill(self) -> None:
        """End the process, and all processes that it started, at once."""

    def trim_log(self) -> None:
        """Move the content of the replica's log to NAME.log.1 if the log is longer than LOG_BYTES.

        Raises OSError if that fails.
        """


class ReplicaProcess:
    """The process of one replica. It ends when this process ends, because its standard input is a pipe from here.

    Args:
        name: the replica's name.
        words: arguments of `intaglio serve`.
        folder: folder for the process's control socket and log.
    """

    def __init__(self, name: str, words: list[str], folder: Path) -> None:
        self.name, self.words, self.folder = name, words, folder
        self.log = folder / f"{name}.log"
        self.process: asyncio.subprocess.Process | None = None
        self.node = ""  # that it runs on: this machine
        self._begins = 0  # where in the log the present start begins
        self._group_ended = True  # the process has ended, and what it had started has been killed

    @property
    def pid(self) -> int | None:
        """Process id of the process; None before start()."""
        return self.process.pid if self.process else None

    @property
    def ended(self) -> bool:
        """True if the process has ended, or was never started."""
        return self.process is None or self.process.returncode is not None

    async def start(self) -> Link:
        """Start the process, connect to it once it serves, and return the Link.

        Raises ReplicaFailed, with the end of the log, if the process ends first or does not serve within STARTING
        seconds.
        """
        socket = self.folder / f"{self.name}-{secrets.token_hex(4)}.sock"

        async def connect() -> Link | None:
            if not socket.exists():
                return None
            try:
                link = await Link.connect(socket)
            except ConnectionRefusedError:
                return None  # bound, and not listening yet
            socket.unlink()  # nobody else is to connect, and the process may be killed
            return link

        return await self._launch(str(socket), {}, connect)

    async def listen(self, host: str, token: str) -> TcpAddress:
        """Start the process with its control channel over TCP. Returns the channel's address once the process serves.

        Args:
            host: address of this machine at which the channel listens; the system chooses the port.
            token: secret of at least 16 bytes that a client must know.

        Raises ReplicaFailed, with the end of the log, if the process ends first or does not serve within STARTING
        seconds.
        """

        async def found() -> TcpAddress | None:
            address = re.search(r"control channel at (tcp://\S+)", self._said())
            return TcpAddress.parse(address[1], token) if address else None

        return await self._launch(str(TcpAddress(host, 0, token.encode())), {TOKEN_VARIABLE: token}, found)

    async def _launch(self, control: str, more: Mapping[str, str], ready: Callable[[], Awaitable[T | None]]) -> T:
        """Start the process, then call `ready` until it returns a value other than None. Returns that value.

        control: address for the control channel. more: additional environment variables. Raises ReplicaFailed, with the
        end of the log, if the process ends first or no value comes within STARTING seconds.
        """
        words = [sys.executable, "-m", "intaglio", "serve", *self.words, "--port", "0", "--control", control]
        environment = {**child_environment(), "INTAGLIO_API_KEY": secrets.token_hex(16), **more}
        with self.log.open("ab") as log:
            self._begins = log.tell()
            self.process = await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            self._group_ended = False
        try:
            async with asyncio.timeout(STARTING):
                while not self.ended:
                    if (found := await ready()) is not None:
                        return found
                    await asyncio.sleep(LOOK)
        except TimeoutError:
            self.kill()
            raise ReplicaFailed(f"replica {self.name} did not serve within {STARTING:.0f} s: {self._tail()}") from None
        except BaseException:
            self.kill()
            raise
        raise ReplicaFailed(f"replica {self.name} did not start: {self._tail()}")

    async def wait(self) -> int:
        """Wait until the process has ended, and kill the processes that it left running. Returns its exit code."""
        assert self.process
        code = await self.process.wait()
        self.kill()
        return code

    async def stop(self) -> None:
        """End the process with SIGTERM, or after STOPPING seconds with SIGKILL, and wait until it has ended."""
        if self.process is None:
            return
        if not self.ended:
            self.process.terminate()
            try:
                await asyncio.wait_for(self.wait(), STOPPING)
            except TimeoutError:
                self.kill()
                await self.wait()
        if self.process.stdin:
            self.process.stdin.close()

    def kill(self) -> None:
        """Kill the process, and all processes that it started (its process group), with SIGKILL.

        If the process has already ended, the first call still kills the processes that it started. Later calls do
        nothing, because the system may have given the group's number to another process by then.
        """
        if self.process is None or self._group_ended:
            return
        self._group_ended = self.ended
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def trim_log(self) -> None:
        """Move the content of the log to NAME.log.1 if it is longer than LOG_BYTES. Raises OSError if that fails.

        The log is copied and then emptied, because the process has it open and goes on appending to it.
        """
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            shutil.copyfile(self.log, self.log.with_name(f"{self.log.name}.1"))
            os.truncate(self.log, 0)

    def _said(self) -> str:
        """Returns the text that the process has written to its log since it was last started.

        If the log was emptied since then, the text begins there.
        """
        with self.log.open("rb") as log:
            log.seek(self._begins if self._begins <= log.seek(0, os.SEEK_END) else 0)  # trimmed since
            return log.read().decode(errors="replace").strip()

    def _tail(self) -> str:
        """Returns the last TAIL characters that the process has written to its log.

        If it has written nothing, the result is "it said nothing".
        """
        return self._said()[-TAIL:] or "it said nothing"
