"""Unix sockets that only this user may connect to."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path


def private_socket(path: Path) -> socket.socket:
    """A Unix socket bound to `path` that only this user may connect to. It does not listen yet.

    Its permissions are set before it listens, so that other users can never connect. A socket that a killed process
    left at the path is replaced. Raises OSError that names the path if a process listens there, or if it is no socket.
    """
    bound = socket.socket(socket.AF_UNIX)
    try:
        try:
            bound.bind(os.fspath(path))
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                raise OSError(f"{path} cannot be bound: {e.strerror or e}; choose another path") from None
            if not path.is_socket():
                raise OSError(f"{path} exists and is no socket; remove it, or choose another path") from None
            if in_use(path):
                raise OSError(f"a process listens at {path} already; end it, or choose another path") from None
            path.unlink()
            bound.bind(os.fspath(path))
        path.chmod(0o600)
    except BaseException:
        bound.close()
        raise
    return bound


def in_use(path: Path) -> bool:
    """True if a process listens at a Unix socket's path."""
    with socket.socket(socket.AF_UNIX) as s:
        return s.connect_ex(os.fspath(path)) == 0
