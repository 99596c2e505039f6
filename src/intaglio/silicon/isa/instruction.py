"""Base class of instructions, with encoder and decoder, assembler and disassembler, all derived from the fields.

An instruction belongs to one engine. Each engine executes its instructions in order and counts those it has finished.
An instruction may start when every engine's counter has reached the number given in `wait`; there is no other order
between engines. The instructions themselves are in the other files of this package.
"""

from __future__ import annotations

import struct
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin

from intaglio.chips import Target
from intaglio.ops.elementwise import Steps
from intaglio.silicon.memory import FORMATS, SPACES, CoreMemory, MachineError, Region

ENGINES = ("DMA", "OUT", "MXU", "VEC", "ATT", "NET", "SEQ")
WORD = 256  # bytes of an encoded instruction
REGION = struct.Struct("<BBxxQIII")  # space, format, address, rows, cols, stride
FORMAT_NAMES = tuple(FORMATS)
STEP_NAMES: tuple[str, ...] = (
    "a", "b", "c", "+", "-", "*", "/", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "exp", "number",
    "softplus",
)  # fmt: skip
STEP_KINDS = {**dict.fromkeys("abc", "operand"), **dict.fromkeys("+-*/", "binary")}
MOST_STEPS = 12


@dataclass(frozen=True)
class Cost:
    """Cost of an instruction: the cycles of its engine, or the bytes that it moves through a shared resource.

    Attributes:
        cycles: cycles of the instruction's engine; for a transfer, the minimum number of cycles.
        bytes: number of bytes transferred. If it is not 0, the time is `bytes` divided by the bandwidth that the
            transfer gets. All transfers in progress share the bandwidth of `resource`.
        resource: what carries the bytes, "hbm" or "link"; "" if there are no bytes.
        latency_s: seconds from the end of the instruction until other instructions can see its result.
    """

    cycles: float = 0.0
    bytes: int = 0
    resource: str = ""
    latency_s: float = 0.0


Shapes = dict[str, tuple[int | str, int | str]]
REGISTRY: dict[str, type[Instruction]] = {}
OPCODES: dict[int, type[Instruction]] = {}


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """Base class of the instructions of simulated chips.

    Each subclass is a frozen dataclass that defines run(), cost(), shapes() and `writes`. A subclass gives its engine
    and opcode in the class statement: class Load(Instruction, engine="DMA", opcode=0x10). Raises TypeError at import if
    the engine is unknown, if another class has the opcode, or if a definition is missing.
    """

    wait: tuple[int, ...] = (0,) * len(ENGINES)  # of each engine: instructions it must have finished
    engine: ClassVar[str]
    opcode: ClassVar[int]

    def __init_subclass__(cls, engine: str, opcode: int) -> None:
        if engine not in ENGINES:
            raise TypeError(f"instruction {cls.__name__}: engine {engine!r}; use one of {', '.join(ENGINES)}")
        if opcode in OPCODES:
            raise TypeError(f"instruction {cls.__name__}: opcode {opcode:#x} belongs to {OPCODES[opcode].__name__}")
        missing = [name for name in ("run", "cost", "shapes", "writes") if name not in cls.__dict__]
        if missing:
            raise TypeError(f"instruction {cls.__name__} must define {', '.join(missing)}")
        cls.engine, cls.opcode = engine, opcode
        REGISTRY[cls.__name__] = OPCODES[opcode] = cls

    writes: ClassVar[tuple[str, ...]]  # names of the region fields it writes; it reads the others
    updates: ClassVar[tuple[str, ...]] = ()  # those of `writes` that it also reads
    hbm: ClassVar[tuple[str, ...]] = ()  # names of the region fields that are in HBM; the others are in the core
    optional: ClassVar[bool] = False  # only chips that list it in ChipSpec.extra_instructions have it

    def run(self, mem: CoreMemory) -> None:
        """Execute the instruction: read its source regions, write its destination regions. Returns nothing.

        Raises MachineError for an operand with which hardware would compute a wrong result, such as an index outside a
        table.
        """
        raise NotImplementedError

    def cost(self, target: Target) -> Cost:
        """Returns the Cost of the instruction on a target.

        Raises ChipError if the chip cannot multiply the format of an operand.
        """
        raise NotImplementedError

    def shapes(self) -> Shapes:
        """Returns the shapes that the instruction's memory regions must have, as a dict {field: (rows, columns)}.

        A size is an integer, or a string such as "m". A string stands for any size, but for the same size wherever it
        occurs in the dict. A region field that is not in the dict may have any shape.
        """
        raise NotImplementedError

    def regions(self, written: bool) -> Iterator[Region]:
        """Yield the memory regions that the instruction writes (`written` is True) or reads (`written` is False)."""
        for name in region_fields(type(self)):
            r = getattr(self, name)
            if r is not None and (
                (name in self.writes) if written else name not in self.writes or self.reads_old(name)
            ):
                yield r

    def reads_old(self, name: str) -> bool:
        """True if the instruction reads the old contents of the region `name` before it writes this region."""
        return name in self.updates

    def __str__(self) -> str:
        return disassemble(self)


