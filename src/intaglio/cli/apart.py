"""Tables and charts of `intaglio simulate` for disaggregated prefill and decode, and why a search found nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.chips import ChipError, Target
from intaglio.cli.plot import Point, bars, lines, no_chart
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import out, say, table, whole
from intaglio.cli.steady import BY, limits_text

if TYPE_CHECKING:
    from intaglio.codesign.disaggregated import ApartResult
    from intaglio.codesign.steady import Question
    from intaglio.progress import Progress

HEADERS = (
    "prefill", "decode", "open", "TTFT\nms", "TPOT\nms", "a user\ntok/s", "a chip\ntok/s", "tok/J", "W/\nchip",
    "busy\nP/D %",
)  # fmt: skip
WIDTH = 40  # characters of the longest bar


def apart_table(
    question: Question, on: Target, prefill: Sequence[str], decode: Sequence[str], concurrency: Sequence[int],
    budget: int, as_json: bool, plot: Path | None = None, chips: int = 0, by: str = "watt",
) -> None:  # fmt: skip
    """Print a table of latencies and rates for each pair of a prefill and a decode layout, at each concurrency.

    Args:
        question: the model and its load.
        on: chip and kernel library of all servers.
        prefill: layouts of prefill servers.
        decode: layouts of decode servers. If `concurrency` is given, the first layout of `decode` is paired with the
            first of `prefill`, the second with the second, and so on. If `concurrency` is empty, each layout of
            `decode` is paired with each layout of `prefill`.
        concurrency: numbers of requests open at once, to simulate. If empty, the function searches instead: for each
            pair of layouts it finds the numbers of servers and the load with the most output per chip, and it orders
            the pairs by `by`, the best first.
        budget: maximum tokens of a step, on each data-parallel copy of the attention layers (DP rank).
        as_json: True to print JSON instead of a table.
        plot: SVG file for a chart of output per chip; None: no chart.
        chips: for a search, the number of chips that all servers have together.
        by: "watt" or "chip": the recommended row has the most output tokens/s per watt or per chip.

    Raises ValueError for another `by`. Raises ValueError if `concurrency` is given and `prefill` and `decode` differ in
    length. Raises LayoutError for a wrong layout. Raises ChipError if the model does not fit the chips of a layout. A
    search does not raise this error but leaves the layout out. It raises ChipError if it finds no pair of layouts for
    another reason than the latency limits; all reasons are printed before.
    """
    if by not in BY:
        raise ValueError(f"--by {by}; use one of {', '.join(BY)}")
    q = question
    refused: list[tuple[str, str]] = []
    unfit = ""
    with progress_bar(f"compiling {q.program.name}") as progress:
        if concurrency:
            found = given_pairs(q, on, prefill, decode, concurrency, budget, progress)
        else:
            found, refused, unfit = searched_pairs(q, on, prefill, decode, chips, budget, by, progress)
    if plot and found:
        plot.write_text(chart(q, on, found, bool(concurrency), by), encoding="utf-8")
    elif plot:
        no_chart(plot)
    if as_json:
        facts = {"model": q.program.name, "chip": on.chip.name, "library": on.library.name, "clock": "modelled"}
        rows = [{"prefill": first, "decode": second, **r.as_dict()} for first, second, r in found]
        left_out = [{"layout": layout, "reason": why} for layout, why in refused]
        print(json.dumps({**facts, "refused": left_out, "results": rows}, indent=2))
        if unfit:
            raise ChipError(unfit)
        return
    say(f"{q.program.name} on {on.chip.name}: requests of {q.input:,} + {q.output:,} tokens, prefill and decode apart")
    if found:
        out.print(table(HEADERS, [cells(first, second, r) for first, second, r in found], words=2))
    most = max((r.tokens_per_s / r.chips for *_, r in found), default=1.0)
    for *_, r in found:
        rate = r.tokens_per_s / r.chips
        say(f"{'#' * max(1, round(WIDTH * rate / most)):<{WIDTH}} {rate:,.0f} tok/s a chip, {1 / r.tpot:,.0f} a user")
    for layout, why in refused:
        say(f"{layout} is left out: {why}")
    if unfit:
        raise ChipError(unfit)
    within = [x for x in found if x[2].ttft <= q.limits.ttft and x[2].tpot <= q.limits.tpot]
    if within:
        first, second, r = max(within, key=lambda x: per(x[2], by))
        figure = f"{per(r, by):,.2f} tok/J" if by == "watt" else f"{per(r, by):,.0f} tok/s a chip"
        say(
            f"Most output per {by} within the limits: {first} and {second} with {r.concurrency:,} open, "
            f"{r.chips} chips: {figure}"
        )
    elif found:
        say("No row keeps the limits: allow longer latencies, other layouts, or fewer open requests.")
    else:
        say("No numbers of servers keep the limits: allow longer latencies, or give other layouts or more chips.")
    links = on.chip.links
    sizes = [r.chips for *_, r in found] or [chips]
    crosses = {links.node_bytes_per_s > 0 and size > links.max_chips for size in sizes}
    ways = {True: ("adapter to other nodes", links.node_bytes_per_s), False: ("links", links.chip_bytes_per_s)}
    travels = " or ".join(f"{ways[x][0]} at {ways[x][1] / 1e9:,.0f} GB/s" for x in sorted(crosses))
    say(
        f"Assumed: {on.library.name} kernels, launch {on.library.launch_s * 1e6:.2g} us; K/V travels over a chip's "
        f"{travels}; random routing of experts; no time of the host. "
        "All times and watts are modelled; TTFT and TPOT are means, and TTFT ends when the decode server has the K/V."
    )


def given_pairs(
    q: Question, on: Target, prefill: Sequence[str], decode: Sequence[str], concurrency: Sequence[int], budget: int,
    progress: Progress,
) -> list[tuple[str, str, ApartResult]]:  # fmt: skip
    """Simulate servers with disaggregated prefill and decode, for each pair of layouts at each concurrency.

    Returns a list of (prefill layout, decode layout, ApartResult). The ApartResult has the modelled latencies and rates
    of the servers.

    Args:
        q: the model and its load.
        on: chip and kernel library of all servers.
        prefill: layouts of prefill servers.
        decode: layouts of decode servers. The i-th is paired with the i-th of `prefill`.
        concurrency: numbers of requests open at once.
        budget: maximum tokens of a step, on each data-parallel copy of the attention layers (DP rank).
        progress: called before each pair and concurrency.

    Raises ValueError if there are not as many prefill as decode layouts, LayoutError for a wrong layout, ChipError if a
    model does not fit.
    """
    from intaglio.codesign.disaggregated import Apart, serve_apart
    from intaglio.codesign.placement import Placement
    from intaglio.codesign.queue import QueueSettings
    from intaglio.codesign.steps import Server, StepTimes
    from intaglio.measure.workload import LoadRequest

    if len(prefill) != len(decode):
        raise ValueError(f"{len(prefill)} layouts of --prefill and {len(decode)} of --decode; give as many of each")
    found: list[tuple[str, str, ApartResult]] = []
    kinds = {
        text: StepTimes(Server.of(q.program, Placement.parse(text), q.formats), on)
        for text in dict.fromkeys((*prefill, *decode))
    }
    for first, second in zip(prefill, decode, strict=True):
        a, b = kinds[first], kinds[second]
        sizes = (
            QueueSettings(a.server.kv_room(on, q.memory_share, budget, 256, gives_back=False), budget, 256 * a.copies),
            QueueSettings(b.server.kv_room(on, q.memory_share, 1024, 1024, gives_back=False), budget, 1024 * b.copies),
        )
        for n in concurrency:
            progress(len(found), len(prefill) * len(concurrency), f"{first} {second}: {n} requests open")
            done = serve_apart(Apart(a, b, *sizes), LoadRequest(0.0, q.input, q.output), n)
            found.append((first, second, done))
    return found


def searched_pairs(
    q: Question, on: Target, prefill: Sequence[str], decode: Sequence[str], chips: int, budget: int, by: str,
    progress: Progress,
) -> tuple[list[tuple[str, str, ApartResult]], list[tuple[str, str]], str]:  # fmt: skip
    """Search for the numbers of servers and open requests with the most output per chip, for each pair of layouts.

    Returns a tuple (found, refused, unfit):

    - found: a list of (prefill layout, decode layout, ApartResult). The results are sorted by output tokens per second
      per watt or per chip (see `by`), the largest first.
    - refused: a list of (layout, reason) for the layouts that do not fit.
    - unfit: a text that says why no pair was found. It is "" if a pair was found, or if only the latency limits can be
      the reason.

    Args:
        q: the model, its load and the latency limits.
        on: chip and kernel library of all servers.
        prefill: layouts of prefill servers.
        decode: layouts of decode servers.
        chips: number of chips that all servers have together.
        budget: maximum tokens of a step, on each data-parallel copy of the attention layers (DP rank).
        by: "watt" or "chip". It only orders `found`; the search itself always maximises output per chip.
        progress: called as pairs are searched.

    Raises LayoutError for a wrong layout. Raises ValueError for a layout with replicas, and for responses of fewer than
    two tokens.
    """
    from intaglio.codesign import ratio

    first, refused = ratio.kinds(q, on, prefill, budget, 256)
    second, others = ratio.kinds(q, on, decode, 1024, 1024)
    found = ratio.search(q, first, second, chips, progress)
    unfit = "" if found else why_unfit(list(first), list(second), chips, limits_text(q) != "no limits")
    both = list(dict.fromkeys([*refused, *others]))  # a layout of both kinds may have one reason
    return sorted(found, key=lambda row: -per(row[2], by)), both, unfit


def per(r: ApartResult, by: str) -> float:
    """Returns the output tokens per second of a deployment, per watt if `by` is "watt", per chip if it is "chip"."""
    return r.tokens_per_s / (r.watts if by == "watt" else r.chips)


def why_unfit(prefill: Sequence[str], decode: Sequence[str], chips: int, limited: bool) -> str:
    """Returns a text that says why a search found no pair of layouts, and what to change.

    The text is "" if the function finds no reason in the layouts and `limited` is True. The latency limits are then the
    likely reason.

    Args:
        prefill: layouts of prefill servers that fit their chips; empty if none does.
        decode: layouts of decode servers that fit their chips; empty if none does.
        chips: number of chips that all servers have together.
        limited: True if the question has a limit of TTFT or TPOT.

    Raises LayoutError for a wrong layout.
    """
    from intaglio.codesign.placement import Placement

    for kind, layouts in (("--prefill", prefill), ("--decode", decode)):
        if not layouts:
            return f"no layout of {kind} fits the chips; give other layouts, or fewer bits"
    first, second = ([Placement.parse(x).chips_per_server for x in kind] for kind in (prefill, decode))
    least = min(first) + min(second)
    if least > chips:
        return f"--chips {chips} are too few; a prefill and a decode server of these layouts take {least} or more"
    rest = ((chips - n * a, b) for a in first for b in second for n in range(1, chips // a + 1))
    if not any(left >= b and left % b == 0 for left, b in rest):
        return f"no numbers of servers of these layouts use all {chips} chips; give other layouts or other --chips"
    if not limited:
        return "no decode server has room for a request; give layouts of more chips, fewer bits or shorter requests"
    return ""


def chart(q: Question, on: Target, found: Sequence[tuple[str, str, ApartResult]], by_load: bool, by: str) -> str:
    """Returns a chart, as SVG text, of modelled results of servers with disaggregated prefill and decode.

    Args:
        q: the question that the results answer; the title names its model and lengths.
        on: the chip, for the title.
        found: (prefill layout, decode layout, ApartResult) of each result.
        by_load: True for a line chart with one line for each pair of layouts: x is output tokens/s per user, y is
            output tokens/s per chip. False for a bar chart with one bar for each result.
        by: "watt" or "chip". The bars show output tokens/s per watt or per chip; the lines do not depend on `by`.
    """
    title = f"{q.program.name} on {on.chip.name}: {q.input:,} + {q.output:,} tokens, prefill and decode apart"
    if not by_load:
        rows = [(f"{a} + {b}", f"{r.concurrency:,} open", per(r, by)) for a, b, r in found]
        return bars(title, f"output tokens/s per {by}, modelled, within the limits", rows)
    series: dict[str, list[Point]] = {}
    for first, second, r in found:
        point = 1 / r.tpot, r.tokens_per_s / r.chips, f"{r.concurrency:,}"
        series.setdefault(f"{first} + {second}", []).append(point)
    return lines(title, "output tokens/s per user", "output tokens/s per chip, modelled; labels: open requests", series)


def cells(first: str, second: str, r: ApartResult) -> tuple[str, ...]:
    """Returns one row of the table of results, as a tuple with a text for each column.

    The row shows the result `r`. first, second: layouts of the prefill and the decode servers.
    """
    return (
        first, second, f"{r.concurrency:,}", whole(r.ttft * 1e3), f"{r.tpot * 1e3:,.1f}", f"{1 / r.tpot:,.0f}",
        whole(r.tokens_per_s / r.chips), f"{r.tokens_per_s / r.watts:,.2f}", f"{r.watts / r.chips:,.0f}",
        f"{100 * r.prefill_busy:.0f}/{100 * r.decode_busy:.0f}",
    )  # fmt: skip
