"""`intaglio build`, `disasm` and `models`: compile checkpoints to Programs and print them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from intaglio.cli import options as o
from intaglio.cli.load import compile_model, compile_rank, find
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import describe, out, print_json, say, summary, table

ARCHITECTURES = Path(__file__).parents[1] / "data" / "architectures.json"  # written by scripts/models.py


def build(
    model: o.Model = None,
    revision: o.Revision = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", callback=o.in_existing_folder, help="File to write. Default: print the report only."
        ),
    ] = None,
    weights: o.Weights = "auto",
    kv_format: o.KvFormat = "auto",
    context: o.Context = None,
    as_json: o.Json = False,
) -> None:
    """Compile a checkpoint to a Program, and say what each pass did."""
    from intaglio.program import save

    report: list[str] = []
    with progress_bar(f"compiling {model or 'the bundled model'}"):
        program = compile_model(model, weights, kv_format, context, report, revision=revision)
    if output:
        save(program, output)
    if as_json:
        print_json({**summary(program), "passes": report, "output": str(output) if output else None})
        return
    for line in report:
        say(line)
    say(describe(program) + (f" -> {output}" if output else ""))


def disasm(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder, hub id or .program file. Default: the bundled model.")
    ] = None,
    revision: o.Revision = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every layer; parses back. Default: layers alike are folded.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="As ported, before the compiler.")] = False,
    weights: o.Weights = "auto",
    kv_format: o.KvFormat = "auto",
    context: o.Context = None,
    layout: o.Layout = None,
    rank: Annotated[int, typer.Option(min=0, help="With --layout: the rank whose Program is printed.")] = 0,
    as_json: o.Json = False,
) -> None:
    """Print a Program as text: what runs, op by op, with shapes, formats and weights."""
    from intaglio.program import load

    is_file = model is not None and model.is_file()
    if model and is_file:
        if raw or weights != "auto" or kv_format != "auto" or context or layout or revision:
            options = "--raw, --weights, --kv, --context, --layout and --revision"
            raise ValueError(f"{model} is compiled already; {options} go with a checkpoint folder")
        program = load(model)
    else:
        with progress_bar(f"compiling {model or 'the bundled model'}"):
            if layout:
                program = compile_rank(model, layout, rank, weights, kv_format, context, raw, revision)
            else:
                program = compile_model(model, weights, kv_format, context, [], raw, revision)
    text = program.text(fold=not full)
    if as_json:
        print_json({**summary(program), "text": text})
    else:
        print(text, end="")


def models(
    folder: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder, GGUF file or hub id. Default: list the families instead.")
    ] = None,
    revision: o.Revision = None,
    context: o.Context = None,
    as_json: o.Json = False,
    every: Annotated[
        bool, typer.Option("--all", help="List every decoder architecture of transformers, ported or refused.")
    ] = False,
) -> None:
    """List the ported model families; or, for a checkpoint, show what each tensor and configuration key is used for."""
    if folder is not None:
        return show_account(find(folder, revision), context, as_json)
    if every:
        return _every_architecture(as_json)
    from intaglio.model import BUNDLED
    from intaglio.models import families

    known = {name: family.models for name, family in families().items()}
    bundled = str(BUNDLED) if BUNDLED.is_dir() else None
    if as_json:
        return print_json({"families": known, "bundled": bundled})
    out.print(table(("architecture\nin config.json", "models"), sorted(known.items()), words=2))
    return say(f"bundled: {bundled or 'none in this installation'}")


def show_account(folder: Path, context: int | None, as_json: bool) -> None:
    """Print which weights a checkpoint's tensors become, and what in the checkpoint is ignored.

    Tensors, config keys and files may be ignored; the reason is printed for each. folder: a checkpoint folder or GGUF
    file, whose weights are not loaded. context: largest context length to compile for; None: the model's own. Raises
    CheckpointError or PortError if the checkpoint cannot be read or is not ported.
    """
    from intaglio.models import account

    a = account(folder, context)
    if as_json:
        return print_json(a.table())
    say(f"{a.path}: {a.architecture} ({a.models}), by {a.said_by}")
    if a.quantised_by:
        say(f"quantised, by {a.quantised_by}")
    say(f"context {a.context}, vocabulary {a.vocabulary}, weights {a.bytes / 1e6:,.1f} MB in memory as stored")
    for g in a.groups:
        say(f"  {g.count:4d} x {g.tensors}, {g.dtype}")
        say(f"         become {g.becomes}, {g.format}, {g.bytes / 1e6:,.2f} MB")
    ignored: dict[tuple[str, str], list[str]] = {}
    for t in (t for t in a.tensors if t.fate != "used"):
        ignored.setdefault(("tensors", t.why), []).append(t.name)
    for f in (f for f in a.keys if f.fate != "used"):
        ignored.setdefault((f.file, f.why), []).append(f.key)
    for f in (f for f in a.files if f.fate != "used"):
        ignored.setdefault(("files", f.why), []).append(f.file)
    say("ignored:")
    for (where, why), which in ignored.items():
        more = f" and {len(which) - 6} more" if len(which) > 6 else ""
        say(f"  {where}: {', '.join(which[:6])}{more}: {why}")
    for note in a.notes:
        say(f"note: {note}")
    return None


def _every_architecture(as_json: bool) -> None:
    """Print which decoder architectures of transformers are ported, and why the others are refused.

    as_json: True to print JSON instead of a table.
    """
    from intaglio.models import families

    data = json.loads(ARCHITECTURES.read_text())
    known = families()
    rows: dict[str, dict[str, Any]] = {}
    for name, row in data["architectures"].items():
        ported = name in known
        rows[name] = {"status": "ported" if ported else "refused", "models": known[name].models if ported else ""}
        rows[name] |= {"deviation": row.get("deviation")} if ported else {"reason": row.get("reason", "not ported")}
    count = sum(row["status"] == "ported" for row in rows.values())
    if as_json:
        print_json({"transformers": data["transformers"], "ported": count, "architectures": rows})
        return
    shown = [
        (name.removesuffix("ForCausalLM"), row["status"], row["models"] or row["reason"]) for name, row in rows.items()
    ]
    out.print(table(("architecture\n(ForCausalLM left out)", "status", "models, or reason"), shown, words=3))
    say(f"{count} of {len(rows)} decoder architectures of transformers {data['transformers']} are ported")