FIELDS: dict[int, tuple[tuple[str, Any], ...]] = {}  # caches by opcode, filled on first use
REGION_FIELDS: dict[int, tuple[str, ...]] = {}


def own_fields(cls: type[Instruction]) -> tuple[tuple[str, Any], ...]:
    """Returns the fields of an instruction class as a tuple of (name, type), in the order in which they are encoded.

    The field `wait`, which all instructions have, is left out.
    """
    if cls.opcode not in FIELDS:
        hints = typing.get_type_hints(cls)
        FIELDS[cls.opcode] = tuple((f.name, hints[f.name]) for f in fields(cls) if f.name != "wait")
    return FIELDS[cls.opcode]


def region_fields(cls: type[Instruction]) -> tuple[str, ...]:
    """Returns the names of the fields that hold a memory region (a Region or None), as a tuple."""
    if cls.opcode not in REGION_FIELDS:
        named = own_fields(cls)
        REGION_FIELDS[cls.opcode] = tuple(n for n, kind in named if kind is Region or Region in get_args(kind))
    return REGION_FIELDS[cls.opcode]


def _pack(kind: Any, value: Any) -> bytes:
    if kind is Region or (Region in get_args(kind)):
        if value is None:
            return b"\xff" + bytes(REGION.size - 1)
        space, format = SPACES.index(value.space), FORMAT_NAMES.index(value.format)
        return REGION.pack(space, format, value.address, value.rows, value.cols, value.stride)
    if get_origin(kind) is Literal:
        return struct.pack("<B", get_args(kind).index(value))
    if kind == Steps:
        if len(value) > MOST_STEPS:
            raise MachineError(f"an expression of {len(value)} steps; an instruction holds at most {MOST_STEPS}")
        packed = [(STEP_NAMES.index("number" if s == "number" else v), v if s == "number" else 0.0) for s, v in value]
        return b"".join(struct.pack("<Bd", *p) for p in packed).ljust(MOST_STEPS * 9, b"\xff")
    return struct.pack({bool: "<?", int: "<q", float: "<d"}[kind], value)


def _unpack(kind: Any, word: bytes, offset: int) -> tuple[Any, int]:
    """Decode the field of type `kind` at byte `offset` of `word`. Returns (value, offset of the next field)."""
    if kind is Region or (Region in get_args(kind)):
        if word[offset] == 0xFF:
            return None, offset + REGION.size
        space, format, address, rows, cols, stride = REGION.unpack_from(word, offset)
        return Region(SPACES[space], address, rows, cols, stride, FORMAT_NAMES[format]), offset + REGION.size
    if get_origin(kind) is Literal:
        return get_args(kind)[word[offset]], offset + 1
    if kind == Steps:
        starts = range(offset, offset + 9 * MOST_STEPS, 9)
        raw = [struct.unpack_from("<Bd", word, start) for start in starts if word[start] != 0xFF]
        names = [STEP_NAMES[code] for code, _ in raw]
        pairs = zip(names, raw, strict=True)
        steps = tuple(("number", v) if n == "number" else (STEP_KINDS.get(n, "call"), n) for n, (_, v) in pairs)
        return steps, offset + MOST_STEPS * 9
    code = {bool: "<?", int: "<q", float: "<d"}[kind]
    return struct.unpack_from(code, word, offset)[0], offset + struct.calcsize(code)


