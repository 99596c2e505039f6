"""`intaglio validate-serving`: simulates measured servers (codesign/queue.py) and prints errors of their latencies."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intaglio.cli import options as o
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import out, say, table

if TYPE_CHECKING:
    from intaglio.codesign.ranking import Ranked

HEADERS = ("engine", "class", "rows", "TPOT\nmedian", "TTFT\nmedian", "TPOT\nbias", "TTFT\nbias")


def validate_serving(
    file: Annotated[Path, typer.Argument(help="A table of measured servers, such as serving.csv.")],
    split: Annotated[
        str | None, typer.Option(help="Only rows of this half: fit (the profiles' constants) or test. Default: all.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Only rows of this serving engine.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Only so many rows, evenly spread.")] = None,
    worst: Annotated[int, typer.Option(help="Worst rows to show of each engine and class, at most 3.")] = 1,
    ranking: Annotated[
        bool, typer.Option("--ranking", help="Also say how often the recommended layout is near the best measured.")
    ] = False,
    closed_form: Annotated[
        bool,
        typer.Option(
            "--closed-form",
            help="The steady state by closed form, not the queue: quicker, less exact; without poll_steps and ranks.",
        ),
    ] = False,
    as_json: o.Json = False,
) -> None:
    """Simulate the loads of measured servers, and compare modelled with measured latencies.

    The errors are listed by serving engine and kind of server: dense model, mixture of experts, or disaggregated.
    """
    from intaglio.codesign import measured
    from intaglio.codesign.ranking import LEAST, MODEL_AND_CHIP, MODEL_CHIP_LENGTHS, rankings

    if split not in (None, "fit", "test"):
        raise ValueError(f"--split {split}; use fit or test")
    rows = [
        r for r in measured.rows(file)
        if (split is None or r.split == split) and (backend is None or r.columns["backend"] == backend)
    ]  # fmt: skip
    if not rows:
        raise ValueError(f"{file}: no rows with split {split} and backend {backend}")
    if sample and sample < len(rows):
        rows = [rows[i * len(rows) // sample] for i in range(sample)]
    with progress_bar(f"reading {file}") as progress:
        compared = list(measured.compare_all(rows, progress=progress, closed_form=closed_form))
    found = measured.agreements(compared)
    refused = Counter(c.refused for c in compared if c.refused)
    derived = sum(c.row.twin is not None and not c.refused for c in compared)
    drafting = sum(c.draft_tokens > 0 for c in compared)
    ranked = {
        f"at least {LEAST} layouts and loads": rankings(compared) if ranking else [],
        "at one load": rankings(compared, at_one_load=True, least=2) if ranking else [],
    }
    for name, same in (("model and chip", MODEL_AND_CHIP), ("model, chip and lengths", MODEL_CHIP_LENGTHS)):
        cases = rankings(compared, same=same, least_layouts=LEAST, apart=True) if ranking else []
        ranked[f"{name}, at least {LEAST} layouts"] = cases
    if as_json:
        figures = [{k: v for k, v in asdict(a).items() if k != "worst"} for a in found]
        by_kind = {kind: [asdict(r) for r in mine] for kind, mine in ranked.items()} if ranking else {}
        report = {"rows": len(rows), "derived": derived, "drafting": drafting, "agreements": figures}
        report["refused"] = dict(refused)
        print(json.dumps({**report, **({"ranking": by_kind} if ranking else {})}, indent=2))
        return
    shown = [
        (
            a.engine,
            a.group,
            f"{a.rows:,}",
            f"{a.tpot:.1%}",
            f"{a.ttft:.1%}",
            f"{a.tpot_bias:+.1%}",
            f"{a.ttft_bias:+.1%}",
        )
        for a in found
    ]
    out.print(table(HEADERS, shown, words=2))
    for a in found:
        for c in a.worst[:worst] if a.engine != "all" else ():
            r = c.row
            what = f"{a.engine} {r.card} {r.columns['system']} {r.placement()} {r.columns['isl']} + {r.columns['osl']}"
            say(
                f"{what}, {r.concurrency} open: TPOT measured {r.tpot * 1e3:,.1f} ms, modelled {c.tpot * 1e3:,.1f}; "
                f"TTFT {r.ttft * 1e3:,.0f} ms, {c.ttft * 1e3:,.0f}"
            )
    if ranking:
        say_ranking(ranked, worst)
    say(f"{len(rows) - sum(refused.values()):,} of {len(rows):,} rows are covered by the model.")
    if derived:
        say(f"{derived:,} of these do not say how many servers there are; rows with the same measurement do.")
    if drafting:
        say(f"{drafting:,} of these are modelled with speculative decoding, which a recipe of their engine assumes.")
    for why, n in refused.most_common():
        say(f"{n:,} not: {why}")
    say("median: of |modelled - measured| / measured. bias: the median of the same with its sign.")


def say_ranking(ranked: Mapping[str, Sequence[Ranked]], worst: int) -> None:
    """Print in how many cases the recommended layout comes within 5 % of the best measured layout.

    The recommended layout is the best one by modelled times.

    Args:
        ranked: groups of compared cases, each under a text that names the group. A case is one question for which
            several layouts were measured.
        worst: number of cases to print for each group. The cases with the worst recommendations are printed.
    """
    for kind, cases in ranked.items():
        if not cases:
            say(f"Ranking, {kind}: no case among these rows.")
            continue
        good = sum(r.good for r in cases)
        say(
            f"Ranking, {kind}: in {good:,} of {len(cases):,} cases ({good / len(cases):.0%}) the recommendation has "
            "at least 95 % of the best measured output tokens/s per chip."
        )
        for r in sorted(cases, key=lambda r: r.reached)[:worst]:
            asked = " ".join(filter(None, r.question))
            say(f"  worst: {asked}: recommended {r.recommended}, best {r.best}: {r.reached:.0%} of its rate")
