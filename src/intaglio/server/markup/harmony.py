"""gpt-oss's harmony format: messages with a channel and a recipient, between special tokens."""

from __future__ import annotations

import re
from collections.abc import Generator

from intaglio.server.markup.json_calls import arguments
from intaglio.server.markup.source import CallStart, Role, Source, Steps, TextDelta, Tools, called, first

CHANNEL, MESSAGE, START, CONSTRAIN = "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START)
MARKS = (CHANNEL, MESSAGE, CONSTRAIN, *ENDS)


def harmony(s: Source, tools: Tools) -> Steps[None]:
    """Parse a model's output in gpt-oss's harmony format. Yields its Parts: text, starts of tool calls, arguments.

    The output may begin inside a message whose header is in the prompt. This generator yields None while it waits for
    more text of the model. tools: the request's tools; if it has no tools, calls are yielded as text.
    """
    role: Role = "content"
    while True:
        while s.waits_for(*MARKS, " to="):
            yield None
        if not s.held:
            return
        if s.held.startswith((CHANNEL, START, MESSAGE, " to=")):
            header = yield from _header(s)
            if header is None:
                break
            channel = re.search(rf"{re.escape(CHANNEL)}\s*(\w+)", header)
            recipient = re.search(r"to=([\w.:-]+)", header)
            role = "reasoning" if channel and channel[1] == "analysis" and not recipient else "content"
            if recipient and tools and (yield from _call(s, recipient[1])):
                continue
        yield from _body(s, role)


def _header(s: Source) -> Generator[None, None, str | None]:
    """Consume a message's header (channel, recipient) up to and including <|message|>.

    This generator yields None while it waits for more text of the model. Its return value is the header's text. If the
    output ends inside the header, the text is dropped and the return value is None.
    """
    while MESSAGE not in s.held and not s.last:
        yield None
    at = s.held.find(MESSAGE)
    if at < 0:
        s.take(len(s.held))
        return None
    return s.take(at + len(MESSAGE))


def _call(s: Source, recipient: str) -> Steps[bool]:
    """Parse a tool call: the body of a message to a function. Yields a CallStart, then CallArguments.

    This generator also yields None while it waits for more text of the model. Its return value is True if a call was
    parsed. It is False if the body does not begin with JSON arguments; then nothing is consumed.

    recipient: the function's name in the header, such as functions.NAME.
    """
    s.mark()
    began, _ = yield from called(arguments(s), CallStart(recipient.removeprefix("functions.")))
    if not began:
        s.held = s.taken + s.held
        return False
    while (found := first(s, *ENDS)) is None and not s.last:
        yield None
    s.take(s.held.find(found) + (len(found) if found != START else 0) if found else len(s.held))
    return True


def _body(s: Source, role: Role) -> Steps[None]:
    """Yield a message's text as TextDeltas of the given role, piece by piece, and consume the message's end mark.

    This generator yields None while it waits for more text of the model.
    """
    while True:
        found = first(s, *ENDS)
        if found:
            text = s.take(s.held.find(found))
            s.take(len(found) if found != START else 0)
        else:
            text = s.take(s.safe(*ENDS))
        if text:
            yield TextDelta(role, text)
        if found or s.last:
            return
        held = len(s.held)
        while len(s.held) == held and not s.last:
            yield None
