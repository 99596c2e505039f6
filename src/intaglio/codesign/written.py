"""Writes chip files and kernel library files (TOML) with what differs from the chip and library they are based on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from intaglio.chips import ChipError, ChipSpec, KernelLibrary, Target
from intaglio.chips.kernel_record import KernelRecord
from intaglio.chips.spec import PARTS

UNWRITTEN = ("name", "description", "reasons", "kernels", "protocols")


def toml(value: Any) -> str:
    """The value as TOML text, for a chip or library file.

    value: a bool, a number or a text, or a tuple or list of such values. Raises TypeError for any other type.
    """
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value)
        case tuple() | list():
            return f"[{', '.join(toml(v) for v in value)}]"
    raise TypeError(f"{value!r} cannot be written to a chip or library file")


def differences(new: Any, old: Any) -> dict[str, Any]:
    """The fields in which two objects of one dataclass differ, as a dict {field: value in `new`}.

    Left out are the fields in UNWRITTEN, such as name and reasons, and the nested parts of a chip.
    """
    fields = [f.name for f in dataclasses.fields(new) if f.name not in (*UNWRITTEN, *PARTS)]
    return {name: getattr(new, name) for name in fields if getattr(new, name) != getattr(old, name)}


def chip_text(new: ChipSpec, old: ChipSpec, base: str, library: str, why: str) -> str:
    """The text of a chip file (TOML) for the chip `new`.

    The file has the values in which `new` differs from the chip `old`. base: name of the file of `old`, on which the
    new file builds. library: name of the file of the chip's default kernel library. why: the reason, which is written
    for each value.
    """
    lines = [
        f"description = {toml(f'{old.description}, calibrated')}",
        f"base = {toml(base)}",
        f"library = {toml(library)}",
    ]
    reasons = differences(new, old)
    lines += ["", *(f"{name} = {toml(value)}" for name, value in reasons.items())]
    for part in PARTS:
        changed = differences(getattr(new, part), getattr(old, part))
        if changed:
            reasons[part] = changed
            lines += ["", f"[{part}]", *(f"{name} = {toml(value)}" for name, value in changed.items())]
    return "\n".join([*lines, *reasons_text(reasons, why), ""])


def library_text(new: KernelLibrary, old: KernelLibrary, base: str, why: str) -> str:
    """The text of a library file (TOML) for the kernel library `new`.

    The file has the values in which `new` differs from the library `old`. The file builds on the file `base`. If the
    kernel records differ, the text has all records of `new`, because their order matters: the first record that fits a
    call is used, and the records of a file come before the records of its base.

    Args:
        new: the library to write.
        old: the library in the file `base`.
        base: name of the library file that `old` was read from.
        why: the reason, which is written for each changed field.
    """
    changed = differences(new, old)
    lines = [f"description = {toml(f'{old.description}, calibrated')}", f"base = {toml(base)}", ""]
    lines += [f"{name} = {toml(value)}" for name, value in changed.items()]
    lines += reasons_text(changed, why)
    for record in new.kernels if new.kernels != old.kernels else ():
        lines += ["", "[[kernels]]", *record_lines(record)]
    return "\n".join([*lines, ""])


def record_lines(record: KernelRecord) -> list[str]:
    """The lines `field = value` that describe a kernel record in a library file, as a list.

    The heading `[[kernels]]`, which comes before these lines, is not in the list.
    """
    own = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "changes"}
    return [f"{name} = {toml(value)}" for name, value in {**own, **dict(record.changes)}.items()]


def reasons_text(changed: dict[str, Any], why: str) -> list[str]:
    """The lines of the section `[reasons]` of a chip or library file, as a list; [] if `changed` is empty.

    Each field in `changed` gets a line with the reason `why`.
    """
    return ["", "[reasons]", *(f"{name} = {toml(why)}" for name in changed)] if changed else []


def new_files(folder: Path, name: str) -> tuple[Path, Path]:
    """The paths of a new chip file and a new library file: (folder/NAME.toml, folder/NAME_library.toml).

    Raises ChipError if one of these files exists, or if `name` is empty or has a folder in it.
    """
    if not name or name != Path(name).name or "\\" in name:
        raise ChipError(f"--name {name!r}: give a name without folders, such as mine, and the folder with --output")
    paths = folder / f"{name}.toml", folder / f"{name}_library.toml"
    for path in paths:
        if path.exists():
            raise ChipError(f"{path} exists; remove it, or choose another --name")
    return paths


def write(files: tuple[Path, Path], new: Target, old: Target, base: str, library_base: str, why: str) -> None:
    """Write a chip file and a library file for the target `new`, with the values in which it differs from `old`.

    Args:
        files: paths of the chip file and the library file, see new_files().
        new: the target (chip and kernel library) to write.
        old: the target that `new` was made from.
        base: name or file of the chip of `old`; the new chip file builds on it.
        library_base: name or file of the kernel library of `old`; the new library file builds on it.
        why: the reason, which both files give for each value.
    """
    chip_file, library_file = files
    chip_file.write_text(chip_text(new.chip, old.chip, base, library_file.name, why), encoding="utf-8")
    library_file.write_text(library_text(new.library, old.library, library_base, why), encoding="utf-8")
