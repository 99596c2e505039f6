"""Kernels of serving engines as records of a kernel library: the files data/kernels/<engine>.toml.

A table `[[kernels]]` describes one kernel: facts that hold on every chip, and constants for each generation of chips.
engine_library() returns a chip's kernel library with an engine's kernels added; callers choose these by name.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

from intaglio.chips.files import DATA, read_toml, record_of
from intaglio.chips.kernel_record import KernelRecord
from intaglio.chips.library import KernelLibrary
from intaglio.chips.presets import LIBRARIES
from intaglio.chips.spec import ChipError

KERNELS = DATA / "kernels"
GENERATIONS = ("hopper", "blackwell")  # whose kernels were measured
SHARED = ("launch_s", "memory_factor")
CONSTANTS: dict[str, tuple[str, ...]] = {  # op of a kernel record -> constants of each generation; the rest are facts
    "products": ("mxu_efficiency", *SHARED),
    "prefill": ("mxu_efficiency", *SHARED),
    "decode": ("mxu_efficiency", *SHARED),
    "experts": ("grouped_mxu_efficiency", *SHARED),
    "recurrent": ("mxu_efficiency", *SHARED),
    "collectives": ("small_reduce_s", "small_reduce_efficiency", "barrier_s", "link_latency_s", "link_efficiency"),
}
# Constants that follow the chip's links -> field of the chip's own library by which another chip's value is scaled
SCALED = {
    "small_reduce_s": "barrier_s", "barrier_s": "barrier_s", "link_latency_s": "link_latency_s",
    "link_efficiency": "link_efficiency",
}  # fmt: skip


def engine_names() -> tuple[str, ...]:
    """Returns the names of the serving engines whose kernels are known, as a tuple in alphabetical order."""
    return tuple(sorted(path.stem for path in KERNELS.glob("*.toml")))


def engine_records(engine: str, generation: str, constants: str = "") -> tuple[KernelRecord, ...]:
    """Returns the KernelRecords of a serving engine's kernels, as a tuple with one record for each kernel.

    A KernelRecord holds the facts about a kernel and its fitted constants, such as efficiencies. The tuple is empty if
    there is no file of this engine's kernels. Raises ChipError for an invalid file.

    Args:
        engine: the engine's name, such as vllm.
        generation: generation of the chips for which the facts are wanted, such as hopper.
        constants: generation of the chips for which the fitted constants are wanted; "": `generation`. A kernel that
            was not measured on a wanted generation gets its values from another generation.
    """
    path = KERNELS / f"{engine}.toml"
    return tuple(record_of(path, merged(entry, generation, constants)) for entry in entries(engine))


@lru_cache
def entries(engine: str) -> tuple[dict[str, Any], ...]:
    """Returns the tables `[[kernels]]` of the file data/kernels/ENGINE.toml as a tuple of dicts; () without the file.

    Raises ChipError, naming the file, if the file cannot be read, is not TOML, or has no tables `[[kernels]]`.
    """
    path = KERNELS / f"{engine}.toml"
    if not path.is_file():
        return ()
    found = read_toml(path).get("kernels")
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ChipError(f"{path}: kernels={found!r}; give a table [[kernels]] for each kernel")
    return tuple(found)


def measured_generations(engine: str, kernel: str) -> tuple[str, ...]:
    """Returns the chip generations on which an engine's kernel was measured, as a tuple of names.

    () if no kernel with this name is known for the engine. engine: the engine's name. kernel: the kernel's name. Raises
    ChipError for an invalid file of the engine's kernels.
    """
    mine = [entry for entry in entries(engine) if entry.get("kernel") == kernel]
    return tuple(g for g in GENERATIONS if any(g in entry for entry in mine))


def lender(entry: dict[str, Any], wanted: str) -> str:
    """Returns the name of the chip generation whose kernel values are used on chips of generation `wanted`.

    entry: the kernel's table `[[kernels]]` in the engine's file. If the table has values for `wanted`, the result is
    `wanted`. Otherwise it is the first of GENERATIONS for which the table has values; "" if it has values for none.
    """
    having = [g for g in GENERATIONS if g in entry]
    return wanted if wanted in having else next(iter(having), "")


def merged(entry: dict[str, Any], generation: str, constants: str = "") -> dict[str, Any]:
    """Returns one kernel's table `[[kernels]]` of an engine's file as a flat dict {field: value} for one generation.

    The dict holds the fields that are the same on every chip, the fields of `generation`, and the kernel's fitted
    constants. If the table has no values for a generation, the dict has the values of the first of GENERATIONS that the
    table does cover. The field `default` is False unless the table sets it.

    Args:
        entry: the table.
        generation: generation of the chip, such as hopper.
        constants: generation of chips from which the fitted constants are taken; "": `generation`.
    """
    own, lent = (entry.get(lender(entry, g), {}) for g in (generation, constants or generation))
    names = CONSTANTS.get(entry.get("op", ""), ())
    facts = {name: value for name, value in entry.items() if name not in GENERATIONS}
    found = {"default": False, **facts, **own}
    return found | {name: lent[name] for name in names if name in lent}


def engine_library(engine: str, base: KernelLibrary, constants: str = "") -> KernelLibrary:
    """Returns a copy of the kernel library `base` with a serving engine's kernels put before the other kernels.

    An added kernel is used only where a caller asks for it by name, unless its table in the engine's file sets
    `default` to true. Returns `base` itself if there is no file of this engine's kernels. Raises ChipError for an
    invalid file.

    Args:
        engine: the engine's name, such as vllm.
        base: the chip's own kernel library.
        constants: generation of chips from which the fitted constants are taken; "": base.generation. Constants of
            links that were fitted on another generation are converted to the chips of `base`.
    """
    found = zip(entries(engine), engine_records(engine, base.generation, constants), strict=True)
    records = tuple(scaled(r, base, lender(entry, constants or base.generation)) for entry, r in found)
    if not records:
        return base
    return dataclasses.replace(base, name=f"{base.name}+{engine}", engine=engine, kernels=records + base.kernels)


def scaled(record: KernelRecord, base: KernelLibrary, lent: str) -> KernelRecord:
    """Returns a copy of a collective's KernelRecord whose link constants are converted for other chips.

    The constants were fitted on chips of the generation `lent`; those of the copy are for the chips of `base`. Each is
    multiplied by (a value in `base`) / (the same value in the library of the generation `lent`). The record itself is
    returned if its kernel is not a collective, or if `lent` is base.generation or "".

    Args:
        record: the kernel's record.
        base: library of the chips for which the constants are wanted.
        lent: the generation of chips on which the constants were fitted.
    """
    if record.op != "collectives" or lent in ("", base.generation):
        return record
    other, changes = LIBRARIES[lent], dict(record.changes)
    for name, field in SCALED.items():
        if name in changes:
            value = changes[name] * getattr(base, field) / getattr(other, field)
            changes[name] = min(value, 1.0) if name.endswith("efficiency") else value
    return dataclasses.replace(record, changes=tuple(changes.items()))
