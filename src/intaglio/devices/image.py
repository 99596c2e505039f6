"""Packed weights on disk: one file for the matrices of a Program, mapped by every process that runs it.

A file is whole or not there: it is made under another name, flushed, and only then given its own. Its header follows
from its key and its matrices alone, so a header that is not equal byte by byte is another's, or damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import TracebackType

import numpy as np

from intaglio import _native

MAGIC = b"intaglio packed weights 1\n"
PAGE = 4096
STALE = 3600  # seconds after which an unfinished file is taken for one whose maker died
WORTH = 64 << 20  # bytes of packed weights from which cache="auto" keeps them: fewer are packed in no time


def default_folder() -> Path:
    return Path(os.environ.get("INTAGLIO_CACHE") or "~/.cache/intaglio/packed").expanduser()


@cache
def layout(format: str, group: int, glu: bool) -> str:
    """How this build packs, told by what it makes of a small matrix: a build that packs otherwise shares no file."""
    n, k = 134, 512 if format in ("q4_k", "q6_k") else 2 * group + 35
    weight = _native.Weight(format, n, k, group, glu)
    mixed = (np.arange(n * k, dtype=np.int64) * 40503 % 65521).reshape(n, k)
    if weight.quantises:
        weight.fill(((mixed - 32760).astype(np.float32) / 8192).reshape(-1).view(np.uint8), "f32", 0, n, 1)
    else:  # all tables that any format has: small whole numbers, which units of 1 divide
        table, units = (mixed[:, : -(-k // group)] % 15).astype(np.float32), np.ones((n, 2), np.float32)
        lows = table if format.startswith("uint") else None
        codes = (mixed % (1 << weight.bits)).astype(np.uint8)
        weight.fill_codes(codes, table, lows, units if k == 512 else None, None, 0, 1)
    return hashlib.sha256(weight.image()).hexdigest()


def offsets(weights: Mapping[str, _native.Weight]) -> tuple[dict[str, int], int]:
    """Where each matrix begins if they stand together, each at a page, and where the last ends."""
    found, end = {}, 0
    for name, weight in weights.items():
        found[name], end = end, end + -(-weight.nbytes // PAGE) * PAGE
    return found, end


def gather(weights: Mapping[str, _native.Weight]) -> None:
    """Let the matrices stand together, before anything is in them: alone, few are as large as a huge page."""
    found, end = offsets(weights)
    region = _native.Region(end)
    for name, weight in weights.items():
        weight.place(region, found[name])


class Image:
    """A file with room for the matrices `weights`. If `ready`, it held them and they are mapped; if not, they are to be
    filled inside the `with` block, at whose end the file is kept. Whatever fails on disk, the weights stay good."""

    def __init__(self, folder: Path, title: str, key: str, weights: Mapping[str, _native.Weight]) -> None:
        self.path = folder / f"{title.replace(os.sep, '-')}-{key[:16]}.packed"
        self.weights, self.ready = weights, False
        self._part: Path | None = None
        self._file = -1
        self._keeper: threading.Thread | None = None
        self._lay_out(key)

    def _lay_out(self, key: str) -> None:
        """Offsets count from the end of the header, whose length depends on them."""
        self.offsets, end = offsets(self.weights)
        table = {name: [self.offsets[name], w.nbytes] for name, w in self.weights.items()}
        header = MAGIC + json.dumps({"key": key, "matrices": table}).encode() + b"\n"
        self.header = header.ljust(-(-len(header) // PAGE) * PAGE, b"\0")
        self.size = len(self.header) + end

    def __enter__(self) -> Image:
        try:
            if not self._open():
                self._begin()
        except (OSError, RuntimeError) as e:  # the native part's mmap raises RuntimeError
            self._give_up(e)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._part and kind is None:
            try:
                self._map(writable=False)
            except RuntimeError as e:
                return self._give_up(e)
            self._keeper = threading.Thread(target=self._keep, name="intaglio-image")
            self._keeper.start()  # not a daemon: a process that ends waits for it
        else:
            self._close()

    def wait(self) -> None:
        """Until the file is in its place, or given up."""
        if self._keeper:
            self._keeper.join()

    def _map(self, writable: bool) -> None:
        region = _native.Region(self._file, self.size, writable)
        for name, weight in self.weights.items():
            weight.place(region, len(self.header) + self.offsets[name])

    def _open(self) -> bool:
        """Map the file that is there, if it is good."""
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        size, why = os.fstat(self._file).st_size, ""
        if size != self.size:
            why = f"has {size} bytes of {self.size}"
        elif os.pread(self._file, len(self.header), 0) != self.header:
            why = "is damaged, or holds other weights"
        if why:
            warnings.warn(f"{self.path} {why}; packing the weights again", stacklevel=2)
            self._close()
            return False
        self._map(writable=False)
        self.ready = True
        return True

    def _begin(self) -> None:
        """A file under another name, all of its space taken, so that no write through the map can run out of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for part in self.path.parent.glob("*.part"):
            if part.stat().st_mtime < time.time() - STALE:
                part.unlink(missing_ok=True)
        self._file, part_name = tempfile.mkstemp(".part", self.path.stem + "-", self.path.parent)
        self._part = Path(part_name)
        os.posix_fallocate(self._file, 0, self.size)
        self._map(writable=True)

    def _keep(self) -> None:
        """The header last, and the name after everything is on disk."""
        assert self._part
        try:
            os.fsync(self._file)
            os.pwrite(self._file, self.header, 0)
            os.fsync(self._file)
            self._part.replace(self.path)
            self._part = None
            self._close()
        except OSError as e:
            self._give_up(e)

    def _give_up(self, error: Exception) -> None:
        warnings.warn(f"packed weights are not kept in {self.path.parent}: {error}", stacklevel=2)
        self._close()

    def _close(self) -> None:
        """Maps outlive the file's name and number."""
        if self._file >= 0:
            os.close(self._file)
        if self._part:
            self._part.unlink(missing_ok=True)
        self._file, self._part = -1, None
