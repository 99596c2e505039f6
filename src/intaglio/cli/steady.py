"""Table, chart and recommendation of `intaglio simulate` for a constant number of open requests per design."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.chips import ChipError, Target
from intaglio.cli.plot import Point, bars, lines, no_chart
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import out, say, table, whole

if TYPE_CHECKING:
    from intaglio.codesign.steady import Design, Question

HEADERS = (
    "chip", "layout", "open", "TTFT\nms", "TPOT\nms", "a user\ntok/s", "a chip\ntok/s", "all\ntok/s", "tok/J",
    "W+KV\nGB",
)  # fmt: skip
BY = ("watt", "chip")


def steady_table(
    question: Question, targets: Sequence[Target], layouts: Sequence[str], concurrency: Sequence[int],
    budget: int | None, find: bool, by: str, as_json: bool, plot: Path | None = None,
) -> None:  # fmt: skip
    """Print a table of serving designs, with one line for each design.

    A design is a layout on a chip with a number of open requests. The table has every layout on every chip, at each
    number in `concurrency`. With `find`, each pair of chip and layout has only one design: the best one within the
    limits.

    Args:
        question: the model, its load and the limits.
        targets: chips with their libraries.
        layouts: ways in which chips share the model. Each layout is tried on every target; such a pair is a candidate.
        concurrency: numbers of requests open at once; not used with `find`.
        budget: maximum tokens of a step, on each data-parallel copy of the attention layers (DP rank). None: 2048, and
            with `find` several are tried.
        find: True to search for the best load of each candidate.
        by: "watt" or "chip": `find` maximises output tokens per second per watt or per chip.
        as_json: True to print JSON instead of tables.
        plot: SVG file for a chart of the designs; None: no chart.

    A candidate that cannot run is printed with the reason. Raises ValueError for another `by`, LayoutError for a wrong
    layout, and, after printing all reasons, ChipError if no candidate can hold the model and a request.
    """
    from intaglio.codesign import steady
    from intaglio.codesign.placement import Placement

    if by not in BY:
        raise ValueError(f"--by {by}; use one of {', '.join(BY)}")
    designs: list[Design] = []
    with progress_bar(f"compiling {question.program.name}") as progress:
        asked, refused = steady.candidates(question, targets, layouts, progress)
        if find:
            designs = steady.find(asked, (budget,) if budget else steady.BUDGETS, by, progress=progress)
        else:
            for i, one in enumerate(asked):
                progress(i, len(asked), f"{one.on.chip.name} {one.server.placement}: timing steps")
                for n in concurrency:
                    of_one = -(-n // one.server.placement.replicas)
                    try:
                        designs.append(one.estimated(of_one, budget or 2048))
                    except ValueError as e:
                        refused.append((one.on.chip.name, str(one.server.placement), str(e)))
    drawn = [d for d in designs if d.within] if find else designs
    if plot and drawn:
        plot.write_text(chart(question, drawn, find, by), encoding="utf-8")
    elif plot:
        no_chart(plot)
    fits = bool(designs) or (find and bool(asked) and limits_text(question) != "no limits")
    if as_json:
        left_out = [{"chip": chip, "layout": layout, "reason": why} for chip, layout, why in refused]
        facts = {"model": question.program.name, "clock": "modelled", "refused": left_out}
        print(json.dumps({**facts, "designs": [d.as_dict() for d in designs]}, indent=2, allow_nan=False))
        if not fits:
            raise nothing_fits(question, refused)
        return
    what = f"{question.program.name}: requests of {question.input:,} + {question.output:,} tokens"
    say(f"{what}; {limits_text(question)}")
    if designs:
        out.print(table(HEADERS, [cells(d) for d in designs], words=2))
    for chip, layout, why in refused:
        say(f"{chip} {layout} is left out: {why}")
    if not fits:
        raise nothing_fits(question, refused)
    if find:
        conclude(question, designs, by)
    for on in targets:
        assumed = f"{on.library.name} kernels, launch {on.library.launch_s * 1e6:.2g} us"
        has = f"{on.chip.hbm_bytes / 1e9:,.0f} GB, TDP {on.chip.tdp_w:,.0f} W"
        links = on.chip.links
        beyond = any(Placement.parse(each).chips_per_server > links.max_chips for each in layouts)
        nodes = f"nodes of {links.max_chips}, {links.node_bytes_per_s / 1e9:,.0f} GB/s a chip between them; "
        say(f"{on.chip.name}: {assumed}, {has}; {nodes if beyond else ''}{on.chip.description}")
    added = question.settings
    say(
        f"Assumed: {added.step_s * 1e6:,.3g} us of the host a step, {added.sequence_s * 1e6:,.3g} us more a sequence, "
        f"{added.request_s * 1e3:,.3g} ms a request; {question.memory_share:.0%} of HBM; random routing of experts. "
        "All times and watts are modelled; TTFT and TPOT are means."
    )
    if not find:
        say("Figures are a closed form of the steady state; *: beyond a limit. simulate-serving runs the queue.")


def nothing_fits(question: Question, refused: Sequence[tuple[str, str, str]]) -> ChipError:
    """Returns the ChipError to raise if no candidate can hold a question's model and one request.

    A candidate is a pair of chip and layout. refused: (chip, layout, reason) of each candidate that cannot hold the
    weights; the error names the first. If `refused` is empty, the error says that no candidate has room for a request
    beside the weights.
    """
    name = question.program.name
    if not refused:
        request = f"a request of {question.input:,} + {question.output:,} tokens"
        return ChipError(f"no design holds {name} and {request}; use more chips, fewer bits or shorter requests")
    chip, layout, why = refused[0]
    more = f" (first of {len(refused)} that do not fit)" if len(refused) > 1 else ""
    return ChipError(f"{name} does not fit {chip} with {layout}: {why}{more}")


def chart(question: Question, designs: Sequence[Design], find: bool, by: str) -> str:
    """Returns a chart of serving designs as SVG text: bars if `find` is True, lines if it is False.

    Bars show each design's output tokens/s per watt, or per chip if `by` is "chip". Lines show one line for each pair
    of chip and layout: the x axis is output tokens/s per user, the y axis output tokens/s per chip.
    """
    title = f"{question.program.name}: requests of {question.input:,} + {question.output:,} tokens"
    if find:
        unit = "output tokens/s per watt" if by == "watt" else "output tokens/s per chip"
        kept = [(d.chip, f"{d.placement}, {d.concurrency:,} open", per(d, by)) for d in designs]
        return bars(title, f"{unit}, modelled; {limits_text(question)}", kept)
    series: dict[str, list[Point]] = {}
    for d in designs:
        series.setdefault(f"{d.chip} {d.placement}", []).append((d.per_user, d.per_chip, f"{d.concurrency:,}"))
    return lines(title, "output tokens/s per user", "output tokens/s per chip, modelled; labels: open requests", series)


def per(d: Design, by: str) -> float:
    """Returns a design's output tokens per second per watt, or per chip if `by` is "chip"."""
    return d.per_watt if by == "watt" else d.per_chip


