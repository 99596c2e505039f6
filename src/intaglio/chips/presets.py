"""Chips and kernel libraries by name: the files data/chips/*.toml and data/libraries/*.toml, and those of plugins.

Constants of a100_sxm, h100_sxm and b200_sxm, and of their libraries, were fitted to measured tables, see
docs/accuracy.md; those of the others are taken from a similar chip or estimated, as [reasons] says. `sohu` is
reconstructed from one public claim.
"""

from __future__ import annotations

from pathlib import Path

from intaglio.chips.files import DATA, read_chip, read_library
from intaglio.chips.library import KernelLibrary
from intaglio.chips.spec import ChipError, ChipSpec
from intaglio.plugins import load_plugins

CHIPS: dict[str, ChipSpec] = {}
DEFAULT_LIBRARY: dict[str, str] = {}  # chip name -> name of its default kernel library
LIBRARIES: dict[str, KernelLibrary] = {p.stem: read_library(p) for p in sorted((DATA / "libraries").glob("*.toml"))}
for _path in sorted((DATA / "chips").glob("*.toml")):
    CHIPS[_path.stem], DEFAULT_LIBRARY[_path.stem] = read_chip(_path)


def chip(name: str) -> ChipSpec:
    """Returns the ChipSpec of the chip called `name`.

    name: a chip that ships with the package or that a plugin registers; or a file, if `name` ends in .toml. Raises
    ChipError for an unknown name, listing the known ones, and for an invalid file; PluginError if a plugin fails to
    load.
    """
    return chip_with_library(name)[0]


def chip_with_library(name: str) -> tuple[ChipSpec, str]:
    """Returns a chip and its default kernel library, as (ChipSpec, name or file of the library).

    name: a chip that ships with the package or that a plugin registers; or a file, if `name` ends in .toml. Raises
    ChipError for an unknown name and for an invalid file, PluginError if a plugin fails to load.
    """
    if name.endswith(".toml"):
        return read_chip(Path(name))
    load_plugins()
    if name not in CHIPS:
        raise ChipError(f"unknown chip {name!r}; known: {', '.join(CHIPS)}. For another, give a file NAME.toml")
    return CHIPS[name], DEFAULT_LIBRARY[name]


def library(name: str) -> KernelLibrary:
    """Returns the KernelLibrary called `name`.

    name: a library that ships with the package or that a plugin registers; or a file, if `name` ends in .toml. Raises
    ChipError for an unknown name, listing the known ones, and for an invalid file; PluginError if a plugin fails to
    load.
    """
    if name.endswith(".toml"):
        return read_library(Path(name))
    load_plugins()
    if name not in LIBRARIES:
        known = ", ".join(LIBRARIES)
        raise ChipError(f"unknown kernel library {name!r}; known: {known}. For another, give a file NAME.toml")
    return LIBRARIES[name]
