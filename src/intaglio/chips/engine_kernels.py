"""Kernels of serving engines as records of a kernel library: the files data/kernels/<engine>.toml.

A table `[[kernels]]` describes one kernel: facts that hold on every chip, and constants for each generation of chips.
engine_library() puts an engine's kernels before those of a chip's own library, where they are asked for by name.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

from intaglio.chips.files import DATA, read_toml, record_of
from intaglio.chips.kernel_record import KernelRecord
from intaglio.chips.library import KernelLibrary
from intaglio.chips.spec import ChipError

KERNELS = DATA / "kernels"
GENERATIONS = ("hopper", "blackwell")  # whose kernels were measured


def engine_names() -> tuple[str, ...]:
    """Names of the serving engines whose kernels are known, in alphabetical order."""
    return tuple(sorted(path.stem for path in KERNELS.glob("*.toml")))


def engine_records(engine: str, generation: str, constants: str = "") -> tuple[KernelRecord, ...]:
    """The KernelRecords of a serving engine's kernels on one generation of chips, as a tuple.

    () if the kernels of this engine are not known. Raises ChipError for a wrong file.

    Args:
        engine: the engine's name.
        generation: generation of the chip, such as hopper.
        constants: generation whose fitted constants the records get; "": `generation`. A kernel that was measured on
            one generation only has the constants of that one.
    """
    path, wanted = KERNELS / f"{engine}.toml", constants or generation
    return tuple(record_of(path, merged(entry, wanted)) for entry in entries(engine))


@lru_cache
def entries(engine: str) -> tuple[dict[str, Any], ...]:
    """The tables `[[kernels]]` of an engine's file, as a tuple of dicts; () if there is no file.

    Raises ChipError, naming the file, if it cannot be read, is not TOML or has no tables `[[kernels]]`.
    """
    path = KERNELS / f"{engine}.toml"
    if not path.is_file():
        return ()
    found = read_toml(path).get("kernels")
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ChipError(f"{path}: kernels={found!r}; give a table [[kernels]] for each kernel")
    return tuple(found)


def merged(entry: dict[str, Any], generation: str) -> dict[str, Any]:
    """A table `[[kernels]]` as one flat dict: its facts, and its constants for a generation of chips.

    A kernel that was measured on one generation only has that one's constants for any other.
    """
    of_each = {g: entry[g] for g in GENERATIONS if g in entry}
    own = of_each.get(generation, next(iter(of_each.values()), {}))
    facts = {name: value for name, value in entry.items() if name not in GENERATIONS}
    return {"default": False, **facts, **own}


def engine_library(engine: str, base: KernelLibrary, constants: str = "") -> KernelLibrary:
    """The kernel library `base` with a serving engine's kernels added, to be chosen by name.

    Returns `base` itself for an engine whose kernels are not known. constants: see engine_records(). Raises ChipError
    for a wrong file.
    """
    records = engine_records(engine, base.generation, constants)
    if not records:
        return base
    return dataclasses.replace(base, name=f"{base.name}+{engine}", engine=engine, kernels=records + base.kernels)
