"""The command line: one function a command. Says what went wrong in one line; --debug shows where."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from intaglio import __version__
from intaglio.devices import DeviceError
from intaglio.server.command import serve
from intaglio.tools import porting
from intaglio.tools.replay import replay
from intaglio.tools.serving import bench_serve
from intaglio.tools.silicon import modelled, register, seventy_b

if TYPE_CHECKING:
    from intaglio.llm import LLM
    from intaglio.program import Program
    from intaglio.runtime import SamplingParams
    from intaglio.tools.bench import Row
    from intaglio.tools.profile import Profile

out, err = Console(highlight=False, emoji=False), Console(stderr=True, highlight=False, emoji=False)
CLAIM = (
    "The public claim is over 500,000 in + out/s; nothing was fitted to it: docs/sohu.md. HBM, links: of the slowest "
    "stage.\nThe same: intaglio simulate llama-3-70b --layout tp8,tp4pp2,tp2pp4,pp8 --weights fp8row --activations fp8 "
    "--kv int8"
)
BOUNDS = (
    "ms: measured. bound ms: the step's bytes or FLOPs at this machine's measured roof. share: bound over measured."
)
DEMO_PROMPTS = (  # none ends in a newline: the tokenizer joins one with the indent that follows
    "def parse_int(text):\n    try:\n        return int(text)\n    except",
    "def is_valid(name):\n    if not isinstance(name, str):\n        raise",
    "class Node:\n    def __init__(self, value, left=None, right=None):\n        self.value =",
    "def read_lines(path):\n    with open(path) as f:",
)


class Group(TyperGroup):
    """Turns the errors a user can act on into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, DeviceError, OSError) as e:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {e}", err=True)
            raise typer.Exit(2) from None


