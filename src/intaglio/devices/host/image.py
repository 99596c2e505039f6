"""Packed weights as a file, on disk or in memory: all matrices of a Program, mapped by every process that runs it.

A file on disk is complete or absent: it is written under a temporary name, flushed, and then renamed. Its header is a
function of its key and its matrices, so a header that differs in any byte means other weights or a damaged file.
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
STALE = 3600  # seconds after which a temporary file is removed, because its process must have died
WORTH = 64 << 20  # least bytes of packed weights that cache="auto" keeps: fewer are packed again in a moment


def default_folder() -> Path:
    """Return the folder for packed weights if cache="auto": $INTAGLIO_CACHE, or ~/.cache/intaglio/packed if not set."""
    return Path(os.environ.get("INTAGLIO_CACHE") or "~/.cache/intaglio/packed").expanduser()


@cache
def packing_hash(format: str, group: int, glu: bool) -> str:
    """Return the SHA-256, in hex, of a small matrix that this build has packed in the given format.

    The hash is a part of a cache file's key. A build that packs weights in another way therefore does not read the
    file.

    Args:
        format: the weight format.
        group: group size of the format.
        glu: True to pack a gate and an up projection together.
    """
    n, k = 134, 512 if format in ("q4_k", "q5_k", "q6_k") else 2 * group + 35
    weight = _native.Weight(format, n, k, group, glu)
    mixed = (np.arange(n * k, dtype=np.int64) * 40503 % 65521).reshape(n, k)
    if weight.quantises:
        weight.fill(((mixed - 32760).astype(np.float32) / 8192).reshape(-1).view(np.uint8), "f32", 0, n, 1)
    else:  # fill every table that a format may have, with small whole numbers, which are multiples of unit 1
        table, units = (mixed[:, : -(-k // group)] % 15).astype(np.float32), np.ones((n, 2), np.float32)
        lines = format == "q5_k"
        lows = table if lines or format.startswith(("uint", "affine")) else None
        own = units if k == 512 else units[:, :1].copy() if format == "nvfp4" else None
        codes = (mixed % (1 << weight.bits)).astype(np.uint8)
        weight.fill_codes(codes, table, lows, own, units if lines else None, 0, 1)
    return hashlib.sha256(weight.image()).hexdigest()


def offsets(weights: Mapping[str, _native.Weight]) -> tuple[dict[str, int], int]:
    """Compute where to store matrices one after another, each beginning at a page boundary.

    Returns a tuple ({name of the matrix: offset in bytes}, total size in bytes).
    """
    found, end = {}, 0
    for name, weight in weights.items():
        found[name], end = end, end + -(-weight.nbytes // PAGE) * PAGE
    return found, end


def gather(weights: Mapping[str, _native.Weight]) -> None:
    """Allocate one memory region for all matrices in `weights`, and give each matrix a part of it. Returns None.

    No values are written. The region is freed when no matrix uses it. One large region can use huge pages; single
    matrices are often too small for them.
    """
    found, end = offsets(weights)
    region = _native.Region(end)
    for name, weight in weights.items():
        weight.place(region, found[name])


class MemoryImage:
    """Packed weights in a memory file that the parent process keeps open, so that the weights outlive this process.

    Use it as a context manager. On entry each matrix becomes a part of the mapped file. `ready` is then True if the
    file already held these weights. If `ready` is False, fill the matrices inside the `with` block. The header is
    written last, so that the weights are packed again if a process died while it was packing.

    Args:
        file: descriptor of the memory file.
        key: hash of everything on which the packed weights depend. The file is ready only if it has the same key.
        weights: the matrices: {name: native Weight}.
    """

    def __init__(self, file: int, key: str, weights: Mapping[str, _native.Weight]) -> None:
        self.file, self.weights, self.ready = file, weights, False
        self.header, self.offsets, self.size = lay_out(key, weights)

    def __enter__(self) -> MemoryImage:
        held = os.fstat(self.file).st_size
        self.ready = held == self.size and os.pread(self.file, len(self.header), 0) == self.header
        if not self.ready:
            os.ftruncate(self.file, 0)
            os.ftruncate(self.file, self.size)
        place(self.file, self.size, not self.ready, self.weights, self.offsets, len(self.header))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and not self.ready:
            place(self.file, self.size, False, self.weights, self.offsets, len(self.header))
            os.pwrite(self.file, self.header, 0)


def lay_out(key: str, weights: Mapping[str, _native.Weight]) -> tuple[bytes, dict[str, int], int]:
    """Compute the layout of an image: a file with a header and then packed matrices, which processes map into memory.

    Returns a tuple (header, offsets, size). `header` is bytes. `offsets` is {name of the matrix: its offset in bytes
    from the end of the header}. `size` is the size of the whole file in bytes. `key` is a text that identifies these
    weights; it is stored in the header.
    """
    found, end = offsets(weights)
    table = {name: [found[name], w.nbytes] for name, w in weights.items()}
    header = MAGIC + json.dumps({"key": key, "matrices": table}).encode() + b"\n"
    header = header.ljust(-(-len(header) // PAGE) * PAGE, b"\0")
    return header, found, len(header) + end


def place(
    file: int, size: int, writable: bool, weights: Mapping[str, _native.Weight], at: Mapping[str, int], first: int
) -> None:
    """Map a file into memory, and make each matrix a part of the mapping, without a copy. Returns None.

    Args:
        file: descriptor of the file.
        size: number of bytes to map, from the beginning of the file.
        writable: True to fill the matrices; their values are then written to the file.
        weights: the matrices: {name: native Weight}. The mapping exists as long as one of them does.
        at: {name of the matrix: its offset in bytes from the end of the header}.
        first: size of the header in bytes.
    """
    region = _native.Region(file, size, writable)
    for name, weight in weights.items():
        weight.place(region, first + at[name])


class Image:
    """A file on disk with packed weight matrices, as a context manager.

    `ready` is True if the file existed and the matrices are now mapped from it. If `ready` is False, fill the matrices
    inside the `with` block; the file is then kept on disk. If the disk fails, there is a warning, and the weights in
    memory stay usable.

    Args:
        folder: folder of the file.
        title: first part of the file's name.
        key: second part of the file's name: a hash of everything on which the packed weights depend.
        weights: the matrices: {name: native Weight}.
    """

    def __init__(self, folder: Path, title: str, key: str, weights: Mapping[str, _native.Weight]) -> None:
        self.path = folder / f"{title.replace(os.sep, '-')}-{key[:16]}.packed"
        self.weights, self.ready = weights, False
        self._part: Path | None = None
        self._file = -1
        self._keeper: threading.Thread | None = None
        self.header, self.offsets, self.size = lay_out(key, weights)

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
            self._keeper.start()  # not a daemon: the process waits for it at exit
        else:
            self._close()

    def wait(self) -> None:
        """Wait until the background thread has written the file. Returns None.

        The file is then complete under its final name. If writing failed, the thread has given a warning and no file is
        kept; the weights in memory stay usable.
        """
        if self._keeper:
            self._keeper.join()

    def _map(self, writable: bool) -> None:
        """Map the file into memory, and make each matrix a part of the mapping.

        `writable` is True to fill the matrices.
        """
        place(self._file, self.size, writable, self.weights, self.offsets, len(self.header))

    def _open(self) -> bool:
        """Map the existing file into memory. Returns True on success; False if there is no file or it is invalid.

        Warns if the file is invalid.
        """
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
        """Create a temporary file and map it into memory.

        The file is allocated at full size, so that the disk cannot become full while matrices are written. Temporary
        files of other processes are deleted if they are older than STALE seconds. Raises OSError if the disk is full.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for part in self.path.parent.glob("*.part"):
            if part.stat().st_mtime < time.time() - STALE:
                part.unlink(missing_ok=True)
        self._file, part_name = tempfile.mkstemp(".part", self.path.stem + "-", self.path.parent)
        self._part = Path(part_name)
        os.posix_fallocate(self._file, 0, self.size)
        self._map(writable=True)

    def _keep(self) -> None:
        """Flush the matrices to disk, write the header and give the file its final name.

        Runs in a background thread.
        """
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
        """Warn that the packed weights are not kept on disk, and close the file."""
        warnings.warn(f"packed weights are not kept in {self.path.parent}: {error}", stacklevel=2)
        self._close()

    def _close(self) -> None:
        """Close the file, and delete it if it still has its temporary name. Existing memory maps stay valid."""
        if self._file >= 0:
            os.close(self._file)
        if self._part:
            self._part.unlink(missing_ok=True)
        self._file, self._part = -1, None
