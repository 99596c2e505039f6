"""Save Programs to files in text form, and load them."""

from __future__ import annotations

from pathlib import Path

from intaglio.program.parse import parse_program
from intaglio.program.program import Program
from intaglio.program.verify import verify


def save(program: Program, path: str | Path) -> None:
    """Verify the Program and write its text form to a file. Raises ProgramError naming the rule that it breaks."""
    verify(program)
    Path(path).write_text(str(program))


def load(path: str | Path) -> Program:
    """Read a file in text form, verify the Program in it and return it.

    Raises ProgramError naming the line that fails to parse, or the rule that is broken.
    """
    program = parse_program(Path(path).read_text())
    verify(program)
    return program
