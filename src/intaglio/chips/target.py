"""Target: a chip together with the kernel library that runs on it. Times are always modelled for a Target."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_origin, get_type_hints

from intaglio.chips.files import typed, wanted
from intaglio.chips.library import KernelLibrary, replace_library
from intaglio.chips.presets import CHIPS, DEFAULT_LIBRARY, LIBRARIES, chip_with_library, library
from intaglio.chips.spec import PARTS, ChipError, ChipSpec, part_of, replace


@dataclass(frozen=True)
class Target:
    """A chip with its kernel library. Raises ChipError if a tile of the library does not fit the chip's memories."""

    chip: ChipSpec
    library: KernelLibrary

    def __post_init__(self) -> None:
        for m, n in self.library.tiles:
            need = 2 * (m + n) * 64 * 2  # two stages of both operands, 64 deep, in bf16
            tile, has = f"{self.library.name!r} on {self.chip.name!r}: tile {m}x{n}", self.chip
            if m * n * 4 > has.acc_bytes:
                raise ChipError(f"library {tile} needs {m * n * 4} bytes of accumulators; a core has {has.acc_bytes}")
            if need > has.sram_bytes:
                raise ChipError(
                    f"library {tile} needs {need} bytes of SRAM for two stages; a core has {has.sram_bytes}"
                )

    def __hash__(self) -> int:
        """The hash of chip and library, computed once: caches of times look a target up for every kernel of a step."""
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = hash((self.chip, self.library))
            object.__setattr__(self, "_hash", known)
        return known

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: hashes of text differ between processes."""
        return {"chip": self.chip, "library": self.library}

    def with_chip(self, **changes: Any) -> Target:
        """A copy of the target with fields of the chip changed, as by chips.replace(). Raises ChipError."""
        return Target(replace(self.chip, **changes), self.library)

    def with_library(self, **changes: Any) -> Target:
        """A copy of the target with fields of the library changed, as by chips.replace_library(). Raises ChipError."""
        return Target(self.chip, replace_library(self.library, **changes))

    def kernel(self, op: str, format: str = "", head_dim: int = 0, name: str = "") -> Target:
        """The chip with one kernel of its library: the one that runs such a call, see KernelLibrary.record()."""
        return one_kernel(self, op, format, head_dim, name) if self.library.kernels else self

    def get(self, name: str) -> Any:
        """The value of the field `chip.FIELD` or `library.FIELD`. Raises ChipError for an unknown name."""
        part, field = split(name)
        if part == "library":
            return getattr(self.library, field)
        inside = part_of(field)
        return getattr(getattr(self.chip, inside) if inside else self.chip, field)

    def parse(self, name: str, text: str) -> Any:
        """The value that `text` stands for, in the type of the field `name`, ready for changed().

        The text is a number such as 8e12, true or false, a word, numbers with commas, or a TOML list. Raises
        ChipError, with the present value as the example, for text of another type.
        """
        part, field = split(name)
        if part == "chip" and field in PARTS:
            inside = ", ".join(f"chip.{n}" for n in get_type_hints(PARTS[field]))
            raise ChipError(f"{name} has parts; give one of them: {inside}")
        if field in ("reasons", "protocols", "kernels"):
            raise ChipError(f"{name} is a table; write it in a {part} file, see docs/codesign.md")
        kind = KINDS[part][field]
        if kind is str:
            return text
        if kind == tuple[str, ...]:
            return tuple(filter(None, text.split(",")))
        for source in (text, f"[{text}]") if get_origin(kind) is tuple else (text,):
            try:
                value = tomllib.loads(f"it = {source}")["it"]
                if isinstance(value, dict):
                    value = list(value.items())  # macs, as in a chip's file: {bf16 = 2048}
                if kind is int and isinstance(value, float) and value.is_integer():
                    value = int(value)
                return typed(name, value, kind)
            except (tomllib.TOMLDecodeError, ChipError):
                continue
        raise ChipError(f"{name}={text}; wanted {wanted(kind)}, such as {example(self.get(name))}")

    def changed(self, changes: Mapping[str, Any]) -> Target:
        """A copy of the target with fields changed, by names such as `chip.hbm_bytes_per_s` and `library.launch_s`.

        Raises ChipError for an unknown name, and for values that are invalid.
        """
        parts: dict[str, dict[str, Any]] = {"chip": {}, "library": {}}
        for name, value in changes.items():
            part, field = split(name)
            parts[part][field] = value
        return Target(replace(self.chip, **parts["chip"]), replace_library(self.library, **parts["library"]))


@lru_cache(maxsize=4096)
def one_kernel(on: Target, op: str, format: str, head_dim: int, name: str) -> Target:
    """Target.kernel(), with a cache. Raises ChipError for a name that no record of the library has."""
    return Target(on.chip, on.library.with_record(on.library.record(op, format, head_dim, name)))


INSIDE = {name: kind for part in PARTS.values() for name, kind in get_type_hints(part).items()}
# Names and types of the fields that split(), Target.parse() and Target.get() know
KINDS = {"chip": {**get_type_hints(ChipSpec), **INSIDE}, "library": get_type_hints(KernelLibrary)}


def example(value: Any) -> str:
    """A field's value as text that Target.parse() accepts."""
    match value:
        case bool():
            return str(value).lower()
        case [[str(), _], *_]:
            return "{" + ", ".join(f"{key} = {one}" for key, one in value) + "}"
        case tuple():
            return ",".join(json.dumps(one) for one in value[:4]) or "[]"
    return str(value)


def split(name: str) -> tuple[str, str]:
    """(part, field) of a name `chip.FIELD` or `library.FIELD`. Raises ChipError for another name."""
    part, dot, field = name.partition(".")
    if not dot:
        owners = [f"{p}.{name}" for p, kinds in KINDS.items() if name in kinds]
        raise ChipError(f"unknown field {name!r}: write {' or '.join(owners or ['chip.FIELD', 'library.FIELD'])}")
    if part not in KINDS:
        raise ChipError(f"unknown field {name!r}: write chip.FIELD or library.FIELD")
    if field not in KINDS[part]:
        what = "a chip" if part == "chip" else "a kernel library"
        raise ChipError(f"{what} has no field {field!r}; it has {', '.join(sorted(KINDS[part]))}")
    return part, field


def target(chip_name: str, library_name: str | None = None) -> Target:
    """The target of a chip, by name or file (*.toml), with its default kernel library or the one named.

    Raises ChipError for an unknown name, or if the library does not fit the chip.
    """
    spec, own = chip_with_library(chip_name)
    return Target(spec, library(library_name or own))


def register_chip(on: Target) -> Target:
    """Register a chip and its kernel library by their names, so that commands and devices find them; returns `on`.

    For plugins. Raises ChipError if another chip or library has the name.
    """
    if CHIPS.get(on.chip.name, on.chip) != on.chip:
        raise ChipError(f"another chip is called {on.chip.name!r}")
    if LIBRARIES.get(on.library.name, on.library) != on.library:
        raise ChipError(f"another kernel library is called {on.library.name!r}")
    CHIPS[on.chip.name], LIBRARIES[on.library.name] = on.chip, on.library
    DEFAULT_LIBRARY[on.chip.name] = on.library.name
    return on
