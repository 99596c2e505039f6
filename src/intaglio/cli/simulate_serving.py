"""`intaglio simulate-serving`: a whole server under load, in the modelled time of chips."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intaglio.chips import target
from intaglio.cli import options as o
from intaglio.cli.bench_serve import latencies
from intaglio.cli.plot import check_path, lines
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import out, say, table
from intaglio.cli.silicon import (
    Activations,
    Changes,
    InputTokens,
    LibraryName,
    OutputTokens,
    SimulatedModel,
    changed,
)

if TYPE_CHECKING:
    from intaglio.codesign.serving import ServingResult
    from intaglio.measure.workload import LoadRequest

HEADERS = (
    "chip", "layout", "TTFT\nms", "TPOT\nms", "a user\ntokens/s", "a chip\ntokens/s", "power\nW/chip", "tokens/J",
    "within\nlimits",
)  # fmt: skip


def simulate_serving(
    model: SimulatedModel,
    chip_name: Annotated[
        str, typer.Option("--chip", help="A name (see intaglio chips) or NAME.toml; several with commas are compared.")
    ] = "sohu",
    library_name: LibraryName = None,
    layout: Annotated[
        str,
        typer.Option(help="Such as tp8, or replicas as dp64tp8 with --rate; several with commas are compared."),
    ] = "tp1",
    workload: Annotated[
        str | None,
        typer.Option(help="Lengths of a trace: code, conversation, document. Default: --input, --output."),
    ] = None,
    input: InputTokens = 2048,
    output: OutputTokens = 128,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Number of requests. Default: 4 x concurrency, else 100.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests open at once. Default: any number with --rate, else 16.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests that arrive a second. Default: one starts when another ends.")
    ] = None,
    ramp: Annotated[
        float | None,
        typer.Option(help="Seconds over which first requests start. Default: one request's time; 0: at once."),
    ] = None,
    cv: Annotated[
        float, typer.Option(help="Coefficient of variation of arrival gaps: 1 Poisson, above: bursts.")
    ] = 1.0,
    ttft: o.TtftLimit = None,
    tpot: o.TpotLimit = None,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step; longer prompts are cut.")] = 2048,
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 256,
    memory_share: Annotated[float, typer.Option(help="Fraction of a chip's HBM that may be filled.")] = 0.9,
    step_overhead: Annotated[float, typer.Option(help="Microseconds of the host before each step.")] = 0.0,
    request_overhead: Annotated[float, typer.Option(help="Milliseconds before each first token.")] = 0.0,
    route: Annotated[
        str, typer.Option(help="Requests go to the replica with the fewest open (least-open), or round-robin.")
    ] = "least-open",
    weights: o.Weights = "auto",
    kv_format: o.KvFormat = "auto",
    activations: Activations = "auto",
    set_field: Changes = None,
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests.")] = 0,
    price: Annotated[float | None, typer.Option(help="Price of a chip for an hour: prints the cost of tokens.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            callback=o.in_existing_folder, help="Write a chart of queue and cache as SVG; one chip, one layout."
        ),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Simulate how chips serve a load, in modelled time; print latencies, throughput, goodput and power.

    No token is computed, so a model of any size runs here. Times are those of `intaglio simulate`. The engine itself
    runs in modelled time. Layouts with replicas, or with experts on all chips, are simulated event by event instead: a
    day of 64 replicas takes minutes.
    """
    from intaglio.codesign.fleet import simulate_fleet
    from intaglio.codesign.placement import Placement
    from intaglio.codesign.serving import EngineSettings, Limits, ramped, request_seconds
    from intaglio.codesign.serving import simulate_serving as serve_load
    from intaglio.codesign.simulate import ported, stages
    from intaglio.codesign.steps import Formats, Server

    check_path(plot)
    if price is not None and not 0 <= price < float("inf"):
        raise ValueError(f"--price is {price:g}; allowed: 0 or more, for a chip and an hour")
    settings = EngineSettings(
        max_batch_tokens, max_sequences, memory_share, step_overhead / 1e6, request_overhead / 1e3
    )  # fmt: skip
    none = float("inf")
    limits = Limits(none if ttft is None else ttft / 1e3, none if tpot is None else tpot / 1e3)
    concurrency = 16 if concurrency is None and rate is None else concurrency
    placements = {each: Placement.parse(each) for each in layout.split(",")}
    if rate is None and not all(one.single for one in placements.values()):
        raise ValueError(f"--layout {layout} has replicas or experts on all chips; give --rate, requests a second")
    if plot and ("," in chip_name or len(placements) > 1):
        raise ValueError(f"--plot {plot}: a chart shows one run; give one --chip and one --layout")
    if concurrency and not all(one.single for one in placements.values()):
        raise ValueError("--concurrency goes with layouts of one replica; with replicas leave it out and give --rate")
    if route != "least-open" and all(one.single for one in placements.values()):
        raise ValueError(f"--route {route} goes with a layout of several replicas, such as dp64tp8")
    program = ported(model, None)
    count = requests or (4 * concurrency if concurrency else 100)
    planned = planned_load(workload, count, none if rate is None else rate, cv, input, output, program.context, seed)
    began, rows, found = time.perf_counter(), [], []
    for name, each in itertools.product(chip_name.split(","), placements):
        on = changed(target(name, library_name), set_field)
        with progress_bar(f"{name} {each}: compiling {program.name}") as progress:
            if placements[each].single:
                compiled = stages(program, each, weights, kv_format, activations)
                load = planned
                if rate is None and concurrency:
                    spread = request_seconds(compiled, on, planned[0], concurrency) if ramp is None else ramp
                    load = ramped(planned, concurrency, spread)
                done = serve_load(
                    program, compiled, on, each, load, settings, limits, concurrency, seed, progress
                )  # fmt: skip
            else:
                server = Server.of(program, placements[each], Formats(weights, kv_format, activations))
                done = simulate_fleet(server, on, planned, settings, limits, route, progress)
        rows.append(cells(on.chip.name, each, done))
        found.append((on, each, done))
    took = time.perf_counter() - began
    if plot:
        plot.write_text(chart(f"{program.name} on {chip_name}, {layout}", found[0][2]), encoding="utf-8")
    if as_json:
        facts = {"model": program.name, "clock": "modelled"}
        print(json.dumps([
            {**facts, "chip": on.chip.name, "library": on.library.name, "layout": each, **done.as_dict()}
            for on, each, done in found
        ], indent=2))  # fmt: skip
        return
    arrivals = "one as another ends" if rate is None else f"{rate:g} requests/s, cv {cv:g}"
    lengths = f"{workload} lengths" if workload else f"{input:,} + {output:,} tokens"
    open_at_once = f"at most {concurrency} open" if concurrency else "any number open"
    say(f"{program.name}: {len(planned):,} requests of {lengths}, {arrivals}, {open_at_once}")
    if len(found) == 1:
        summary = found[0][2].summary
        out.print(latencies(summary, "modelled"))
        tokens = f"{summary.prompt_tokens_per_s:,.0f} prompt and {summary.output_tokens_per_s:,.0f} output tokens/s"
        failed = ", ".join(f"{n} x {what}" for what, n in sorted(summary.errors.items()))
        say(f"{summary.requests_per_s:,.2f} requests/s, {tokens}" + (f"; failed: {failed}" if failed else ""))
    out.print(table(HEADERS, rows))
    for on, each, done in found:
        each_has = "" if placements[each].single else " in each"
        kept = f"K/V cache of {done.kv_tokens:,} tokens{each_has}, {done.preemptions:,} preemptions"
        assumed = f"{on.library.name} kernels, launch {on.library.launch_s * 1e6:.2g} us"
        how = "" if placements[each].single else f"event by event, {placements[each].replicas:,} replicas, {route}; "
        say(f"{on.chip.name} {each}: {how}{done.steps:,} steps; {kept}; {assumed}")
        energy = f"{1 / 3.6 / done.output_tokens_per_joule:,.3g} kWh"
        cost = "" if price is None else f" and {cost_per_million(done, price):,.3g} at {price:g} for a chip and an hour"
        say(f"{on.chip.name} {each}: a million output tokens take {energy}{cost}")
    modelled = sum(done.summary.seconds for _, _, done in found)
    say(f"{modelled:,.1f} s modelled, {took:,.1f} s here. All times are modelled; TTFT and TPOT are means.")


