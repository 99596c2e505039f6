"""`intaglio simulate`, `chips`, `libraries`, `isa` and `validate`: models on modelled chips."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intaglio.chips import (
    CHIPS,
    DEFAULT_LIBRARY,
    LIBRARIES,
    ChipSpec,
    KernelLibrary,
    Target,
    chip_with_library,
    library,
    target,
)
from intaglio.chips.kernel_record import WIDEST, KernelRecord
from intaglio.cli import options as o
from intaglio.cli.apart import apart_table
from intaglio.cli.fields import described, quantity
from intaglio.cli.plot import check_path
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import facts, out, say, table
from intaglio.cli.steady import steady_table
from intaglio.program import Program

if TYPE_CHECKING:
    from intaglio.codesign.simulate import LayoutResult, Phase

MODELLED = (
    "All times are modelled, none is measured. used: share of the peak FLOP/s of all chips, and of the HBM and link "
    "bytes/s of the slowest stage."
)
USED = ("FLOP/s\nused", "HBM\nused", "links\nused")
LibraryName = Annotated[
    str | None,
    typer.Option(
        "--library",
        help="Kernel library: a name (see intaglio libraries) or a file, NAME.toml. Default: the chip's own.",
    ),
]
SimulatedModel = Annotated[str, typer.Argument(help="Checkpoint folder, config.json, or a card such as llama-3-70b.")]
InputTokens = Annotated[int, typer.Option(min=1, help="Prompt tokens of a request.")]
OutputTokens = Annotated[int, typer.Option(min=1, help="New tokens of a request.")]
Activations = Annotated[
    str,
    typer.Option(help="auto; fp8: FP8 rows before FP8 weights; with --concurrency or --find also weights: as these."),
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change a field: chip.FIELD=value or library.FIELD=value.")
]
ChipName = Annotated[str, typer.Option("--chip", help="A name (see intaglio chips) or a file, NAME.toml.")]


def changed(on: Target, changes: list[str] | None) -> Target:
    """Returns a copy of a target with some fields changed. changes: texts such as `chip.FIELD=VALUE`; None: no changes.

    Raises ChipError for an unknown field or a wrong value, ValueError for a text without "=".
    """
    values: dict[str, Any] = {}
    for change in changes or ():
        field, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change!r}; wanted field=value, such as chip.hbm_bytes_per_s=8e12")
        values[field] = on.parse(field, text)
    return on.changed(values)


def whole_numbers(option: str, text: str) -> list[int]:
    """Returns the whole numbers of a text such as 16,64, as a list.

    Raises ValueError, naming the option `option`, for any other text and for numbers below 1.
    """
    found = text.split(",")
    if not all(n.strip().isdecimal() and int(n) for n in found):
        raise ValueError(f"{option} {text!r}; wanted whole numbers of 1 or more, such as 64 or 16,64")
    return [int(n) for n in found]


def modelled(program: Program, chip_name: str = "sohu") -> str:
    """Returns a text of two lines: the modelled time of a prefill on a chip, and of the decode step after it.

    The prompt has 256 tokens, or one token less than the context if that is shorter. chip_name: a preset chip, such as
    sohu.
    """
    from intaglio.silicon.plan import Plan
    from intaglio.silicon.sizes import BatchSizes

    plan = Plan(program, target(chip_name))
    prompt = min(256, program.context - 1)
    lines = []
    for name, sizes in (
        (f"a prompt of {prompt} tokens", BatchSizes(prompt, 1, ((prompt, prompt, 1),))),
        (f"one token after {prompt}", BatchSizes(1, 1, ((1, prompt + 1, 1),))),
    ):
        timeline = plan.run(sizes)
        first = max(timeline.spent_on().items(), key=lambda item: item[1])[0]
        lines.append(f"{chip_name}, {name}: {timeline.seconds * 1e6:,.1f} us, most of it {first}")
    return "\n".join(lines)


LAYOUTS = ("tp8", "tp4pp2", "tp2pp4", "pp8")  # of eight chips


def seventy_b(layouts: Sequence[str] = LAYOUTS) -> None:
    """Print a table of the modelled speed of Llama-3-70B on eight `sohu` chips.

    layouts: ways in which the eight chips share the model, such as tp8; each gives one row.
    """
    from intaglio.codesign.simulate import Serving, compare_layouts

    formats = ("fp8row", "int8", "fp8")  # weights, keys and values, rows
    with progress_bar("compiling llama-3-70b") as progress:
        found = compare_layouts("llama-3-70b", target("sohu"), layouts, Serving(2048, 128), *formats, progress)
    by_layout(found)


def used(p: Phase) -> tuple[str, ...]:
    """Returns the shares of three peak rates that a step uses, as texts such as "43%".

    The rates are FLOP/s of all chips together, and HBM and link bandwidth of the slowest pipeline stage.
    """
    return tuple(f"{v:.0%}" for v in (p.flops_share, p.slowest.hbm_share(), p.slowest.link_share()))


def by_layout(found: Sequence[LayoutResult]) -> None:
    """Print a table of layouts with their rates and utilisation.

    One line for each layout follows: its bottleneck, and the change that helps most.
    """
    rows = []
    for a in found:
        p = a.mixed
        rates = (f"{n / p.period:,.0f}" for n in (p.tokens, p.new))
        rows.append((a.layout, f"{p.period * 1e3:,.2f}", *rates, *used(p)))
    out.print(table(("layout", "step\nms", "in + out\ntokens/s", "out\ntokens/s", *USED), rows))
    for a in found:
        limit, seconds = a.mixed.slowest.bottleneck
        share = f"{seconds / a.mixed.slowest.seconds:.0%} of the step"
        say(f"{a.layout}: bound by {limit}, {share}; helps most: {a.change}, {a.gain:.2f}x")


def simulate(
    model: SimulatedModel,
    chip_name: Annotated[
        str,
        typer.Option("--chip", help="A name (see intaglio chips) or NAME.toml; with --concurrency or --find several."),
    ] = "sohu",
    library_name: LibraryName = None,
    chips: Annotated[int, typer.Option(min=1, help="Chips; with --layout they must be as many as its ranks.")] = 1,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Such as tp4pp2; several with commas are compared. Default: tensor parallel over all chips, or with "
            "--find every layout."
        ),
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Requests open at once, such as 64 or 16,64,256: the steady state of a server.")
    ] = None,
    find: Annotated[
        bool, typer.Option("--find", help="Search for the load and chunk size, or numbers of servers, that serve best.")
    ] = False,
    prefill: Annotated[
        str | None,
        typer.Option(help="Layouts of servers that only compute prompts, with --decode and --concurrency or --find."),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(help="Layouts of servers that only decode, one for each of --prefill; with --find any number."),
    ] = None,
    experts_format: Annotated[
        str,
        typer.Option(help="Format of routed experts, such as nvfp4, with --concurrency or --find. Default: --weights."),
    ] = "",
    by: Annotated[str, typer.Option(help="What --find maximises: tokens/s a watt or a chip.")] = "watt",
    ttft: o.TtftLimit = None,
    tpot: o.TpotLimit = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a step. Default: 2048, with --prefill 8192; --find tries some."),
    ] = None,
    memory_share: Annotated[float, typer.Option(help="Fraction of a chip's HBM that may be filled.")] = 0.9,
    step_overhead: Annotated[float, typer.Option(help="Microseconds of the host before each step.")] = 0.0,
    input: InputTokens = 2048,
    output: OutputTokens = 128,
    batch: Annotated[int, typer.Option(min=1, help="Requests that start in every step.")] = 1,
    weights: o.Weights = "auto",
    kv_format: o.KvFormat = "auto",
    activations: Activations = "auto",
    set_field: Changes = None,
    trace: Annotated[
        Path | None,
        typer.Option(callback=o.in_existing_folder, help="Write the mixed step for Perfetto (Chrome trace JSON)."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(callback=o.in_existing_folder, help="Write a chart as SVG, with --concurrency or --find."),
    ] = None,
    helps: Annotated[bool, typer.Option("--what-helps", help="Which single change of the chip helps most.")] = False,
    as_json: o.Json = False,
) -> None:
    """Time a model's serving steps on a chip: prefill, decode, and a step that mixes the two.

    In the mixed step, --batch requests start, and all running requests decode one token each. With
    --concurrency or --find: latencies, rates and power of whole servers under load.
    """
    from intaglio.codesign.simulate import Serving, Simulation, compare_layouts, ported, stages, what_helps
    from intaglio.compiler import Layout
    from intaglio.silicon.timeline import chrome_trace

    check_path(plot)
    if concurrency or find:
        if trace or helps or batch != 1:
            raise ValueError("--concurrency and --find take neither --batch, --trace nor --what-helps")
        from intaglio.codesign.placement import Placement, placements
        from intaglio.codesign.queue import QueueSettings
        from intaglio.codesign.serving import EngineSettings, Limits
        from intaglio.codesign.steady import Question
        from intaglio.codesign.steps import Formats
        from intaglio.ops import Experts

        none, engine = float("inf"), EngineSettings(memory_share=memory_share, step_overhead_s=step_overhead / 1e6)
        limits = Limits(none if ttft is None else ttft / 1e3, none if tpot is None else tpot / 1e3)
        how = Formats(weights, kv_format, activations, experts_format)
        added = QueueSettings(0, step_s=engine.step_overhead_s)
        asked = Question(ported(model, None), how, input, output, limits, memory_share, settings=added)
        targets = [changed(target(name, library_name), set_field) for name in chip_name.split(",")]
        layouts = layout.split(",") if layout else [f"tp{chips}"]
        if find and not layout:
            routed = any(isinstance(op, Experts) for op in asked.program.ops)
            layouts = [str(one) for one in placements(chips, routed)]
        apart = prefill or decode
        if apart and not (prefill and decode and not layout and len(targets) == 1):
            raise ValueError("--prefill goes with --decode, --concurrency or --find, and one chip, without --layout")
        if apart and find and chips < 2:
            raise ValueError("--prefill with --find shares out --chips between both kinds of servers; give 2 or more")
        if apart and concurrency and chips != 1:
            raise ValueError(
                f"--chips {chips} with --prefill, --decode and --concurrency: the layouts give the numbers of chips; "
                "leave --chips out, or use --find in place of --concurrency"
            )
        if find and concurrency:
            raise ValueError("--find searches the number of open requests; leave --concurrency out")
        if apart and step_overhead:
            raise ValueError("--prefill and --decode do not take --step-overhead")
        counts = whole_numbers("--concurrency", concurrency) if concurrency else []
        if prefill and decode:
            apart_table(
                asked,
                targets[0],
                prefill.split(","),
                decode.split(","),
                counts,
                max_batch_tokens or 8192,
                as_json,
                plot,
                chips,
                by,
            )
            return
        if chips != 1 and (others := [each for each in layouts if Placement.parse(each).chips != chips]):
            raise ValueError(f"--chips {chips} but layout {', '.join(others)} has another number of chips")
        steady_table(asked, targets, layouts, counts, max_batch_tokens, find, by, as_json, plot)
        return
    options = (ttft, tpot, max_batch_tokens, prefill, decode, experts_format, step_overhead, plot)
    if any(options) or "," in chip_name or by != "watt" or memory_share != 0.9:
        raise ValueError(
            "limits, --max-batch-tokens, --prefill, --decode, --experts-format, --by, --memory-share, --step-overhead, "
            "--plot and several chips go with --concurrency or --find"
        )
    layout, serving = layout or f"tp{chips}", Serving(input, output, batch)
    on = changed(target(chip_name, library_name), set_field)
    many = {Layout.parse(each).ranks for each in layout.split(",")}
    if chips != 1 and many != {chips}:
        raise ValueError(f"--chips {chips} but layout {layout} has {', '.join(map(str, sorted(many)))} ranks")
    if "," in layout:
        with progress_bar(f"compiling {model}") as progress:
            found = compare_layouts(model, on, layout.split(","), serving, weights, kv_format, activations, progress)
        if as_json:
            print(json.dumps([a.as_dict() for a in found], indent=2))
        else:
            by_layout(found)
            say(MODELLED)
        return
    with progress_bar(f"compiling {model}") as progress:
        programs = stages(ported(model, None), layout, weights, kv_format, activations)
        simulation = Simulation.of(programs, on, layout)
        phases = simulation.phases(serving, progress)
        changes = what_helps(programs, on, layout, serving, progress) if helps else []
    if trace:
        trace.write_text(chrome_trace(phases[-1].stages))
    if as_json:
        facts = {"model": programs[0].name, "chip": on.chip.name, "library": on.library.name, "layout": layout}
        figures = {"chips": simulation.chips, "phases": [p.as_dict() for p in phases], "what_helps": dict(changes)}
        memory = {"memory_per_chip": simulation.memory(serving).as_dict()}
        print(json.dumps({**facts, **figures, **memory}, indent=2))
        return
    on_what = f"{simulation.chips} x {on.chip.name}, {layout}, {on.library.name} kernels; {on.chip.description}"
    say(f"{programs[0].name} on {on_what}")
    rows = []
    for p in phases:
        times = (f"{p.period * 1e3:,.3f}", f"{p.latency * 1e3:,.3f}")
        rates = (f"{p.tokens / p.period:,.0f}", f"{p.new / p.period:,.0f}")
        rows.append((p.name, *times, *rates, *used(p), f"{p.watts:,.0f}"))
    out.print(
        table(("phase", "step\nms", "latency\nms", "all\ntokens/s", "new\ntokens/s", *USED, "power\nW/chip"), rows)
    )
    for p in phases:
        say(f"{p.name}: {p.slowest.report(p.format)}")
    say(f"memory a chip: {simulation.memory(serving)}")
    if changes:
        out.print(
            table(("change of the chip", "speedup of the\nlast phase"), [(n, f"{gain:.2f}x") for n, gain in changes])
        )
    say(MODELLED)


def print_fields(spec: ChipSpec | KernelLibrary, before: Sequence[tuple[str, str]] = ()) -> None:
    """Print the pairs `before`, then all fields of a chip or kernel library, then the source of each value."""
    fields = {field: value for field, value in asdict(spec).items() if field not in ("reasons", "kernels")}
    out.print(facts([*before, *described(fields)]))
    if spec.reasons:
        out.print(table(("field", "where its value is from"), spec.reasons, words=2))


def kernel_facts(record: KernelRecord) -> tuple[str, str]:
    """Returns two texts that describe a kernel record: (its op, description).

    The description has the kernel's name, the calls it is chosen for and the values it sets. Its second line says where
    the values come from.
    """
    least, most = record.head_dims
    width = f"head width {least} to {most}" if most < WIDEST else f"head width from {least}" if least else ""
    calls = ", ".join(part for part in (*record.formats, width) if part) or "all calls"
    values = ", ".join(f"{field} {quantity(field, value)}" for field, value in record.changes)
    chosen = "" if record.default else ", only on request"
    return record.op, f"{record.kernel}, for {calls}{chosen}: {values}\n{record.why}"


def chips(
    name: Annotated[str | None, typer.Argument(help="Name of a chip to print with the source of its numbers.")] = None,
    as_json: o.Json = False,
) -> None:
    """List the preset chips, or print one of them in full."""
    if as_json:
        shown = [chip_with_library(c) for c in (CHIPS if name is None else [name])]
        print(json.dumps({c.name: {**asdict(c), "library": own} for c, own in shown}, indent=2))
        return
    if name is not None:
        spec, own = chip_with_library(name)
        print_fields(spec, [("library", own)])
        return
    rows = []
    for c in CHIPS.values():
        eight = max(c.peak_flops(f) for f in ("e4m3", "int8", "bf16")) / 1e12
        numbers = (f"{c.peak_flops('bf16') / 1e12:,.0f}", f"{eight:,.0f}", f"{c.hbm_bytes / 1e9:,.0f}")
        rates = (f"{c.hbm_bytes_per_s / 1e12:.2f}", f"{c.links.chip_bytes_per_s / 1e9:,.0f}", f"{c.tdp_w:,.0f}")
        rows.append((c.name, c.description, *numbers, *rates))
    headers = ("bf16\nTFLOP/s", "8-bit\nTFLOP/s", "HBM\nGB", "HBM\nTB/s", "links\nGB/s", "power\nW")
    out.print(table(("chip", "what", *headers), rows, words=2))
    say("intaglio chips NAME shows all fields of a chip, the source of each, and its kernel library.")


def libraries(
    name: Annotated[str | None, typer.Argument(help="Name of a library to print with all its fields.")] = None,
    as_json: o.Json = False,
) -> None:
    """List the preset kernel libraries, or print one of them in full."""
    shown = list(LIBRARIES.values()) if name is None else [library(name)]
    if as_json:
        print(json.dumps({lib.name: asdict(lib) for lib in shown}, indent=2))
        return
    if name is not None:
        print_fields(shown[0])
        if shown[0].kernels:
            out.print("\nKernels with values of their own")
            out.print(facts([kernel_facts(record) for record in shown[0].kernels]))
        return
    chips = [", ".join(c for c, own in DEFAULT_LIBRARY.items() if own == lib.name) for lib in shown]
    rows = [(lib.name, lib.description, of) for lib, of in zip(shown, chips, strict=True)]
    out.print(table(("library", "what", "chips"), rows, words=3))


def first_sentence(text: str) -> str:
    """Returns the first sentence of a text on one line, without its full stop.

    A sentence ends at a full stop with a space behind it; the dots of a range such as `a .. b` end none. If there is no
    such full stop, the whole text is returned.
    """
    return re.split(r"(?<![. ])\. ", " ".join(text.split()))[0]


def isa(
    page: Annotated[bool, typer.Option("--page", help="The whole reference, as Markdown.")] = False,
    as_json: o.Json = False,
) -> None:
    """List the instructions of the simulated chips, or with --page print their reference page in Markdown."""
    from intaglio.silicon.isa.instruction import OPCODES, own_fields
    from intaglio.silicon.isa.page import page as write_page
    from intaglio.silicon.isa.page import type_name

    known = [OPCODES[code] for code in sorted(OPCODES)]
    if page:
        print(write_page(), end="")
    elif as_json:
        fields = [{name: type_name(kind) for name, kind in own_fields(c)} for c in known]
        rows = zip(known, fields, strict=True)
        print(json.dumps([{"name": c.__name__, "engine": c.engine, "opcode": c.opcode, "fields": f} for c, f in rows]))
    else:
        lines = [(c.engine, c.__name__, f"{c.opcode:#04x}", first_sentence(c.__doc__ or "")) for c in known]
        out.print(table(("engine", "instruction", "opcode", "does"), lines, words=4))


def checked_split(split: str | None) -> str | None:
    """Callback of --split: returns the option's value unchanged.

    Raises ValueError unless the value is "fit", "test" or None (option not given).
    """
    if split not in (None, "fit", "test"):
        raise ValueError(f"--split is {split!r}; give fit or test, or leave the option out for all rows")
    return split


def validate(
    folder: Annotated[Path, typer.Argument(help="Holds <chip>_<table>.csv, or <chip>/<engine>_<table>.csv.")],
    split: Annotated[
        str | None, typer.Option(callback=checked_split, help="Only rows of this split: fit or test. Default: all.")
    ] = None,
    min_us: Annotated[
        float, typer.Option(callback=o.not_negative, help="Only rows that took at least so many microseconds.")
    ] = 0.0,
    worst: Annotated[int, typer.Option(help="Worst cases to show of each table.")] = 3,
    library_name: Annotated[
        str, typer.Option("--library", help="engine: an engine's kernels, by name; chip: the chip's own; or a library.")
    ] = "engine",
    as_json: o.Json = False,
) -> None:
    """Compare predicted with measured kernel times; print errors by kernel and bottleneck, and the worst calls."""
    from intaglio.codesign.engine_tables import validate_engines
    from intaglio.codesign.regime import BUSY_SHARE, LAUNCH_SHARE, REGIMES
    from intaglio.codesign.validate import SERVING, as_dict
    from intaglio.codesign.validate import validate as run_validate

    if not folder.is_dir():
        why = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {why}; give a folder with <chip>_<table>.csv or <chip>/<engine>_<table>.csv")
    servers = folder / SERVING
    left = [f"{servers} is left out: it holds measured servers; use validate-serving"] if servers.is_file() else []
    if any(folder.glob("*/*.csv")) and all(path.name == SERVING for path in folder.glob("*.csv")):
        records, more = validate_engines(folder, min_us, worst, split, library_name)
        left += more
    else:
        with progress_bar(f"reading {folder}") as progress:
            records = run_validate(folder, split, min_us, worst, progress)
    if not records:
        asked = f"took {min_us:g} us or more" + (f" and is of split {split}" if split else "")
        raise ValueError("; ".join((f"no row in {folder} {asked}: change --min-us, --split or the tables", *left)))
    if as_json:
        print(json.dumps([as_dict(r) for r in records], indent=2))
        return
    halves = [half for half in ("fit", "test") if split is None and any(half in r.halves for r in records)]
    headers = ("chip", "table", "dtype", "rows", "median\nerror", *halves, "mean\nerror", "bias")
    shown = [
        (
            r.chip, r.table, r.dtype, f"{r.rows:,}", f"{r.median:.1f}%",
            *(f"{r.halves[half].median:.1f}%" if half in r.halves else "" for half in halves),
            f"{r.mean:.1f}%", f"{r.bias:+.1f}%",
        )
        for r in records
    ]  # fmt: skip
    out.print(table(headers, shown, words=3))
    by_regime = [
        (r.chip, r.table, r.dtype, *(f"{r.regimes[g].median:.1f}%" if g in r.regimes else "" for g in REGIMES))
        for r in records
    ]
    say("\nMedian error by the regime of the modelled call (--json has the number of rows of each):")
    out.print(table(("chip", "table", "dtype", *(g.removesuffix("-bound") for g in REGIMES)), by_regime, words=3))
    say("")
    for r in records:
        for w in r.worst:
            times = f"measured {w.us:,.1f} us, predicted {w.predicted:,.1f} us"
            say(f"{r.chip} {r.table} {w.words}: {times}: {w.reason}")
    for line in left:
        say(line)
    say("error: |predicted - measured| / measured. bias: the mean of the same with its sign.")
    if halves:
        say("fit, test: median errors of the rows to which constants were fitted, and of the others.")
    say(
        f"launch-bound: launches take {LAUNCH_SHARE:.0%} of the time or more. Other regimes: memory, computation or "
        f"links are busy for most of the rest; tail: none for {BUSY_SHARE:.0%} of it, as in a last wave of few tiles."
    )
