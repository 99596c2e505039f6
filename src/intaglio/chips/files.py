"""Reads chip files and kernel library files (TOML) into ChipSpec and KernelLibrary.

The file's stem is the name of the chip or library; its keys are the fields of ChipSpec or KernelLibrary. `base` names
another file, of the same folder or of the shipped ones, from which missing values are taken. `[reasons]` gives the
source of each value; values taken from the base keep the base's reasons.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from math import inf
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from intaglio.chips.kernel_record import KernelRecord
from intaglio.chips.library import KernelLibrary, Protocol
from intaglio.chips.spec import PARTS, ChipError, ChipSpec

DATA = Path(__file__).parent.parent / "data"
FIXED = ("name", "description", "kernels", "reasons", "protocols")  # fields that a record of a kernel cannot change
SHEET_TOLERANCE = 0.01  # relative, between a data sheet's rounded FLOP/s and 2 * cores * clock * multiply-accumulates


def read_chip(path: Path) -> tuple[ChipSpec, str]:
    """Read a chip file (TOML). Returns (ChipSpec, name or path of the chip's default kernel library).

    The second item is text: a path if it ends in .toml, otherwise the name of a library. The key `base` of a chip file
    may name another chip file, from which missing values are taken.

    Raises ChipError, naming the file, in these cases: The file or its base cannot be read. A key is unknown, `library`
    is missing, a value has the wrong type, or ChipSpec refuses a value. A peak rate differs by more than 1 % from the
    rate in the section `[sheet_flops]`, which repeats the data sheet.
    """
    table = merged(path, "chips")
    sheet, library = table.pop("sheet_flops", {}), table.pop("library", None)
    if not isinstance(library, str):
        raise ChipError(f"{path}: library={library!r}; give the name of the chip's default kernel library")
    library = str(path.parent / library) if library.endswith(".toml") else library
    for name, kind in PARTS.items():
        if isinstance(table.get(name), dict):
            table[name] = built(path, kind, table[name], f"{name}.")
    if isinstance(table.get("macs"), dict):
        table["macs"] = tuple(table["macs"].items())
    spec = built(path, ChipSpec, {"name": path.stem, **table, "reasons": reasons_of(path, ChipSpec, table)})
    if not isinstance(sheet, dict):
        raise ChipError(f"{path}: sheet_flops is {sheet!r}; wanted a table of FLOP/s by format, [sheet_flops]")
    for format, flops in sheet.items():
        if isinstance(flops, bool) or not isinstance(flops, int | float) or not 0 < flops < inf:
            raise ChipError(
                f"{path}: sheet_flops.{format} is {flops!r}; allowed: a number of FLOP/s above 0; correct or remove it"
            )
        peak = spec.peak_flops(format)
        if abs(peak / flops - 1) > SHEET_TOLERANCE:
            raise ChipError(f"{path}: the peak rate in {format} is {peak:.4g} FLOP/s, but sheet_flops says {flops:.4g}")
    return spec, library


def read_library(path: Path) -> KernelLibrary:
    """Read a kernel library file (TOML) and return the KernelLibrary.

    The key `base` of a library file may name another library file, from which missing values are taken. Raises
    ChipError, naming the file, if the file or its base cannot be read, for an unknown key, for a value of the wrong
    type, and for a value that KernelLibrary refuses.
    """
    table = merged(path, "libraries")
    protocols = table.get("protocols")
    if isinstance(protocols, list):
        table["protocols"] = tuple(built(path, Protocol, p, "protocols.") for p in protocols)
    if isinstance(table.get("tiles"), list):
        table["tiles"] = tuple(sorted({tile for entry in table["tiles"] for tile in tiles_of(path, entry)}))
    if isinstance(table.get("kernels"), list):
        table["kernels"] = tuple(record_of(path, entry) for entry in table["kernels"])
    return built(path, KernelLibrary, {"name": path.stem, **table, "reasons": reasons_of(path, KernelLibrary, table)})


def record_of(path: Path, entry: Mapping[str, Any]) -> KernelRecord:
    """Returns the KernelRecord that one table `[[kernels]]` of a library file describes.

    A KernelRecord is the description of one kernel. path: the file, for errors. entry: the table as a dict. Its keys
    are fields of KernelRecord, and fields of KernelLibrary for which this kernel has another value than the library.
    Raises ChipError for an unknown or missing field, for a value of the wrong type, and for a field of FIXED, which a
    kernel cannot change.
    """
    own = {f.name for f in dataclasses.fields(KernelRecord)} - {"changes"}
    hints = get_type_hints(KernelLibrary)
    where = f"kernels.{entry.get('kernel', '?')}."
    changes = {}
    for name, value in entry.items():
        if name in own:
            continue
        if name not in hints or name in FIXED:
            known = ", ".join([*own, *(n for n in hints if n not in FIXED)])
            raise ChipError(f"{path}: unknown field {where}{name}; known: {known}")
        if name == "tiles":
            value = sorted({tile for each in value for tile in tiles_of(path, each)})
        changes[name] = typed(f"{path}: {where}{name}", value, hints[name])
    given = {name: value for name, value in entry.items() if name in own}
    return built(path, KernelRecord, {**given, "changes": tuple(changes.items())}, where)


def reasons_of(path: Path, kind: type[Any], table: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Returns the section `[reasons]` of a chip or library file, as a tuple of pairs (field, text).

    The text says where the field's value comes from.

    Args:
        path: the file, for errors.
        kind: the class that has the fields, ChipSpec or KernelLibrary.
        table: the contents of the whole file.

    Raises ChipError if the section names a field that `kind` does not have.
    """
    fields = [f.name for f in dataclasses.fields(kind)]
    for name in table["reasons"]:
        if name not in fields:
            raise ChipError(f"{path}: unknown field reasons.{name}; known: {', '.join(fields)}")
    return tuple(table["reasons"].items())


def tiles_of(path: Path, entry: Any) -> list[tuple[int, int]]:
    """Returns a list of tiles (rows, columns), read from one item of the list `tiles` in a library file.

    A tile is the part of a result that one core computes at a time. The item `entry` is one tile, [rows, columns], or a
    grid: a table with the lists `rows` and `columns` that stands for all pairs of them. `transposed = true` in the grid
    adds the pairs (columns, rows). `max_values = n` leaves out tiles of more than n values. Raises ChipError for any
    other item.
    """
    if isinstance(entry, list):
        if len(entry) != 2:
            raise ChipError(f"{path}: tiles has {entry}; a tile is [rows, columns]")
        return [(entry[0], entry[1])]
    if not isinstance(entry, dict):
        raise ChipError(f"{path}: tiles has {entry!r}; give a tile [rows, columns], or a grid")
    unknown = entry.keys() - {"rows", "columns", "max_values", "transposed"}
    if unknown or not {"rows", "columns"} <= entry.keys():
        raise ChipError(f"{path}: tiles has {entry}; a grid has rows, columns, max_values and transposed")
    pairs = [(m, n) for m in entry["rows"] for n in entry["columns"]]
    pairs += [(n, m) for m, n in pairs] if entry.get("transposed") else []
    return [(m, n) for m, n in pairs if m * n <= entry.get("max_values", m * n)]


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as a dict. Raises ChipError, naming the file, if it cannot be read or is not TOML in UTF-8."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ChipError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ChipError(f"{path}: not TOML: {error}") from None


def merged(path: Path, folder: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a chip or library file as a dict. Values that the file lacks come from the file that its key `base` names.

    The result has no key `base`. Three parts of the base are special. Of its `reasons` (texts that say where a value
    comes from), only those of values that come from the base are kept. Its kernels come after the file's own kernels.
    Its `[sheet_flops]` (peak rates that only check a chip's own values) are left out.

    Args:
        path: the file.
        folder: "chips" or "libraries", the folder of shipped files. The base is looked up in the file's own folder,
            then in this folder.
        above: files that have `path` as their base, directly or through other files.

    Raises ChipError for a file that cannot be read or is not TOML, for a base that does not exist, and for bases in a
    circle.
    """
    table = read_toml(path)
    base = table.pop("base", None)
    if base is None:
        return {"reasons": {}, **table}
    places = [place / f"{base}.toml" for place in (path.parent, DATA / folder)]
    found = next((p for p in places if p.exists()), None)
    if found is None:
        looked = " and ".join(map(str, dict.fromkeys(places)))
        raise ChipError(f"{path}: no file for base {base!r}; looked for {looked}")
    if found in (*above, path):
        raise ChipError(f"{path}: base {base!r} has {path.stem!r} as its own base")
    below = merged(found, folder, (*above, path))
    below.pop("sheet_flops", None)
    out = below | table
    for name in PARTS:
        if isinstance(table.get(name), dict) and isinstance(below.get(name), dict):
            out[name] = below[name] | table[name]
    if "kernels" in table and "kernels" in below:  # a file's own kernels come first, those of its base after them
        out["kernels"] = table["kernels"] + below["kernels"]
    kept = {field: why for field, why in below["reasons"].items() if out.get(field) == below.get(field)}
    out["reasons"] = kept | table.get("reasons", {})
    return out


def built(path: Path, kind: type[Any], table: Mapping[str, Any], inside: str = "") -> Any:
    """Returns an instance of the dataclass `kind`, made from one table of a TOML file.

    path: the file, for errors. table: the table as a dict {field: value}. inside: prefix of the fields' names in
    errors, such as "links.". Raises ChipError, naming the file, for an unknown or missing field, a wrong type, or
    values that `kind` refuses.
    """
    hints = get_type_hints(kind)
    none = dataclasses.MISSING
    required = [f.name for f in dataclasses.fields(kind) if f.default is none and f.default_factory is none]
    for name in table:
        if name not in hints:
            raise ChipError(f"{path}: unknown field {inside}{name}; known: {', '.join(hints)}")
    missing = [name for name in required if name not in table]
    if missing:
        raise ChipError(f"{path}: {', '.join(inside + name for name in missing)} missing, and no base has a value")
    values = {name: typed(f"{path}: {inside}{name}", value, hints[name]) for name, value in table.items()}
    try:
        return kind(**values)
    except ChipError as error:
        raise ChipError(f"{path}: {error}") from None


def typed(what: str, value: Any, kind: Any) -> Any:
    """Convert a TOML value to the type `kind` and return it.

    Lists become tuples, and integers become floats if `kind` is float. what: name of the value, for the error. Raises
    ChipError if the value's type does not fit `kind`.
    """
    if kind is Any:
        return value
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        inner = get_args(kind)
        if inner[-1] is Ellipsis:
            return tuple(typed(what, v, inner[0]) for v in value)
        if len(value) == len(inner):
            return tuple(typed(what, v, k) for v, k in zip(value, inner, strict=True))
    elif get_origin(kind) is UnionType:  # of a type and None, which TOML cannot say
        return typed(what, value, get_args(kind)[0])
    elif get_origin(kind) is dict and isinstance(value, dict):
        inner = get_args(kind)
        return {key: typed(f"{what}.{key}", v, inner[1]) for key, v in value.items()}
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif get_origin(kind) is None and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ChipError(f"{what}={value!r}; wanted {wanted(kind)}")


def wanted(kind: Any) -> str:
    """Returns the name of a type for error messages.

    For example, it is "a whole number" for int, and "[a text, a number]" for tuple[str, float].
    """
    inner = get_args(kind)
    if get_origin(kind) is tuple and inner[-1] is Ellipsis:
        return f"a list, each of it {wanted(inner[0])}"
    if get_origin(kind) is tuple:
        return f"[{', '.join(wanted(each) for each in inner)}]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))
