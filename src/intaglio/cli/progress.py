"""The progress bar of all commands: one line on stderr with the current work, the share done and the time.

If stderr is a file or a pipe, it gets a line of text every REPORT_S seconds instead. With --json nothing is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from intaglio.cli.show import Stream
from intaglio.progress import Progress, silent

REPORT_S = 30.0  # seconds between two lines of progress in a file
console = Stream(stderr=True)  # quiet with --json


def quiet_with_json(as_json: bool) -> bool:
    """Callback of --json: switches the progress bar off if the option is given. Returns `as_json` unchanged."""
    console.quiet = as_json
    return as_json


class Times(ProgressColumn):
    """Progress column that shows the elapsed time and, if the total is known, the percentage done and the time left."""

    def render(self, task: Task) -> Text:
        elapsed = duration(task.elapsed or 0)
        if task.total is None:
            return Text(elapsed)
        left = "" if task.time_remaining is None or task.finished else f", {duration(task.time_remaining)} left"
        return Text(f"{task.percentage:.0f}%, {elapsed}{left}")


def duration(seconds: float) -> str:
    """Returns a duration as text in s, min or h, such as "119 s" or "2 min".

    The unit is the largest with which the number is 2 or more. Below 2 s it is s.
    """
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """Context manager that shows a progress bar on stderr while its block runs.

    Yields a callback progress(done, total, what) that updates the bar: `done` of `total` parts are complete, and `what`
    describes the part in progress. A total of 0 means that it is unknown. The bar first shows the argument `what`, and
    is erased at the end of the block.

    If stderr is not a terminal, lines of text are printed instead. With --json nothing is shown.
    """
    if console.quiet or not console.is_terminal:
        yield silent if console.quiet else report_lines(lambda line: typer.echo(line, err=True))
        return
    text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (SpinnerColumn(), text, BarColumn(16), Times())
    # stdout is not redirected: what a command prints there belongs there, terminal or not
    with Bar(*columns, console=console, transient=True, redirect_stdout=False, refresh_per_second=5) as bar:
        task = bar.add_task(what, total=None)

        def report(done: float, total: float, what: str) -> None:
            if (total or None) != bar.tasks[0].total:  # another operation: its speed is its own
                bar.reset(task, total=total or None)
            bar.update(task, completed=done, description=what)

        yield report


def report_lines(write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> Progress:
    """Returns a callback progress(done, total, what) that reports progress as lines of text, for a file or pipe.

    It calls `write` with a line, at most once in REPORT_S seconds. The line has the text `what`, the percentage done
    and the time since report_lines() was called. clock: function that returns the time in seconds.
    """
    began = last = clock()

    def report(done: float, total: float, what: str) -> None:
        nonlocal last
        now = clock()
        if now - last >= REPORT_S:
            last = now
            write(f"{what}: {f'{done / total:.0%}, ' if total else ''}{duration(now - began)}")

    return report


def interrupted() -> None:
    """Print "interrupted" over the ^C that the terminal has shown after Ctrl-C."""
    typer.echo("\rinterrupted", err=True)
