"""ReplicaProcess: one `intaglio serve` process of a cluster, with its control socket."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

from intaglio.cluster.link import Link
from intaglio.devices.processes import child_environment

STARTING = 600.0  # seconds that a replica may take to load its model
STOPPING = 10.0  # seconds between SIGTERM and SIGKILL
LOOK = 0.02  # seconds between looks for the control socket
TAIL = 2000  # characters of a log that an error shows
LOG_BYTES = 8 << 20  # a log that is longer is moved to NAME.log.1, in place of the one there


class ReplicaFailed(ValueError):
    """Raised for a replica process that ended, or did not serve in time, when it was started."""


class ReplicaProcess:
    """The process of one replica. Its standard input is a pipe from this process, so it ends when this process does.

    Args:
        name: of the replica.
        words: arguments of `intaglio serve`.
        folder: for its control socket and its log.
    """

    def __init__(self, name: str, words: list[str], folder: Path) -> None:
        self.name, self.words, self.folder = name, words, folder
        self.log = folder / f"{name}.log"
        self.process: asyncio.subprocess.Process | None = None
        self._group_ended = True  # the process has ended, and what it had started has been killed

    @property
    def pid(self) -> int | None:
        """Process id; None before start()."""
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
        words = [sys.executable, "-m", "intaglio", "serve", *self.words, "--port", "0", "--control", str(socket)]
        environment = {**child_environment(), "INTAGLIO_API_KEY": secrets.token_hex(16)}
        with self.log.open("ab") as log:
            begins = log.tell()
            self.process = await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            self._group_ended = False
        try:
            async with asyncio.timeout(STARTING):
                while not self.ended:
                    if socket.exists():
                        try:
                            link = await Link.connect(socket)
                            socket.unlink()  # nobody else is to connect, and the process may be killed
                            return link
                        except ConnectionRefusedError:
                            pass  # bound, and not listening yet
                    await asyncio.sleep(LOOK)
        except TimeoutError:
            self.kill()
            why = f"replica {self.name} did not serve within {STARTING:.0f} s: {self._tail(begins)}"
            raise ReplicaFailed(why) from None
        except BaseException:
            self.kill()
            raise
        raise ReplicaFailed(f"replica {self.name} did not start: {self._tail(begins)}")

    async def wait(self) -> int:
        """Wait until the process has ended, and kill what it had started and left running. Returns its exit code."""
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
        """Kill the process and all that it started (its process group) with SIGKILL.

        After the process has ended, only the first call does anything: the system may give the group's number to others
        later.
        """
        if self.process is None or self._group_ended:
            return
        self._group_ended = self.ended
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def trim_log(self) -> None:
        """Move the content of the log to NAME.log.1 if it is longer than LOG_BYTES. Raises OSError.

        The log is copied and then emptied, because the process has it open and goes on appending to it.
        """
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            shutil.copyfile(self.log, self.log.with_name(f"{self.log.name}.1"))
            os.truncate(self.log, 0)

    def _tail(self, begins: int) -> str:
        """The last TAIL characters that the process has logged since it was started; a remark if there are none.

        begins: length of the log in bytes when it was started.
        """
        with self.log.open("rb") as log:
            log.seek(begins if begins <= log.seek(0, os.SEEK_END) else 0)  # trimmed since
            text = log.read().decode(errors="replace").strip()
        return text[-TAIL:] or "it said nothing"
