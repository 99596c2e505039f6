"""The text of a model's output as it arrives (Source), and the parts that parsers make of it.

Parsers are generators over a Source. They yield a part when it is certain and None when they need more text. Once
`source.last` is set no more text comes, and they must not yield None. A parser's result is its return value.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Role = Literal["content", "reasoning"]
Tools = Mapping[str, Mapping[str, Any]]  # name of a tool to the JSON schema of its arguments


@dataclass(frozen=True)
class TextDelta:
    """A piece of output text. `role`: "content" or "reasoning"."""

    role: Role
    text: str


@dataclass(frozen=True)
class CallStart:
    """The beginning of a tool call. `id` is None if the output has no id for the call."""

    name: str
    id: str | None = None


@dataclass(frozen=True)
class CallArguments:
    """A piece of JSON text of the arguments of the latest call."""

    text: str


Part = TextDelta | CallStart | CallArguments
Steps = Generator[Part | None, None, T]
Pieces = Generator[str | None, None, T]  # of parsers that yield text


class Source:
    """Buffer of a model's output text that has arrived so far. Parsers consume the text from the front.

    Attributes:
        held: text that no parser has consumed yet.
        taken: text consumed since mark() was last called.
        last: True if no more text will arrive.
    """

    def __init__(self) -> None:
        self.held, self.taken, self.last = "", "", False

    def take(self, n: int) -> str:
        """Consume the first `n` characters of the held text, or all if there are fewer. Returns them."""
        text, self.held = self.held[:n], self.held[n:]
        self.taken += text
        return text

    def mark(self) -> None:
        """Clear the buffer's field `taken`, so that it records the text consumed from now on."""
        self.taken = ""

    def waits_for(self, *marks: str) -> bool:
        """True if the held text, which may be empty, is an incomplete beginning of one of the delimiters `marks`.

        False if no more text will arrive, since the delimiter can then no longer be completed.
        """
        return not self.last and any(m != self.held and m.startswith(self.held) for m in marks)

    def safe(self, *marks: str) -> int:
        """Returns how many held characters, from the first, a parser may consume without splitting a delimiter.

        Characters at the end that could be the beginning of one of the delimiters `marks` are not counted. If no more
        text will arrive, all characters are counted.
        """
        if self.last:
            return len(self.held)
        tails = (n for m in marks for n in range(1, len(m)) if self.held.endswith(m[:n]))
        return len(self.held) - max(tails, default=0)


Reading = Callable[[Source, str, Tools], Steps[bool]]  # parses calls after an opener; True if one has begun


def some(s: Source, n: int = 1) -> Generator[None, None, bool]:
    """Wait until the text not yet consumed (`s.held`) has at least `n` characters.

    This generator yields None while it waits for more text of the model. Its return value is True, or False if the
    output ends earlier.
    """
    while len(s.held) < n and not s.last:
        yield None
    return len(s.held) >= n


def blanks(s: Source) -> Generator[None, None, bool]:
    """Consume white space.

    This generator yields None while it waits for more text of the model. Its return value is True if other text
    follows, False if the output ends.
    """
    while True:
        s.take(len(s.held) - len(s.held.lstrip()))
        if s.held or s.last:
            return bool(s.held)
        yield None


def skip(s: Source, *marks: str, over: str = " \n\r\t") -> Generator[None, None, str | None]:
    """Consume the next delimiter, one of `marks`, and any characters of `over` in front of it.

    If the text begins with several of `marks`, the delimiter is the longest of them.

    This generator yields None while it waits for more text of the model. Its return value is the delimiter. If none of
    the delimiters comes next, its return value is None and nothing is consumed.
    """
    while True:
        text = s.held.lstrip(over)
        if s.last or (text and not any(m != text and m.startswith(text) for m in marks)):
            break
        yield None
    found = max((m for m in marks if text.startswith(m)), key=len, default=None)
    if found:
        s.take(len(s.held) - len(text) + len(found))
    return found


def until(s: Source, *marks: str) -> Generator[None, None, tuple[str, str | None]]:
    """Consume the text up to and including the first of the delimiters `marks`; all remaining text if there is none.

    This generator yields None while it waits for more text of the model. Its return value is (text before the
    delimiter, delimiter), or (all remaining text, None).
    """
    while True:
        found = first(s, *marks)
        if found:
            text = s.take(s.held.find(found))
            s.take(len(found))
            return text, found
        if s.last:
            return s.take(len(s.held)), None
        yield None


def first(s: Source, *marks: str) -> str | None:
    """Returns the first delimiter in the text that is not consumed yet; None if there is none.

    marks: the delimiters to look for. If several delimiters begin at the same position, the longest of them is
    returned.
    """
    places = [(at, -len(m), m) for m in marks if (at := s.held.find(m)) >= 0]
    return min(places)[2] if places else None


def collect(steps: Pieces[T], into: list[str]) -> Generator[None, None, T]:
    """Run the parser `steps` to its end, and collect the text that it yields.

    Each piece of text is appended to the list `into`. This generator yields None whenever `steps` yields None, which
    means that `steps` waits for more text of the model. Its return value is the return value of `steps`.
    """
    while True:
        try:
            piece = next(steps)
        except StopIteration as e:
            result: T = e.value
            return result
        if piece is None:
            yield None
        else:
            into.append(piece)


def called(steps: Pieces[T], start: CallStart, began: bool = False) -> Steps[tuple[bool, T]]:
    """Run `steps`, a parser of a call's arguments, and yield the Parts of the call: `start`, then pieces of arguments.

    This generator yields `start` just before the first piece of arguments, and each piece as a CallArguments. It yields
    None whenever `steps` yields None, which means that `steps` waits for more text of the model. Its return value is
    (began, result): began is True if the start of the call has been yielded, and result is the return value of `steps`.

    Args:
        steps: parser that yields the text of the call's arguments in pieces.
        start: the first Part of the call, with its name.
        began: True if the caller has already yielded the start of the call; `start` is then not used.
    """
    while True:
        try:
            piece = next(steps)
        except StopIteration as e:
            return began, e.value
        if piece is None:
            yield None
            continue
        if not began:
            yield start
            began = True
        yield CallArguments(piece)
