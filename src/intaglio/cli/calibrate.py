"""`intaglio calibrate`: fit a chip's few constants, and facts of its kernel library, to measured kernel times."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from intaglio.chips import ChipError, target
from intaglio.cli import options as o
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import out, say, table
from intaglio.cli.silicon import LibraryName

if TYPE_CHECKING:
    from intaglio.codesign.calibrate import Fitted


def calibrate(
    tables: Annotated[list[Path], typer.Argument(help="CSV files with the columns of intaglio validate's tables.")],
    chip_name: Annotated[str, typer.Option("--chip", help="Where the fit starts: a name or a file, NAME.toml.")],
    library_name: LibraryName = None,
    points: Annotated[int, typer.Option(min=0, help="Rows of each table and format to fit to; 0: all.")] = 24,
    folds: Annotated[int, typer.Option(min=2, help="Parts for the cross-validation.")] = 4,
    min_us: Annotated[
        float, typer.Option(callback=o.not_negative, help="Leave out rows that took fewer microseconds.")
    ] = 20.0,
    name: Annotated[str | None, typer.Option(help="Name of the files to write. Default: CHIP_calibrated.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write them to.")] = Path(),
    seed: Annotated[int, typer.Option(help="Seed of the random division into parts.")] = 0,
    as_json: o.Json = False,
) -> None:
    """Fit a chip and its kernel library to a few measured kernel times; write files for --chip and --library.

    With tables of one serving engine (<engine>_<table>.csv, with a column kernel_source), only the kernels of that
    engine are fitted.
    """
    from intaglio.codesign.calibrate import by_table, samples
    from intaglio.codesign.calibrate import calibrate as run
    from intaglio.codesign.engine_tables import is_engine_table
    from intaglio.codesign.written import new_files, write

    if any(is_engine_table(path) for path in tables):
        return calibrate_engine(tables, chip_name, library_name, points, min_us, name, output, seed, as_json)
    rows = {}
    for path in tables:
        with path.open(newline="") as f:
            rows[str(path)] = list(csv.DictReader(f))
    data = samples(by_table(rows), min_us)
    if not data:
        raise ValueError(f"no row took {min_us:g} us or more; give --min-us")
    base, library_base = Path(chip_name).stem, Path(library_name or target(chip_name).library.name).stem
    check_base(chip_name, output)
    start, written = target(chip_name, library_name), new_files(output, name or f"{base}_calibrated")
    with progress_bar("calibrating") as progress:
        found = run(start, data, points, folds, seed, progress)
    why = f"found by intaglio calibrate from {sum(f.rows for f in found.crossed)} measured rows"
    write(written, found.on, start, base, library_base, why)
    if as_json:
        kept = {k: v for k, v in vars(found).items() if k not in ("on", "crossed", "rest")}
        errors = {k: [asdict(f) for f in getattr(found, k)] for k in ("crossed", "rest")}
        print(json.dumps({**kept, **errors, "files": [str(p) for p in written]}, indent=2))
        return
    out.print(
        table(("constant", "before", "fitted"), [(n, f"{a:.4g}", f"{b:.4g}") for n, (a, b) in found.constants.items()])
    )
    say(f"kept of the fit, since it predicts rows that were left out best: {found.kept}")
    for fact, value in found.facts.items():
        say(f"fact: {fact}: {value}")
    for title, fits in (("cross-validated", found.crossed), ("rows not used", found.rest)):
        if fits:
            say(f"errors, {title}:")
            out.print(error_table("table", fits))
    if found.wanted:
        say("measure next, since the fits of the parts disagree most on them:")
        for of, row, spread in found.wanted:
            say(f"{of} {row}: {spread:.1f}%")
    say(f"wrote {written[0]} and {written[1]}; use them with --chip {written[0]}")


def calibrate_engine(
    tables: list[Path],
    chip_name: str,
    library_name: str | None,
    points: int,
    min_us: float,
    name: str | None,
    output: Path,
    seed: int,
    as_json: bool,
) -> None:
    """Fit the kernels of one serving engine to its tables, print the errors, and write a chip and a library file.

    Args:
        tables: the CSV files.
        chip_name: name or file of the chip where the fit starts.
        library_name: name or file of the kernel library where the fit starts; None: the chip's own library.
        points: rows of each table and format to fit to; 0: all.
        min_us: rows that took fewer microseconds are left out.
        name: name of the files to write; None: the chip's name with _calibrated.
        output: folder of the files.
        seed: seed of the random choice of rows.
        as_json: True to print JSON instead of a table.

    Raises ValueError if the tables are of several engines, or lack columns; ChipError if the chip is a file in another
    folder than `output`.
    """
    from intaglio.codesign.engine_tables import calibrate_kernels
    from intaglio.codesign.written import new_files, write

    check_base(chip_name, output)
    base = target(chip_name, library_name)
    written = new_files(output, name or f"{base.chip.name}_calibrated")
    with progress_bar("calibrating") as progress:
        on, rest = calibrate_kernels(base, tables, points, min_us, seed, progress)
    write(written, on, base, Path(chip_name).stem, Path(library_name or base.library.name).stem, "")
    if as_json:
        shown = [asdict(f) for f in rest]
        print(json.dumps({"rest": shown, "files": [str(p) for p in written]}, indent=2))
        return
    say("errors of rows that were not used, by kernel:")
    out.print(error_table("kernel", rest))
    say(f"wrote {written[0]} and {written[1]}; use them with --chip {written[0]}")


def check_base(chip_name: str, output: Path) -> None:
    """Raise ChipError if the chip is a file in another folder than `output`, the folder of the files to be written.

    The files to be written name the chip as their base, and a base is looked up in the folder of the file that names
    it. A chip that is given by its name, not by a file NAME.toml, is always accepted.
    """
    if chip_name.endswith(".toml") and Path(chip_name).parent.resolve() != output.resolve():
        raise ChipError(f"the new files name {chip_name} as their base; write them beside it, with --output")


def error_table(first: str, fits: Sequence[Fitted]) -> Table:
    """Returns a rich Table of the errors before and after a fit, with one line for each of `fits`.

    first: heading of the first column.
    """
    headers = (first, "format", "rows", "median\nbefore", "median\nafter", "95 %\ninterval", "mean\nafter")
    lines = [
        (f.table, f.dtype, f"{f.rows:,}", f"{f.before:.1f}%", f"{f.median:.1f}%", f"{f.low:.1f}-{f.high:.1f}%",
         f"{f.mean:.1f}%") for f in fits
    ]  # fmt: skip
    return table(headers, lines, words=2)
