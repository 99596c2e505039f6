"""Progress callbacks, by which long operations report their progress to any display.

The command line draws the reports as a bar on a terminal (`cli/progress.py`). An operation takes a `Progress` and calls
it before each part of its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# progress(done, total, what): `done` of `total` parts are complete, and `what` is the part under way, such as "prefill
# of 8 x 256 tokens". total 0: the number of parts is unknown. One callback serves several operations, one after
# another.
Progress = Callable[[float, float, str], object]


def silent(done: float, total: float, what: str) -> None:
    """A Progress callback that does nothing, for operations whose progress is not to be shown."""


def prefixed(progress: Progress, name: str) -> Progress:
    """Returns a Progress callback that calls `progress` with `name` and a colon in front of the description.

    It is used where an operation works on several things in turn: `name` says which thing is under way.
    """
    return lambda done, total, what: progress(done, total, f"{name}: {what}")


def counted(items: Sequence[T], progress: Progress, what: Callable[[T], str]) -> Iterator[T]:
    """Yield the items in order, and report the progress of the loop over them.

    Before each item, `progress` is called with the number of items done, the number of all items, and what(item). After
    the last item it is called once more, with all items done.

    items: the items. progress: the Progress callback. what: function that describes an item, as text.
    """
    for done, item in enumerate(items):
        progress(done, len(items), what(item))
        yield item
    if items:
        progress(len(items), len(items), what(items[-1]))