def encode(i: Instruction) -> bytes:
    """Returns an instruction encoded as 256 bytes (the constant WORD).

    The bytes are the opcode, the wait counters, the fields in order, and zeros. Raises MachineError if the fields need
    more bytes, or if an expression has more than MOST_STEPS steps.
    """
    word = struct.pack(f"<B{len(ENGINES)}I", i.opcode, *i.wait)
    word += b"".join(_pack(kind, getattr(i, name)) for name, kind in own_fields(type(i)))
    if len(word) > WORD:
        raise MachineError(f"{type(i).__name__} takes {len(word)} bytes; a word has {WORD}")
    return word.ljust(WORD, b"\0")


def decode(word: bytes) -> Instruction:
    """Returns the Instruction that was encoded as `word` by encode().

    word: 256 bytes (the constant WORD); the length is not checked. Raises MachineError for an unknown opcode.
    """
    opcode, *wait = struct.unpack_from(f"<B{len(ENGINES)}I", word)
    if opcode not in OPCODES:
        raise MachineError(f"unknown opcode {opcode:#x}; known: {', '.join(f'{code:#x}' for code in sorted(OPCODES))}")
    cls, offset, values = OPCODES[opcode], 1 + 4 * len(ENGINES), {}
    for name, kind in own_fields(cls):
        values[name], offset = _unpack(kind, word, offset)
    return cls(wait=tuple(wait), **values)


def disassemble(i: Instruction) -> str:
    """Returns one line of text for an instruction, such as `VEC Drain dst=... acc=... after MXU:3`.

    Fields that have their default value are left out.
    """
    default = {f.name: f.default for f in fields(i) if f.default is not MISSING}
    parts = [f"{name}={_text(getattr(i, name))}" for name, _ in own_fields(type(i)) if _differs(i, name, default)]
    after = [f"{engine}:{n}" for engine, n in zip(ENGINES, i.wait, strict=True) if n]
    return " ".join([i.engine, type(i).__name__, *parts, *(["after", *after] if after else [])])


def _differs(i: Instruction, name: str, default: dict[str, Any]) -> bool:
    return name not in default or getattr(i, name) != default[name]


def _text(value: Any) -> str:
    if isinstance(value, Region):
        return f"{value.format}:{value.rows}x{value.cols}@{value.space}:{value.address:#x}+{value.stride}"
    if isinstance(value, tuple):
        return ",".join(f"{v!r}" if s == "number" else f"{v}" for s, v in value)
    return repr(value) if isinstance(value, float) else str(value)


def assemble(line: str) -> Instruction:
    """Returns the Instruction that `line` describes. The line has the form that disassemble() writes.

    Raises MachineError for an unknown instruction or field.
    """
    head, _, after = line.partition(" after ")
    _, name, *parts = head.split()
    if name not in REGISTRY:
        raise MachineError(f"unknown instruction {name!r}; known: {', '.join(sorted(REGISTRY))}")
    counts = {engine: int(n) for engine, n in (part.split(":") for part in after.split())}
    given = dict(part.split("=", 1) for part in parts)
    values = {n: _parse(kind, given.pop(n)) for n, kind in own_fields(REGISTRY[name]) if n in given}
    if given:
        known = ", ".join(n for n, _ in own_fields(REGISTRY[name]))
        raise MachineError(f"{name} has no field {next(iter(given))!r}; its fields are {known}")
    return REGISTRY[name](wait=tuple(counts.get(engine, 0) for engine in ENGINES), **values)


def _parse(kind: Any, text: str) -> Any:
    if kind is Region or (isinstance(kind, types.UnionType) and Region in get_args(kind)):
        format, shape = text.split("@")[0].split(":")
        space, place = text.split("@")[1].split(":")
        (rows, cols), (address, stride) = shape.split("x"), place.split("+")
        return Region(space, int(address, 16), int(rows), int(cols), int(stride), format)
    if get_origin(kind) is Literal:
        return text
    if kind == Steps:
        return tuple(
            (STEP_KINDS.get(s, "call"), s) if s in STEP_NAMES else ("number", float(s)) for s in text.split(",")
        )
    return text == "True" if kind is bool else kind(text)
