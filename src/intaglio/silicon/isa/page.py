"""Generates docs/isa.md, the reference page of the instruction set, from the classes and their docstrings."""

from __future__ import annotations

from dataclasses import MISSING, fields
from inspect import cleandoc
from typing import Any, Literal, get_args, get_origin

from intaglio.silicon.isa.instruction import ENGINES, MOST_STEPS, OPCODES, REGION, WORD, Instruction, Steps, own_fields
from intaglio.silicon.memory import FORMATS, Region

ENGINE_ROLES = {
    "DMA": "loads from HBM",
    "OUT": "stores to HBM",
    "MXU": "the matrix array",
    "VEC": "the vector lanes",
    "ATT": "the fused attention engine, on chips that have one",
    "NET": "links to other chips",
    "SEQ": "the sequencer",
}
HEAD = """# The instruction set

The instructions of the simulated chips (device `silicon`). `intaglio isa --page` generates this page from the classes
in `src/intaglio/silicon/isa/`; a test compares the two.

## Cores, engines and counters

A chip has several cores, which share its HBM. A core has its own SRAM, its own accumulators (memory for the FP32
results of matrix products) and {engines} engines, which work at the same time:

| engine | what it is |
|---|---|
{roles}

A *stream* is the list of instructions of one core. Each instruction belongs to one engine.

- An engine executes its own instructions one at a time, in the order of the stream.
- An instruction has *finished* when other instructions can see its result. This may be some time after its engine is
  free for the next instruction: a `Load` has finished only after HBM's latency. The instructions of one engine finish
  in order.
- Each engine has a counter: the number of its instructions that have finished.
- Each instruction holds {engines} numbers, one for each engine. It starts when its own engine is free and every
  engine's counter has reached its number. `VEC Drain ... after MXU:3`, for example, starts when the MXU has finished 3
  instructions. Nothing else orders instructions of different engines.
- An instruction that reads the result of an earlier one of the same engine must wait for it by such a number too,
  since its engine may be free before that result is visible. One that only overwrites the result needs no number.

Authors of chip kernels do not write these numbers. They allocate *tiles* (matrices in SRAM or in the accumulators) and
issue instructions that read and write them; `silicon/stream.py` derives the numbers.

## Faults

For each of these faults the simulator ends the run with an error (MachineError), which names the engine, the
instruction and the site (the op's place in the model, such as `layers.3.mlp.down_proj`).

- The chip does not have the instruction: an instruction of ATT or NET on a chip without that engine, or an optional
  instruction ({optional}) that the field `extra_instructions` of the chip's `ChipSpec` does not list.
- The chip's matrix array does not multiply the format of an operand (`Matmul`, `Attend`).
- An operand is in the wrong memory, or the shapes of the operands do not fit each other.
- An operand ends beyond the core's SRAM or accumulators.
- A race: two instructions of a core access the same bytes, at least one of them writes, and no chain of waits orders
  the two.
- A deadlock: instructions wait for each other, or for a message that is never sent. All of them are named.
- An instruction reads bytes that were never written.
- Two cores of a chip access the same bytes of HBM in one run, and at least one of them writes. Nothing orders cores.
- A fault of a single instruction, such as an index outside a table. The section of the instruction says so.

## Encoding

An instruction takes {word} bytes: the opcode (1 byte), the {engines} numbers that it waits for (4 bytes each), the
fields in the order of its table below, and zeros.

| type of a field | content | bytes |
|---|---|---|
| region | a matrix in memory, see below; if there is none, the first byte is 255 | {region} |
| integer | signed integer | 8 |
| number | FP64 | 8 |
| flag | `False` or `True` | 1 |
| one of ... | place of the value in that list, from 0 | 1 |
| stack program | an expression in postfix order, of at most {steps} steps | {stack} |

A region consists of memory (`hbm`, `sram` or `acc`, the accumulators), number format, address of its first byte, rows,
columns, and bytes from one row to the next. The number formats are {formats}; `e4m3` is FP8. Products in other formats,
such as FP4, have no instructions: their time is computed by a formula, and they are not executed.

## How to read the sections

`x f32 [m, k]` means: the region in field `x` has m rows and k columns in format f32. A letter such as m stands for the
same size throughout a section. Where no format is given, the operation takes any format. `@` is the matrix product,
`.T` the transpose, `//` division rounded down.

The last column of a table says whether the instruction reads a region, writes it, or updates it (both). The region is
in HBM if the column says so, and otherwise in the core's SRAM or accumulators. For other fields the column has the
default.
"""


def page() -> str:
    """Returns the text of docs/isa.md, in Markdown. Instructions are ordered by engine and opcode."""
    optional = [f"`{OPCODES[code].__name__}`" for code in sorted(OPCODES) if OPCODES[code].optional]
    out = [
        HEAD.format(
            engines=len(ENGINES), roles="\n".join(f"| {e} | {ENGINE_ROLES[e]} |" for e in ENGINES), word=WORD,
            optional=", ".join(optional), region=REGION.size, steps=MOST_STEPS, stack=9 * MOST_STEPS,
            formats=", ".join(f"`{f}`" for f in FORMATS),
        )
    ]  # fmt: skip
    for engine in ENGINES:
        classes = [OPCODES[code] for code in sorted(OPCODES) if OPCODES[code].engine == engine]
        if classes:
            out.append(f"## {engine}: {ENGINE_ROLES[engine]}\n")
            out += [section(cls) for cls in classes]
    return "\n".join(out)


def section(cls: type[Instruction]) -> str:
    """Returns the section of docs/isa.md about one instruction: name, opcode, docstring, table of fields."""
    default = {f.name: f.default for f in fields(cls)}
    rows = [
        f"| `{name}` | {type_name(kind)} | {access_or_default(cls, name, kind, default[name])} |"
        for name, kind in own_fields(cls)
    ]
    table = ["| field | type | access or default |", "|---|---|---|", *rows] if rows else []
    return "\n".join([f"### {cls.__name__} `{cls.opcode:#04x}`\n", cleandoc(cls.__doc__ or ""), "", *table, ""])


def type_name(kind: Any) -> str:
    """Returns the name of a field's type as docs/isa.md shows it, such as "integer".

    kind: Python type of an instruction's field: int, float, bool, Region, a Literal or Steps. Raises KeyError for
    another type.
    """
    if kind is Region or Region in get_args(kind):
        return "region" if kind is Region else "region or none"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f"`{v}`" if v else "none" for v in get_args(kind))
    return "stack program" if kind == Steps else {bool: "flag", int: "integer", float: "number"}[kind]


def access_or_default(cls: type[Instruction], name: str, kind: Any, default: Any) -> str:
    """Returns the text of the last column in an instruction's table of fields, for the field `name`.

    For a memory region the text is "read", "written" or "updated" (read and written), followed by ", in HBM" if the
    region is in HBM. For another field it is the default value, or "" if there is none.
    """
    if kind is Region or Region in get_args(kind):
        access = ("updated" if name in cls.updates else "written") if name in cls.writes else "read"
        return f"{access}, in HBM" if name in cls.hbm else access
    return "" if default is MISSING or default == () else f"`{default}`" if default != "" else "none"
