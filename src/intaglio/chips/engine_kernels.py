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
    """Names of the serving engines whose kernels are known, as a tuple in alphabetical order."""
    return tuple(sorted(path.stem for path in KERNELS.glob("*.toml")))


def engine_records(engine: str, generation: str, constants: str = "") -> tuple[KernelRecord, ...]:
    """A tuple with one KernelRecord (facts and fitted constants of a kernel) for each kernel of a serving engine.

    The tuple is empty if there is no file of this engine's kernels. Raises ChipError for an invalid file.

    Args:
        engine: the engine's name, such as vllm.
        generation: generation of the chip, such as hopper.
        constants: generation of chips from which the records take their fitted constants; "": `generation`. If a kernel
            was not measured on that generation, its record takes the constants of another generation, see merged().
    """
    path, wanted = KERNELS / f"{engine}.toml", constants or generation
    return tuple(record_of(path, merged(entry, wanted)) for entry in entries(engine))


@lru_cache
def entries(engine: str) -> tuple[dict[str, Any], ...]:
    """The tables `[[kernels]]` of the file data/kernels/ENGINE.toml, as a tuple of dicts; () if there is no such file.

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
    """Flatten a table `[[kernels]]` of an engine's file into one dict {field: value} and return it.

    The dict has the kernel's facts (fields that hold on every chip) and its fitted constants for `generation`. If the
    table has no constants for `generation`, it has those of the first of GENERATIONS that the table covers. The field
    `default` is False unless the table sets it.
    """
    of_each = {g: entry[g] for g in GENERATIONS if g in entry}
    own = of_each.get(generation, next(iter(of_each.values()), {}))
    facts = {name: value for name, value in entry.items() if name not in GENERATIONS}
    return {"default": False, **facts, **own}


def engine_library(engine: str, base: KernelLibrary, constants: str = "") -> KernelLibrary:
    """A copy of the kernel library `base` with a serving engine's kernels added at the head of its `kernels`.

    An added kernel is used where a caller asks for it by name, unless its table sets `default` to true.
    Returns `base` itself if there is no file of this engine's kernels. Raises ChipError for an invalid file.

    Args:
        engine: the engine's name, such as vllm.
        base: the chip's own kernel library.
        constants: generation of chips from which the fitted constants are taken; "": base.generation.
    """
    records = engine_records(engine, base.generation, constants)
    if not records:
        return base
    return dataclasses.replace(base, name=f"{base.name}+{engine}", engine=engine, kernels=records + base.kernels)
