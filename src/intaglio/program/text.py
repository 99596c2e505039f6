"""The text form of a Program: prints like assembly, parses back to an equal Program.

A section `layers.3:` gathers what belongs to a layer; inside it a leading dot stands for `layers.3.`.

    weight .attn.q_proj.weight bf16[2048, 2048] from model.layers.3.self_attn.q_proj.weight
    .attn.q_proj: f32[T, 2048] = linear(.attn.norm, .attn.q_proj.weight) x_format=bf16
    .attn.q: f32[T, 64] = view .attn.qkv_proj from 0
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from itertools import groupby

import numpy as np

from intaglio.ops import REGISTRY, Op, Tensor
from intaglio.ops.op import Shape
from intaglio.program.program import Program, ProgramError

SECTION = re.compile(r"(layers\.\d+)\.")
BARE = re.compile(r"[A-Za-z_]\w*")


def _section(site: str) -> str:
    match = SECTION.match(site)
    return match[1] if match else ""


def _short(name: str, section: str) -> str:
    return name[len(section) :] if section and name.startswith(section + ".") else name


def _type(t: Tensor) -> str:
    return t.type + (f" %{t.buffer}" if t.buffer is not None else "")


def _declare(t: Tensor, section: str) -> str:
    line = f"{t.role} {_short(t.name, section)} {t.type}"
    if t.source:
        line += " from " + " + ".join(t.source)
    if t.values:
        line += " = " + " ".join(str(np.float32(x)) for x in t.values)
    return line


def _attributes(op: Op) -> Iterator[str]:
    defaults = {f.name: f.default for f in fields(op)}
    for name in op.named("attribute"):
        value = getattr(op, name)
        if value != defaults[name] or defaults[name] is MISSING:
            bare = isinstance(value, str) and BARE.fullmatch(value) and value not in ("True", "False", "None")
            yield f"{name}={value if bare else _literal(value)}"


def _literal(value: object) -> str:
    """As Python writes it; without spaces but in text, for spaces part attributes."""
    return repr(value) if isinstance(value, str) else repr(value).replace(" ", "")


def _op_line(p: Program, op: Op, section: str) -> str:
    def result(name: str) -> str:
        t = p.tensors[name]
        role = "output " if t.role == "output" else ""
        return role + ("" if name == op.site else _short(name, section) + " ") + _type(t)

    results = ", ".join(result(n) for n in op.outputs)
    operands = [_short(getattr(op, n), section) for n in op.named("operand")]
    operands += [f"{n}={_short(v, section)}" for n in op.named("optional") if (v := getattr(op, n)) is not None]
    call = " ".join([f"{op.kind}({', '.join(operands)})", *_attributes(op)])
    return f"{_short(op.site, section)}: {results + ' = ' if results else ''}{call}"


def _sections(p: Program) -> Iterator[tuple[str, list[str]]]:
    """(section, lines) in order: each section declares its weights and state, then lists its ops and views."""
    declared: set[str] = set()
    views: dict[str, list[Tensor]] = {}
    for t in p.tensors.values():
        if t.view:
            views.setdefault(t.view[0], []).append(t)
    header = [_declare(t, "") for t in p.tensors.values() if t.role in ("input", "const")]
    sections = {_section(op.site) for op in p.ops} - {""}
    held = [t for t in p.tensors.values() if t.role in ("weight", "state")]
    header += [_declare(t, "") for t in held if _section(t.name) not in sections]
    yield "", header
    for section, group in groupby(p.ops, key=lambda op: _section(op.site)):
        ops = list(group)
        lines = []
        if section and section not in declared:
            declared.add(section)
            lines += [_declare(t, section) for t in held if _section(t.name) == section]
        for op in ops:
            lines.append(_op_line(p, op, section))
            for t in (v for out in op.outputs for v in views.get(out, ())):
                assert t.view
                base, start = t.view
                lines.append(f"{_short(t.name, section)}: {_type(t)} = view {_short(base, section)} from {start}")
        yield section, lines


def print_program(p: Program, fold: bool = False) -> str:
    """The text form. With `fold`, for reading only: a run of layers alike is printed once and named."""
    out = [f"program {p.name} context={p.context} mesh={p.mesh} rank={p.rank}"]
    alike: list[str] = []

    def flush() -> None:
        if len(alike) > 1:
            out.append(f"{alike[1]}{' .. ' + alike[-1] if len(alike) > 2 else ''}: as {alike[0]}")

    previous, body = "", ""
    for section, lines in _sections(p):
        text = "\n".join(lines)
        if fold and section:
            number = section.split(".")[1]
            before = f"layers.{int(number) - 1}."
            same = re.sub(r"from [^\d\s]\S*( \+ \S+)*", "", text.replace(before, "previous."))
            same = re.sub(r" = -?\d.*", "", re.sub(r" %\d+", "", same))
            if same == body:
                alike.append(section)
                continue
            flush()
            alike, body = [section], same
        else:
            flush()
            alike, body = [], ""
        if section != previous:
            out.append(f"\n{section or 'top'}:")
        out += ["  " + line for line in lines]
        previous = section
    flush()
    return "\n".join(out) + "\n"


class _Parser:
    """One pass over the lines; keeps the section for leading dots."""

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
        self.add(Tensor(self.full(site), shape, format, "temp", view=(self.full(base), int(start)), buffer=buffer))

    def op(self, site: str, results: str, call: str) -> None:
        match = re.fullmatch(r"(\w+)\(([^)]*)\)(.*)", call)
        if not match or match[1] not in REGISTRY:
            raise ProgramError(f"{call!r} is not a call of a known op ({', '.join(sorted(REGISTRY))})")
        cls = REGISTRY[match[1]]
        given: dict[str, object] = {}
        positional = iter(cls.named("operand"))
        for item in filter(None, (x.strip() for x in match[2].split(","))):
            name, _, value = item.rpartition("=")
            given[name or next(positional)] = self.full(value)
        known = set(cls.named("attribute"))
        for name, value in re.findall(r"(\w+)=('[^']*'|\"[^\"]*\"|\S+)", match[3]):
            if name not in known:
                raise ProgramError(f"op {match[1]} has no attribute {name!r}; it has {', '.join(sorted(known))}")
            bare = BARE.fullmatch(value) and value not in ("True", "False", "None")
            given[name] = value if bare else ast.literal_eval(value)
        declared = re.findall(r"[^,\[]+\[[^\]]*\](?: %\d+)?", results)
        for field_name, text in zip(cls.named("result"), declared, strict=True):
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
    """The Program a text form describes (not verified). Raises ProgramError with the line's number."""
    lines = text.splitlines()
    head = re.fullmatch(r"program (\S+) context=(\d+) mesh=(\d+) rank=(\d+)", lines[0].strip()) if lines else None
    if not head:
        raise ProgramError("line 1: a program starts with 'program NAME context=N mesh=N rank=N'")
    parser = _Parser()
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            try:
                parser.line(line.strip())
            except (ProgramError, ValueError, SyntaxError, TypeError, StopIteration) as e:
                raise ProgramError(f"line {number}: {e}") from None
    return Program(head[1], tuple(parser.ops), parser.tensors, int(head[2]), int(head[3]), int(head[4]))
