"""Checkpoint: config.json and the tensors of a folder's safetensors files, or of a GGUF file, mapped into memory.

It knows how bytes are stored in files, and which tensors together make one quantised matrix. What the tensors are used
for is a port's business.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.models.config import CheckpointError, Settings
from intaglio.models.files.coded import Coded, Stored
from intaglio.models.files.folder import Found, find_files, refuse_folder
from intaglio.models.files.gguf import GgufModel, find_gguf, read_gguf
from intaglio.models.files.header import DTYPES, Entry, read_json
from intaglio.models.files.published import find_coded
from intaglio.models.files.quantisation import find_quantisation
from intaglio.ops import Value

EXPONENTS: dict[str, tuple[type, int]] = {
    "F32": (np.uint32, 0x7F800000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}
PLAIN = {"F32": "f32", "BF16": "bf16", "F16": "f16"}  # the formats of tensors that are no codes
COMPARED = 1 << 22  # values compared at a time
CHUNK = 1 << 18  # values checked at a time: 0.5 to 1 MB, so that the second look is in cache
STRIP = 1 << 18  # codes made at a time, at least: with what they are made of they take 1 to 3 MB
ROWS = 128  # a run has a multiple of these: whole blocks of scales, and whole panels of those who pack them
WORTH = 1 << 30  # bytes: matrices that take so much more in memory than in the file are worth a note
IDENTITY_SAMPLES, IDENTITY_BYTES = 256, 4096  # of each file, evenly spread
GGUF_HEAD = 1 << 20  # bytes of a GGUF file that tell it from others: its metadata, or the most of it


def find_nonfinite(x: np.ndarray, dtype: str) -> tuple[tuple[int, ...], int] | None:
    """Find NaN and infinite values in the array `x`. Returns (index of the first one, number of all).

    The index is a tuple with one int per dimension. If there are no such values, the result is None.

    Args:
        x: the array.
        dtype: the stored type of `x`. Only F32, BF16 and F16 are checked; for other types the result is None.
    """
    if dtype not in EXPONENTS:
        return None
    kind, mask = EXPONENTS[dtype]
    bits: np.ndarray = x.reshape(-1).view(kind)
    scratch: np.ndarray = np.empty(min(CHUNK, bits.size), kind)
    first, count = -1, 0
    for at in range(0, bits.size, CHUNK):
        part = bits[at : at + CHUNK]
        exponents = np.bitwise_and(part, scratch.dtype.type(mask), out=scratch[: part.size])
        if exponents.max() == mask:
            bad = np.flatnonzero(exponents == mask)
            first, count = (at + int(bad[0]) if first < 0 else first), count + bad.size
    return (tuple(int(i) for i in np.unravel_index(first, x.shape)), count) if count else None


def _note_cost(c: Checkpoint) -> list[str]:
    """Returns a list with a note for the user if quantised matrices need much more memory than their files.

    Some matrices become f32, f16 or bf16 when they are read, because Intaglio has no number format for their codes. The
    list has one text if these matrices together need at least 1 GiB more in memory than in the files. Otherwise it is
    empty.
    """
    wide = {n: x for n, x in c.coded.items() if x.format in PLAIN.values()}
    stored = sum(c.entries[part].stop - c.entries[part].start for part in {p for x in wide.values() for p in x.parts})
    held = sum(formats.get(x.format).nbytes(prod(x.shape[:-1]), x.shape[-1]) for x in wide.values())
    if held - stored < WORTH:
        return []
    return [
        f"{len(wide)} quantised matrices become {', '.join(sorted({x.format for x in wide.values()}))}, "
        f"{held / 1e9:.1f} GB in memory instead of {stored / 1e9:.1f} in the files; with weights int8 or int4 they are "
        "quantised anew"
    ]


@dataclass
class Checkpoint:
    """An open checkpoint: the configuration and the tensors of a model.

    A device can load its weights from a Checkpoint (see devices.Weights). Tensors are read as views of memory-mapped
    files; quantised matrices are read as codes and scales.

    Attributes:
        path: the folder or GGUF file.
        config: the contents of config.json; for a GGUF file, its metadata translated into the keys of config.json.
        entries: {name of a stored tensor: its place in the files}.
        coded: {name of a quantised matrix: how it is stored and decoded}. The name is that of the matrix in a
            checkpoint without quantisation.
        taken: names of the stored tensors that belong to quantised matrices, such as their codes and scales.
        found: the files of the folder that are read, and those that are not.
        quantisation: settings that say how matrices are quantised.
        quantised_by: the file and key that have these settings; "" if there are none.
        gguf: the contents of a GGUF file; None for a folder of safetensors files.
        maps: memory maps of the files.
        checked: names of the tensors that have been checked for NaN and infinity.
    """

    path: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    coded: dict[str, Coded] = field(default_factory=dict, repr=False)
    taken: set[str] = field(default_factory=set, repr=False)
    found: Found = field(default_factory=lambda: Found({}, ""), repr=False)
    quantisation: Settings = field(default_factory=lambda: Settings({}), repr=False)
    quantised_by: str = ""
    gguf: GgufModel | None = field(default=None, repr=False)
    maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)
    checked: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint folder or GGUF file and return the Checkpoint.

        Reads config.json and the headers of the files. Tensors are not read, except small ones that say how matrices
        are stored, such as column orders (act-order). Raises CheckpointError for a file that is missing or damaged,
        PortError for a quantisation or GGUF architecture that is not supported.
        """
        path = Path(path)
        if gguf := find_gguf(path):
            model = read_gguf(gguf)
            own = {n: Entry(r.file, r.dtype, r.shape, r.start, r.stop) for n, r in model.tables.raw.items()}
            found = Found({}, "", notes=[key.note for key in model.keys if key.note])
            return cls(path, model.config, own, model.tables.coded, model.tables.taken, found, gguf=model)
        if not path.is_dir():
            hint = f"; give the folder of the file, {path.parent}" if path.is_file() else ""
            raise CheckpointError(f"no folder {path}; give the folder that holds config.json and *.safetensors{hint}")
        if not (path / "config.json").exists():
            raise refuse_folder(path)
        config = read_json(path / "config.json")
        found = find_files(path, config)
        c = cls(path, config, found.entries, found=found)
        c.quantisation, c.quantised_by = find_quantisation(path, config)
        dtypes, shapes = {n: e.dtype for n, e in c.entries.items()}, {n: e.shape for n, e in c.entries.items()}
        c.coded, c.taken = find_coded(Stored(dtypes, shapes, c.read_entry), c.quantisation, c.quantised_by)
        found.notes += _note_cost(c)
        return c

    @property
    def config_name(self) -> str:
        """The name of the file that `config` was read from."""
        return "config.json" if self.found.said_by else self.path.name

    @property
    def notes(self) -> list[str]:
        """Notes for the user about ignored or unusual files, as a list of texts."""
        return self.found.notes

    @property
    def unlisted(self) -> list[str]:
        """The names of the folder's *.safetensors files that are not read, as a sorted list.

        A file is read if it is the only file of the model, or if config.json or the index names it.
        """
        return self.found.unlisted

    @property
    def architecture(self) -> str:
        """The model class that config.json names, such as LlamaForCausalLM. Raises CheckpointError if it names none."""
        named = self.config.get("architectures")
        if not (isinstance(named, list) and named and isinstance(named[0], str)):
            raise CheckpointError(f"{self.path / 'config.json'} has architectures={named!r}; wanted a list of one name")
        return named[0]

    @property
    def names(self) -> set[str]:
        return (set(self.entries) - self.taken) | set(self.coded)

    def entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}; it holds {len(self.entries)} others")
        return self.entries[name]

    def dtype(self, name: str) -> str:
        """The stored type of the tensor `name`, as the file's header writes it: F32, BF16, F16, ...

        Raises CheckpointError if the files have no tensor of that name.
        """
        return self.entry(name).dtype

    def format(self, name: str) -> str:
        """The number format of the value that read(name) returns, such as bf16 or a quantised format.

        "" if the tensor `name` is stored in a type that cannot be read. Raises CheckpointError if there is no such
        tensor.
        """
        return self.coded[name].format if name in self.coded else PLAIN.get(self.dtype(name), "")

    def shape(self, name: str) -> tuple[int, ...]:
        return self.coded[name].shape if name in self.coded else self.entry(name).shape

    @property
    def orders(self) -> set[str]:
        """The names of all act-order permutations (g_idx) of matrices in the checkpoint, as a set."""
        return {name for name, c in self.coded.items() if c.format == "i32"}

    def order(self, name: str) -> str:
        """The name of the act-order permutation (g_idx) of the matrix `name`; "" if its columns are not reordered."""
        return self.coded[name].order if name in self.coded else ""

    def read(self, name: str) -> Value:
        """The values of the tensor `name`, as an array or a Quantised.

        - For a tensor that is not quantised: a read-only view of the file.
        - For a quantised matrix whose codes have a number format in Intaglio: a Quantised with codes and scales.
        - For any other quantised matrix: an array of decoded values, usually bf16; format() says which type.

        Raises CheckpointError if there is no such tensor, or if its type cannot be read.
        """
        return self.coded[name].read(self.read_entry) if name in self.coded else self.read_entry(name)

    def strips(self, name: str) -> Iterator[Value]:
        """Yield the values of the tensor `name` in parts, so that decoding takes less memory.

        A matrix in a quantised format is yielded as several Quantised, each with some consecutive rows. Any other
        tensor is yielded whole, as read() returns it.
        """
        c = self.coded.get(name)
        if c is None or not formats.get(c.format).grouped:
            yield self.read(name)
            return
        rows, *rest = c.shape
        step = -(-STRIP // prod(rest) // ROWS) * ROWS if len(c.shape) == 2 else 1
        step = -(-step // c.step) * c.step
        for first in range(0, rows, step):
            yield c.read(self.read_entry, slice(first, min(first + step, rows)))

    def read_entry(self, name: str) -> np.ndarray:
        """The values of one stored tensor, as a view of the file.

        If the tensor has NaN or infinite values, a warning is issued the first time that it is read.
        """
        e, x = self.entry(name), self._array(name)
        if name not in self.checked:
            self.checked.add(name)
            if bad := find_nonfinite(x, e.dtype):
                index, count = bad
                warnings.warn(
                    f"{e.file}: tensor {name} holds {count} NaN or Inf of {x.size} values, the first at {list(index)}",
                    stacklevel=2,
                )
        return x

    def readable(self, name: str) -> bool:
        """True if the stored type of the tensor `name` can be read."""
        return name in self.coded or self.dtype(name) in DTYPES

    def equal(self, a: str, b: str) -> bool:
        """True if the tensors named `a` and `b` have equal values, even if their types differ.

        Quantised matrices never count as equal. The tensors are compared part by part, up to the first difference.
        """
        if a in self.coded or b in self.coded or self.shape(a) != self.shape(b):
            return False
        one, other = (self._array(name).reshape(-1) for name in (a, b))
        same = one.dtype == other.dtype
        equal = all(
            np.array_equal(x.view(np.uint8), y.view(np.uint8))
            if same
            else np.array_equal(x.astype(np.float32), y.astype(np.float32))
            for x, y in ((one[i : i + COMPARED], other[i : i + COMPARED]) for i in range(0, one.size, COMPARED))
        )
        self.release(a)
        self.release(b)
        return equal

    def release(self, name: str) -> None:
        """Release the memory pages that hold only the tensor `name`. A later read loads them again."""
        for part in self.coded[name].parts if name in self.coded else (name,):
            self._release(self.entry(part))

    def _release(self, e: Entry) -> None:
        first = -(-e.start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = e.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map(e.file).madvise(mmap.MADV_DONTNEED, first, last - first)

    def identity(self) -> str:
        """A hash that differs between checkpoints with different files, as text.

        The hash covers each file's header, size, modification time and samples of the contents. Samples are needed
        because two fine-tunes of one model have files of the same sizes, and copying, or packing into a container
        image, can give these files the same times. The path of the folder is not part of the hash.
        """
        digest = hashlib.sha256()
        for file in sorted({e.file for e in self.entries.values()}):
            with file.open("rb") as f:
                head = f.read(8)
                length = GGUF_HEAD if head.startswith(b"GGUF") else int.from_bytes(head, "little")
                digest.update(head + f.read(length))
                facts = os.fstat(f.fileno())
                for i in range(IDENTITY_SAMPLES):
                    f.seek(facts.st_size * i // IDENTITY_SAMPLES)
                    digest.update(f.read(IDENTITY_BYTES))
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}".encode())
        return digest.hexdigest()

    def recipe(self) -> tuple[str, dict[str, object]]:
        """The Recipe that opens this checkpoint in another process: (name of a function, dict of its arguments)."""
        return f"{__name__}:Checkpoint.open", {"path": str(self.path.absolute())}

    def _array(self, name: str) -> np.ndarray:
        e = self.entry(name)
        if e.dtype not in DTYPES:
            raise CheckpointError(f"{e.file}: tensor {name} has dtype {e.dtype!r}; known are {', '.join(DTYPES)}")
        return np.ndarray(e.shape, DTYPES[e.dtype], self._map(e.file), e.start)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self.maps:
            with file.open("rb") as f:
                self.maps[file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        return self.maps[file]
