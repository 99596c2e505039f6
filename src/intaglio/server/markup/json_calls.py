"""Tool calls as JSON: incremental parsers of JSON values and of calls written as objects or lists of objects.

The parsers pass on what is valid so far. They repair raw control characters in strings, and arguments that are missing,
null, or a JSON object inside a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator

from intaglio.server.markup.source import (
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
    some,
)

NAMES, ARGUMENTS = ("name", "tool_name", "function"), ("arguments", "parameters")
KEYS = (*NAMES, *ARGUMENTS, "id", "type", "tool_call_id")
MAX_DEPTH = 100
SCALAR = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
CONTROL = re.compile(r"[\x00-\x1f]")


def value(s: Source, depth: int = 0) -> Pieces[bool]:
    """Parse one JSON value and yield its text piece by piece.

    The text that is yielded has one space after each `,` and `:`. This generator yields None while it waits for more
    text of the model. Its return value is True if the JSON value is complete. It is False if the text is not JSON, ends
    early, or is nested deeper than MAX_DEPTH.

    depth: number of JSON objects and lists that enclose this value.
    """
    if not (yield from blanks(s)) or depth > MAX_DEPTH:
        return False
    match s.held[0]:
        case "{":
            return (yield from _members(s, depth, "{", "}"))
        case "[":
            return (yield from _members(s, depth, "[", "]"))
        case '"':
            return (yield from string(s))
    while re.fullmatch(r"[-+.\w]*", s.held) and not s.last:
        yield None
    word = re.match(r"[-+.\w]*", s.held)
    if not word or not SCALAR.fullmatch(word[0]):
        return False
    yield s.take(len(word[0]))
    return True


def string(s: Source) -> Pieces[bool]:
    """Parse one JSON string and yield its text piece by piece.

    The text that is yielded includes the quotes; control characters in it are escaped. This generator yields None while
    it waits for more text of the model in `s`. Its return value is True if the string is complete. It is False if the
    text does not begin with a quote or ends early.
    """
    if not (yield from some(s)) or s.held[0] != '"':
        return False
    pending, escaped = s.take(1), False
    while True:
        for at, c in enumerate(s.held):
            if c == '"' and not escaped:
                yield pending + _escape(s.take(at)) + s.take(1)
                return True
            escaped = c == "\\" and not escaped
        whole = len(s.held) - escaped  # an escape sequence stays in one piece
        if piece := pending + _escape(s.take(max(0, whole))):
            yield piece
        pending, escaped = "", False
        if s.last:
            return False
        held = len(s.held)
        while len(s.held) == held and not s.last:
            yield None


def _escape(text: str) -> str:
    """Returns `text` with each raw control character, which JSON strings must not contain, as an escape sequence."""
    return CONTROL.sub(lambda c: json.dumps(c[0])[1:-1], text)


def _members(s: Source, depth: int, begin: str, end: str) -> Pieces[bool]:
    """Parse a JSON object or list between the brackets `begin` and `end`, and yield its text piece by piece.

    The opening bracket is yielded only when the first member is known to be valid. This generator also yields None
    while it waits for more text of the model. Its return value is True if the object or list is complete, else False.

    depth: number of JSON objects and lists that enclose this one.
    """
    pending = s.take(1)
    if not (yield from blanks(s)):
        return False
    if s.held[0] == end:
        yield pending + s.take(1)
        return True
    while True:
        if begin == "{":
            key: list[str] = []
            if not (yield from blanks(s)) or not (yield from collect(string(s), key)) or not (yield from blanks(s)):
                return False
            if s.held[0] != ":":
                return False
            s.take(1)
            yield f"{pending}{''.join(key)}: "
            pending = ""
        if pending:
            first: list[str] = []
            good = yield from collect(value(s, depth + 1), first)
            if not good:
                return False
            yield pending + "".join(first)
        elif not (yield from value(s, depth + 1)):
            return False
        if not (yield from blanks(s)):
            return False
        match s.held[0]:
            case ",":
                s.take(1)
                pending = ", "
            case other if other == end:
                yield s.take(1)
                return True
            case _:
                return False


def call(s: Source, known: Tools | None = None) -> Steps[bool]:
    """Parse one tool call of the form {"name": ..., "arguments": ...}. Yields a CallStart, then CallArguments.

    This generator also yields None while it waits for more text of the model. Its return value is True if the start of
    a call was yielded, even if the call's arguments are cut off.

    known: the tools that the call may name. Parsing then stops at a name of another tool, or at a key that is not in
    KEYS. If `known` is None, any name is accepted and unknown keys are skipped.
    """
    if not (yield from blanks(s)) or s.held[0] != "{":
        return False
    s.take(1)
    name: str | None = None
    early: str | None = None  # arguments that came before the name
    id: str | None = None
    began = False
    while (yield from blanks(s)) and s.held[0] != "}":
        if s.held[0] == ",":
            s.take(1)
            continue
        key: list[str] = []
        if not (yield from blanks(s)) or not (yield from collect(string(s), key)) or not (yield from blanks(s)):
            return began
        if s.held[0] != ":":
            return began
        s.take(1)
        word = json.loads("".join(key), strict=False)
        if known is not None and word not in KEYS:
            return began
        if word in ARGUMENTS and name is not None and not began:
            began, good = yield from called(arguments(s), CallStart(name, id))
            if not good:
                return began
            continue
        text: list[str] = []
        if not (yield from collect(arguments(s) if word in ARGUMENTS else value(s), text)):
            return began
        if word in ARGUMENTS:
            early = "".join(text)
            continue
        found = json.loads("".join(text))
        if word in NAMES and isinstance(found, str):
            if known is not None and found not in known:
                return began
            name = found
        elif word == "id" and isinstance(found, str):
            id = found
    s.take(1)
    if name is None:
        return began
    if not began:
        began, _ = yield from called(_text(early or "{}"), CallStart(name, id))
    return began


def arguments(s: Source) -> Pieces[bool]:
    """Parse the arguments of a call and yield them as the text of a JSON object, in pieces; null and "" become {}.

    This generator also yields None while it waits for more text of the model. Its return value is True if the arguments
    are a JSON object, null, an empty string, or a string that contains an object or null. For anything else it is
    False.
    """
    if not (yield from blanks(s)):
        return False
    if s.held[0] == "{":
        return (yield from value(s))
    text: list[str] = []
    if not (yield from collect(value(s), text)):
        return False
    found = json.loads("".join(text))
    if isinstance(found, str):
        try:
            found = json.loads(found, strict=False) if found.strip() else {}
        except (ValueError, RecursionError):
            return False
    if found is not None and not isinstance(found, dict):
        return False
    yield json.dumps(found or {}, ensure_ascii=False)
    return True


def calls(s: Source, known: Tools | None = None, joined: str = "") -> Steps[bool]:
    """Parse one tool call, several calls with a separator, or a JSON list of calls, and yield their Parts.

    The Parts of a call are a CallStart, then CallArguments. This generator also yields None while it waits for more
    text of the model. Its return value is True if the start of at least one call was yielded.

    known: tools that a call may name; None: any name is accepted. joined: separator between calls that are not in a
    list; if it is "", at most one call outside a list is parsed.
    """
    if not (yield from blanks(s)):
        return False
    if s.held[0] != "[":
        began = yield from call(s, known)
        while began and joined and (yield from _next(s, joined)):
            yield from call(s, known)
        return began
    s.take(1)
    began = False
    while (yield from blanks(s)):
        if s.held[0] == "]":
            s.take(1)
            break
        if s.held[0] == ",":
            s.take(1)
        elif not (yield from call(s, known)):
            break
        else:
            began = True
    return began


def _next(s: Source, joined: str) -> Generator[None, None, bool]:
    """Consume the separator `joined` and the blanks around it, if `{` follows; otherwise consume nothing.

    This generator yields None while it waits for more text of the model. Its return value is True if `{` follows.
    """
    while not s.last and re.fullmatch(rf"\s*({re.escape(joined)}\s*)?", s.held):
        yield None
    found = re.match(rf"\s*{re.escape(joined)}\s*(?={{)", s.held)
    if found:
        s.take(found.end())
    return found is not None


def _text(text: str) -> Pieces[bool]:
    yield text
    return True


def plain(s: Source, opener: str, tools: Tools) -> Steps[bool]:
    """Parse JSON tool calls in a format that has no delimiter after the calls, and yield their Parts.

    The Parts of a call are a CallStart, then CallArguments. The calls are JSON objects separated by `;`, or a JSON
    list. This generator also yields None while it waits for more text of the model. Its return value is True if the
    start of a call was yielded.

    s: the output. opener: the delimiter in front of the calls, which is already consumed; "" if there is none. Without
    a delimiter, a call must name one of `tools`; other JSON is not parsed as a call.
    """
    return (yield from calls(s, None if opener else tools, ";"))


def enclosed(end: str, *more: str) -> Reading:
    """Returns a parser of JSON tool calls that end at a delimiter, `end` or one of `more`, or at the end of the output.

    The parser is a generator function with the arguments (s, opener, tools): the model's output as a Source, the
    delimiter in front of the calls, and the request's tools. Its generator yields Parts, and None while it waits for
    more text of the model. The generator's return value is True if the start of a call was yielded.
    """

    def read(s: Source, opener: str, tools: Tools) -> Steps[bool]:
        began = yield from calls(s)
        while began and (yield from peek_call(s)):
            yield from calls(s)
        if began:
            yield from close(s, end, *more)
        return began

    return read


def peek_call(s: Source) -> Generator[None, None, bool]:
    """Consume the spaces, line breaks and commas in front of the next JSON call; consume nothing if no call follows.

    This generator yields None while it waits for more text of the model. Its return value is True if a call follows.
    """
    while not s.last and not s.held.lstrip(" \n,"):
        yield None
    text = s.held.lstrip(" \n,")
    if not text.startswith(("{", "[")):
        return False
    s.take(len(s.held) - len(text))
    return True


def close(s: Source, *ends: str) -> Generator[None, None, None]:
    """Consume the delimiter that closes tool calls.

    Any spaces, line breaks, `}` and `]` in front of the delimiter are consumed too. If no such delimiter comes next,
    nothing is consumed. ends: the delimiters that may close the calls. This generator yields None while it waits for
    more text of the model. It has no return value.
    """
    yield from skip(s, *ends, over=" \n}]")
