"""The header of a safetensors file: the tensors it holds and where their bytes are, checked not to overlap.

Folders of files are read by folder.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from intaglio.models.config import CheckpointError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "C64": np.dtype(np.complex64),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library itself


@dataclass(frozen=True)
class Entry:
    """Place of one tensor in a safetensors file.

    Attributes:
        file: the file.
        dtype: name of the dtype in safetensors, such as BF16.
        shape: the shape.
        start: offset of the tensor's first byte in the file.
        stop: offset after its last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file as a dict.

    Raises CheckpointError if the file is not JSON or holds another JSON value than an object. The message names the
    file.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}; download the file again") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} holds a JSON {type(table).__name__}; wanted an object {{...}}")
    return table


def read_header(path: Path) -> dict[str, Entry]:
    """Reads the header of a safetensors file.

    Returns a dict from each tensor's name to its Entry (place, dtype, shape). Raises CheckpointError if the file is not
    a safetensors file, is truncated, or has gaps or overlaps between tensors.
    """
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
    """Returns the Entry (place, dtype and shape) of one tensor of a safetensors file.

    Args:
        path: the file.
        name: name of the tensor, for errors.
        item: what the JSON header says of the tensor: dtype, shape and data_offsets.
        base: offset in the file at which the tensors' data begin.
        size: size of the file in bytes.

    Raises CheckpointError if `item` is damaged or the tensor's data lie outside the file.
    """
    try:
        dtype, shape = str(item["dtype"]), tuple(int(d) for d in item["shape"])
        start, stop = (int(x) for x in item["data_offsets"])
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: the header's entry for {name} is {item!r}; wanted dtype, shape and data_offsets"
        ) from None
    known = dtype in DTYPES  # any other can be passed over, but not read
    wanted = int(np.prod(shape, dtype=object)) * DTYPES[dtype].itemsize if known else stop - start
    if min(shape, default=0) < 0 or stop < start or stop - start != wanted:
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
