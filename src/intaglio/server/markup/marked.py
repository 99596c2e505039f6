"""Tool calls between special tokens, with JSON arguments: Mistral, DeepSeek-V3, Kimi-K2, Cohere, Granite."""

from __future__ import annotations

import re

from intaglio.server.markup.json_calls import arguments, calls, close
from intaglio.server.markup.source import CallStart, Source, Steps, Tools, blanks, called, skip, until

MISTRAL, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
DEEPSEEK = {
    "calls": "<｜tool▁calls▁begin｜>", "end_calls": "<｜tool▁calls▁end｜>", "call": "<｜tool▁call▁begin｜>",
    "end_call": "<｜tool▁call▁end｜>", "sep": "<｜tool▁sep｜>",
}  # fmt: skip
KIMI = {
    "calls": "<|tool_calls_section_begin|>", "end_calls": "<|tool_calls_section_end|>", "call": "<|tool_call_begin|>",
    "end_call": "<|tool_call_end|>", "sep": "<|tool_call_argument_begin|>",
}  # fmt: skip
ACTION, END_ACTION = "<|START_ACTION|>", "<|END_ACTION|>"


def mistral(s: Source, opener: str, tools: Tools) -> Steps[bool]:
    """Parse Mistral's tool calls, and yield their Parts: starts of calls and pieces of arguments.

    Two formats are read:

    - a JSON list of calls, with or without the delimiter `opener` in front;
    - from tokenizer v11 on, `NAME[ARGS]{...}` or `NAME[CALL_ID]ID[ARGS]{...}` after each delimiter.

    This generator also yields None while it waits for more text of the model. Its return value is True if the start of
    a call was yielded.

    opener: the delimiter in front of the calls, which is already consumed; "" if there is none. Without a delimiter, a
    call must name one of `tools`.
    """
    if not (yield from blanks(s)):
        return False
    if s.held[0] in "[{" or not opener:
        return (yield from calls(s, None if opener else tools))
    began = False
    while True:
        while re.fullmatch(r"[\w.-]{0,128}", s.held) and not s.last:
            yield None
        name = re.match(r"[\w.-]{1,128}", s.held)
        if not name:
            return began
        s.take(name.end())
        id = None
        if (yield from skip(s, CALL_ID)):
            while ARGS not in s.held and not s.last:
                yield None
            id = s.take(s.held.find(ARGS) if ARGS in s.held else len(s.held)).strip()
        yield from skip(s, ARGS)
        one, _ = yield from called(arguments(s), CallStart(name[0], id))
        began = began or one
        if not one or not (yield from skip(s, MISTRAL)):
            return began


def deepseek(s: Source, opener: str, tools: Tools) -> Steps[bool]:
    """Parse DeepSeek's tool calls, and yield their Parts: starts of calls and pieces of arguments.

    V3 and R1 write `function<sep>NAME`, a line break and a fenced JSON block. V3.1 writes `NAME<sep>{...}`. <sep> is
    the special token DEEPSEEK["sep"]. This generator also yields None while it waits for more text of the model. Its
    return value is True if the start of a call was yielded, even if the call is cut off.

    s: the output. opener: the delimiter in front of the calls, already consumed; "" if there is none. tools: not used.
    """
    m, began = DEEPSEEK, False
    while opener == m["call"] or (yield from skip(s, m["call"])):
        opener = ""
        name, mark = yield from until(s, m["sep"], m["end_call"])
        if mark == m["sep"] and name.strip() == "function":
            name, _ = yield from until(s, "\n")
            yield from skip(s, "```json")
        if not name.strip():
            return began
        one, _ = yield from called(arguments(s), CallStart(name.strip()))
        if not one:
            return began
        began = True
        yield from skip(s, "```")
        yield from close(s, m["end_call"])
    yield from skip(s, m["end_calls"])
    return began


def kimi(s: Source, opener: str, tools: Tools) -> Steps[bool]:
    """Parse Kimi-K2's tool calls, `functions.NAME:NUMBER<sep>{...}`, and yield their Parts.

    The Parts of a call are a CallStart, then CallArguments. <sep> is the special token KIMI["sep"]. All text before
    <sep> is the call's id, and NAME is the function's name. This generator also yields None while it waits for more
    text of the model. Its return value is True if the start of a call was yielded, even if the call is cut off.

    s: the output. opener: the delimiter in front of the calls, already consumed; "" if there is none. tools: not used.
    """
    m, began = KIMI, False
    while opener == m["call"] or (yield from skip(s, m["call"])):
        opener = ""
        id, _ = yield from until(s, m["sep"])
        name = re.sub(r":\d+$", "", id.strip()).removeprefix("functions.")
        one, _ = yield from called(arguments(s), CallStart(name, id.strip()))
        if not one:
            return began
        began = True
        yield from close(s, m["end_call"])
    yield from skip(s, m["end_calls"])
    return began
