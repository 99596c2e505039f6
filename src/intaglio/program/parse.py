"""Parses the text form of a Program, as text.py prints it."""

from __future__ import annotations

import ast
import re

import numpy as np

from intaglio.ops import REGISTRY, Op, Tensor
from intaglio.ops.op import Shape
from intaglio.plugins import load_plugins
from intaglio.program.program import Program, ProgramError
from intaglio.program.text import BARE

ATTRIBUTE = re.compile(r"(?:(?<=\s)|^)(\w+)=('[^']*'|\"[^\"]*\"|\S+)")
RESULT = re.compile(r"[^,\[]+\[[^\]]*\](?: %\d+)?")


def literal(name: str, text: str) -> object:
    """Returns the value of an op's attribute, parsed from its text as a Python literal.

    `name` is the attribute's name, for the error. Raises ProgramError if the text is not a Python literal.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ProgramError(f"{name} is {text!r}; wanted a number, a text in quotes, True, False or None") from None


class _Parser:
    """Parses a Program's text form, line by line, and collects its ops and tensors.

    A line such as "layers.3:" begins a section. In a section, a name that begins with a dot is completed with the
    section's name: ".attn" becomes "layers.3.attn".
    """

    def __init__(self) -> None:
        self.section = ""
        self.ops: list[Op] = []
        self.tensors: dict[str, Tensor] = {}

    def full(self, name: str) -> str:
        return self.section + name if name.startswith(".") else name

    def type(self, text: str) -> tuple[str, Shape, int | None]:
        match = re.fullmatch(r"(\w+)\[([^\]]*)\](?: %(\d+))?", text.strip())
        if not match:
            raise ProgramError(f"{text!r} is not a type such as f32[T, 64]")
        dims = [d.strip() for d in match[2].split(",") if d.strip()]
        shape = tuple(int(d) if d.isdigit() else d for d in dims)
        return match[1], shape, int(match[3]) if match[3] else None

    def add(self, tensor: Tensor) -> None:
        if tensor.name in self.tensors:
            raise ProgramError(f"{tensor.name} is declared twice")
        self.tensors[tensor.name] = tensor

    def declare(self, role: str, rest: str) -> None:
        head, _, values = rest.partition(" = ")
        head, _, source = head.partition(" from ")
        name, _, kind = head.partition(" ")
        format, shape, _ = self.type(kind)
        numbers = tuple(float(np.float32(x)) for x in values.split())
        sources = tuple(source.split(" + ")) if source else ()
        self.add(Tensor(self.full(name), shape, format, role, sources, values=numbers))

    def view(self, site: str, kind: str, rest: str) -> None:
        base, _, start = rest.partition(" from ")
        format, shape, buffer = self.type(kind)
        if not start.isdecimal():
            raise ProgramError(f"a view starts at column {start!r}; wanted a number, as in 'view x from 64'")
        self.add(Tensor(self.full(site), shape, format, "temp", view=(self.full(base), int(start)), buffer=buffer))

    def op(self, site: str, results: str, call: str) -> None:
        match = re.fullmatch(r"(\w+)\(([^)]*)\)(.*)", call)
        if not match or match[1] not in REGISTRY:
            raise ProgramError(f"{call!r} is not a call of a known op ({', '.join(sorted(REGISTRY))})")
        cls = REGISTRY[match[1]]
        given: dict[str, object] = {}
        positional, operands = iter(cls.named("operand")), cls.named("operand", "optional")
        for item in filter(None, (x.strip() for x in match[2].split(","))):
            name, _, value = item.rpartition("=")
            name = name or next(positional, "")
            if name not in operands or name in given:
                raise ProgramError(f"{item!r} is no operand of op {match[1]}, or given twice: {', '.join(operands)}")
            given[name] = self.full(value)
        known = set(cls.named("attribute"))
        if rest := ATTRIBUTE.sub("", match[3]).strip():
            raise ProgramError(f"{rest!r} is no attribute of op {match[1]}; they are written NAME=VALUE")
        for name, value in ATTRIBUTE.findall(match[3]):
            if name not in known:
                raise ProgramError(f"op {match[1]} has no attribute {name!r}; it has {', '.join(sorted(known))}")
            if name in given:
                raise ProgramError(f"attribute {name} is given twice")
            bare = BARE.fullmatch(value) and value not in ("True", "False", "None")
            given[name] = value if bare else literal(name, value)
        declared, wanted = RESULT.findall(results), cls.named("result")
        if RESULT.sub("", results).strip(" ,") or len(declared) != len(wanted):
            raise ProgramError(f"{results!r} are not the {len(wanted)} results of op {match[1]}: {', '.join(wanted)}")
        for field_name, text in zip(wanted, declared, strict=True):
            words = text.strip(" ,").split(" ")
            role = "output" if words[0] == "output" else "temp"
            words = words[1:] if role == "output" else words
            own = "[" not in words[0]
            given[field_name] = self.full(words[0]) if own else site
            format, shape, buffer = self.type(" ".join(words[1:] if own else words))
            self.add(Tensor(str(given[field_name]), shape, format, role, buffer=buffer))
        self.ops.append(cls(site=site, **given))

    def line(self, text: str) -> None:
        role, _, rest = text.partition(" ")
        if role in ("input", "const", "weight", "state"):
            self.declare(role, rest)
        elif match := re.fullmatch(r"(layers\.\d+|top):", text):
            self.section = "" if match[1] == "top" else match[1]
        elif match := re.fullmatch(r"(\S+): (.*) = view (.*)", text):
            self.view(*match.groups())
        elif match := re.fullmatch(r"(\S+): (?:(.*?\](?: %\d+)?) = )?(\w+\(.*)", text):
            self.op(self.full(match[1]), match[2] or "", match[3])
        else:
            raise ProgramError(f"{text!r} is neither a declaration, a section, a view nor an op")


def parse_program(text: str) -> Program:
    """Returns the Program that is written in `text`, the text form of a Program. The Program is not verified.

    Raises ProgramError, with the number of the first line that is wrong. Raises PluginError if a plugin cannot be
    imported.
    """
    load_plugins()
    lines = text.splitlines()
    head = re.fullmatch(r"program (\S+) context=(\d+) mesh=(\d+) rank=(\d+)", lines[0].strip()) if lines else None
    if not head:
        raise ProgramError("line 1: a program starts with 'program NAME context=N mesh=N rank=N'")
    parser = _Parser()
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            try:
                parser.line(line.strip())
            except (ProgramError, ValueError, TypeError) as e:
                shown = repr(line.strip())
                raise ProgramError(f"line {number}: {e}{'' if shown in str(e) else f' in {shown}'}") from None
    return Program(head[1], tuple(parser.ops), parser.tensors, int(head[2]), int(head[3]), int(head[4]))