class Bench(TyperGroup):
    """`bench MODEL` measures the model itself, as `bench model MODEL` does; `bench serve` a server."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args[:1] == ["--help"] or (args and args[0] in self.commands)
        return super().parse_args(ctx, args if named else ["model", *args])


app = typer.Typer(cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Model = Annotated[
    Path | None, typer.Argument(help="Checkpoint folder (Hugging Face layout). Default: the bundled model.")
]
Device = Annotated[
    str, typer.Option(help="host (C++, fast), reference (NumPy, the definition), oracle, silicon (modelled).")
]
Weights = Annotated[
    str, typer.Option(help="Format of the weights: auto (as stored), f32, bf16, fp8, int8, int4, q4_k, mxfp4.")
]
KvFormat = Annotated[
    str, typer.Option("--kv", help="Format of the KV cache: auto (as the weights ask), f32, bf16, int8.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the host device. Default: all cores.")]
Context = Annotated[int | None, typer.Option(min=1, help="Positions to compile for. Default: the model's own.")]
Layout = Annotated[
    str | None,
    typer.Option(help="How ranks share the model: tp2, pp2, tp4pp2, tp2ep4, tp4sp, ... All run here."),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither use nor keep packed weights on disk.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")]
TopK = Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same tokens. Default: a fresh one.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]


def show_version(value: bool) -> None:
    if value:
        print(f"intaglio {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Intaglio: transformer inference, from checkpoint to chip. Start with `intaglio demo`."""


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr while `what` goes on; nothing if stderr is not a terminal."""
    if err.is_terminal:
        with err.status(what):
            yield
    else:
        yield


def open_llm(
    model: Path | None, device: str, weights: str, kv_format: str, threads: int | None, context: int | None = None,
    no_cache: bool = False, layout: str | None = None,
) -> LLM:  # fmt: skip
    with working(f"loading {model or 'the bundled model'}"):
        from intaglio.llm import LLM

        cache = None if no_cache else "auto"
        return LLM(model, device, weights, threads, context=context, kv_format=kv_format, cache=cache, layout=layout)


def compile_model(
    model: Path | None, weights: str, kv_format: str, context: int | None, report: list[str], raw: bool = False
) -> Program:
    """The Program of a checkpoint: as ported if `raw`, else compiled; what each pass did goes to `report`."""
    from intaglio.compiler import build
    from intaglio.llm import BUNDLED
    from intaglio.models import Checkpoint, port

    ported = port(Checkpoint.open(model or BUNDLED), context)
    return ported if raw else build(ported, weights, kv_format, report=report)


def compile_rank(
    model: Path | None, layout: str, rank: int, weights: str, kv_format: str, context: int | None, raw: bool
) -> Program:
    """The Program of one rank of a layout: as cut if `raw`, else compiled."""
    from intaglio.compiler import build_mesh, shard

    ported = compile_model(model, weights, kv_format, context, [], raw=True)
    programs = shard(ported, layout) if raw else build_mesh(ported, layout, weights, kv_format)
    if rank >= len(programs):
        raise ValueError(f"--rank {rank}: layout {layout} has ranks 0..{len(programs) - 1}")
    return programs[rank]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def summary(p: Program) -> dict[str, Any]:
    """What a Program is, in numbers."""
    size, count = Counter[str](), Counter[str]()
    for t in p.of_role("weight"):
        size[t.format] += t.nbytes({})
        count[t.format] += 1
    return {
        "name": p.name,
        "hash": p.hash,
        "context": p.context,
        "vocabulary": p.vocabulary,
        "ops": dict(Counter(op.kind for op in p.ops)),
        "weights": {f: {"tensors": count[f], "bytes": size[f]} for f in sorted(size)},
    }


def describe(p: Program) -> str:
    """The same, to be read."""
    s = summary(p)
    weights = ", ".join(f"{w['bytes'] / 1e6:,.1f} MB {f}" for f, w in s["weights"].items())
    return f"{p.name}: {sum(s['ops'].values())} ops, weights {weights}, context {p.context}, hash {p.hash[:12]}"


def describe_device(llm: LLM) -> str:
    """Name, and where there are any, instruction set and threads."""
    facts = [f"{name} {value}" for name in ("isa", "threads") if (value := getattr(llm.device, name, None))]
    return ", ".join([llm.device.name, *facts])


def check_measurable(device: str) -> None:
    if device == "silicon":
        raise ValueError("device 'silicon' has nothing to measure, its times are modelled: use intaglio simulate")


def stream(llm: LLM, prompt: str | list[int], params: SamplingParams) -> tuple[str, str]:
    """Print a continuation as it comes, then its speed on stderr; returns (text, finish reason)."""
    clock = llm.engine.clock
    text, tokens, reason, start, first = "", 0, "", clock(), 0.0
    for delta in llm.stream(prompt, params):
        first = first or clock() - start
        text += delta.text
        tokens += len(delta.token_ids)
        reason = delta.finish_reason or reason
        print(delta.text, end="", flush=True)
        if delta.error:
            raise DeviceError(delta.error)
    rest = clock() - start - first
    print()
    speed = f", then {(tokens - 1) / rest:,.0f} tokens/s" if tokens > 1 else ""
    speed += f", modelled: {llm.modelled}" if llm.modelled else ""
    err.print(f"[dim]{tokens} tokens, first after {first * 1e3:,.2f} ms{speed}; finish reason: {reason}[/dim]")
    return text, reason


@app.command()
def demo(
    weights: Weights = "auto", kv_format: KvFormat = "auto", device: Device = "host", threads: Threads = None
) -> None:
    """Show what Intaglio does, with the bundled model: load, generate, stream, measure. Takes some seconds."""
    from intaglio.runtime import SamplingParams

    start = time.perf_counter()
    llm = open_llm(None, device, weights, kv_format, threads)
    out.print(f"[bold]Intaglio {__version__}[/bold], loaded in {time.perf_counter() - start:.1f} s")
    out.print(f"program  {describe(llm.program)}", markup=False, soft_wrap=True)
    out.print(f"device   {describe_device(llm)}", markup=False)
    out.rule(f"{len(DEMO_PROMPTS)} continuations of Python code, one batch", style="dim")
    params = SamplingParams(max_tokens=48, temperature=0.6, top_p=0.9, seed=1)
    for prompt, output in zip(DEMO_PROMPTS, llm.generate(DEMO_PROMPTS, params), strict=True):
        out.print(f"[bold]{escape(prompt)}[/bold]{escape(output.text)}\n")
    out.rule("one more, as it comes", style="dim")
    prompt = "class Queue:\n    def put(self, item):"
    print(prompt, end="", flush=True)
    stream(llm, prompt, SamplingParams(max_tokens=96, temperature=0.6, top_p=0.9, seed=2))
    out.rule("measured, beside the bound of this machine's measured roofs", style="dim")
    rows, why = run_bench(llm, lengths=[256], sequences=[1, 8], runs=3)
    out.print(bench_table(rows))
    out.print(why or BOUNDS)
    out.rule("modelled: the same model on a chip that does not exist", style="dim")
    out.print(modelled(llm.program), markup=False, soft_wrap=True)
    out.rule("modelled: Llama-3-70B, FP8, on eight of them, 2,048 tokens in and 128 out", style="dim")
    seventy_b()
    out.print(CLAIM, markup=False, soft_wrap=True)
    out.print(
        "Next: intaglio generate --prompt 'class ', intaglio disasm, intaglio simulate llama-3-8b, intaglio --help"
    )


@app.command()
def generate(
    model: Model = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; several make one batch. Default: stdin.")
    ] = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    weights: Weights = "auto",
    kv_format: KvFormat = "auto",
    device: Device = "host",
    threads: Threads = None,
    context: Context = None,
    layout: Layout = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Continue text. The bundled model continues Python code: intaglio generate --prompt "def "."""
    from intaglio.runtime import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, seed, stop or ())
    piped = "" if prompt or sys.stdin.isatty() else sys.stdin.read()
    prompts = prompt or [piped or ("def " if model is None else "")]
    if not prompts[0]:
        raise ValueError("there is nothing to continue: give --prompt TEXT, or pipe text in")
    llm = open_llm(model, device, weights, kv_format, threads, context, no_cache, layout)
    if len(prompts) == 1 and not as_json:
        print(prompts[0], end="", flush=True)
        stream(llm, prompts[0], params)
        return
    with working("generating"):
        outputs = llm.generate(prompts, params)
    if as_json:
        print_json([{"prompt": p, **asdict(o)} for p, o in zip(prompts, outputs, strict=True)])
        return
    for text, output in zip(prompts, outputs, strict=True):
        out.rule(style="dim")
        print(text + output.text + (f"\nerror: {output.error}" if output.error else ""))


