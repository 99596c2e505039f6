"""Output of commands: consoles, tables, JSON, and a Program or a device in one line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from intaglio.llm import LLM
    from intaglio.program import Program


class Stream(Console):
    """A rich Console without automatic colours and emoji, for a command's output.

    Printing raises BrokenPipeError if the output is a pipe whose reader has closed it.
    """

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, emoji=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


out, err = Stream(), Stream(stderr=True)


LONGEST_NAME = 20  # characters


def say(text: str) -> None:
    """Print a text. On a terminal it is wrapped at the terminal's width; in a file or pipe it is not wrapped."""
    out.print(text, markup=False, soft_wrap=not out.is_terminal)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, style: str = "") -> Table:
    """Returns a rich table that fits 80 columns.

    Args:
        headers: a text for each column; a second line, after a newline, may have the unit.
        rows: for each row of the table, a sequence with a text for each column.
        words: number of columns, from the first, that hold text, which is wrapped. The other columns hold numbers,
            which are not wrapped. If `words` is 2 or more, the first column is not wrapped either, as long as its texts
            are single words of at most LONGEST_NAME characters.
        style: rich's style of the whole table; "": none.
    """
    rows = list(rows)
    names = words > 1 and all(len(row[0]) <= LONGEST_NAME and " " not in row[0] for row in rows)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, style=style)
    for i, header in enumerate(headers):
        longest = max(map(len, header.split()), default=0)
        if i < words:
            shown.add_column(Text(header), overflow="fold", no_wrap=names and i == 0, min_width=longest)
        else:
            shown.add_column(Text(header), justify="right", no_wrap=True, min_width=longest)
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Returns a rich table of two columns, names and values, from pairs (name, value). The values are wrapped."""
    shown = Table.grid(padding=(0, 2))
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for pair in pairs:
        shown.add_row(*map(Text, pair))
    return shown


def whole(x: float) -> str:
    """Returns a number as text without decimals; from a million on in millions with one decimal (1.5M)."""
    return f"{x:,.0f}" if x < 1e6 else f"{x / 1e6:,.1f}M"


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2))


def summary(p: Program) -> dict[str, Any]:
    """Returns a dict for JSON: a Program's name, hash, context, vocabulary, ops by kind, weights by format."""
    size, count = Counter[str](), Counter[str]()
    for t in p.of_role("weight"):
        size[t.format] += t.nbytes({})
        count[t.format] += 1
    return {
        "name": p.name,
        "hash": p.hash,
        "context": p.context,
        "vocabulary": p.vocabulary,
        "ops": dict(Counter(op.kind for op in p.ops)),
        "weights": {f: {"tensors": count[f], "bytes": size[f]} for f in sorted(size)},
    }


def describe(p: Program) -> str:
    """Returns one line of text: a Program's name, number of ops, bytes of weights by format, context and hash."""
    s = summary(p)
    weights = ", ".join(f"{w['bytes'] / 1e6:,.1f} MB {f}" for f, w in s["weights"].items())
    return f"{p.name}: {sum(s['ops'].values())} ops, weights {weights}, context {p.context}, hash {p.hash[:12]}"


def describe_device(llm: LLM) -> str:
    """Returns the device's name as text, with its instruction set and number of threads if it has them."""
    facts = llm.device.facts()
    named = {"isa": facts.isa, "threads": facts.threads}
    return ", ".join([llm.device.name, *(f"{name} {value}" for name, value in named.items() if value)])
