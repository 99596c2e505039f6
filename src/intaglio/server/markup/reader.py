"""Reader: splits the text of one choice into reasoning, content and tool calls, as it arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intaglio.server.markup.forms import Form, Thinking
from intaglio.server.markup.harmony import MARKS, harmony
from intaglio.server.markup.source import (
    CallArguments,
    CallStart,
    Part,
    Role,
    Source,
    Steps,
    TextDelta,
    Tools,
    first,
)
from intaglio.server.protocol import Tool


@dataclass(frozen=True)
class OutputStyle:
    """How to parse one chat output into reasoning, content and tool calls.

    Attributes:
        form: format of tool calls; None: calls are not parsed.
        thinking: delimiters of reasoning; None: reasoning is not parsed.
        inside: True if the prompt ends inside reasoning, so the output begins with it.
        forced: True if the output is a forced tool call; text that is not part of a call is dropped.
        harmony: True if the output is in gpt-oss's harmony format.
        tools: the request's tools, as name to JSON schema of the arguments; None without tools.
    """

    form: Form | None = None
    thinking: Thinking | None = None
    inside: bool = False
    forced: bool = False
    harmony: bool = False
    tools: Tools | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """A tuple of the delimiters that detokenization must keep for the parser, even if they are special tokens."""
        thinking = (self.thinking.begin, self.thinking.end, *self.thinking.dropped) if self.thinking else ()
        return (*(self.form.marks if self.form else ()), *(MARKS if self.harmony else ()), *thinking)


class Reader:
    """Streaming parser of one choice's output text into TextDelta, CallStart and CallArguments.

    Text that is not a valid call is returned as content; it is dropped if the output must be a call. Delimiters are
    removed, and so is white space between content and calls.
    """

    def __init__(self, style: OutputStyle) -> None:
        self.style, self.source, self.calls = style, Source(), 0
        self.role: Role = "reasoning" if style.inside else "content"  # of the text that is read now
        self.steps: Steps[None] = harmony(self.source, style.tools or {}) if style.harmony else self._read()
        self.ended = False

    def feed(self, text: str, last: bool = False) -> list[Part]:
        """Add new output text. Returns a list of the Parts (text, starts of calls, arguments) that are now certain.

        last: True if `text` is the end of the output. All text that was held back is then returned too.
        """
        self.source.held += text
        self.source.last = self.source.last or last
        out: list[Part] = []
        while not self.ended:
            try:
                part = next(self.steps)
            except StopIteration:
                self.ended = True
                break
            if part is None:
                break
            self._append(out, part)
        return out

    def _append(self, out: list[Part], part: Part) -> None:
        """Append a part to the list `out`. Returns nothing.

        If the last item of `out` has the same kind, the part is merged with it: text with text of the same role, call
        arguments with call arguments. A part with empty text is dropped.
        """
        match part, out[-1] if out else None:
            case ((TextDelta(text="") | CallArguments(text="")), _):
                return
            case TextDelta(role, text), TextDelta(before, earlier) if role == before:
                out[-1] = TextDelta(role, earlier + text)
            case CallArguments(text), CallArguments(earlier):
                out[-1] = CallArguments(earlier + text)
            case _:
                out.append(part)
        self.calls += isinstance(part, CallStart)
        if isinstance(part, TextDelta):
            self.role = part.role

    def _read(self) -> Steps[None]:
        s, style = self.source, self.style
        gap = yield from self._reasoning() if style.thinking else self._nothing()
        yield from self._content(gap)
        if s.held and not style.forced:
            yield TextDelta("content", s.take(len(s.held)))

    def _nothing(self) -> Steps[bool]:
        return False
        yield

    def _reasoning(self) -> Steps[bool]:
        """Parse reasoning at the beginning of the output, and yield it as TextDeltas.

        This generator also yields None while it waits for more text of the model. Its return value is True if there was
        reasoning, else False.
        """
        s, thinking = self.source, self.style.thinking
        assert thinking
        if not self.style.inside:
            while True:
                text = s.held.lstrip()
                if s.last or not (text != thinking.begin and thinking.begin.startswith(text)):
                    break
                yield None
            if not text.startswith(thinking.begin):
                return False
            s.take(len(s.held) - len(text) + len(thinking.begin))
        self.role = "reasoning"
        form = self.style.form
        ends = (thinking.end, *(form.openers if form and form.ends_reasoning else ()))
        while True:
            found = first(s, *ends)
            yield TextDelta("reasoning", s.take(s.held.find(found) if found else s.safe(*ends)))
            if found or s.last:
                break
            yield None
        self.role = "content"
        s.take(len(thinking.end) if found == thinking.end else 0)
        return True

    def _content(self, gap: bool) -> Steps[None]:
        """Parse the rest of the output, and yield its Parts: text, starts of tool calls, pieces of arguments.

        This generator also yields None while it waits for more text of the model. gap: True to skip line breaks first,
        such as those between reasoning and content.
        """
        s, form = self.source, self.style.form
        openers = form.openers if form else ()
        dropped = self.style.thinking.dropped if self.style.thinking else ()
        blank = True  # content since the beginning or the last call is white space, which a call makes vanish
        if form and form.bare:
            while not s.last and any(o != s.held.lstrip() and o.startswith(s.held.lstrip()) for o in (*openers, "{")):
                yield None
            if s.held.lstrip().startswith(("{", "[")) and not s.held.lstrip().startswith(openers):
                gap = yield from self._call("", form)
                blank = gap
        while True:
            if gap:
                s.take(len(s.held) - len(s.held.lstrip("\n")))
                gap = not s.held
            found = first(s, *openers, *dropped)
            text = s.held[: s.held.find(found)] if found else s.held[: s.safe(*openers, *dropped)]
            blank = blank and not text.strip()
            if not blank or (s.last and not found):
                yield TextDelta("content", "" if self.style.forced else s.take(len(text)))
            if found:
                s.mark()
                s.take(s.held.find(found) + len(found))
                if found not in dropped:
                    assert form
                    gap = yield from self._call(found, form)
                    blank = gap
                continue
            if s.last:
                return
            yield None

    def _call(self, opener: str, form: Form) -> Steps[bool]:
        """Parse the tool calls that follow `opener`, and yield their Parts: starts of calls, pieces of arguments.

        The delimiter `opener` is already consumed. It is "" for calls at the beginning of the output without a
        delimiter. This generator also yields None while it waits for more text of the model. Its return value is True
        if the start of a call was yielded.

        If no call was found, the consumed text is yielded as content; it is dropped if the output must be a call.
        """
        s = self.source
        if not opener:
            s.mark()
        began: bool = yield from form.read(s, opener, self.style.tools or {})
        if not began and not self.style.forced:
            yield TextDelta("content", s.taken)
        return began


def begins_inside(prompt: str, thinking: Thinking | None) -> bool:
    """True if the output begins inside reasoning.

    This is so if the rendered prompt, without white space at its end, ends with the delimiter that begins reasoning.
    False if `thinking` is None, since then no delimiters of reasoning are known.
    """
    return thinking is not None and prompt.rstrip().endswith(thinking.begin)


def parameters(tools: list[Tool]) -> dict[str, dict[str, Any]]:
    """Returns a dict from the name of each tool to the JSON schema of its arguments.

    A tool that gives no schema gets {"type": "object"}.
    """
    return {t.function.name: t.function.parameters or {"type": "object"} for t in tools}