@app.command()
def chat(
    model: Model = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    weights: Weights = "auto",
    kv_format: KvFormat = "auto",
    device: Device = "host",
    threads: Threads = None,
    context: Context = None,
    layout: Layout = None,
    no_cache: NoCache = False,
) -> None:
    """Talk with a model that has a chat template. A line is a turn, piped lines too; Ctrl-D ends."""
    from intaglio.runtime import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, seed, stop or ())
    llm = open_llm(model, device, weights, kv_format, threads, context, no_cache, layout)
    llm.chat_prompt([{"role": "user", "content": "?"}])  # says at once if the model has no template
    history: list[dict[str, str]] = []
    while (line := read_turn()) is not None:
        if line.strip():
            turn = [*history, {"role": "user", "content": line}]
            answer, _ = stream(llm, llm.chat_prompt(turn), params)
            history = [*turn, {"role": "assistant", "content": answer}]


def read_turn() -> str | None:
    """The user's next line; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


@app.command()
def build(
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. Default: print the report only.")
    ] = None,
    weights: Weights = "auto",
    kv_format: KvFormat = "auto",
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint to a Program, and say what each pass did."""
    from intaglio.program import save

    report: list[str] = []
    program = compile_model(model, weights, kv_format, context, report)
    if output:
        save(program, output)
    if as_json:
        print_json({**summary(program), "passes": report, "output": str(output) if output else None})
        return
    for line in report:
        out.print(line, markup=False, soft_wrap=True)
    out.print(describe(program) + (f" -> {output}" if output else ""), markup=False, soft_wrap=True)


