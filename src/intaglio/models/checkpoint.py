"""A checkpoint folder: config.json and tensors in safetensors files, mapped into memory and never copied here.

Knows how bytes lie in files, and which tensors together make one quantised matrix. Knows nothing of what the tensors
mean: that is a port's business.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from intaglio import formats
from intaglio.models.gguf import read_gguf
from intaglio.models.published import Coded, Stored, find_coded
from intaglio.ops import Value

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
EXPONENTS: dict[str, tuple[type, int]] = {
    "F32": (np.uint32, 0x7F800000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}
PLAIN = {"F32": "f32", "BF16": "bf16", "F16": "f16"}  # the formats of tensors that are no codes
CHUNK = 1 << 18  # values checked at a time: 0.5 to 1 MB, so that the second look is in cache
STRIP = 1 << 18  # codes made at a time, at least: with what they are made of they take 1 to 3 MB
ROWS = 128  # a run has a multiple of these: whole blocks of scales, and whole panels of those who pack them
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library itself
INDEX = "model.safetensors.index.json"
GGUF_HEAD = 1 << 20  # bytes of a GGUF file that tell it from others: its metadata, or the most of it


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it stands; the message names file, thing, value and next step."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its dtype and shape, and its bytes start..stop in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming the file and the line that does not parse."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}; download the file again") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} holds a JSON {type(table).__name__}; wanted an object {{...}}")
    return table


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file: 8 bytes of length, a JSON header, then data without gaps or overlaps."""
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, HEADER_LIMIT):
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: it has {size} bytes and claims a header of {length}; "
                "download it again"
            )
        raw = f.read(length)
    try:
        table = json.loads(raw)
        if not isinstance(table, dict):
            raise ValueError(f"it is a JSON {type(table).__name__}, wanted an object")
    except ValueError as e:
        raise CheckpointError(f"{path}: the header is not JSON ({e}); the file is damaged, download it again") from None
    base = 8 + length
    entries = {n: _entry(path, n, item, base, size) for n, item in table.items() if n != "__metadata__"}
    _check_layout(path, entries, base, size)
    return entries


def _entry(path: Path, name: str, item: Any, base: int, size: int) -> Entry:
    """One line of a header, checked by itself."""
    try:
        dtype, shape = str(item["dtype"]), tuple(int(d) for d in item["shape"])
        start, stop = (int(x) for x in item["data_offsets"])
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: the header's entry for {name} is {item!r}; wanted dtype, shape and data_offsets"
        ) from None
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    wanted = int(np.prod(shape, dtype=object)) * DTYPES[dtype].itemsize
    if min(shape, default=0) < 0 or stop - start != wanted:
        raise CheckpointError(
            f"{path}: tensor {name} is {dtype}{list(shape)}, {wanted} bytes, but its offsets {start}..{stop} span "
            f"{stop - start}; the header is damaged"
        )
    if start < 0 or base + stop > size:
        raise CheckpointError(
            f"{path}: tensor {name} should lie at {base + start}..{base + stop} but the file ends at {size}; "
            "it is truncated, download it again"
        )
    return Entry(path, dtype, shape, base + start, base + stop)


