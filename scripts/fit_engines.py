"""Fit what serving engines' hosts add to the kernels, on the fit half of a table of measured servers.

    python scripts/fit_engines.py serving.csv --rows 60

For each engine, and for its older releases, rows of all models are served in virtual time once, without these
additions. As they are linear in a request's tokens and in the time of a step, the constants with the least error follow
from the residuals: step_s from the times per token; request_s, prompt_token_s and admission_steps from those to the
first. They belong in src/intaglio/data/engines/NAME.toml. It prints them; the test half judges them
(`intaglio validate-serving serving.csv --split test`).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import replace
from pathlib import Path

from intaglio.codesign.engines import engine, engines
from intaglio.codesign.measured import Compared, compare_all, rows

STEP_S = (0.0, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 8e-4, 1e-3, 1.25e-3, 1.5e-3, 2e-3)
REQUEST_S = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1)
PROMPT_TOKEN_S = (0.0, 5e-6, 1e-5, 2e-5, 3e-5, 4e-5, 6e-5, 8e-5)
ADMISSION_STEPS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0)


def step_error(found: list[Compared], step: float) -> float:
    """Median and, with less weight, mean of the relative error of TPOT with this addition."""
    errors = [abs((c.tpot + step) / c.row.tpot - 1) for c in found]
    return statistics.median(errors) + 0.2 * statistics.fmean(min(e, 1.0) for e in errors)


def error(found: list[Compared], step: float, request: float, token: float, steps: float) -> float:
    """The same of TTFT with these additions."""
    errors = [
        abs((c.ttft + request + token * c.row.number("isl") + steps * (c.tpot + step)) / c.row.ttft - 1) for c in found
    ]
    return statistics.median(errors) + 0.2 * statistics.fmean(min(e, 1.0) for e in errors)


def main() -> None:
    """Print the constants of each engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("table", type=Path)
    parser.add_argument("--rows", type=int, default=60, help="of each engine, evenly spread over its rows")
    parser.add_argument("--engine", choices=list(engines()), help="only this one")
    asked = parser.parse_args()
    for name, old in itertools.product([asked.engine] if asked.engine else engines(), (False, True)):
        mine = [
            r for r in rows(asked.table)
            if r.columns["backend"] == name and r.split == "fit" and not r.refusal()
            and engine(name).is_older(r.columns["backend_version"]) == old
        ]  # fmt: skip
        if not mine:
            continue
        mine = [mine[i * len(mine) // asked.rows] for i in range(asked.rows)] if len(mine) > asked.rows else mine
        plain = replace(engine(name), older={}, step_s=0.0, request_s=0.0, prompt_token_s=0.0, admission_steps=0.0)
        found = [c for c in compare_all(mine, lambda _, p=plain: p) if not c.refused]  # type: ignore[misc]
        step = min(STEP_S, key=lambda s: step_error(found, s))
        grid = itertools.product([step], REQUEST_S, PROMPT_TOKEN_S, ADMISSION_STEPS)
        best = min(grid, key=lambda x: error(found, *x))[1:]
        tpot = f"{step_error(found, 0.0):.3f} -> {step_error(found, step):.3f}"
        before, after = error(found, step, 0.0, 0.0, 0.0), error(found, step, *best)
        print(f"{name}{', older' if old else ''}: {len(found)} rows, TPOT {tpot}, TTFT {before:.3f} -> {after:.3f}")
        print(
            f"step_s = {step:g}\nrequest_s = {best[0]:g}\nprompt_token_s = {best[1]:g}\nadmission_steps = {best[2]:g}",
            flush=True,
        )


if __name__ == "__main__":
    main()
