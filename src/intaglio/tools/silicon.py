"""The commands about silicon: simulate, chips, isa, validate. The command line takes them in by register()."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from intaglio.chips import CHIPS, chip
from intaglio.chips import replace as other_chip
from intaglio.program import Program

if TYPE_CHECKING:
    from intaglio.tools.simulate import Answer

out = Console(highlight=False, emoji=False)
MODELLED = "All times are modelled, none is measured. share: FLOPs over the peak of all chips."
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
ChipName = Annotated[str, typer.Option("--chip", help="A preset: see intaglio chips.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (simulate, chips, isa, validate):
        app.command()(command)


def changed(name: str, changes: list[str] | None) -> Any:
    """The preset, with fields replaced as `field=value`. Raises ChipError for a field or a value that cannot be."""
    values: dict[str, Any] = {}
    for change in changes or ():
        field, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change!r}; wanted field=value, such as hbm_bytes_per_s=8e12")
        number = None if text in ("switch", "k44", "torus", "none") else float(text)
        values[field] = text if number is None else int(number) if number == int(number) and number < 2**53 else number
    return other_chip(chip(name), **values) if values else chip(name)


def modelled(program: Program, chip_name: str = "sohu") -> str:
    """A Program's prefill and decode on a preset, in words: modelled time, not measured."""
    from intaglio.silicon.step import Load, Plan

    plan = Plan(program, chip(chip_name))
    prompt = min(256, program.context - 1)
    lines = []
    for name, load in (
        (f"a prompt of {prompt} tokens", Load(prompt, 1, ((prompt, prompt, 1),))),
        (f"one token after {prompt}", Load(1, 1, ((1, prompt + 1, 1),))),
    ):
        timeline = plan.run(load)
        first = max(timeline.stalls().items(), key=lambda item: item[1])[0]
        lines.append(f"{chip_name}, {name}: {timeline.seconds * 1e6:,.1f} us, most of it {first}")
    return "\n".join(lines)


LAYOUTS = ("tp8", "tp4pp2", "tp2pp4", "pp8")  # of eight chips


def seventy_b(layouts: Sequence[str] = LAYOUTS) -> None:
    """Print what the chip of the public claim makes of the claim's question: docs/sohu.md writes it up."""
    from intaglio.tools.simulate import Serving, answers

    formats = ("fp8row", "int8", "fp8")  # weights, keys and values, rows
    by_layout(answers("llama-3-70b", chip("sohu"), layouts, Serving(2048, 128), *formats))


def by_layout(found: Sequence[Answer]) -> None:
    """Print layouts beside each other: rates and shares, then what limits each and what would help it most."""
    table = Table("layout", "step ms", "in + out/s", "out/s", "FLOPS", "HBM", "links")
    for a in found:
        p = a.mixed
        rates = (f"{n / p.period:,.0f}" for n in (p.tokens, p.new))
        shares = (f"{v:.0%}" for v in (p.flops_share, p.slowest.hbm_share(), p.slowest.link_share()))
        table.add_row(a.layout, f"{p.period * 1e3:.2f}", *rates, *shares)
    out.print(table)
    for a in found:
        limit, seconds = a.mixed.slowest.limit
        share = f"{seconds / a.mixed.slowest.seconds:.0%} of the step"
        out.print(f"{a.layout}: bound by {limit}, {share}; helps most: {a.change}, {a.gain:.2f}x", markup=False)


def simulate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, config.json, or a card such as llama-3-70b.")],
    chip_name: ChipName = "sohu",
    chips: Annotated[int, typer.Option(min=1, help="Chips; with --layout they must be as many as its ranks.")] = 1,
    layout: Annotated[
        str | None,
        typer.Option(help="Such as tp4pp2; several with commas are compared. Default: tensor parallel over all chips."),
    ] = None,
    input: Annotated[int, typer.Option(min=1, help="Prompt tokens of a request.")] = 2048,
    output: Annotated[int, typer.Option(min=1, help="New tokens of a request.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Requests that start in every step.")] = 1,
    weights: Annotated[str, typer.Option(help="Format of the weights, as for build.")] = "auto",
    kv_format: Annotated[str, typer.Option("--kv", help="Format of keys and values, as for build.")] = "auto",
    activations: Annotated[str, typer.Option(help="auto, or fp8: FP8 rows before FP8 weights.")] = "auto",
    set_field: Annotated[list[str] | None, typer.Option("--set", help="Change the chip: field=value.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the mixed step for Perfetto (Chrome trace JSON).")] = None,
    helps: Annotated[bool, typer.Option("--what-helps", help="Which single change of the chip helps most.")] = False,
    as_json: Json = False,
) -> None:
    """Time a model's serving steps on a chip: prefill, decode, and the mixed step of the steady state."""
    from intaglio.compiler import Layout
    from intaglio.silicon.timeline import chrome_trace
    from intaglio.tools.simulate import Serving, Simulation, answers, ported, stages, what_helps

    spec, layout, serving = changed(chip_name, set_field), layout or f"tp{chips}", Serving(input, output, batch)
    many = {Layout.parse(each).ranks for each in layout.split(",")}
    if chips != 1 and many != {chips}:
        raise ValueError(f"--chips {chips} but layout {layout} has {', '.join(map(str, sorted(many)))} ranks")
    if "," in layout:
        found = answers(model, spec, layout.split(","), serving, weights, kv_format, activations)
        if as_json:
            print(json.dumps([a.as_dict() for a in found], indent=2))
        else:
            by_layout(found)
            out.print(MODELLED, markup=False)
        return
    programs = stages(ported(model, None), layout, weights, kv_format, activations)
    simulation = Simulation.of(programs, spec, layout)
    phases = simulation.phases(serving)
    changes = what_helps(programs, spec, layout, serving) if helps else []
    if trace:
        trace.write_text(chrome_trace(phases[-1].stages))
    if as_json:
        facts = {"model": programs[0].name, "chip": spec.name, "layout": layout, "chips": simulation.chips}
        print(json.dumps({**facts, "phases": [p.as_dict() for p in phases], "what_helps": dict(changes)}, indent=2))
        return
    out.print(
        f"{programs[0].name} on {simulation.chips} x {spec.name}, {layout}; {spec.what}", markup=False, soft_wrap=True
    )
    table = Table("phase", "step ms", "latency ms", "tokens/s", "new/s", "share", "HBM", "links", "W a chip")
    for p in phases:
        numbers = (f"{p.period * 1e3:,.3f}", f"{p.latency * 1e3:,.3f}", f"{p.tokens / p.period:,.0f}")
        shares = (f"{v:.0%}" for v in (p.flops_share, p.slowest.hbm_share(), p.slowest.link_share()))
        table.add_row(p.name, *numbers, f"{p.new / p.period:,.0f}", *shares, f"{p.watts:,.0f}")
    out.print(table)
    for p in phases:
        out.print(f"{p.name}: {p.slowest.report(p.format)}", markup=False, soft_wrap=True)
    for name, gain in changes:
        out.print(f"  {name}: {gain:.2f}x", markup=False)
    out.print(MODELLED, markup=False)


