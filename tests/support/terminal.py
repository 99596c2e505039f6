"""Runs `intaglio` commands on a pseudo terminal, and returns what a user would see. Used by tests."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterable
from dataclasses import dataclass

TEST_TIMEOUT_S = 180.0  # seconds until a command that does not end is killed and the test fails


@dataclass(frozen=True)
class Seen:
    """What a command left behind: `screen` is what it wrote to the terminal, control sequences included; `piped` what
    it wrote to a stdout that is no terminal; `status` its exit status."""

    screen: str
    piped: str
    status: int


def _own_terminal() -> None:
    """In the child: take the terminal, so that Ctrl-C reaches its group, and take SIGINT even if the tests run in the
    background of a shell, which ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def on_terminal(words: Iterable[str], columns: int = 80, pipe: bool = True, interrupt: str | None = None) -> Seen:
    """Run `intaglio WORDS` with stdin and stderr on a terminal, and stdout too unless `pipe`. interrupt: press Ctrl-C
    once, as soon as this text is on the screen; the command must not end before."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "intaglio", *words], stdin=slave, stderr=slave,
        stdout=subprocess.PIPE if pipe else slave, env={**clean, "TERM": "xterm"}, start_new_session=True,
        preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(slave)
    screen, piped, end = b"", b"", time.monotonic() + TEST_TIMEOUT_S
    pressed = interrupt is None
    readers = {master, *([process.stdout.fileno()] if process.stdout else [])}
    try:
        while readers:
            for reader in select.select(list(readers), [], [], 1.0)[0]:
                try:
                    data = os.read(reader, 1 << 16)
                except OSError:  # how Linux says that nobody holds the terminal any more
                    data = b""
                if not data:
                    readers.discard(reader)
                elif reader == master:
                    screen += data
                else:
                    piped += data
            if not pressed and str(interrupt).encode() in screen + piped:
                pressed = True
                os.write(master, b"\x03")
            assert time.monotonic() < end, f"{words} goes on for ever: {screen[-2000:]!r}"
    finally:
        process.kill()  # does nothing to a process that has ended
        status = process.wait()
        os.close(master)
        if process.stdout:
            process.stdout.close()
    assert pressed, f"{interrupt!r} never came: {screen!r}"
    return Seen(screen.decode(errors="replace"), piped.decode(errors="replace"), status)
