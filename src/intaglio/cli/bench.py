"""`intaglio bench model` and `intaglio profile`: measured speed beside the machine's bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.table import Table

from intaglio.cli import options as o
from intaglio.cli.load import open_llm
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import describe, describe_device, out, print_json, say, summary, table

if TYPE_CHECKING:
    from intaglio.devices.expert_load import ExpertLoad
    from intaglio.llm import LLM
    from intaglio.measure.bench import Row
    from intaglio.measure.profile import Profile
    from intaglio.measure.ranks import RankTimes

T = TypeVar("T")
BOUNDS = (
    "bound: the step's bytes or FLOPs at the bandwidth or FLOP/s that this machine reaches, measured too. share of "
    "roof: bound over measured time."
)


def bench(
    model: o.Model = None,
    revision: o.Revision = None,
    prompt_tokens: Annotated[str | None, typer.Option(help="Prompt lengths, such as 128,512.")] = None,
    sequences: Annotated[str, typer.Option(help="Numbers of sequences run together.")] = "1,8",
    runs: Annotated[int, typer.Option(min=1, help="Runs of which the median is taken.")] = 3,
    weights: o.Weights = "auto",
    kv_format: o.KvFormat = "auto",
    device: o.Device = "host",
    threads: o.Threads = None,
    context: o.Context = None,
    layout: o.Layout = None,
    in_process: o.InProcess = False,
    no_cache: o.NoCache = False,
    as_json: o.Json = False,
) -> None:
    """Measure prefill and decode; print each speed beside the limit that memory bandwidth or peak FLOP/s sets."""
    check_measurable(device)
    lengths = numbers(prompt_tokens) if prompt_tokens else None
    counts = numbers(sequences)
    llm = open_llm(model, device, weights, kv_format, threads, context, no_cache, layout, in_process, revision, 0)
    rows, why = run_bench(llm, lengths=lengths, sequences=counts, runs=runs)
    if as_json:
        print_json({**facts(llm, why), "rows": [r.as_dict() for r in rows]})
        return
    print_head(llm, runs)
    out.print(bench_table(rows))
    say(why or BOUNDS)


def profile(
    model: o.Model = None,
    revision: o.Revision = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Prompt length. Default: 256, if it fits.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences run together.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Runs of which medians are taken.")] = 5,
    weights: o.Weights = "auto",
    kv_format: o.KvFormat = "auto",
    device: o.Device = "host",
    threads: o.Threads = None,
    context: o.Context = None,
    layout: o.Layout = None,
    trace: Annotated[Path | None, typer.Option(help="With --layout: write a decode step for Perfetto.")] = None,
    no_cache: o.NoCache = False,
    as_json: o.Json = False,
) -> None:
    """Print the time of each op in a step beside the op's roofline bound.

    Then print the ops with the most time above their bounds. With a layout, also show how long each rank was in
    collectives and for which rank it waited.
    """
    from intaglio.measure.profile import profile as run_profile
    from intaglio.measure.ranks import chrome_trace, rank_times, timed_decode

    check_measurable(device)
    if trace and not layout:
        raise ValueError("--trace shows the ranks of a layout; add --layout, such as tp2")
    llm = open_llm(
        model, device, weights, kv_format, threads, context, no_cache, layout, revision=revision, window_tokens=0
    )
    profiles, why = beside_roofs(llm, run_profile, sequences=sequences, prompt_tokens=prompt_tokens, runs=runs)
    steps = timed_decode(llm.engine.executable, sequences, runs) if layout else []
    ranks = rank_times(llm.mesh, steps) if steps else []
    if trace and steps:
        trace.write_text(chrome_trace(steps[-1].rank_timings))
    if as_json:
        together = {"ranks": [asdict(r) for r in ranks]} if layout else {}
        print_json({**facts(llm, why), "phases": [p.as_dict() for p in profiles], **together})
        return
    print_head(llm, runs)
    for p in profiles:
        size = f"{p.sequences} {'x' if p.phase == 'prefill' else 'after'} {p.prompt_tokens} tokens"
        times = f"{p.seconds * 1e3:,.2f} ms timed, {p.untimed_seconds * 1e3:,.2f} ms untimed"
        out.rule(f"{p.phase} of {size}: {times}", style="dim")
        out.print(profile_table(p))
        for s in p.worst:
            say(p.gap(s))
    if ranks:
        out.rule("ranks in a decode step", style="dim")
        out.print(rank_table(ranks))
    if loads := llm.engine.executable.unwrapped().expert_loads():
        out.rule("tokens routed to experts", style="dim")
        out.print(expert_table(loads))
    say(why or BOUNDS)


def expert_table(loads: Mapping[str, ExpertLoad]) -> Table:
    """Returns the table that `intaglio profile` prints for a mixture-of-experts model, as a rich Table.

    loads: {name of a layer's op `experts`: load of the layer's experts}. Each item makes one line, with the number of
    routed tokens and how unevenly they are spread over the experts.
    """
    lines = []
    for site, load in loads.items():
        total, hottest = int(load.tokens.sum()), int(load.tokens.argmax())
        share = load.tokens[hottest] / max(1, total) * len(load.tokens)
        of = "ranks" if load.held else "experts"
        numbers = (f"{total:,}", f"{hottest} of {len(load.tokens)}", f"{share:.2f}", f"{load.imbalance():.2f} ({of})")
        lines.append((site, *numbers))
    headers = ("site", "routed\ntokens", "hottest\nexpert", "its tokens\nover the mean", "largest load\nover the mean")
    return table(headers, lines)


def rank_table(ranks: Sequence[RankTimes]) -> Table:
    """Returns the table that `intaglio profile --layout` prints, as a rich Table with one line for each rank."""
    headers = ("rank", "ops\nms", "in collectives\nms", "of these waiting\nms", "for\nrank")
    lines = []
    for r in ranks:
        waits = sorted(r.waited.items(), key=lambda item: -item[1])
        named = ", ".join(f"{peer} ({seconds * 1e3:,.3f})" for peer, seconds in waits) or "-"
        times = (r.seconds, r.collectives, sum(r.waited.values()))
        lines.append((str(r.rank), *(f"{t * 1e3:,.3f}" for t in times), named))
    return table(headers, lines)


def bench_table(rows: Sequence[Row]) -> Table:
    """Returns a rich Table with one line for each of `rows`. `intaglio bench model` prints this table."""
    headers = (
        "phase", "sequences", "prompt\ntokens", "measured\ntokens/s", "measured\nms", "bound\nms", "bound\nby",
        "share\nof roof",
    )  # fmt: skip
    lines = []
    for r in rows:
        bound = ("-", "-", "-")
        if r.bound_seconds is not None and r.share is not None:
            bound = (f"{r.bound_seconds * 1e3:,.2f}", str(r.bound_by), f"{r.share:.0%}")
        cells = (f"{r.sequences:,}", f"{r.prompt_tokens:,}", f"{r.tokens_per_second:,.0f}", f"{r.seconds * 1e3:,.2f}")
        lines.append((r.phase, *cells, *bound))
    return table(headers, lines)


def profile_table(p: Profile) -> Table:
    """Returns a rich Table with one line for each op of a profile, the slowest op first.

    `intaglio profile` prints this table. The last line is the time outside the ops.
    """
    headers = ("site", "measured\nms", "share\nof step", "bound\nms", "bound\nby", "share\nof roof")
    lines = []
    for s in sorted(p.sites, key=lambda s: -s.seconds):
        bound = ("-", "-", "-")
        if s.bound_seconds is not None and s.share is not None:
            bound = (f"{s.bound_seconds * 1e3:,.3f}", str(s.bound_by), f"{s.share:.0%}")
        lines.append((s.label, f"{s.seconds * 1e3:,.3f}", f"{s.seconds / p.seconds:.1%}", *bound))
    lines.append(("outside kernels", f"{p.outside_seconds * 1e3:,.3f}", f"{p.outside_share:.1%}", "-", "-", "-"))
    return table(headers, lines)


def run_bench(llm: LLM, **sizes: Any) -> tuple[list[Row], str]:
    """Measure what `intaglio bench model` prints. Returns (rows of its table, reason).

    The reason says why the rows have no roofline bounds; it is "" if they have bounds. sizes: keyword arguments of
    measure.bench.bench(), such as the prompt lengths.
    """
    from intaglio.measure.bench import bench

    return beside_roofs(llm, bench, **sizes)


def beside_roofs(llm: LLM, measure: Callable[..., T], **sizes: Any) -> tuple[T, str]:
    """Measure this machine's roofs (its peak rates of arithmetic and memory), then call `measure` with them.

    Returns (the result of `measure`, the reason why there are no roofs). The reason is "" if there are roofs. A model
    that runs on several ranks has no roofs.

    measure: a function that is called as measure(executable, Roofs or None, progress=..., **sizes).
    """
    from intaglio.measure.bench import Roofs, measured_roofs

    with progress_bar("measuring") as progress:
        ranks = len(llm.mesh.programs)
        several = f"the model runs on {ranks} ranks: speeds are printed without bounds"
        roofs = measured_roofs(llm.device) if ranks == 1 else several
        found = roofs if isinstance(roofs, Roofs) else None
        measured = measure(llm.engine.executable, found, progress=progress, **sizes)
    return measured, "" if isinstance(roofs, Roofs) else roofs


def facts(llm: LLM, why: str) -> dict[str, Any]:
    """Returns a dict for JSON that describes what was measured.

    - "program": description of the measured Program.
    - "device": description of the device.
    - "no_bounds": the text `why`; None if `why` is "".

    why: the reason why the measured times have no roofline bounds; "" if they have such bounds.
    """
    return {"program": summary(llm.model.program), "device": describe_device(llm), "no_bounds": why or None}


def print_head(llm: LLM, runs: int) -> None:
    """Print the measured Program and device, and the number of runs, in two lines."""
    say(describe(llm.model.program))
    say(f"on {describe_device(llm)}; medians of {runs} runs")


def numbers(text: str) -> list[int]:
    """Returns the whole numbers in a comma-separated text, as a list: '128,512' gives [128, 512].

    Raises ValueError for any other text.
    """
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is not a list of whole numbers such as 128,512") from None


def check_measurable(device: str) -> None:
    """Raise ValueError if the device is "silicon", whose times are modelled and cannot be measured."""
    if device == "silicon":
        raise ValueError("device 'silicon' has nothing to measure, its times are modelled: use intaglio simulate")
