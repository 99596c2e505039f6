"""Unix sockets that only this user may connect to, at paths of any length."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATH_MAX = 107  # bytes of the path in a Unix socket's address on Linux
OPEN_FOLDERS = Path("/proc/self/fd")  # has a link to each folder that this process has opened


def private_socket(path: Path) -> socket.socket:
    """Returns a Unix socket that is bound to `path` and that only this user may connect to. It does not listen yet.

    Its permissions are set before it listens, so that other users can never connect. If a killed process has left a
    socket at the path, this socket is replaced. Raises OSError if another process listens there, or if the file at
    `path` is not a socket. The message names the path.
    """
    bound = socket.socket(socket.AF_UNIX)
    try:
        with short_path(path) as short:
            try:
                bound.bind(short)
            except OSError as e:
                if e.errno != errno.EADDRINUSE:
                    raise OSError(f"{path} cannot be bound: {e.strerror or e}; choose another path") from None
                if not path.is_socket():
                    raise OSError(f"{path} exists and is no socket; remove it, or choose another path") from None
                if in_use(path):
                    raise OSError(f"a process listens at {path} already; end it, or choose another path") from None
                path.unlink()
                bound.bind(short)
        path.chmod(0o600)
    except BaseException:
        bound.close()
        raise
    return bound


def connected_socket(path: Path, timeout: float | None = None) -> socket.socket:
    """Returns a socket that is connected to the Unix socket at `path`. Raises OSError if no process listens there.

    timeout: time limit in seconds for connecting and for later operations of the socket; None: no limit.
    """
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(timeout)
    try:
        with short_path(path) as short:
            connected.connect(short)
    except BaseException:
        connected.close()
        raise
    return connected


def in_use(path: Path) -> bool:
    """True if a process listens at a Unix socket's path."""
    try:
        connected_socket(path).close()
    except OSError:
        return False
    return True


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Context manager that yields a path of the file `path`, as text, short enough for a Unix socket's address.

    If `path` is short enough, it is yielded unchanged. Otherwise the file's folder is opened, and the yielded path is
    /proc/self/fd/N/NAME, where N is the descriptor of the open folder. This path is valid only inside the context,
    which closes the folder at its end. On a system without /proc, `path` is yielded unchanged even if it is too long.

    Raises OSError if the folder cannot be opened.
    """
    if len(os.fsencode(path)) <= PATH_MAX or not OPEN_FOLDERS.is_dir():
        yield os.fspath(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield str(OPEN_FOLDERS / str(folder) / path.name)
    finally:
        os.close(folder)