def planned_load(
    workload: str | None, count: int, rate: float, cv: float, input: int, output: int, context: int, seed: int
) -> list[LoadRequest]:
    """Returns the requests of a simulated load, as a list of `count` LoadRequests with their arrival times.

    Args:
        workload: name of a trace from which the requests' lengths are drawn, scaled to fit `context`; None: every
            request has `input` and `output` tokens.
        count: number of requests.
        rate: requests per second, on average.
        cv: coefficient of variation of the gaps between arrivals; 1 is Poisson.
        input: prompt tokens of each request; not used with a workload.
        output: new tokens of each request; not used with a workload.
        context: the model's largest context.
        seed: seed of the random lengths and arrival times.

    Raises ValueError unless rate and cv are above 0.
    """
    import numpy as np

    from intaglio.measure.workload import LoadRequest, arrivals, draw, fitting, trace

    if workload:
        t = trace(workload)
        return draw(t, count, rate, cv, fitting(t, context), context, seed)
    at = arrivals(count, rate, cv, np.random.default_rng(seed))
    return [LoadRequest(float(seconds), input, output) for seconds in at]


def cost_per_million(done: ServingResult, price: float) -> float:
    """Returns the cost of a million output tokens in the simulated run `done`.

    price: price of one chip for an hour. The result is in the same currency as `price`.
    """
    return 1e6 * price / 3600 / done.output_tokens_per_s_per_chip


def chart(title: str, done: ServingResult) -> str:
    """Returns a chart of a simulated run as SVG text, with three lines over modelled time.

    The lines are the number of requests that wait, the number that decode, and the percentage of the K/V cache that
    decoding requests fill. title: title of the chart.
    """
    series = {
        "waiting": [(m.at, float(m.waiting), "") for m in done.moments],
        "decoding": [(m.at, float(m.decoding), "") for m in done.moments],
        "K/V cache, %": [(m.at, 100 * m.kv_share, "") for m in done.moments],
    }
    return lines(title, "seconds, modelled", "requests; % of the K/V cache that decoding requests fill", series)


def cells(chip: str, layout: str, done: ServingResult) -> tuple[str, ...]:
    """Returns one row of the table of simulated runs, as a tuple with a text for each column.

    The row shows the run `done`. chip, layout: names of the chip and the layout, for the first columns.
    """
    mean = {name: done.summary.times.get(name, {}).get("mean", float("nan")) for name in ("ttft", "tpot")}
    return (
        chip, layout, f"{mean['ttft'] * 1e3:,.1f}", f"{mean['tpot'] * 1e3:,.2f}",
        f"{1 / mean['tpot']:,.0f}" if mean["tpot"] else "-",
        f"{done.output_tokens_per_s_per_chip:,.0f}", f"{done.watts_per_chip:,.0f}",
        f"{done.output_tokens_per_joule:,.2f}", f"{done.within_limits:.0%}",
    )  # fmt: skip
