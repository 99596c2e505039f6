"""Unix sockets that only this user may connect to."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def private_socket(path: Path) -> socket.socket:
    """A Unix socket bound to `path` that only this user may connect to. It does not listen yet.

    Its permissions are set before it listens, so that other users can never connect. Raises OSError.
    """
    bound = socket.socket(socket.AF_UNIX)
    try:
        bound.bind(os.fspath(path))
        path.chmod(0o600)
    except BaseException:
        bound.close()
        raise
    return bound
