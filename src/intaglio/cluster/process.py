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
    """Raised for a replica process that ended before it served."""


class ReplicaProcess:
    """A replica's process. It ends with its standard input, and so with this process, however that ends.

    words: arguments of `intaglio serve`. folder: for its control socket and its log.
    """

    def __init__(self, name: str, words: list[str], folder: Path) -> None:
        self.name, self.words, self.folder = name, words, folder
        self.log = folder / f"{name}.log"
        self.process: asyncio.subprocess.Process | None = None
        self._group_ended = True  # the process has ended, and what it had started has been killed

    @property
    def pid(self) -> int | None:
        """Process id; None before the start."""
        return self.process.pid if self.process else None

    @property
    def ended(self) -> bool:
        """True if there is no process, or it has ended."""
        return self.process is None or self.process.returncode is not None

    async def start(self) -> Link:
        """Start the process, connect to it once it serves, and return the Link.

        Raises ReplicaFailed with the end of its log if it ends before, or after STARTING seconds.
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
        """Wait until the process has ended, and kill what it has left running. Returns its exit code."""
        assert self.process
        code = await self.process.wait()
        self.kill()
        return code

    async def stop(self) -> None:
        """End the process: SIGTERM, and after STOPPING seconds SIGKILL."""
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
        """End the process and all that it started, at once.

        Does nothing once it has been called after the process's end: the system may then give the number of the process
        group to another.
        """
        if self.process is None or self._group_ended:
            return
        self._group_ended = self.ended
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def trim_log(self) -> None:
        """Move the log to NAME.log.1 if it has more than LOG_BYTES. Raises OSError.

        It is copied and emptied, since the process goes on writing to the same file, always at its end.
        """
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            shutil.copyfile(self.log, self.log.with_name(f"{self.log.name}.1"))
            os.truncate(self.log, 0)

    def _tail(self, begins: int) -> str:
        """The last TAIL characters of the log from byte `begins` on, where the present start begins."""
        with self.log.open("rb") as log:
            log.seek(begins if begins <= log.seek(0, os.SEEK_END) else 0)  # trimmed since
            text = log.read().decode(errors="replace").strip()
        return text[-TAIL:] or "it said nothing"
