"""Fit the model of serving engines' kernels to measured tables (rows marked fit); write src/intaglio/data/kernels.

    python scripts/fit_kernels.py DIR            DIR holds <chip>/<engine>_<table>.csv
    python scripts/fit_kernels.py DIR --engine vllm --table gemm            only some tables, the others' fits stay

A kernel that was measured on both chips gets one set of facts, unless facts of each chip are clearly better. Where its
rows clearly differ by head width, it gets facts and constants for each range of widths. The rows marked test judge the
result (`intaglio validate DIR --min-us 20`); they are not used here.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.chips import target
from intaglio.chips.engine_kernels import CONSTANTS, KERNELS
from intaglio.codesign.calibrate import ANY_WIDTH
from intaglio.codesign.engine_tables import COLUMNS, kinds, read_rows, tables_of
from intaglio.codesign.kernel_fit import Case, fit_by_width
from intaglio.codesign.validate import FORMAT
from intaglio.codesign.written import toml

MIN_US = 20.0  # shorter rows are not used
MOST_ROWS = 64  # of a kernel on a chip that are fitted to, the first of the table
MARK = "[[kernels]]\n"
WHY = "fitted on rows marked fit of table "
Kind = tuple[str, str, str, str]  # engine, table, kernel, number format


def cases(folder: Path, split: str, most: int | None = None) -> dict[Kind, list[Case]]:
    """The measured rows of each kernel, by chip. most: number of rows of a kernel on a chip, at most."""
    out: dict[Kind, list[Case]] = {}
    for path, chip, engine, table in tables_of(folder):
        if table not in COLUMNS:
            continue
        rows, _ = read_rows(path, table, MIN_US, split)
        for (kernel, dtype), mine in kinds(rows).items():
            case = Case(target(chip), COLUMNS[table][0], tuple(mine[:most]))
            out.setdefault((engine, table, kernel, dtype), []).append(case)
    return out


def text(value: Any) -> str:
    """A value as TOML, numbers with four digits."""
    return toml(float(f"{value:.4g}")) if isinstance(value, float) else toml(value)


def entry(kind: Kind, mine: list[Case], widths: tuple[int, int], fitted: dict[str, dict[str, Any]]) -> str:
    """A table [[kernels]] in TOML: facts that differ from the chips' own libraries, then constants of each chip."""
    _, table, kernel, dtype = kind
    op, all_values = mine[0].op, list(fitted.values())
    facts = {f: v for f, v in all_values[0].items() if f not in CONSTANTS[op] and v is not None}
    facts = {f: v for f, v in facts.items() if all(values[f] == v for values in all_values)}
    used = [c.of_widths(*widths) for c in mine if c.on.chip.name in fitted]
    counts = ", ".join(f"{len(c.rows)} of {c.on.chip.name}" for c in used)
    lines = [MARK.strip(), f"op = {text(op)}", f"kernel = {text(kernel)}"]
    lines += [f"formats = [{text(FORMAT[dtype])}]"] if dtype in FORMAT else []
    lines += [f"head_dims = {text(widths)}"] if widths != ANY_WIDTH else []
    lines += [f"why = {text(f'{WHY}{table}: {counts}')}"]
    differ = {f for f in facts if any(getattr(c.on.library, f) != facts[f] for c in mine)}
    lines += [f"{name} = {text(facts[name])}" for name in facts if name in differ]
    for case in reversed(mine):
        if values := fitted.get(case.on.chip.name):
            lines += ["", f"[kernels.{case.on.library.generation}]"]
            own = {f: v for f, v in values.items() if f not in (*facts, *CONSTANTS[op]) and v is not None}
            lines += [f"{f} = {text(v)}" for f, v in own.items() if v != getattr(case.on.library, f)]
            lines += [f"{name} = {text(float(values[name]))}" for name in CONSTANTS[op]]
    return "\n".join(lines)


def error(case: Case | None, values: dict[str, Any] | None = None) -> str:
    """Median and mean error of some rows, as text. values: of the kernel; None: of the chip's own library."""
    if case is None or not case.rows:
        return "no rows"
    size = np.abs(np.expm1(case.errors(values or case.start()))) * 100
    return f"{np.median(size):.1f} / {size.mean():.1f} %"


def blocks(engine: str) -> list[str]:
    """The tables [[kernels]] of an engine's present file, as text."""
    path = KERNELS / f"{engine}.toml"
    return [MARK + block.strip() for block in path.read_text().split(MARK)[1:]] if path.exists() else []


def of_block(block: str) -> tuple[str, str]:
    """(table, kernel) of the text of a table [[kernels]]."""
    entry = tomllib.loads(block)["kernels"][0]
    return entry["why"].removeprefix(WHY).partition(":")[0], entry["kernel"]


def main() -> None:
    """Fit, print the errors of both halves, and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", help="only this one")
    parser.add_argument("--table", help="only this one, such as gemm")
    parser.add_argument("--kernel", default="", help="only kernels whose names contain this")
    parser.add_argument("--print", action="store_true", help="write no file")
    asked = parser.parse_args()
    fit, test = cases(asked.folder, "fit", MOST_ROWS), cases(asked.folder, "test")
    files: dict[str, list[str]] = {}
    done = set[tuple[str, str, str]]()
    for kind, mine in fit.items():
        engine, table, kernel, _ = kind
        if asked.engine not in (None, engine) or asked.table not in (None, table) or asked.kernel not in kernel:
            continue
        done.add((engine, table, kernel))
        for widths, fitted in fit_by_width(mine):
            files.setdefault(engine, []).append(entry(kind, mine, widths, fitted))
            for chip, values in fitted.items():
                known, left = (
                    next((c.of_widths(*widths) for c in half.get(kind, []) if c.on.chip.name == chip), None)
                    for half in (fit, test)
                )
                words = f"fit {error(known, values)}, test {error(left, values)}, before {error(left)}"
                print(chip, *kind, widths, f"{len(known.rows) if known else 0} rows, {words}")
                begun = known.start() if known else {}
                print("   ", {n: v for n, v in values.items() if v != begun.get(n)}, flush=True)
    for engine, entries in files.items():
        if not asked.print:
            head = f"# Kernels of {engine} by name. Written by scripts/fit_kernels.py; do not edit it.\n\n"
            others = [block for block in blocks(engine) if (engine, *of_block(block)) not in done]
            (KERNELS / f"{engine}.toml").write_text(head + "\n\n".join(sorted(others + entries)) + "\n")


if __name__ == "__main__":
    main()
