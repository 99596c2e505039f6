"""What an instruction is: an engine, fields, a meaning on memory, a cost, and a word of fixed width.

Encoder, assembler and the page docs/isa.md follow from the fields. The instructions themselves are in instructions.py.

An instruction may start when every engine has finished as many instructions as `wait` says: each engine counts what it
has finished, and these counters are the only order there is between engines. An engine runs its own in order.
"""

from __future__ import annotations

import struct
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin

from intaglio.chips import ChipSpec
from intaglio.silicon.memory import FORMATS, SPACES, MachineError, Region, Spaces

ENGINES = ("DMA", "OUT", "MXU", "VEC", "ATT", "NET", "SEQ")
WORD = 256  # bytes
REGION = struct.Struct("<BBxxQIII")  # space, format, address, rows, cols, stride
FORMAT_NAMES = tuple(FORMATS)
Steps = tuple[tuple[str, float | str], ...]  # a small stack program, as ops.elementwise.postfix() gives it
STEP_NAMES: tuple[str, ...] = (
    "a", "b", "c", "+", "-", "*", "/", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "exp", "number",
)  # fmt: skip
STEP_KINDS = {**dict.fromkeys("abc", "operand"), **dict.fromkeys("+-*/", "binary")}
MOST_STEPS = 12


@dataclass(frozen=True)
class Cost:
    """What an instruction holds: cycles of its engine; or bytes moved through a shared resource (hbm, link), which take
    as long as others leave them. `latency_s`: from the end of that until the result is there."""

    cycles: float = 0.0
    bytes: int = 0
    resource: str = ""
    latency_s: float = 0.0


REGISTRY: dict[str, type[Instruction]] = {}
OPCODES: dict[int, type[Instruction]] = {}


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """Base of all instructions: a subclass is a frozen dataclass with run() and cost(), or it fails at import."""

    wait: tuple[int, ...] = (0,) * len(ENGINES)
    engine: ClassVar[str]
    opcode: ClassVar[int]

    def __init_subclass__(cls, engine: str, opcode: int) -> None:
        if engine not in ENGINES:
            raise TypeError(f"instruction {cls.__name__}: engine {engine!r}; use one of {', '.join(ENGINES)}")
        if opcode in OPCODES:
            raise TypeError(f"instruction {cls.__name__}: opcode {opcode:#x} belongs to {OPCODES[opcode].__name__}")
        missing = [face for face in ("run", "cost", "writes") if face not in cls.__dict__]
        if missing:
            raise TypeError(f"instruction {cls.__name__} lacks {', '.join(missing)}")
        cls.engine, cls.opcode = engine, opcode
        REGISTRY[cls.__name__] = OPCODES[opcode] = cls

    writes: ClassVar[tuple[str, ...]]  # names of the region fields it writes; it reads the others
    updates: ClassVar[tuple[str, ...]] = ()  # those of `writes` whose old content it also reads

    def run(self, at: Spaces) -> None:
        """Do it: read regions, write regions."""
        raise NotImplementedError

    def cost(self, spec: ChipSpec) -> Cost:
        raise NotImplementedError

    def regions(self, written: bool) -> Iterator[Region]:
        """The regions it writes, or those it reads."""
        for name in region_fields(type(self)):
            r = getattr(self, name)
            if r is not None and (
                (name in self.writes) if written else name not in self.writes or self.reads_old(name)
            ):
                yield r

    def reads_old(self, name: str) -> bool:
        """Whether it reads what the written field `name` held."""
        return name in self.updates

    def __str__(self) -> str:
        return disassemble(self)


FIELDS: dict[int, tuple[tuple[str, Any], ...]] = {}  # by opcode, as they are first asked for
REGION_FIELDS: dict[int, tuple[str, ...]] = {}


def own_fields(cls: type[Instruction]) -> tuple[tuple[str, Any], ...]:
    """(name, type) of the fields below `wait`."""
    if cls.opcode not in FIELDS:
        hints = typing.get_type_hints(cls)
        FIELDS[cls.opcode] = tuple((f.name, hints[f.name]) for f in fields(cls) if f.name != "wait")
    return FIELDS[cls.opcode]


def region_fields(cls: type[Instruction]) -> tuple[str, ...]:
    """Names of the fields that are regions."""
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
            raise MachineError(f"an expression of {len(value)} steps; an instruction holds {MOST_STEPS}")
        packed = [(STEP_NAMES.index("number" if s == "number" else v), v if s == "number" else 0.0) for s, v in value]
        return b"".join(struct.pack("<Bd", *p) for p in packed).ljust(MOST_STEPS * 9, b"\xff")
    return struct.pack({bool: "<?", int: "<q", float: "<d"}[kind], value)


def _unpack(kind: Any, word: bytes, at: int) -> tuple[Any, int]:
    if kind is Region or (Region in get_args(kind)):
        if word[at] == 0xFF:
            return None, at + REGION.size
        space, format, address, rows, cols, stride = REGION.unpack_from(word, at)
        return Region(SPACES[space], address, rows, cols, stride, FORMAT_NAMES[format]), at + REGION.size
    if get_origin(kind) is Literal:
        return get_args(kind)[word[at]], at + 1
    if kind == Steps:
        raw = [struct.unpack_from("<Bd", word, at + 9 * i) for i in range(MOST_STEPS) if word[at + 9 * i] != 0xFF]
        names = [STEP_NAMES[code] for code, _ in raw]
        pairs = zip(names, raw, strict=True)
        steps = tuple(("number", v) if n == "number" else (STEP_KINDS.get(n, "call"), n) for n, (_, v) in pairs)
        return steps, at + MOST_STEPS * 9
    code = {bool: "<?", int: "<q", float: "<d"}[kind]
    return struct.unpack_from(code, word, at)[0], at + struct.calcsize(code)


def encode(i: Instruction) -> bytes:
    """The word of WORD bytes: opcode, the counters waited for, then the fields in order."""
    word = struct.pack(f"<B{len(ENGINES)}I", i.opcode, *i.wait)
    word += b"".join(_pack(kind, getattr(i, name)) for name, kind in own_fields(type(i)))
    if len(word) > WORD:
        raise MachineError(f"{type(i).__name__} takes {len(word)} bytes; a word has {WORD}")
    return word.ljust(WORD, b"\0")


def decode(word: bytes) -> Instruction:
    """The instruction of a word. Raises MachineError for an opcode there is not."""
    opcode, *wait = struct.unpack_from(f"<B{len(ENGINES)}I", word)
    if opcode not in OPCODES:
        raise MachineError(f"opcode {opcode:#x} is no instruction")
    cls, at, values = OPCODES[opcode], 1 + 4 * len(ENGINES), {}
    for name, kind in own_fields(cls):
        values[name], at = _unpack(kind, word, at)
    return cls(wait=tuple(wait), **values)


def disassemble(i: Instruction) -> str:
    """One line: `VEC Drain dst=... acc=... after MXU:3`; fields at their default are left out."""
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
    """The instruction that disassemble() wrote as `line`. Raises MachineError naming what it does not understand."""
    head, _, after = line.partition(" after ")
    _, name, *parts = head.split()
    if name not in REGISTRY:
        raise MachineError(f"{name!r} is no instruction; there are {', '.join(sorted(REGISTRY))}")
    counts = {engine: int(n) for engine, n in (part.split(":") for part in after.split())}
    given = dict(part.split("=", 1) for part in parts)
    values = {n: _parse(kind, given.pop(n)) for n, kind in own_fields(REGISTRY[name]) if n in given}
    if given:
        raise MachineError(f"{name} has no field {next(iter(given))!r}")
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
