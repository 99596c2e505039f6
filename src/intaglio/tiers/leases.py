"""Leases: pin K/V blocks of a folder until a time, so that no engine that uses the folder evicts them before.

A lease is a file with the names of blocks. Its modification time is the time at which it ends; a renewal moves that
time, and nobody has to clean up: a lease that has run out pins nothing, whoever took it. Block names need not have
files yet, so blocks that are still to be computed can be pinned too. Hosts that share a folder need clocks that agree.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST = 600.0  # seconds; a lease that seems to last longer is damaged, or the clock was set back
LOCK_WAIT = 5.0  # seconds that taking or renewing a lease, or evicting, may wait while another process does so
LOCK_LOOK = 0.01  # seconds between attempts to lock
SUFFIX = ".lease"
SECOND = 10**9  # ns


class Leases:
    """Leases on the K/V blocks of a folder. A lease protects some blocks from eviction until a given time.

    It is taken for blocks that another replica will load. Each lease is a file, so all processes that use the folder
    see it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "leases"

    def take(self, names: Sequence[str], seconds: float) -> str:
        """Take a lease: protect the blocks `names` from eviction for `seconds`. Returns its id, 32 hexadecimal digits.

        Raises ValueError unless 0 < seconds <= LONGEST, TimeoutError if others lock the folder for LOCK_WAIT seconds,
        and OSError if the lease cannot be written; after an error no block is protected.
        """
        lease = secrets.token_hex(16)
        check_seconds(seconds)  # before anything is written
        body = "\n".join(names).encode()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = self.folder / f".{lease}"
        with self.locked():
            ends = _ends(seconds)
            try:
                partial.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
                os.utime(partial, ns=(ends, ends))
                partial.replace(self._file(lease))
            except BaseException:
                with suppress(OSError):
                    partial.unlink()
                raise
        return lease

    def renew(self, lease: str, seconds: float) -> bool:
        """Extend a lease, so that it ends `seconds` seconds from now. Returns True if the lease was extended.

        Returns False if the lease has ended already or its file cannot be changed. Raises ValueError unless 0 < seconds
        <= LONGEST, and TimeoutError if others lock the folder for LOCK_WAIT seconds. lease: id of the lease.
        """
        check_seconds(seconds)
        try:
            with self.locked():
                if self.names(lease) is None:
                    return False
                ends = _ends(seconds)
                os.utime(self._file(lease), ns=(ends, ends))
        except TimeoutError:
            raise
        except OSError:
            return False
        return True

    def release(self, lease: str) -> None:
        """End a lease, so that it no longer protects its blocks from eviction. Does nothing if it has ended already.

        lease: id of the lease, as take() returned it.
        """
        with suppress(OSError, ValueError):
            self._file(lease).unlink()

    def names(self, lease: str) -> frozenset[str] | None:
        """Returns a frozenset of the names of the blocks that a lease protects, or None.

        None: the lease has ended or never existed, or its file is damaged. lease: id of the lease.
        """
        try:
            return self._read(self._file(lease))
        except ValueError:
            return None

    def pinned(self) -> set[str]:
        """Returns a set of the names of all blocks that leases protect. Deletes leases that have ended or are damaged.

        Also deletes partial files of processes that were killed while they wrote a lease.
        """
        found: set[str] = set()
        for partial in self.folder.glob(".*"):
            with suppress(OSError):
                if time.time_ns() - partial.stat().st_mtime_ns > LONGEST * SECOND:
                    partial.unlink()
        for file in _files(self.folder):
            names = self._read(file)
            if names is None:
                with suppress(OSError):
                    file.unlink()
            else:
                found |= names
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Returns a context manager that locks the leases. Then no other process or thread takes a lease or evicts.

        Raises TimeoutError if others hold the lock for LOCK_WAIT seconds, and OSError if the folder cannot be locked.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(file, LOCK_WAIT)
            yield
        finally:
            os.close(file)

    def _file(self, lease: str) -> Path:
        """Returns the path of the file of a lease.

        Raises ValueError if `lease` is not 32 hexadecimal digits; so it cannot be a path.
        """
        if not re.fullmatch(r"[0-9a-f]{32}", lease, re.ASCII):
            raise ValueError(f"{lease[:40]!r} is no lease; allowed: 32 hexadecimal digits")
        return self.folder / f"{lease}{SUFFIX}"

    def _read(self, file: Path) -> frozenset[str] | None:
        try:
            ends, content = file.stat().st_mtime_ns, file.read_bytes()
        except OSError:
            return None
        left = ends - time.time_ns()
        checksum, _, body = content.partition(b"\n")
        if not 0 < left <= LONGEST * SECOND or checksum != hashlib.sha256(body).hexdigest().encode():
            return None
        return frozenset(body.decode().split("\n")) if body else frozenset()


def _lock(file: int, patience: float) -> None:
    """Lock an open file for this process alone. Raises TimeoutError if others hold the lock for `patience` seconds.

    file: descriptor of the file.
    """
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise TimeoutError(errno.ETIMEDOUT, f"the leases were locked for {patience:g} s") from None
        time.sleep(LOCK_LOOK)


def check_seconds(seconds: float) -> None:
    """Raise ValueError unless 0 < seconds <= LONGEST. Returns nothing."""
    if not 0 < seconds <= LONGEST:
        raise ValueError(f"a lease of {seconds} s; allowed: above 0, at most {LONGEST:g} s")


def _ends(seconds: float) -> int:
    """Returns the time `seconds` from now, in ns since the epoch. Raises ValueError unless 0 < seconds <= LONGEST."""
    check_seconds(seconds)
    return time.time_ns() + int(seconds * SECOND)


def _files(folder: Path) -> list[Path]:
    """Returns the paths of all lease files in `folder`; [] if the folder cannot be read."""
    try:
        return [file for file in folder.iterdir() if file.name.endswith(SUFFIX) and not file.name.startswith(".")]
    except OSError:
        return []