def _check_layout(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    at, before = base, "the header"
    for name, e in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if e.start != at:
            what = "overlaps" if e.start < at else "leaves a gap after"
            raise CheckpointError(f"{path}: tensor {name} at {e.start} {what} {before}, which ends at {at}")
        at, before = e.stop, name
    if at != size:
        raise CheckpointError(f"{path}: {size - at} bytes follow the last tensor, {before}; the file is damaged")


def _files(path: Path) -> dict[str, Entry]:
    """All tensors of a folder: by its index if it has one, else from its only safetensors file."""
    if (path / INDEX).exists():
        listed = read_json(path / INDEX).get("weight_map")
        if not isinstance(listed, dict):
            raise CheckpointError(f"{path / INDEX} has no weight_map from tensor to file; download it again")
        shards = {file: _shard(path, str(file)) for file in sorted(set(listed.values()))}
        for name, file in listed.items():
            if name not in shards[file]:
                raise CheckpointError(f"{path / INDEX} says that {name} is in {file}, which does not hold it")
        return {name: shards[file][name] for name, file in listed.items()}
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return read_header(found[0])
    if found:
        names = ", ".join(f.name for f in found[:4])
        raise CheckpointError(f"{path} has {len(found)} safetensors files ({names}...) but no {INDEX}; download it too")
    other = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"))
    hint = (
        f"it has {', '.join(other[:4])}; convert with transformers: AutoModelForCausalLM.from_pretrained(folder)"
        ".save_pretrained(new_folder)"
        if other
        else "download model.safetensors, or its shards with " + INDEX
    )
    raise CheckpointError(f"{path} has no *.safetensors file; {hint}")


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file a path names, or the only one of a folder without safetensors."""
    if path.is_file() and path.suffix == ".gguf":
        return path
    found = sorted(path.glob("*.gguf")) if path.is_dir() and not any(path.glob("*.safetensors")) else []
    return found[0] if len(found) == 1 else None


def _shard(path: Path, file: str) -> dict[str, Entry]:
    if not (path / file).exists():
        raise CheckpointError(f"{path / INDEX} names the shard {file}, which is missing; download it")
    return read_header(path / file)


def find_nonfinite(x: np.ndarray, dtype: str) -> tuple[tuple[int, ...], int] | None:
    """(index of the first, count) of the NaN and Inf values in `x`, or None. By exponent bits: no float arithmetic."""
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


@dataclass
class Checkpoint:
    """An open checkpoint: `config`, and the tensors by name. Reads as Weights do: views on the mapped files, and codes
    where matrices are quantised. `coded` are those, by the name they have without quantisation; `taken` the entries
    that they are made of."""

    path: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    coded: dict[str, Coded] = field(default_factory=dict, repr=False)
    taken: set[str] = field(default_factory=set, repr=False)
    maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)
    checked: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read config.json and the headers, and no tensor but the order of columns where a format has one. Raises
        CheckpointError."""
        path = Path(path)
        if gguf := _gguf_file(path):
            config, raw, coded, taken = read_gguf(gguf)
            return cls(
                path, config, {n: Entry(gguf, r.dtype, r.shape, r.start, r.stop) for n, r in raw.items()}, coded, taken
            )
        if not path.is_dir():
            raise CheckpointError(f"no folder {path}; give the folder that holds config.json and *.safetensors")
        if not (path / "config.json").exists():
            raise CheckpointError(f"{path} has no config.json; download it, it says which model this is")
        config, entries = read_json(path / "config.json"), _files(path)
        c = cls(path, config, entries)
        dtypes, shapes = {n: e.dtype for n, e in entries.items()}, {n: e.shape for n, e in entries.items()}
        c.coded, c.taken = find_coded(Stored(dtypes, shapes, c.read_entry), config)
        return c

    @property
    def architecture(self) -> str:
        """The model class that config.json names, such as LlamaForCausalLM."""
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
        """The stored type as the header writes it: F32, BF16, F16, ..."""
        return self.entry(name).dtype

    def format(self, name: str) -> str:
        """The number format of a tensor, or "" if no format is like its stored type."""
        return self.coded[name].format if name in self.coded else PLAIN.get(self.dtype(name), "")

    def shape(self, name: str) -> tuple[int, ...]:
        return self.coded[name].shape if name in self.coded else self.entry(name).shape

    @property
    def orders(self) -> set[str]:
        """The tensors that say in which order columns stand, one a matrix; Programs read those they need."""
        return {name for name, c in self.coded.items() if c.format == "i32"}

    def order(self, name: str) -> str:
        """The tensor that says in which order a matrix's columns stand; "" if as in what it multiplies."""
        return self.coded[name].order if name in self.coded else ""

    def read(self, name: str) -> Value:
        """The tensor as a read-only view on the file, or its codes if it is quantised."""
        return self.coded[name].read(self.read_entry) if name in self.coded else self.read_entry(name)

    def strips(self, name: str) -> Iterator[Value]:
        """The same, but codes in runs along their first dimension: no more are made at a time than those of one."""
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
        """One tensor of a file. The first read warns if it holds NaN or Inf."""
        e = self.entry(name)
        x: np.ndarray = np.ndarray(e.shape, DTYPES[e.dtype], self._map(e.file), e.start)
        if name not in self.checked:
            self.checked.add(name)
            if bad := find_nonfinite(x, e.dtype):
                index, count = bad
                warnings.warn(
                    f"{e.file}: tensor {name} holds {count} NaN or Inf of {x.size} values, the first at {list(index)}",
                    stacklevel=2,
                )
        return x

    def release(self, name: str) -> None:
        """Let go of the pages that hold nothing but this tensor; a later read maps them again."""
        for part in self.coded[name].parts if name in self.coded else (name,):
            self._release(self.entry(part))

    def _release(self, e: Entry) -> None:
        first = -(-e.start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = e.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map(e.file).madvise(mmap.MADV_DONTNEED, first, last - first)

    def identity(self) -> str:
        """A hash of each file's header, size and time of change, wherever the folder stands."""
        digest = hashlib.sha256()
        for file in sorted({e.file for e in self.entries.values()}):
            with file.open("rb") as f:
                head = f.read(8)
                length = GGUF_HEAD if head.startswith(b"GGUF") else int.from_bytes(head, "little")
                digest.update(head + f.read(length))
                facts = os.fstat(f.fileno())
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}".encode())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[object, ...]:
        """It travels to another process as its path: maps do not."""
        return Checkpoint.open, (self.path,)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self.maps:
            with file.open("rb") as f:
                self.maps[file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        return self.maps[file]
