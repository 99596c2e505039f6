"""Runs one seed of a simulation, of an engine or of a group of ranks: its event log, and its violation if any."""

from __future__ import annotations

from collections.abc import Callable

from intaglio.runtime import Engine
from simulation.groups import GroupWorld
from simulation.rules import Rules
from simulation.world import Violation, World


def play(seed: int, plant: Callable[[Engine], None] | None = None) -> tuple[list[str], BaseException | None]:
    """Run a seed. Returns the log, and the Violation (or other exception) that ended it, or None.

    `plant` may plant a bug in the engine before it starts.
    """
    world = World(seed, plant, Rules)
    try:
        world.run()
    except (Violation, Exception) as e:  # an engine that raises where it should not is a violation too
        return world.lines, e
    return world.lines, None


def play_group(seed: int) -> tuple[list[str], BaseException | None]:
    """As play(), of a seed of a group of ranks on several hosts."""
    world = GroupWorld(seed)
    try:
        world.run()
    except (Violation, Exception) as e:
        return world.lines, e
    return world.lines, None


def group_failure(seed: int) -> str | None:
    """As failure(), of a seed of a group of ranks."""
    _, wrong = play_group(seed)
    first = str(wrong).splitlines()[0] if str(wrong) else ""
    again = f"PYTHONPATH=tests python -m simulation --groups --seed {seed}"
    return f"{type(wrong).__name__}: {first}  <- {again}" if wrong else None


def failure(seed: int) -> str | None:
    """The line that reports a failing seed and the command that runs it again; None if the seed passes."""
    _, wrong = play(seed)
    first = str(wrong).splitlines()[0] if str(wrong) else ""
    return f"{type(wrong).__name__}: {first}  <- PYTHONPATH=tests python -m simulation --seed {seed}" if wrong else None
