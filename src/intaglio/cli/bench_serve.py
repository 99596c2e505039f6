"""`intaglio bench serve`: put load on a server and print its latencies, or run the load in a chip's modelled time."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from intaglio.cli import options as o
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import out, say, table
from intaglio.measure.server import serve_words, started

if TYPE_CHECKING:
    from intaglio.measure.load import Summary

ROWS = {
    "ttft": "time to first token", "tpot": "time per output token", "gap": "between two texts", "whole": "whole answer",
}  # fmt: skip
FIGURES = ("mean", "p50", "p90", "p99")


def bench_serve(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder to serve. Default: the bundled model.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Address of a server that runs already, up to and with /v1.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="INTAGLIO_API_KEY", help="API key for --base-url.")] = None,
    workload: Annotated[
        str, typer.Option(help="Lengths as in a trace: code, conversation, document.")
    ] = "conversation",
    requests: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 100,
    rate: Annotated[float, typer.Option(help="Requests a second, on average; inf: all at once.")] = 1.0,
    cv: Annotated[
        float, typer.Option(help="Coefficient of variation of arrival gaps: 1 Poisson, above: bursts.")
    ] = 1.0,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests open at once. Default: any number.")] = None,
    scale: Annotated[float | None, typer.Option(help="Multiplies the lengths. Default: as the context needs.")] = None,
    deadline: Annotated[float, typer.Option(help="Seconds for a whole answer to count as good.")] = 30.0,
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests.")] = 0,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for outputs of just the trace's lengths.")] = True,
    device: Annotated[str, typer.Option(help="host, or silicon: then all times are modelled.")] = "host",
    chip: o.Chip = None,
    chips: o.Chips = None,
    weights: o.Weights = "auto",
    threads: o.Threads = None,
    context: o.Context = None,
    as_json: o.Json = False,
) -> None:
    """Send a server the load of a public trace; print latencies, throughput, and goodput under a deadline.

    --base-url names any server with OpenAI's /v1/completions. Without it, a server is started for this run. With
    --device silicon there is no server: the engine runs in the modelled time of the chip.
    """
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise ValueError("bench serve needs aiohttp: pip install 'intaglio[serve]'") from None
    from intaglio.measure import load as client
    from intaglio.measure.modelled import load_modelled
    from intaglio.measure.workload import draw, fitting, trace

    t = trace(workload)
    if base_url and (model or chip or chips or threads or context or (device, weights) != ("host", "auto")):
        raise ValueError(f"--base-url {base_url} is a server that runs already: leave out options for a new one")

    def drawn(most: int | None) -> tuple[float, list[Any]]:
        by = fitting(t, most) if scale is None else scale
        return by, draw(t, requests, rate, cv, by, most, seed)

    began = time.perf_counter()
    if device == "silicon" and base_url is None:
        from intaglio.llm import LLM

        with progress_bar(f"loading {model or 'the bundled model'}") as progress:
            llm = LLM(
                model, device, weights, threads, context=context, chip=chip, chips=chips, max_waiting=requests,
                progress=progress,
            )  # fmt: skip
        by, planned = drawn(llm.model.program.context)
        began = time.perf_counter()
        with progress_bar("running the load") as progress:
            answers = load_modelled(llm, planned, seed, concurrency, progress)
        where = str(llm.modelled)
    else:
        words = serve_words(model, device=device, weights=weights, threads=threads, context=context)
        with ExitStack() as stack:
            with progress_bar("starting the server" if base_url is None else f"asking {base_url}"):
                url = base_url or stack.enter_context(started(words))
                server = client.Server(url.rstrip("/"), api_key, ignore_eos)
            try:
                asyncio.run(client.probe(server))
                by, planned = drawn(server.context)
                with progress_bar("running the load") as progress:
                    answers = asyncio.run(client.load(server, planned, concurrency, seed, progress))
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
    arrivals = f"{rate:g} requests/s, cv {cv:g}" if rate < 1e308 else "all requests at once"
    arrivals += f", at most {concurrency} open" if concurrency else ""
    say(f"{where}: {workload}, lengths x {by:.3g} ({t.source}); {arrivals}")
    out.print(latencies(summary, "modelled" if modelled else "measured"))
    say(words_of(summary))
    if modelled:
        ratio = summary.seconds / took
        say(f"{summary.seconds:,.3f} s there, modelled; {took:,.2f} s here, measured: {ratio:,.2f} times real time")


def latencies(s: Summary, clock: str) -> Table:
    """Returns the latencies of a load, in milliseconds, as a rich Table.

    clock: "measured" or "modelled", for the heading.
    """
    shown = [name for name in ROWS if name in s.times]
    rows = [(ROWS[name], *(f"{s.times[name][k] * 1e3:,.3f}" for k in FIGURES)) for name in shown]
    headers = (f"latency, {clock}", *(f"{figure}\nms" for figure in FIGURES))
    return table(headers, rows, style="magenta" if clock == "modelled" else "")


def words_of(s: Summary) -> str:
    """Returns a sentence that tells the throughput, goodput and errors of a load."""
    failed = ", ".join(f"{n} x {what}" for what, n in sorted(s.errors.items()))
    return (
        f"{s.answered} of {s.requests} answered in {s.seconds:,.3f} s: {s.requests_per_s:,.2f} requests/s, "
        f"{s.prompt_tokens_per_s:,.0f} prompt and {s.output_tokens_per_s:,.0f} output tokens/s; "
        f"goodput {s.goodput:,.2f}/s within {s.deadline:g} s" + (f"; failed: {failed}" if failed else "")
    )
