"""Playing a seed to its end: the log of all that happened, and what went wrong, if anything did."""

from __future__ import annotations

from collections.abc import Callable

from simulation.rules import Rules
from simulation.world import Violation, World


def play(seed: int, plant: Callable[[World], None] | None = None) -> tuple[list[str], BaseException | None]:
    """The log, and the Violation (or whatever else was raised) that ended it."""
    world = World(seed, plant, Rules)
    try:
        world.run()
    except (Violation, Exception) as e:  # an engine that raises where it should not is a violation too
        return world.lines, e
    return world.lines, None


def failure(seed: int) -> str | None:
    """The line that tells of a failing seed and how to see it again."""
    _, wrong = play(seed)
    first = str(wrong).splitlines()[0] if str(wrong) else ""
    return f"{type(wrong).__name__}: {first}  <- PYTHONPATH=tests python -m simulation --seed {seed}" if wrong else None
