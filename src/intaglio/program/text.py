"""Prints the text form of a Program. parse.py reads it back to an equal Program.

A section `layers.3:` contains the ops of a layer; inside it a leading dot stands for `layers.3.`.

    weight .attn.q_proj.weight bf16[2048, 2048] from model.layers.3.self_attn.q_proj.weight
    .attn.q_proj: f32[T, 2048] = linear(.attn.norm, .attn.q_proj.weight) x_format=bf16
    .attn.q: f32[T, 64] = view .attn.qkv_proj from 0
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from itertools import groupby

import numpy as np

from intaglio.ops import Op, Tensor
from intaglio.ops.op import Tensors

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
    """Returns `value` written as a Python literal, without spaces outside strings.

    In the text form, spaces separate the attributes of an op.
    """
    return repr(value) if isinstance(value, str) else repr(value).replace(" ", "")


def _op_line(op: Op, tensors: Tensors, section: str) -> str:
    def result(name: str) -> str:
        t = tensors[name]
        role = "output " if t.role == "output" else ""
        return role + ("" if name == op.site else _short(name, section) + " ") + _type(t)

    results = ", ".join(result(n) for n in op.outputs)
    operands = [_short(getattr(op, n), section) for n in op.named("operand")]
    operands += [f"{n}={_short(v, section)}" for n in op.named("optional") if (v := getattr(op, n)) is not None]
    call = " ".join([f"{op.kind}({', '.join(operands)})", *_attributes(op)])
    return f"{_short(op.site, section)}: {results + ' = ' if results else ''}{call}"


def _sections(ops: Sequence[Op], tensors: Tensors) -> Iterator[tuple[str, list[str]]]:
    """Yield the parts of a Program's text form as (section name, list of lines), in order.

    A section is a layer such as "layers.3", or "" for everything outside layers. Its lines declare its weights and
    state, then list its ops and views. If ops of a layer do not follow each other directly, the layer has several
    parts.
    """
    declared: set[str] = set()
    views: dict[str, list[Tensor]] = {}
    for t in tensors.values():
        if t.view:
            views.setdefault(t.view[0], []).append(t)
    header = [_declare(t, "") for t in tensors.values() if t.role in ("input", "const")]
    sections = {_section(op.site) for op in ops} - {""}
    held = [t for t in tensors.values() if t.role in ("weight", "state")]
    header += [_declare(t, "") for t in held if _section(t.name) not in sections]
    yield "", header
    for section, group in groupby(ops, key=lambda op: _section(op.site)):
        lines = []
        if section and section not in declared:
            declared.add(section)
            lines += [_declare(t, section) for t in held if _section(t.name) == section]
        for op in group:
            lines.append(_op_line(op, tensors, section))
            for t in (v for out in op.outputs for v in views.get(out, ())):
                assert t.view
                base, start = t.view
                lines.append(f"{_short(t.name, section)}: {_type(t)} = view {_short(base, section)} from {start}")
        yield section, lines


def print_text(head: str, ops: Sequence[Op], tensors: Tensors, fold: bool = False) -> str:
    """Returns a Program in its text form, with `head` as its first line.

    Args:
        head: the first line.
        ops: the Program's ops, in order.
        tensors: the Program's tensors, by name.
        fold: True to print layers with equal text only once. The result is then for people, and cannot be parsed.
    """
    out = [head]
    alike: list[str] = []

    def flush() -> None:
        if len(alike) > 1:
            out.append(f"{alike[1]}{' .. ' + alike[-1] if len(alike) > 2 else ''}: as {alike[0]}")

    previous, body = "", ""
    for section, lines in _sections(ops, tensors):
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
