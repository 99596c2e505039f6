"""Tool calls whose arguments are written one by one between tags: Qwen3-Coder, GLM-4.5, MiniMax-M2, DeepSeek-V3.2."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from intaglio.server.markup.json_calls import calls, close, peek_call
from intaglio.server.markup.source import (
    CallArguments,
    CallStart,
    Pieces,
    Reading,
    Source,
    Steps,
    Tools,
    blanks,
    called,
    collect,
    skip,
    until,
)

KINDS: dict[str, type | tuple[type, ...]] = {
    "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list, "object": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Tags:
    """The tags in which one model family writes a tool call, such as <function=NAME> ... </function>.

    A call is: `begin`, the function's name, `named`, the arguments, `end`. An argument is: `key`, its name, `keyed`,
    `between`, its value, `end_value`.

    Attributes:
        begin: text in front of the function's name, such as "<function="; "" if there is none.
        named: text after the function's name, such as ">".
        key: text in front of an argument's name, such as "<parameter=".
        keyed: text after an argument's name, such as ">".
        end_value: closing tag after an argument's value.
        end: closing tag of the call; "" if there is none.
        between: opening tag of an argument's value; "" if there is none.
    """

    begin: str
    named: str
    key: str
    keyed: str
    end_value: str
    end: str
    between: str = ""


QWEN = Tags("<function=", ">", "<parameter=", ">", "</parameter>", "</function>")
GLM = Tags("", "\n", "<arg_key>", "</arg_key>", "</arg_value>", "", "<arg_value>")
INVOKE = Tags('<invoke name="', '">', '<parameter name="', '">', "</parameter>", "</invoke>")
DSML = Tags(
    '<｜DSML｜invoke name="', '">', '<｜DSML｜parameter name="', ">", "</｜DSML｜parameter>", "</｜DSML｜invoke>"
)


def tagged(end: str, *ways: Tags) -> Reading:
    """Returns a parser of tool calls that are written in tags such as <function=NAME>, or as JSON.

    The parser is a generator function with the arguments (s, opener, tools): the model's output as a Source; the
    delimiter in front of the calls, already consumed; and the request's tools. Its generator yields Parts, and None
    while it waits for more text of the model. The generator's return value is True if the start of a call was yielded,
    else False.

    end: delimiter after the last call; the parser consumes it, and accepts that it is missing. ways: the sets of tags
    in which a call may be written.
    """

    def read(s: Source, opener: str, tools: Tools) -> Steps[bool]:
        if not (yield from blanks(s)):
            return False
        if s.held[0] in "{[":
            began = yield from calls(s)
            while began and (yield from peek_call(s)):
                yield from calls(s)
        else:
            began = False
            while (way := (yield from _way(s, ways))) and (yield from _call(s, way, end, tools)):
                began = True
                if not way.end:
                    break
        if began:
            yield from close(s, end)
        return began

    return read


def _way(s: Source, ways: tuple[Tags, ...]) -> Generator[None, None, Tags | None]:
    """Consume the opening tag of the next tool call, and find the set of tags to which this tag belongs.

    This generator yields None while it waits for more text of the model in `s`. Its return value is the Tags in `ways`
    whose opening tag was read. If no opening tag comes next, the return value is the first Tags in `ways` without an
    opening tag; None if all of them have one.
    """
    marks = [w.begin for w in ways if w.begin]
    found = (yield from skip(s, *marks)) if marks else None
    return next((w for w in ways if w.begin and w.begin == found), next((w for w in ways if not w.begin), None))


def _call(s: Source, way: Tags, end: str, tools: Tools) -> Steps[bool]:
    """Parse one tool call that is written in the tags `way`. Yields a CallStart, then CallArguments.

    This generator also yields None while it waits for more text of the model. Its return value is True if the start of
    a call was yielded, even if the call is cut off.

    If the tags have no opening tag (GLM), the function's name ends at a line break, at the first argument, or at `end`,
    and must be the name of one of `tools`. end: delimiter after the last call.
    """
    ends = (way.named,) if way.begin else (way.named, way.key, end)
    while not any(e in s.held for e in ends) and not s.last and len(s.held) < 300:
        yield None
    at = min((n for e in ends if (n := s.held.find(e)) >= 0), default=-1)
    name = s.held[:at].strip().strip("\"'") if at >= 0 else ""
    if not re.fullmatch(r"[\w.:/-]{1,128}", name) or not (way.begin or name in tools):
        return False
    s.take(at + (len(way.named) if s.held.startswith(way.named, at) else 0))
    yield CallStart(name)
    schema, written = tools.get(name, {}), 0
    properties = schema.get("properties")
    while (yield from skip(s, way.key)):
        key, _ = yield from until(s, way.keyed)
        forced = 'string="true"' in key
        key = key.split('"')[0].strip()
        if way.between:
            yield from skip(s, way.between)
        yield CallArguments(("{" if not written else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        written += 1
        kinds = types(properties.get(key) if isinstance(properties, Mapping) else None, schema)
        follow = (way.key, way.end, end) if way.end else (way.key, end)
        _, good = yield from called(_argument(s, way, {"string"} if forced else kinds, follow), CallStart(name), True)
        if not good:
            return True
    closed = (yield from skip(s, way.end)) if way.end else None
    while not closed and not s.last and end.startswith(s.held.lstrip()) and s.held.lstrip() != end:
        yield None
    if closed or not s.last or s.held.lstrip().startswith(end):
        yield CallArguments("}" if written else "{}")
    return True


def _argument(s: Source, way: Tags, kinds: set[str], follow: tuple[str, ...]) -> Pieces[bool]:
    """Parse one argument's value and yield it as JSON text: strings piece by piece, other values when complete.

    This generator also yields None while it waits for more text of the model. Its return value is True, or False if the
    closing tag of the value never comes.

    kinds: JSON types that the tool's schema allows. follow: tags that may come after the value's closing tag.
    """
    if kinds == {"string"}:
        yield '"'
        text = raw(s, way.end_value, follow)
        while True:
            try:
                piece = next(text)
            except StopIteration as e:
                if e.value:
                    yield '"'
                return bool(e.value)
            yield None if piece is None else json.dumps(piece, ensure_ascii=False)[1:-1]
    pieces: list[str] = []
    if not (yield from collect(raw(s, way.end_value, follow), pieces)):
        return False
    yield json.dumps(typed("".join(pieces), kinds), ensure_ascii=False)
    return True


def raw(s: Source, mark: str, follow: tuple[str, ...]) -> Pieces[bool]:
    """Yield the text in front of the closing tag `mark`, in pieces, and consume the tag.

    The text itself may contain `mark`. It counts as the closing tag only if one of the tags `follow` comes next, or if
    the output ends there. One line break at each end of the text is removed. This generator also yields None while it
    waits for more text of the model. Its return value is True, or False if the closing tag never comes.
    """
    while not s.held and not s.last:
        yield None
    s.take(s.held.startswith("\n"))
    while True:
        at = s.held.find(mark)
        if at < 0:
            if piece := s.take(s.safe("\n" + mark, mark)):
                yield piece
            if s.last:
                return False
            yield None
            continue
        rest = s.held[at + len(mark) :].lstrip()
        if not s.last and (not rest or any(f != rest and f.startswith(rest) for f in follow)):
            yield None
            continue
        ends = any(rest.startswith(f) for f in follow if f) or (s.last and not rest)
        piece = s.take(at if ends else at + len(mark))
        if ends:
            s.take(len(mark))
            piece = piece.removesuffix("\n")
        if piece:
            yield piece
        if ends:
            return True


def types(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """Returns the set of JSON types that the schema of an argument allows; {"string"} if the schema names none.

    root: the schema in which references ($ref) are looked up.
    """
    if not isinstance(schema, Mapping):
        return {"string"}
    if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#/"):
        target: Any = root
        for part in ref[2:].split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        return types(target, {}) if target is not None else {"string"}
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {str(k) for k in kind}
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list) and options:
        return set().union(*(types(o, root) for o in options))
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values:
        return {name for v in values for name in (*KINDS, "string") if _is(v, name)}
    return {"object"} if "properties" in schema else {"string"}


def typed(text: str, kinds: set[str]) -> Any:
    """Returns the value that the text of an argument stands for, such as 3 for "3".

    The value has one of the JSON types `kinds`. If the text fits none of these types except string, the text itself is
    returned. White space around it is removed, unless `kinds` is {"string"}.
    """
    text = text.strip() if kinds != {"string"} else text
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
            json.dumps(found, allow_nan=False)  # raises for a value that JSON cannot express: a set, bytes, NaN
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if any(_is(found, kind) for kind in kinds if kind != "string"):
            return found
    if "boolean" in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text


def _is(value: Any, kind: str) -> bool:
    if kind == "string":
        return isinstance(value, str)
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    return kind in KINDS and isinstance(value, KINDS[kind])
