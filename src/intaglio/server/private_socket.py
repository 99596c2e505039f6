"""Unix sockets that only this user may connect to."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def private_socket(path: Path) -> socket.socket:
    """A Unix socket bound to `path` that only this user may connect to. It does not listen yet.

    Nobody can connect before it listens, so there is no moment at which others can.
    """
    bound = socket.socket(socket.AF_UNIX)
    try:
        bound.bind(os.fspath(path))
        path.chmod(0o600)
    except BaseException:
        bound.close()
        raise
    return bound
