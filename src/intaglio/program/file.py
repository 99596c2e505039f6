"""Save Programs to files in text form, and load them. The last line shows that a file is whole and unchanged."""

from __future__ import annotations

import re
from pathlib import Path

from intaglio.program.parse import parse_program
from intaglio.program.program import Program, ProgramError
from intaglio.program.verify import verify

END = re.compile(r"end(?: sha256=(\S+))?")


def save(program: Program, path: str | Path) -> None:
    """Verify the Program and write it to a file in its text form.

    Raises ProgramError, naming a rule that the Program breaks. The last line of the file is `end sha256=HASH`, where
    HASH is Program.hash.
    """
    verify(program)
    Path(path).write_text(f"{program}\nend sha256={program.hash}\n", encoding="utf-8")


def load(path: str | Path) -> Program:
    """Read a file with a Program in text form. Returns the Program, verified.

    The last line of the file is `end sha256=HASH`, where HASH is the hash of the Program. If you edit a file by hand,
    replace this line by `end`; the hash is then not checked.

    Raises ProgramError in these cases:

    - A line cannot be parsed; the error names the line.
    - The Program breaks a rule; the error names the rule.
    - The last line has neither form, for example because the file is cut.
    - The Program's hash is not the HASH of the last line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8").rstrip()
    except UnicodeDecodeError as e:
        raise ProgramError(f"{path}: byte {e.start} is not UTF-8 text; the file is damaged, build it again") from None
    body, _, last = text.rpartition("\n")
    end = END.fullmatch(last.strip())
    try:
        program = parse_program(body if end else text)
    except ProgramError as e:
        raise ProgramError(f"{path}: {e}") from None
    where = f"{path}: line {len(text.splitlines())}"
    if not end:
        raise ProgramError(
            f"{where} is the last and is {last.strip()!r}; wanted 'end sha256=HASH'. The file is cut: build it again, "
            "or add the line 'end' if you wrote it yourself"
        )
    if end[1] not in (None, program.hash):
        raise ProgramError(
            f"{where}: sha256 is {end[1]}, but that of the text above is {program.hash}. The file is damaged: build it "
            "again, or make the line 'end' if you edited it yourself"
        )
    try:
        verify(program)
    except ProgramError as e:
        raise ProgramError(f"{path}: {e}") from None
    return program
