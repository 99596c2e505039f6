"""GgufFile: a GGUF file with all its parts. It has the metadata by key and the place of each tensor in the parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from intaglio.models.config import CheckpointError
from intaglio.models.files.gguf.header import HeaderError, Tensor, read_header

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
BESIDE = ("mmproj",)  # vision towers, which people keep beside the model


@dataclass(frozen=True, eq=False)
class GgufFile:
    """An open GGUF model: its metadata, and the place of each tensor. It may be split into several files, called parts.

    Attributes:
        path: path of the first part.
        parts: paths of all parts, in order.
        fields: metadata of the first part, {key: value}.
        tensors: (path of the part, description of the tensor) for each tensor.
    """

    path: Path
    parts: tuple[Path, ...]
    fields: Mapping[str, Any]
    tensors: tuple[tuple[Path, Tensor], ...]

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value of `key`; `default` if the file does not have the key."""
        return self.fields.get(key, default)

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture"))

    @property
    def types(self) -> dict[str, int]:
        """How many values of the model are stored in each tensor type, as {name of the type: number of values}."""
        found: dict[str, int] = {}
        for _, t in self.tensors:
            found[t.kind] = found.get(t.kind, 0) + prod(t.shape)
        return found


def find_gguf(path: Path) -> Path | None:
    """The path of the GGUF model at `path`; None if there is none.

    path: a GGUF file or a folder.

    If the model is split into several files, the result is the path of the first file. It is also None for a folder
    that has safetensors files. Raises CheckpointError if a folder has several GGUF models, or if a file of a split
    model is missing.
    """
    if path.is_file() and path.suffix == ".gguf":
        return parts_of(path)[0]
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(f for f in path.glob("*.gguf") if not f.name.lower().startswith(BESIDE))
    models = sorted({parts_of(f)[0] for f in found})
    if len(models) > 1:
        sizes = (sum(part.stat().st_size for part in parts_of(m)) for m in models)
        listed = ", ".join(f"{m.name} ({size / 1e9:.1f} GB)" for m, size in zip(models, sizes, strict=True))
        raise CheckpointError(f"{path} holds {len(models)} GGUF models: {listed}; give the path of one, {models[0]}")
    return models[0] if models else None


def parts_of(path: Path) -> list[Path]:
    """The paths of all files of the GGUF model to which the file `path` belongs, as a list in order.

    Raises CheckpointError, with the names of missing files, if the model is split and not complete.
    """
    match = PART.fullmatch(path.name)
    if not match:
        return [path]
    base, _, count = match.groups()
    parts = [path.with_name(f"{base}-{i:05}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    missing = [p.name for p in parts if not p.exists()]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(
            f"{path} is one of {int(count)} parts; missing beside it: {', '.join(missing[:4])}{more}; download them"
        )
    return parts


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF model with all its parts and return the GgufFile.

    path: the file, or the first file of a split model. Raises CheckpointError for a file that is missing or damaged.
    """
    facts = path.stat()
    return _opened(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=2)  # the tokenizer reads the same metadata, half a second of it where there are 150,000 tokens
def _opened(path: Path, size: int, changed: int) -> GgufFile:
    parts = parts_of(path)
    headers = [_header(part) for part in parts]
    fields = headers[0][0]
    count = int(fields.get("split.count", 0))
    if count > 1 and len(parts) == 1:
        raise CheckpointError(
            f"{path} says that it is one of {count} parts, but its name does not; parts are named "
            "NAME-00001-of-00002.gguf: rename them so"
        )
    tensors = [(part, t) for part, (_, own) in zip(parts, headers, strict=True) for t in own]
    names = [t.name for _, t in tensors]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise CheckpointError(f"{path}: tensor {twice} stands in two parts; they belong to different models")
    return GgufFile(path, tuple(parts), fields, tuple(tensors))


def _header(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    try:
        return read_header(path)
    except HeaderError as e:
        raise CheckpointError(f"{path} is no GGUF file, or damaged or truncated: {e}; download it again") from None
