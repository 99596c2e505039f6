"""`intaglio port`, `check` and `replay`: find a port, compare a model with transformers or two runs, replay a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from intaglio.cli import options as o
from intaglio.cli.load import find
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import out, print_json, say, table
from intaglio.debugging.automatic import AutoPort, port_automatically
from intaglio.debugging.porting import PortingError, investigate
from intaglio.debugging.replay import replay_journal

if TYPE_CHECKING:
    from intaglio.debugging.check import Report


def port(
    target: Annotated[str, typer.Argument(help="A checkpoint folder, or a model type of transformers.")],
    auto: Annotated[
        bool, typer.Option("--auto", help="Derive the port from the model's behaviour, verify it and print its file.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=o.in_existing_folder, help="With --auto: the file to write."),
    ] = None,
) -> None:
    """Find the port (loader code) that fits an architecture.

    The command prints the line of code that adds the architecture to Intaglio. The line belongs in FAMILIES, the table
    of supported architectures in a file of models/ports/. If no port fits, the command prints what is missing. Needs
    torch and transformers.
    """
    if output and not auto:
        raise ValueError("--output goes with --auto, which writes a port file")
    try:
        with progress_bar(f"reading {target}") as progress:
            if auto:
                return _show_automatic(port_automatically(target, progress), output)
            findings = investigate(target, progress)
    except PortingError as e:
        raise ValueError(str(e)) from None
    for line in str(findings).splitlines():
        say(line)
    if not findings.trials[0].fits:
        raise typer.Exit(1)
    return None


def _show_automatic(made: AutoPort, output: Path | None) -> None:
    """Print the report of an automatically derived port and, if the port is verified, also its source.

    output: file to which the source is written instead of being printed; None: it is printed. Raises typer.Exit with
    code 1 if the port is not verified.
    """
    for line in str(made).splitlines():
        say(line)
    if not made.verified:
        raise typer.Exit(1)
    if output:
        output.write_text(made.text, encoding="utf-8")
        say(f"written to {output}; a file in src/intaglio/models/ports/ is part of the table")
        say("next: ruff format, then a row in tests/support/tiny.py for its tests (docs/adding-a-model.md)")
    else:
        print(made.text, end="")


def check(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder, GGUF file or hub id.")],
    revision: o.Revision = None,
    device: o.Device = "host",
    seed: Annotated[int, typer.Option(help="Seed of the random token ids that are run.")] = 0,
    bisect: Annotated[
        str, typer.Option(help="Compare these two of our devices or formats instead: reference,host:int8.")
    ] = "",
    as_json: o.Json = False,
) -> None:
    """Compare the model on a device with transformers, op by op; exit code 1 if they disagree. Needs torch."""
    from intaglio.debugging.bisect import bisect as run_bisect
    from intaglio.debugging.check import CheckError
    from intaglio.debugging.check import check as run_check

    model = find(model, revision)
    try:
        with progress_bar(f"checking {model}") as progress:
            if bisect:
                report = run_bisect(model, bisect.split(","), seed, progress=progress)
            else:
                report = run_check(model, device=device, seed=seed, progress=progress)
    except CheckError as e:
        raise ValueError(str(e)) from None
    if as_json:
        print_json(report.as_dict())
    else:
        say(report.title)
        out.print(site_table(report))
        for line in report.conclusion:
            say(line)
    if not report.ok:
        raise typer.Exit(1)


def site_table(report: Report) -> Table:
    """Returns the table that `intaglio check` prints, as a rich Table with the errors of each op.

    Columns in which no op has a value are left out.
    """
    headers = ["site", "error", "allowed"]
    columns = [
        [r.site for r in report.rows],
        [f"{r.error:.2e}" for r in report.rows],
        [f"{r.tolerance:.2e}" for r in report.rows],
    ]
    if any(r.bf16 for r in report.rows):
        headers += ["bf16's\nerror", "error over\nbf16's"]
        columns.append([f"{r.bf16:.2e}" if r.bf16 else "-" for r in report.rows])
        columns.append([f"{r.ratio:.3f}" if r.ratio is not None else "-" for r in report.rows])
    if not all(r.ok for r in report.rows):
        headers.append("")
        columns.append(["" if r.ok else "OUT OF LINE" for r in report.rows])
    return table(headers, zip(*columns, strict=True))


def replay(
    journal: Annotated[Path, typer.Argument(help="The file that LLM(journal=...) or the server wrote.")],
    model: Annotated[Path | None, typer.Option(help="The checkpoint folder, if it has moved.")] = None,
    device: Annotated[str | None, typer.Option(help="Run on another device than the recorded one.")] = None,
    as_json: o.Json = False,
) -> None:
    """Run a recorded journal again, and print whether every event came out the same. Exit code 1: not the same."""
    with progress_bar(f"replaying {journal}") as progress:
        done = replay_journal(journal, model, device, progress)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
    else:
        typer.echo(f"{done.steps} steps, {done.requests} requests, {done.tokens} tokens, {done.faults} failed launches")
        typer.echo(f"not the same: {done.divergence}" if done.divergence else "every event came out the same")
    if done.divergence:
        raise typer.Exit(1)
