"""Save Programs to files in text form, and load them. The last line shows that a file is whole and unchanged."""

from __future__ import annotations

import re
from pathlib import Path

from intaglio.program.parse import parse_program
from intaglio.program.program import Program, ProgramError
from intaglio.program.verify import verify

END = re.compile(r"end(?: sha256=(\S+))?")


def save(program: Program, path: str | Path) -> None:
    """Verify the Program and write its text form to a file. Raises ProgramError naming the rule that it breaks.

    The file ends with the line `end sha256=HASH`, where HASH is Program.hash.
    """
    verify(program)
    Path(path).write_text(f"{program}\nend sha256={program.hash}\n", encoding="utf-8")


def load(path: str | Path) -> Program:
    """Read a file in text form, verify the Program in it and return it.

    A file ends with the line `end sha256=HASH`, the hash of its Program. If you edit a file by hand, make this line
    `end`, so that no hash is compared.

    Raises ProgramError naming the line that fails to parse, or the rule that the Program breaks; if the last line is
    neither of the two, as in a file that is cut; and if the Program has another hash than the line says.
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
