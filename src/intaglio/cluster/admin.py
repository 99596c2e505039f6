"""Administration of a running cluster: a folder that only its user may enter, with a Unix socket for commands.

A command is one line of JSON, {"do": NAME, ...}; the answer is one line, {"ok": ...} or {"error": TEXT}.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from intaglio.server.private_socket import connected_socket, in_use, private_socket

SOCKET = "admin.sock"
BLOCKS = "blocks"  # link to the folder of K/V blocks
SHM = "/dev/shm"  # a file system in memory
Command = Callable[[dict[str, Any]], Awaitable[Any]]


def cluster_folder(name: str) -> Path:
    """Returns the folder of the cluster `name`. The folder is created with mode 0700 if it is missing.

    Raises ValueError for a name that is not a plain word, and for a folder that another user owns or may enter.
    """
    if not re.fullmatch(r"[\w.-]{1,32}", name, re.ASCII) or name.startswith("."):
        raise ValueError(f"the cluster's name is {name!r}; allowed: up to 32 letters, digits, '_', '-' and '.'")
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"intaglio-{os.getuid()}"
    folder = base / name
    for path in (base, folder):
        path.mkdir(mode=0o700, exist_ok=True)
        if not _is_ours(path):
            raise ValueError(f"{path} is not a folder of this user alone; remove it, or set XDG_RUNTIME_DIR")
    return folder


@contextmanager
def blocks_folder(cluster: Path) -> Iterator[Path]:
    """Context manager that yields a new folder for K/V blocks, and removes it at the end.

    Replicas hand over K/V blocks through this folder. It is in memory where the system has /dev/shm. `cluster`, the
    cluster's own folder, gets a link to it. If a router is killed, the link lets the next start find and remove the
    folder that was left. Raises ValueError if a cluster already runs in the folder `cluster`.
    """
    refuse_running(cluster)
    link = cluster / BLOCKS
    if link.is_symlink() and _is_ours(left := link.readlink()):
        shutil.rmtree(left, ignore_errors=True)
    link.unlink(missing_ok=True)
    blocks = Path(tempfile.mkdtemp(prefix=f"intaglio-{cluster.name}-", dir=SHM if os.access(SHM, os.W_OK) else None))
    link.symlink_to(blocks)
    try:
        yield blocks
    finally:
        link.unlink(missing_ok=True)
        shutil.rmtree(blocks, ignore_errors=True)


def refuse_running(cluster: Path) -> None:
    """Raise ValueError if a running cluster answers on the socket in the folder `cluster`; return nothing otherwise."""
    if in_use(cluster / SOCKET):
        raise ValueError(f"a cluster {cluster.name!r} runs already; end it with `intaglio cluster down`")


def _is_ours(path: Path) -> bool:
    """True if the path is a folder, not a link, that this user owns and nobody else may enter."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def ask(name: str, command: dict[str, Any], timeout: float = 900.0) -> Any:
    """Send a command to the running cluster `name` and return its answer, a JSON value.

    Raises ValueError if no such cluster runs, if it ends before it answers, or if the command fails; TimeoutError after
    `timeout` seconds.
    """
    path = cluster_folder(name) / SOCKET
    try:
        s = connected_socket(path, timeout)
    except (FileNotFoundError, ConnectionRefusedError):
        raise ValueError(f"no cluster {name!r} runs here; start one with `intaglio cluster up`") from None
    with s:
        s.sendall(json.dumps(command).encode() + b"\n")
        answer = b"".join(iter(lambda: s.recv(1 << 16), b""))
    if not answer:
        raise ValueError(f"cluster {name!r} ended before it answered")
    table = json.loads(answer)
    if "error" in table:
        raise ValueError(table["error"])
    return table["ok"]


@asynccontextmanager
async def administration(folder: Path, commands: dict[str, Command]) -> AsyncIterator[None]:
    """Async context manager that answers a cluster's commands while its block runs.

    The commands come over the socket in `folder`, the cluster's folder. commands: {name of the command: async function
    that takes the command and returns the answer}. Raises ValueError if another cluster already answers on the socket.
    """
    path = folder / SOCKET
    refuse_running(folder)
    path.unlink(missing_ok=True)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await _answer(commands, await reader.readline())
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(connected, sock=private_socket(path))
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


async def _answer(commands: dict[str, Command], line: bytes) -> dict[str, Any]:
    try:
        command = json.loads(line)
        handler = commands[command["do"]]
    except (ValueError, KeyError, TypeError):
        return {"error": f"{line[:100]!r} is no command; there are {', '.join(commands)}"}
    try:
        return {"ok": await handler(command)}
    except Exception as e:
        return {"error": str(e) or type(e).__name__}
