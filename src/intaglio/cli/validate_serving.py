"""`intaglio validate-serving`: measured servers against the queue in virtual time."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from intaglio.cli import options as o
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import out, say, table

HEADERS = ("engine", "class", "rows", "TPOT\nmedian", "TTFT\nmedian", "TPOT\nbias", "TTFT\nbias")


def validate_serving(
    file: Annotated[Path, typer.Argument(help="A table of measured servers, such as serving.csv.")],
    split: Annotated[
        str | None, typer.Option(help="Only rows of this half: fit (the profiles' constants) or test. Default: all.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Only rows of this serving engine.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Only so many rows, evenly spread.")] = None,
    worst: Annotated[int, typer.Option(help="Worst rows to show of each engine and class, at most 3.")] = 1,
    as_json: o.Json = False,
) -> None:
    """Serve the loads of measured servers in modelled time and compare latencies, by engine and class of model."""
    from intaglio.codesign import measured

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
        compared = list(measured.compare_all(rows, progress=progress))
    found = measured.agreements(compared)
    refused = Counter(c.refused for c in compared if c.refused)
    if as_json:
        figures = [{k: v for k, v in asdict(a).items() if k != "worst"} for a in found]
        print(json.dumps({"rows": len(rows), "agreements": figures, "refused": dict(refused)}, indent=2))
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
    say(f"{len(rows) - sum(refused.values()):,} of {len(rows):,} rows are expressed.")
    for why, n in refused.most_common():
        say(f"{n:,} not: {why}")
    say("median: of |modelled - measured| / measured. bias: the median of the same with its sign.")