def limits_text(question: Question) -> str:
    """Returns the limits of a question as text, such as "TPOT up to 20 ms"; "no limits" if it has none."""
    limits = [
        f"{name} up to {value * 1e3:,.4g} ms"
        for name, value in (("TTFT", question.limits.ttft), ("TPOT", question.limits.tpot))
        if value < float("inf")
    ]
    return " and ".join(limits) or "no limits"


def conclude(question: Question, designs: Sequence[Design], by: str) -> None:
    """Print the recommended design: the first of `designs` that keeps the latency limits.

    If no design keeps the limits, the printed text says so. designs: serving designs, the best first. by: "watt" or
    "chip", the measure that is printed.
    """
    kept = [d for d in designs if d.within]
    if not kept:
        say("No design keeps the limits: allow longer latencies, more chips, or fewer bits.")
        return
    best = kept[0]
    figure = f"{best.per_watt:,.3g} tokens/s per W" if by == "watt" else f"{best.per_chip:,.0f} tokens/s per chip"
    say(
        f"Recommended: {best.placement.chips} x {best.chip}, {best.placement}, {best.concurrency:,} requests open, "
        f"{best.max_batch_tokens:,} tokens a step: {figure}, TTFT {best.ttft * 1e3:,.0f} ms, "
        f"TPOT {best.tpot * 1e3:,.1f} ms"
    )
    say("Rows marked q were confirmed by the queue in virtual time; the others are estimates; *: beyond a limit.")


def cells(d: Design) -> tuple[str, ...]:
    """Returns the row for the design `d` in the table of designs, as a tuple with a text for each column."""
    mark = ("q" if d.confirmed else "") + ("" if d.within else "*")
    return (
        d.chip, str(d.placement), f"{d.concurrency:,}{mark}", whole(d.ttft * 1e3), f"{d.tpot * 1e3:,.1f}",
        f"{d.per_user:,.0f}", whole(d.per_chip), whole(d.tokens_per_s), f"{d.per_watt:,.4g}",
        f"{d.weight_bytes / 1e9:,.0f}+{d.kv_bytes / 1e9:,.0f}",
    )  # fmt: skip