@app.command()
def disasm(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder or .program file. Default: the bundled model.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every layer; parses back. Default: layers alike are folded.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="As ported, before the compiler.")] = False,
    weights: Weights = "auto",
    kv_format: KvFormat = "auto",
    context: Context = None,
    layout: Layout = None,
    rank: Annotated[int, typer.Option(min=0, help="With --layout: the rank whose Program is printed.")] = 0,
    as_json: Json = False,
) -> None:
    """Print a Program as text: what runs, op by op, with shapes, formats and weights."""
    from intaglio.program import load, print_program

    is_file = model is not None and model.is_file()
    if model and is_file:
        if raw or weights != "auto" or kv_format != "auto" or context or layout:
            options = "--raw, --weights, --kv, --context and --layout"
            raise ValueError(f"{model} is compiled already; {options} go with a checkpoint folder")
        program = load(model)
    elif layout:
        program = compile_rank(model, layout, rank, weights, kv_format, context, raw)
    else:
        program = compile_model(model, weights, kv_format, context, [], raw)
    text = print_program(program, fold=not full)
    if as_json:
        print_json({**summary(program), "text": text})
    else:
        print(text, end="")


@app.command()
def models(as_json: Json = False) -> None:
    """List the model families there are ports for, and the bundled model."""
    from intaglio.llm import BUNDLED
    from intaglio.models import families

    known = {name: family.models for name, family in families().items()}
    bundled = str(BUNDLED) if BUNDLED.is_dir() else None
    if as_json:
        print_json({"families": known, "bundled": bundled})
        return
    table = Table("architecture (config.json)", "models")
    for name in sorted(known):
        table.add_row(name, known[name])
    out.print(table)
    out.print(f"bundled: {bundled or 'none in this installation'}", soft_wrap=True)


app.command()(porting.port)


@app.command()
def check(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    device: Device = "host",
    seed: Annotated[int, typer.Option(help="Of the token ids that are run.")] = 0,
    bisect: Annotated[str, typer.Option(help="Two of our own runs instead, such as reference,host:int8.")] = "",
    as_json: Json = False,
) -> None:
    """Compare the model on a device with transformers, site by site; exit code 1 if they disagree. Needs torch."""
    from intaglio.tools.bisect import bisect as run_bisect
    from intaglio.tools.check import CheckError
    from intaglio.tools.check import check as run_check

    try:
        with working(f"checking {model}"):
            runs = bisect.split(",")
            report = run_bisect(model, runs, seed) if bisect else run_check(model, device=device, seed=seed)
    except CheckError as e:
        raise ValueError(str(e)) from None
    if as_json:
        print_json(report.as_dict())
    else:
        print(report)
    if not report.ok:
        raise typer.Exit(1)


def numbers(text: str) -> list[int]:
    """'128,512' as [128, 512]."""
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is not a list of whole numbers such as 128,512") from None


