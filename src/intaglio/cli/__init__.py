"""The command line. Each module has one group of commands; an error prints one line, and with --debug the traceback."""

from __future__ import annotations

from typing import Annotated

import typer

from intaglio import __version__
from intaglio.cli import (
    bench,
    bench_serve,
    calibrate,
    cluster,
    debugging,
    demo,
    generate,
    hosts,
    program,
    serve,
    silicon,
    simulate_serving,
    validate_serving,
)
from intaglio.cli.group import Bench, Group
from intaglio.plugins import load_plugins

app = typer.Typer(cls=Group, no_args_is_help=True, pretty_exceptions_enable=False)
benches = typer.Typer(cls=Bench, help="Measure a model's prefill and decode, or a server under load.")


def show_version(value: bool) -> None:
    """Callback of --version: if `value` is True, print the version and raise typer.Exit; else do nothing."""
    if value:
        print(f"intaglio {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Intaglio: transformer inference, from checkpoint to chip. Start with `intaglio demo`."""
    load_plugins()


for command in (
    demo.demo,
    generate.generate,
    generate.chat,
    program.build,
    program.disasm,
    program.models,
    debugging.port,
    debugging.check,
    bench.profile,
    debugging.replay,
    serve.serve,
    hosts.agent,
    silicon.simulate,
    silicon.chips,
    silicon.libraries,
    silicon.isa,
    silicon.validate,
    calibrate.calibrate,
):
    app.command()(command)
app.command("simulate-serving")(simulate_serving.simulate_serving)
app.command("validate-serving")(validate_serving.validate_serving)
app.command(context_settings={"allow_interspersed_args": False, "allow_extra_args": True})(hosts.launch)
benches.command("model")(bench.bench)
benches.command("serve")(bench_serve.bench_serve)
app.add_typer(benches, name="bench")
app.add_typer(cluster.cluster, name="cluster")
