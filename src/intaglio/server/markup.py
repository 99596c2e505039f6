"""Reasoning and tool calls inside a model's text: which form a chat template speaks, and a reader of streamed text.

Forms are recognised by what the template itself writes; a template that takes tools in no form known here is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

THINK, THOUGHT = "<think>", "</think>"
Role = Literal["content", "reasoning"]


@dataclass(frozen=True)
class Form:
    """How calls are written. `begin` and `end` embrace one call each; without them the whole text is one call, or a
    list of them. `arguments` is the key of the arguments; `openers` may stand before the JSON."""

    name: str
    begin: str = ""
    end: str = ""
    arguments: str = "arguments"
    openers: tuple[str, ...] = ()


FORMS = {  # by what a template with that form contains
    "<tool_call>": Form("tagged", "<tool_call>", "</tool_call>"),
    "[TOOL_CALLS]": Form("list", openers=("[TOOL_CALLS]",)),
    '"parameters"': Form("whole", arguments="parameters", openers=("<|python_tag|>",)),
}


@dataclass(frozen=True)
class Said:
    """Some more of the answer, or of the reasoning before it."""

    role: Role
    text: str


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON


def form_of(template: str | None) -> Form | None:
    """How a template's model writes calls; None if it takes no tools, or in no form known here."""
    if template is None or "tools" not in template:
        return None
    return next((form for mark, form in FORMS.items() if mark in template), None)


def reasons(template: str | None) -> bool:
    """Whether a template's model writes its reasoning between THINK and THOUGHT."""
    return template is not None and THOUGHT in template


def begins_inside(prompt: str) -> bool:
    """Whether a rendered prompt leaves the model inside its reasoning."""
    return prompt.rstrip().endswith(THINK)


def call_grammar(form: Form, tools: dict[str, dict[str, Any]]) -> tuple[Literal["lark", "json_schema"], str]:
    """What an answer must match to be a call of one of these tools, each with the schema of its arguments."""
    schemas = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, form.arguments: arguments},
            "required": ["name", form.arguments],
            "additionalProperties": False,
        }
        for name, arguments in tools.items()
    ]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if not form.begin:
        return "json_schema", json.dumps(schema)
    strict = {**schema, "x-guidance": {"whitespace_flexible": False}}  # or a small model writes nothing but space
    return "lark", f'start: "{form.begin}\\n" call "\\n{form.end}"\ncall: %json {json.dumps(strict)}'


class Reader:
    """Divides one choice's text, as it comes, into reasoning, content and calls. No text is lost: what looks like a
    call and is none is content."""

    def __init__(self, form: Form | None, reasons: bool, inside: bool) -> None:
        self.form, self.reasons = form, reasons
        self.state: Literal["start", "reasoning", "content", "call"] = "start"
        if reasons and inside:
            self.state = "reasoning"
        self.held = ""  # not handed out yet
        self.gap = False  # whether empty lines are to be passed over: after reasoning, and after a call
        self.blank = True  # whether the content since the start or the last call is nothing but space: held, as no
        # content if a call follows it
        self.calls = 0

    def feed(self, text: str, last: bool = False) -> list[Said | Call]:
        """Take more text; what is settled now. With `last`, everything."""
        self.held += text
        out: list[Said | Call] = []
        more = True
        while more:
            parts, more = self._next(last)
            out += parts
        return [part for part in out if not isinstance(part, Said) or part.text]

    def _next(self, last: bool) -> tuple[list[Said | Call], bool]:
        """One move: (what it settles, whether to move on)."""
        match self.state:
            case "start":
                return self._start(last)
            case "reasoning":
                return self._reasoning(last)
            case "content":
                return self._content(last)
        return self._call(last)

    def _start(self, last: bool) -> tuple[list[Said | Call], bool]:
        text = self.held.lstrip()
        if not last and not text:
            return [], False
        if self.reasons and text.startswith(THINK):
            self.held, self.state = text[len(THINK) :], "reasoning"
            return [], True
        whole = self.form if self.form and not self.form.begin else None
        openers = (*(whole.openers if whole else ()), *((THINK,) if self.reasons else ()))
        if not last and any(o.startswith(text) for o in openers):
            return [], False
        self.state = "call" if whole and text.startswith(("{", "[", *whole.openers)) else "content"
        return [], True

    def _reasoning(self, last: bool) -> tuple[list[Said | Call], bool]:
        before, mark, after = self.held.partition(THOUGHT)
        if mark:
            self.held, self.state, self.gap = after, "start", True
            self.reasons = False  # once is enough: a second <think> is text
            return [Said("reasoning", before)], True
        return [Said("reasoning", self._release(THOUGHT, last))], False

    def _content(self, last: bool) -> tuple[list[Said | Call], bool]:
        if self.gap:
            self.held = self.held.lstrip("\n")
            self.gap = not self.held
        if self.form and self.form.begin:
            before, mark, after = self.held.partition(self.form.begin)
            if mark:
                content = "" if self.blank and not before.strip() else before
                self.held, self.state, self.blank = after, "call", True
                return [Said("content", content)], True
            content = self._release(self.form.begin, last)
            self.blank = self.blank and not content.strip()
            if self.blank and not last:
                self.held, content = content + self.held, ""
            return [Said("content", content)], False
        return [Said("content", self._release("", True))], False

    def _call(self, last: bool) -> tuple[list[Said | Call], bool]:
        assert self.form
        if self.form.begin:
            inner, mark, after = self.held.partition(self.form.end)
            if not mark and not last:
                return [], False
            calls = read_calls(inner, self.form)
            written = self.form.begin + inner + mark
            self.held, self.state, self.gap, self.blank = after, "content", calls is not None, calls is not None
        else:
            if not last:
                return [], False
            written = inner = self.held
            for opener in self.form.openers:
                inner = inner.strip().removeprefix(opener)
            calls = read_calls(inner, self.form)
            self.held, self.state = "", "content"
        self.calls += len(calls or ())
        return [*calls] if calls else [Said("content", written)], bool(self.held)

    def _release(self, mark: str, last: bool) -> str:
        """All that is held but a tail that may turn out to begin `mark`."""
        keep = 0 if last else max((n for n in range(1, len(mark)) if self.held.endswith(mark[:n])), default=0)
        end = len(self.held) - keep
        out, self.held = self.held[:end], self.held[end:]
        return out


def read_calls(text: str, form: Form) -> list[Call] | None:
    """The calls that a text in JSON is; None if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        return None
    arguments = [c.get(form.arguments, c.get("arguments")) for c in calls]
    if not all(isinstance(a, dict) for a in arguments):
        return None
    return [Call(c["name"], json.dumps(a, ensure_ascii=False)) for c, a in zip(calls, arguments, strict=True)]
