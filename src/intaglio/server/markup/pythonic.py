"""Tool calls written as Python: [get_weather(city="Paris", days=2), now()] of Llama 3.2 and 4, and OLMo 3's lines."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from intaglio.server.markup.json_calls import calls, close
from intaglio.server.markup.source import CallArguments, CallStart, Reading, Source, Steps, Tools, blanks

HEAD = re.compile(r"([A-Za-z_][\w.-]*)\(")
WORDS = {"true": True, "false": False, "null": None}
PAIRS = {"(": ")", "[": "]", "{": "}"}


def pythonic(*ends: str) -> Reading:
    """Returns a parser of tool calls in Python syntax or JSON. One of the delimiters `ends` may follow the calls.

    The parser is a generator function with the arguments (s, opener, tools): the model's output as a Source; the
    delimiter in front of the calls, already consumed, or ""; and the request's tools. Its generator yields Parts, and
    None while it waits for more text of the model. The generator's return value is True if the start of a call was
    yielded, else False.
    """

    def read(s: Source, opener: str, tools: Tools) -> Steps[bool]:
        if not (yield from blanks(s)):
            return False
        json_first = s.held.startswith("{")
        began = yield from (calls(s, None if opener else tools, ";") if json_first else _python(s, opener, tools))
        if began and ends:
            yield from close(s, *ends)
        return began

    return read


def _python(s: Source, opener: str, tools: Tools) -> Steps[bool]:
    """Parse tool calls written as Python, in a bracketed list or one per line, and yield their Parts.

    The Parts of a call are a CallStart, then CallArguments. This generator also yields None while it waits for more
    text of the model. Its return value is True if the start of a call was yielded, even if the call is cut off.

    s: the output; it holds at least one character. opener: the delimiter in front of the calls, already consumed; "" if
    there is none. Without a delimiter, a call must name one of `tools`.
    """
    if s.held[0] == "[":
        while re.fullmatch(r"\[\s*", s.held) and not s.last:
            yield None
        if re.match(r"\[\s*\{", s.held):
            return (yield from calls(s, None if opener else tools))
        s.take(1)
    began = False
    while (yield from blanks(s)):
        if s.held[0] == ",":
            s.take(1)
        elif s.held[0] == "]":
            s.take(1)
            break
        elif not (yield from _call(s, None if opener else tools)):
            break
        else:
            began = True
    return began


def _call(s: Source, known: Tools | None) -> Steps[bool]:
    """Parse one tool call in Python syntax, and yield its Parts.

    The first Part is the start of the call. Each argument follows once it is complete. This generator also yields None
    while it waits for more text of the model. Its return value is True if it has yielded the beginning of a call, else
    False. known: tools that the call may name; None: any.
    """
    while re.fullmatch(r"[A-Za-z_][\w.-]*", s.held) and not s.last:
        yield None
    head = HEAD.match(s.held)
    if not head or (known is not None and head[1] not in known):
        return False
    s.take(head.end())
    began = False
    while True:
        while (end := _argument_end(s.held)) is None:
            if s.last:
                return began
            yield None
        text, mark = s.held[:end].strip(), s.held[end]
        found = _keywords(text)
        if found is None or (not text and mark == ","):
            return began
        s.take(end + 1)
        if not began:
            yield CallStart(head[1])
        pieces = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in found.items()]
        opening = ("{" if not began else ", ") if pieces else ("" if began else "{")
        began = True
        yield CallArguments(opening + ", ".join(pieces) + ("}" if mark == ")" else ""))
        if mark == ")":
            return True


def _argument_end(text: str) -> int | None:
    """Returns the index in `text` of the comma or `)` that ends a call's first argument; None if there is none yet.

    Commas and brackets inside nested brackets or strings are skipped.
    """
    open: list[str] = []
    quote = ""
    at = 0
    while at < len(text):
        c = text[at]
        if quote:
            if c == "\\":
                at += 1
            elif text.startswith(quote, at):
                at += len(quote) - 1
                quote = ""
        elif c in "'\"":
            quote = c * 3 if text.startswith(c * 3, at) else c
            at += len(quote) - 1
        elif c in PAIRS:
            open.append(PAIRS[c])
        elif open and c == open[-1]:
            open.pop()
        elif not open and c in ",)":
            return at
        at += 1
    return None


def _keywords(text: str) -> dict[str, Any] | None:
    """Returns a dict {name: value} parsed from `text`, one keyword argument of a call in Python syntax.

    The dict is empty for an empty text. Returns None if the text is anything else.
    """
    try:
        node = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(node, ast.Call)
        if node.args or any(k.arg is None for k in node.keywords):
            return None
        return {str(k.arg): _literal(k.value) for k in node.keywords}
    except (SyntaxError, ValueError, AssertionError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    """Returns the Python value of `node`, a literal that JSON can express. Raises ValueError for another expression."""
    match node:
        case ast.Name(id=name) if name in WORDS:
            return WORDS[name]
        case ast.List() | ast.Tuple():
            return [_literal(e) for e in node.elts]
        case ast.Dict():
            return {str(_literal(k)): _literal(v) for k, v in zip(node.keys, node.values, strict=True) if k}
    found = ast.literal_eval(node)
    if not isinstance(found, str | int | float | bool | None):
        raise ValueError(f"{found!r} is no value of JSON")
    return found