def bench_table(rows: Sequence[Row]) -> Table:
    table = Table("phase", "batch", "prompt", "tokens/s", "ms", "bound ms", "bound by", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for r in rows:
        bound = ("-", "-", "-")
        if r.bound_seconds is not None and r.share is not None:
            bound = (f"{r.bound_seconds * 1e3:,.2f}", str(r.bound_by), f"{r.share:.0%}")
        cells = (str(r.sequences), str(r.prompt_tokens), f"{r.tokens_per_second:,.0f}", f"{r.seconds * 1e3:,.2f}")
        table.add_row(r.phase, *cells, *bound)
    return table


def run_bench(llm: LLM, **sizes: Any) -> tuple[list[Row], str]:
    """(rows, why there are no bounds, if there are none)."""
    from intaglio.tools.bench import Roofs, bench, measured_roofs

    with err.status("measuring the roofs") as status:
        roofs = measured_roofs(llm.device)
        found = roofs if isinstance(roofs, Roofs) else None
        rows = bench(llm.engine.executable, found, progress=lambda what: status.update(f"measuring: {what}"), **sizes)
    return rows, "" if isinstance(roofs, Roofs) else roofs


benches = typer.Typer(cls=Bench, help="Measure a model's prefill and decode, or a server under load.")
benches.command("serve")(bench_serve)
app.add_typer(benches, name="bench")


@benches.command("model")
def bench(
    model: Model = None,
    prompt_tokens: Annotated[str | None, typer.Option(help="Prompt lengths, such as 128,512.")] = None,
    sequences: Annotated[str, typer.Option(help="Numbers of sequences run together.")] = "1,8",
    runs: Annotated[int, typer.Option(min=1, help="Runs of which the median is taken.")] = 3,
    weights: Weights = "auto",
    kv_format: KvFormat = "auto",
    device: Device = "host",
    threads: Threads = None,
    context: Context = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode, each beside the bound that memory bandwidth and matrix peak set."""
    check_measurable(device)
    lengths = numbers(prompt_tokens) if prompt_tokens else None
    counts = numbers(sequences)
    llm = open_llm(model, device, weights, kv_format, threads, context, no_cache)
    rows, why = run_bench(llm, lengths=lengths, sequences=counts, runs=runs)
    if as_json:
        facts = {"program": summary(llm.program), "device": describe_device(llm), "no_bounds": why or None}
        print_json({**facts, "rows": [r.as_dict() for r in rows]})
        return
    out.print(describe(llm.program), markup=False, soft_wrap=True)
    out.print(f"on {describe_device(llm)}; medians of {runs} runs", markup=False)
    out.print(bench_table(rows))
    out.print(why or BOUNDS)


def profile_table(p: Profile) -> Table:
    table = Table("site", "ms", "of all", "bound ms", "bound by", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for s in sorted(p.sites, key=lambda s: -s.seconds):
        bound = ("-", "-", "-")
        if s.bound_seconds is not None and s.share is not None:
            bound = (f"{s.bound_seconds * 1e3:,.3f}", str(s.bound_by), f"{s.share:.0%}")
        table.add_row(s.label, f"{s.seconds * 1e3:,.3f}", f"{s.seconds / p.seconds:.1%}", *bound)
    table.add_row("outside kernels", f"{p.outside_seconds * 1e3:,.3f}", f"{p.outside_share:.1%}", "-", "-", "-")
    return table


@app.command()
def profile(
    model: Model = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Prompt length. Default: 256, if it fits.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences run together.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Runs of which medians are taken.")] = 5,
    weights: Weights = "auto",
    kv_format: KvFormat = "auto",
    device: Device = "host",
    threads: Threads = None,
    context: Context = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Show where a step's time goes, site by site beside its roof, and which sites lose most."""
    from intaglio.tools.bench import Roofs, measured_roofs
    from intaglio.tools.profile import profile as run_profile

    check_measurable(device)
    llm = open_llm(model, device, weights, kv_format, threads, context, no_cache)
    with err.status("measuring the roofs") as status:
        roofs = measured_roofs(llm.device)
        profiles = run_profile(
            llm.engine.executable, roofs if isinstance(roofs, Roofs) else None, sequences=sequences,
            prompt_tokens=prompt_tokens, runs=runs, progress=lambda what: status.update(f"measuring: {what}"),
        )  # fmt: skip
    why = "" if isinstance(roofs, Roofs) else roofs
    if as_json:
        facts = {"program": summary(llm.program), "device": describe_device(llm), "no_bounds": why or None}
        print_json({**facts, "phases": [p.as_dict() for p in profiles]})
        return
    out.print(describe(llm.program), markup=False, soft_wrap=True)
    out.print(f"on {describe_device(llm)}; medians of {runs} runs", markup=False)
    for p in profiles:
        size = f"{p.sequences} {'x' if p.phase == 'prefill' else 'after'} {p.prompt_tokens} tokens"
        times = f"{p.seconds * 1e3:,.2f} ms timed, {p.untimed_seconds * 1e3:,.2f} ms untimed"
        out.rule(f"{p.phase} of {size}: {times}", style="dim")
        out.print(profile_table(p))
        for s in p.worst:
            out.print(p.gap(s), markup=False, soft_wrap=True)
    out.print(why or BOUNDS)


app.command()(replay)
app.command()(serve)
register(app)

if __name__ == "__main__":
    app()