def chips(
    name: Annotated[str | None, typer.Argument(help="One of them, with the source of its numbers.")] = None,
    as_json: Json = False,
) -> None:
    """List the chips there are; or one of them in full."""
    if as_json:
        print(json.dumps({c.name: asdict(c) for c in (CHIPS.values() if name is None else [chip(name)])}, indent=2))
        return
    if name is not None:
        spec = chip(name)
        for field, value in asdict(spec).items():
            if field != "reasons":
                out.print(f"{field:24} {value}", markup=False, soft_wrap=True)
        for field, why in spec.reasons:
            out.print(f"{field}: {why}", markup=False, soft_wrap=True)
        return
    table = Table("chip", "what", "bf16 TFLOP/s", "8-bit", "HBM GB", "TB/s", "links GB/s", "W")
    for c in CHIPS.values():
        eight = max(c.peak_flops(f) for f in ("e4m3", "int8", "bf16")) / 1e12
        numbers = (f"{c.peak_flops('bf16') / 1e12:,.0f}", f"{eight:,.0f}", f"{c.hbm_bytes / 1e9:,.0f}")
        rates = (f"{c.hbm_bytes_per_s / 1e12:.2f}", f"{c.links.chip_bytes_per_s / 1e9:,.0f}", f"{c.tdp_w:,.0f}")
        table.add_row(c.name, c.what, *numbers, *rates)
    out.print(table)


def isa(
    page: Annotated[bool, typer.Option("--page", help="The whole reference, as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """List the instructions; --page prints the reference."""
    from intaglio.silicon.instruction import OPCODES
    from intaglio.silicon.isa import kind_of, own_fields
    from intaglio.silicon.isa import page as write_page

    known = [OPCODES[code] for code in sorted(OPCODES)]
    if page:
        print(write_page(), end="")
    elif as_json:
        fields = [{name: kind_of(kind) for name, kind in own_fields(c)} for c in known]
        rows = zip(known, fields, strict=True)
        print(json.dumps([{"name": c.__name__, "engine": c.engine, "opcode": c.opcode, "fields": f} for c, f in rows]))
    else:
        table = Table("engine", "instruction", "opcode", "does")
        for c in known:
            table.add_row(c.engine, c.__name__, f"{c.opcode:#04x}", " ".join((c.__doc__ or "").split()).split(". ")[0])
        out.print(table)


def validate(
    folder: Annotated[Path, typer.Argument(help="Holds <chip>_<table>.csv.")],
    split: Annotated[str | None, typer.Option(help="Only rows of this split: fit or test. Default: all.")] = None,
    min_us: Annotated[float, typer.Option(help="Only rows that took at least so many microseconds.")] = 0.0,
    worst: Annotated[int, typer.Option(help="Worst cases to show of each table.")] = 3,
    as_json: Json = False,
) -> None:
    """Hold predicted against measured kernel times of real parts."""
    from intaglio.tools.validate import as_dict
    from intaglio.tools.validate import validate as run_validate

    records = run_validate(folder, split, min_us, worst)
    if as_json:
        print(json.dumps([as_dict(r) for r in records], indent=2))
        return
    table = Table("chip", "table", "dtype", "rows", "median %", "mean %", "bias %")
    for r in records:
        table.add_row(r.chip, r.table, r.dtype, f"{r.rows:,}", f"{r.median:.1f}", f"{r.mean:.1f}", f"{r.bias:+.1f}")
    out.print(table)
    for r in records:
        for row, us, predicted in r.worst:
            out.print(f"{r.chip} {r.table} {row}: measured {us:,.1f} us, predicted {predicted:,.1f} us", soft_wrap=True)
    out.print("median and mean: of |predicted - measured| / measured. Measured beside modelled, never mixed.")
