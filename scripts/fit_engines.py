"""Fit the host overhead of serving engines, on the fit half of a table of measured servers.

    python scripts/fit_engines.py serving.csv --rows 60

For each engine, for its older releases and for prefill and decode apart, rows of all models are served in virtual time
twice: without these additions, and with step_s and sequence_s, since requests wait longer where steps are longer. The
additions are linear in a request's tokens and in the time of a step, so the constants with the least error follow from
the residuals: step_s and sequence_s from the times per token of the first run; request_s, prompt_token_s and
admission_steps from the times to the first token of the second. Servers with speculative decoding, or with a recipe
that gives step_s, are left out of these; tokens_per_step or step_s of such recipes follow from their times per token.
A recipe's prefill_factor changes how long requests wait: its rows are served with each of FACTORS, and the factors are
chosen together with the constants of the times to the first token.
All belong in src/intaglio/data/engines/NAME.toml. It prints them; the test half judges them (`intaglio
validate-serving serving.csv --split test`).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import replace
from pathlib import Path

from intaglio.codesign.engines import EngineProfile, engine, engines
from intaglio.codesign.measured import Compared, Row, compare_all, rows

ADDED = ("step_s", "sequence_s", "request_s", "prompt_token_s", "admission_steps")
SEQUENCE_S = (0.0, 5e-6, 1e-5, 1.5e-5, 2e-5, 3e-5, 4e-5, 6e-5)
STEP_S = (0.0, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 8e-4, 1e-3, 1.25e-3, 1.5e-3, 2e-3, 2.5e-3, 3e-3)
REQUEST_S = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15)
PROMPT_TOKEN_S = (0.0, 5e-6, 1e-5, 2e-5, 3e-5, 4e-5, 6e-5, 8e-5)
FACTORS = tuple(n / 10 for n in range(10, 26))  # 1.0 to 2.5
ADMISSION_STEPS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)


def added(c: Compared, step: float, sequence: float) -> float:
    """Seconds of the host for each step of a row's server, if all open requests decode."""
    apart = c.row.group == "disaggregated"
    placement, profile = c.row.placement("decode_" if apart else ""), c.row.profile(engine(c.row.columns["backend"]))
    most = profile.settings(0, 1, c.row.concurrency, apart).max_sequences
    return step + sequence * min(most, c.row.concurrency / placement.replicas / placement.copies)


def step_error(found: list[Compared], step: float, sequence: float) -> float:
    """Median and, with less weight, mean of the relative error of TPOT with these additions."""
    errors = [abs((c.tpot + added(c, step, sequence)) / c.row.tpot - 1) for c in found]
    return statistics.median(errors) + 0.2 * statistics.fmean(min(e, 1.0) for e in errors)


def error(found: list[Compared], request: float, token: float, steps: float) -> float:
    """The same of TTFT with these additions."""
    errors = [abs((c.ttft + request + token * c.row.number("isl") + steps * c.tpot) / c.row.ttft - 1) for c in found]
    return statistics.median(errors) + 0.2 * statistics.fmean(min(e, 1.0) for e in errors)


def kind_of(row: Row, profile: EngineProfile) -> str:
    """The table of the profile with the row's constants: "apart", "older", or "" for the profile itself."""
    if row.group == "disaggregated":
        return "apart"
    return "older" if profile.is_older(row.columns["backend_version"]) else ""


