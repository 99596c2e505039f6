"""The reference page of the instruction set, written from the classes: nothing about it is said twice."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin

import intaglio.silicon.fused
import intaglio.silicon.routing  # noqa: F401  (likewise)
from intaglio.silicon.instruction import ENGINES, OPCODES, WORD, Instruction, Steps, own_fields
from intaglio.silicon.memory import FORMATS, SPACES, Region

DOES = {
    "DMA": "brings bytes into a core",
    "OUT": "takes bytes out of a core",
    "MXU": "the matrix array",
    "VEC": "the vector lanes",
    "ATT": "the fused attention engine, where a chip has one",
    "NET": "links to other chips",
    "SEQ": "checks, and the end",
}
HEAD = """# The instruction set

Written by `intaglio isa --page` from the classes in `src/intaglio/silicon/`; a test holds it fresh.

A core has {engines} engines: {what}. Each is an in-order queue and counts what it has finished. An instruction may
start when the engines' counters have reached the numbers it waits for; that is all the order there is between engines.
The tile language (`silicon/kernel.py`) derives these numbers from which instruction touches which tile.

A word has {word} bytes: opcode (1), the {engines} counters waited for (4 each), then the fields in the order below. A
region is a matrix in a space ({spaces}): first byte, rows, columns, bytes between rows, and format ({formats}).
"""


def page() -> str:
    """Markdown of the whole set, by engine and opcode."""
    what = "; ".join(f"{e} {DOES[e]}" for e in ENGINES)
    out = [
        HEAD.format(engines=len(ENGINES), what=what, word=WORD, spaces=", ".join(SPACES), formats=", ".join(FORMATS))
    ]
    for engine in ENGINES:
        mine = [OPCODES[code] for code in sorted(OPCODES) if OPCODES[code].engine == engine]
        if mine:
            out.append(f"## {engine}: {DOES[engine]}\n")
            out += [entry(cls) for cls in mine]
    return "\n".join(out)


def entry(cls: type[Instruction]) -> str:
    """One instruction: name, opcode, meaning, fields."""
    meaning = " ".join((cls.__doc__ or "").split())
    default = {f.name: f.default for f in fields(cls)}
    rows = [f"| `{name}` | {kind_of(kind)} | {use(cls, name, kind, default[name])} |" for name, kind in own_fields(cls)]
    table = ["| field | is | default or use |", "|---|---|---|", *rows] if rows else []
    return "\n".join([f"### {cls.__name__} `{cls.opcode:#04x}`\n", meaning, "", *table, ""])


def kind_of(kind: Any) -> str:
    if kind is Region or Region in get_args(kind):
        return "region" if kind is Region else "region or none"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f"`{v}`" if v else "none" for v in get_args(kind))
    return "stack program" if kind == Steps else {bool: "flag", int: "integer", float: "number"}[kind]


def use(cls: type[Instruction], name: str, kind: Any, default: Any) -> str:
    if kind is Region or Region in get_args(kind):
        return ("updated" if name in cls.updates else "written") if name in cls.writes else "read"
    return "" if default is MISSING or default == () else f"`{default}`" if default != "" else "none"
