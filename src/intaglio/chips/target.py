"""Target: a chip together with the kernel library that runs on it. Times are always modelled for a Target."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_origin, get_type_hints

from intaglio.chips.files import typed, wanted
from intaglio.chips.kernel_record import KernelRecord
from intaglio.chips.library import KernelLibrary, replace_library
from intaglio.chips.presets import CHIPS, DEFAULT_LIBRARY, LIBRARIES, chip_with_library, library
from intaglio.chips.spec import PARTS, ChipError, ChipSpec, part_of, replace


@dataclass(frozen=True)
class Target:
    """A chip with its kernel library.

    Raises ChipError if a tile of `library.tiles` needs more accumulators or SRAM than a core of the chip has.
    """

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
        """Returns the hash of chip and library. It is computed once, because targets are often keys of caches."""
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = hash((self.chip, self.library))
            object.__setattr__(self, "_hash", known)
        return known

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state to pickle, a dict of the two fields.

        The cached hash is left out, because hashes of text differ between processes.
        """
        return {"chip": self.chip, "library": self.library}

    def with_chip(self, **changes: Any) -> Target:
        """Returns a copy of the target with fields of the chip changed. changes: the new values, by field.

        Fields inside chip.links, chip.energy and chip.constants are given by their own names, such as bytes_per_s.
        Raises ChipError for an unknown field, an invalid chip, and a chip that the library does not fit.
        """
        return Target(replace(self.chip, **changes), self.library)

    def with_library(self, **changes: Any) -> Target:
        """Returns a copy of the target with fields of the library changed. changes: the new values, by field.

        The new values hold for all kernels of the library. Raises ChipError for an unknown field, a value outside its
        range, and a library that does not fit the chip.
        """
        return Target(self.chip, replace_library(self.library, **changes))

    def kernel(self, op: str, format: str = "", head_dim: int = 0, name: str = "") -> Target:
        """Returns a copy of this target whose library describes one kernel: the one that computes a given kind of call.

        `library.kernels` is a list of kernel records. A record describes one kernel, and has the kernel's own values
        for some fields of the library. The copy has the values of the first record that fits the call, or the library's
        own values if no record fits. If `library.kernels` is empty, the result is this target itself, whatever `name`
        is.

        Args:
            op: kind of call, such as "products" or "prefill".
            format: number format of the weights, or of the keys and values.
            head_dim: columns of an attention head; 0 for other calls.
            name: name of the kernel to use; "": the first that fits among the kernels used by default.

        Raises ChipError if the library has records, but none called `name`.
        """
        return one_kernel(self, op, format, head_dim, name) if self.library.kernels else self

    def reduced(self, record: KernelRecord | None) -> Target:
        """Returns a copy of this target whose library describes only the kernel of `record`, and has no records.

        The chip's hbm_efficiency and l2_efficiency are multiplied by the kernel's memory_factor in the copy, but are
        at most 1. The copy's own memory_factor is 1.

        record: one of the library's `kernels`. None stands for a kernel with the values of the library's own fields.
        """
        return reduced_target(self, record)

    def get(self, name: str) -> Any:
        """Returns the value of the field called `chip.FIELD` or `library.FIELD`.

        Fields inside chip.links, chip.energy and chip.constants are named without that part: chip.bytes_per_s stands
        for chip.links.bytes_per_s. Raises ChipError for an unknown name.
        """
        part, field = split(name)
        if part == "library":
            return getattr(self.library, field)
        inside = part_of(field)
        return getattr(getattr(self.chip, inside) if inside else self.chip, field)

    def parse(self, name: str, text: str) -> Any:
        """Returns a value for one field, converted from text to the field's type.

        name: `chip.FIELD` or `library.FIELD`. text: a number such as 8e12, true or false, a word, numbers with commas,
        or a TOML list. Raises ChipError for an unknown field, for a field that is a table, and for text that does not
        fit the field's type.
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
        """Returns a copy of the target with some fields changed. changes: {name such as `library.launch_s`: new value}.

        Raises ChipError for an unknown name, and for values that are invalid.
        """
        parts: dict[str, dict[str, Any]] = {"chip": {}, "library": {}}
        for name, value in changes.items():
            part, field = split(name)
            parts[part][field] = value
        return Target(replace(self.chip, **parts["chip"]), replace_library(self.library, **parts["library"]))


@lru_cache(maxsize=4096)
def one_kernel(on: Target, op: str, format: str, head_dim: int, name: str) -> Target:
    """Returns a copy of the target `on` whose library describes only the kernel that computes a given call. Cached.

    Args:
        on: the target.
        op: kind of call, such as "products" or "prefill".
        format: number format of the weights, or of the keys and values.
        head_dim: columns of an attention head; 0 for other calls.
        name: name of the kernel to use; "": the first that fits among the kernels used by default.

    Raises ChipError if no kernel record of the library is called `name`.
    """
    return reduced_target(on, on.library.record(op, format, head_dim, name))


@lru_cache(maxsize=4096)
def reduced_target(on: Target, record: KernelRecord | None) -> Target:
    """Returns a copy of the target `on` whose library describes only one kernel, and has no records. Cached.

    The chip's hbm_efficiency and l2_efficiency are multiplied by the kernel's memory_factor in the copy, but are at
    most 1. The copy's own memory_factor is 1.

    record: the kernel, one of on.library.kernels. None stands for a kernel with the values of the library's own
    fields.
    """
    reduced = on.library.with_record(record)
    factor, own = reduced.memory_factor, on.chip.constants
    if factor == 1:
        return Target(on.chip, reduced)
    rates = {f: min(1.0, getattr(own, f) * factor) for f in ("hbm_efficiency", "l2_efficiency")}
    return Target(replace(on.chip, **rates), dataclasses.replace(reduced, memory_factor=1.0))


INSIDE = {name: kind for part in PARTS.values() for name, kind in get_type_hints(part).items()}
# Names and types of the fields that split(), Target.parse() and Target.get() know
KINDS = {"chip": {**get_type_hints(ChipSpec), **INSIDE}, "library": get_type_hints(KernelLibrary)}


def example(value: Any) -> str:
    """Returns a field's value as text that Target.parse() accepts, such as 8e12 or 64,128.

    Of a tuple, only the first four items are shown.
    """
    match value:
        case bool():
            return str(value).lower()
        case [[str(), _], *_]:
            return "{" + ", ".join(f"{key} = {one}" for key, one in value) + "}"
        case tuple():
            return ",".join(json.dumps(one) for one in value[:4]) or "[]"
    return str(value)


def split(name: str) -> tuple[str, str]:
    """Split a name `chip.FIELD` or `library.FIELD` into a pair (part, field). `part` is "chip" or "library".

    Raises ChipError for any other text, and for a field that the chip or library does not have.
    """
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
    """Returns the Target that combines a chip with a kernel library.

    chip_name, library_name: a name or a file (*.toml); library_name None: the chip's default library. Raises ChipError
    for an unknown name or an invalid file, or if the library does not fit the chip; PluginError if a plugin fails to
    load.
    """
    spec, own = chip_with_library(chip_name)
    return Target(spec, library(library_name or own))


def register_chip(on: Target) -> Target:
    """Register a chip and its kernel library, so that commands and devices find them by name. Returns `on`.

    on: the chip and the library. Plugins call this function. The library becomes the chip's default library. Raises
    ChipError if a different chip or library already has the name.
    """
    if CHIPS.get(on.chip.name, on.chip) != on.chip:
        raise ChipError(f"another chip is called {on.chip.name!r}")
    if LIBRARIES.get(on.library.name, on.library) != on.library:
        raise ChipError(f"another kernel library is called {on.library.name!r}")
    CHIPS[on.chip.name], LIBRARIES[on.library.name] = on.chip, on.library
    DEFAULT_LIBRARY[on.chip.name] = on.library.name
    return on
