"""`intaglio bench serve`: a server under a load like a public trace's, timed by a client; or a chip, in its time."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from intaglio.tools.load import Summary

out, err = Console(highlight=False, emoji=False), Console(stderr=True, highlight=False, emoji=False)
ROWS = {"ttft": "to the first token", "tpot": "a token after it", "gap": "between texts", "whole": "the whole answer"}


@contextmanager
def started(words: list[str]) -> Iterator[str]:
    """A server of this package, of `intaglio serve` with these words, on a free port: its address up to and with /v1.
    Ended, and waited for, with the block. Raises ValueError with what it said if it does not start."""
    source = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "intaglio.cli", "serve", *words, "--port", "0"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment)
        try:
            assert process.stdout
            found = re.search(r" at (http://[^\s;]+)", process.stdout.readline())
            if not found:
                process.wait()
                said.seek(0)
                raise ValueError(f"the server did not start: {said.read().strip()[-500:]}")
            yield f"{found[1]}/v1"
        finally:
            process.terminate()
            process.communicate()


def serve_words(model: Path | None, **options: Any) -> list[str]:
    """A command line's words for options that are not None."""
    given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    return [*([str(model)] if model else []), *(word for pair in given for word in pair)]


def bench_serve(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder to serve. Default: the bundled model.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="A server that runs already, such as http://127.0.0.1:8000/v1.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="INTAGLIO_API_KEY", help="Its key.")] = None,
    workload: Annotated[
        str, typer.Option(help="Lengths as in a trace: code, conversation, document.")
    ] = "conversation",
    requests: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    rate: Annotated[float, typer.Option(help="Requests a second, on average; inf: all at once.")] = 1.0,
    cv: Annotated[float, typer.Option(help="Of the gaps between requests: 1 is Poisson, more comes in bursts.")] = 1.0,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests open at once. Default: any number.")] = None,
    scale: Annotated[float | None, typer.Option(help="Multiplies the lengths. Default: as the context needs.")] = None,
    deadline: Annotated[float, typer.Option(help="Seconds for a whole answer to count as good.")] = 30.0,
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests.")] = 0,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for outputs of just the trace's lengths.")] = True,
    device: Annotated[str, typer.Option(help="host, or silicon: then all times are modelled.")] = "host",
    chip: Annotated[str | None, typer.Option(help="With silicon: the chip.")] = None,
    chips: Annotated[int | None, typer.Option(min=1, help="With silicon: how many share the model.")] = None,
    weights: Annotated[str, typer.Option(help="Format of the weights, as for serve.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the host device.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Positions to compile for.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
) -> None:
    """Put a load like a public trace's on a server: latencies, throughput, and goodput under a deadline.

    With --base-url on any server of OpenAI's completions; else on one that is started for it. With --device silicon the
    engine runs in the chip's time, and what the chip waits for takes no time here."""
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise ValueError("bench serve needs aiohttp: pip install 'intaglio[serve]'") from None
    from intaglio.tools import load as client
    from intaglio.tools.workload import draw, fitting, trace

    t = trace(workload)
    if base_url and (model or chip or chips or threads or context or (device, weights) != ("host", "auto")):
        raise ValueError(f"--base-url {base_url} is a server that runs already: leave out what a new one would be told")

    def drawn(most: int | None) -> tuple[float, list[Any]]:
        by = fitting(t, most) if scale is None else scale
        return by, draw(t, requests, rate, cv, by, most, seed)

    began = time.perf_counter()
    if device == "silicon" and base_url is None:
        from intaglio.llm import LLM

        llm = LLM(model, device, weights, threads, context=context, chip=chip, chips=chips, max_waiting=requests)
        by, asks = drawn(llm.program.context)
        began = time.perf_counter()
        answers = client.load_modelled(llm, asks, seed)
        where = str(llm.modelled)
    else:
        words = serve_words(model, device=device, weights=weights, threads=threads, context=context)
        with started(words) if base_url is None else _there(base_url) as url:
            server = client.Server(url.rstrip("/"), api_key, ignore_eos)
            try:
                asyncio.run(client.meet(server))
                by, asks = drawn(server.context)
                answers = asyncio.run(client.load(server, asks, concurrency, seed))
            except OSError as e:
                raise ValueError(f"{server.url}: {e}") from None
        where = f"{server.model} at {url}"
    took = time.perf_counter() - began
    summary = client.summarise(answers, deadline)
    modelled = device == "silicon" and base_url is None
    facts = {"server": where, "workload": workload, "source": t.source, "scale": by, "rate": rate, "cv": cv}
    if as_json:
        clock = {"clock": "modelled", "wall_seconds": took} if modelled else {"clock": "measured"}
        print(json.dumps({**facts, "rate": rate if rate < 1e308 else None, **clock, **asdict(summary)}, indent=2))
        return
    pace = f"{rate:g} requests/s, cv {cv:g}" if rate < 1e308 else "all requests at once"
    pace += f", at most {concurrency} open" if concurrency else ""
    out.print(f"{where}: {workload}, lengths x {by:.3g} ({t.source}); {pace}", markup=False, soft_wrap=True)
    out.print(table(summary, "modelled" if modelled else "measured"))
    out.print(words_of(summary), markup=False, soft_wrap=True)
    if modelled:
        ratio = summary.seconds / took
        out.print(
            f"{summary.seconds:,.3f} s there, modelled; {took:,.2f} s here, measured: {ratio:,.2f} times real time",
            markup=False, soft_wrap=True,
        )  # fmt: skip


@contextmanager
def _there(url: str) -> Iterator[str]:
    yield url


def table(s: Summary, clock: str) -> Table:
    """Latencies, in columns that say by which clock."""
    shown = Table(f"ms, {clock}", "mean", "p50", "p90", "p99", style="magenta" if clock == "modelled" else "")
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, text in ROWS.items():
        if name in s.times:
            shown.add_row(text, *(f"{s.times[name][k] * 1e3:,.3f}" for k in ("mean", "p50", "p90", "p99")))
    return shown


def words_of(s: Summary) -> str:
    """Throughput, goodput, and what failed."""
    failed = ", ".join(f"{n} x {what}" for what, n in sorted(s.errors.items()))
    return (
        f"{s.answered} of {s.requests} answered in {s.seconds:,.3f} s: {s.requests_per_s:,.2f} requests/s, "
        f"{s.prompt_tokens_per_s:,.0f} prompt and {s.output_tokens_per_s:,.0f} output tokens/s; "
        f"goodput {s.goodput:,.2f}/s within {s.deadline:g} s" + (f"; failed: {failed}" if failed else "")
    )