def spread_rows(mine: list[Row], most: int) -> list[Row]:
    """At most `most` of the rows, as a list, evenly spread."""
    return [mine[i * len(mine) // most] for i in range(most)] if len(mine) > most else mine


def main() -> None:
    """Print the constants of each engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("table", type=Path)
    parser.add_argument("--rows", type=int, default=60, help="of each engine, evenly spread over its rows")
    parser.add_argument("--engine", choices=list(engines()), help="only this one")
    parser.add_argument("--kind", choices=("", "older", "apart"), help='only these rows; "": the others')
    asked = parser.parse_args()
    kinds = ("", "older", "apart") if asked.kind is None else (asked.kind,)
    for name, kind in itertools.product([asked.engine] if asked.engine else engines(), kinds):
        profile = engine(name)
        mine = [
            r for r in rows(asked.table)
            if r.columns["backend"] == name and r.split == "fit" and not r.refusal()
            and kind_of(r, profile) == kind
        ]  # fmt: skip
        plain = replace(
            profile,
            apart={k: v for k, v in profile.apart.items() if k not in ADDED},
            older={},
            step_s=0.0,
            sequence_s=0.0,
            request_s=0.0,
            prompt_token_s=0.0,
            admission_steps=0.0,
        )
        drafted = [r for r in mine if r.profile(plain).draft_tokens]
        slow = [r for r in mine if r.profile(plain).step_s]
        mine = spread_rows([r for r in mine if r not in drafted and r not in slow], asked.rows)
        if not mine:
            continue
        found = served(mine, plain)
        ahead = min(itertools.product(STEP_S, SEQUENCE_S), key=lambda x: step_error(found, *x))
        with_steps = replace(plain, step_s=ahead[0], sequence_s=ahead[1])
        slower = served(mine, with_steps)
        factors = by_field(mine, plain, "prefill_factor")
        others = served(factors.pop(plain.prefill_factor, []), with_steps)
        tried = [{f: served(alike, with_factor(with_steps, now, f)) for f in FACTORS} for now, alike in factors.items()]
        grid = itertools.product(REQUEST_S, PROMPT_TOKEN_S, ADMISSION_STEPS)
        best = min(grid, key=lambda x: error(with_best(others, tried, x), *x))
        slower_now, slower = slower, with_best(others, tried, best)
        tpot = f"{step_error(found, 0.0, 0.0):.3f} -> {step_error(slower, 0.0, 0.0):.3f}"
        before, after = error(slower_now, 0.0, 0.0, 0.0), error(slower, *best)
        print(f"{name}{', ' if kind else ''}{kind}: {len(found)} rows, TPOT {tpot}, TTFT {before:.3f} -> {after:.3f}")
        print(
            f"step_s = {ahead[0]:g}\nsequence_s = {ahead[1]:g}\nrequest_s = {best[0]:g}\nprompt_token_s = {best[1]:g}\n"
            f"admission_steps = {best[2]:g}",
            flush=True,
        )
        for (now, alike), found_by in zip(factors.items(), tried, strict=True):
            servers = sorted({str(r.placement("prefill_" if r.group == "disaggregated" else "")) for r in alike})
            wanted = best_factor(found_by, best)
            print(f"prefill_factor = {wanted:g}, now {now:g}: {len(alike)} rows of {', '.join(servers)}", flush=True)
        for step, alike in by_field(slow, plain, "step_s").items():
            bare = tuple({k: v for k, v in recipe.items() if k != "step_s"} for recipe in plain.recipes)
            found = served(alike, replace(plain, sequence_s=ahead[1], recipes=bare))
            residuals = [c.row.tpot - c.tpot for c in found]
            wanted = min(residuals, key=lambda s, found=found: step_error(found, s, 0.0))  # type: ignore[misc]
            print(f"step_s = {wanted:.2g}, now {step:g}: {len(found)} rows of a recipe", flush=True)
        for tokens, alike in by_field(drafted, plain, "tokens_per_step").items():
            found = served(spread_rows(alike, asked.rows), plain)
            wanted = statistics.median((tokens * c.tpot + added(c, *ahead)) / c.row.tpot for c in found)
            servers = sorted({f"{c.row.card} {c.row.columns['backend_version']} {c.row.placement()}" for c in found})
            print(
                f"tokens_per_step = {wanted:.3g}, now {tokens:g}: {len(found)} rows of {', '.join(servers)}", flush=True
            )


def served(mine: list[Row], profile: EngineProfile) -> list[Compared]:
    """The rows served by the profile, without those that it refuses."""
    return [c for c in compare_all(mine, lambda _: profile) if not c.refused]


def with_factor(profile: EngineProfile, now: float, factor: float) -> EngineProfile:
    """A copy of the profile whose recipes with prefill_factor `now` have `factor` instead."""
    changed = [
        {**recipe, "prefill_factor": factor} if recipe.get("prefill_factor") == now else recipe
        for recipe in profile.recipes
    ]
    return replace(profile, recipes=tuple(changed))


def best_factor(tried: dict[float, list[Compared]], added: tuple[float, float, float]) -> float:
    """The key of `tried`, a prefill_factor, whose rows have the least error() with these three additions."""
    return min(tried, key=lambda factor: error(tried[factor], *added))


def with_best(
    others: list[Compared], tried: list[dict[float, list[Compared]]], added: tuple[float, float, float]
) -> list[Compared]:  # fmt: skip
    """The rows `others`, and of each dict in `tried` those served with its best_factor()."""
    return others + [c for found in tried for c in found[best_factor(found, added)]]


def by_field(mine: list[Row], profile: EngineProfile, field: str) -> dict[float, list[Row]]:
    """The rows as {value: rows}, grouped by a field of the engine profile that applies to each row's server."""
    out: dict[float, list[Row]] = {}
    for row in mine:
        out.setdefault(getattr(row.profile(profile), field), []).append(row)
    return out


if __name__ == "__main__":
    main()
