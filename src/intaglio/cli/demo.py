"""`intaglio demo`: the main features in one run, with the bundled model."""

from __future__ import annotations

import time

from rich.markup import escape

from intaglio import __version__
from intaglio.cli import options as o
from intaglio.cli.bench import BOUNDS, bench_table, run_bench
from intaglio.cli.generate import stream
from intaglio.cli.load import open_llm
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import describe, describe_device, out, say
from intaglio.cli.silicon import modelled, seventy_b

CLAIM = (
    "The public claim is over 500,000 in + out/s; nothing was fitted to it: docs/sohu.md. HBM, links: of the slowest "
    "stage.\nThe same: intaglio simulate llama-3-70b --layout tp8,tp4pp2,tp2pp4,pp8 --weights fp8row --activations fp8 "
    "--kv int8"
)
DEMO_PROMPTS = (  # none ends in a newline: the tokenizer joins one with the indent that follows
    "def parse_int(text):\n    try:\n        return int(text)\n    except",
    "def is_valid(name):\n    if not isinstance(name, str):\n        raise",
    "class Node:\n    def __init__(self, value, left=None, right=None):\n        self.value =",
    "def read_lines(path):\n    with open(path) as f:",
)


def demo(
    weights: o.Weights = "auto", kv_format: o.KvFormat = "auto", device: o.Device = "host", threads: o.Threads = None
) -> None:
    """Show what Intaglio does, with the bundled model: load, generate, stream, measure. Takes some seconds."""
    from intaglio.runtime import SamplingParams

    start = time.perf_counter()
    llm = open_llm(None, device, weights, kv_format, threads)
    out.print(f"[bold]Intaglio {__version__}[/bold], loaded in {time.perf_counter() - start:.1f} s")
    say(f"program  {describe(llm.model.program)}")
    say(f"device   {describe_device(llm)}")
    out.rule(f"{len(DEMO_PROMPTS)} continuations of Python code, one batch", style="dim")
    params = SamplingParams(max_tokens=48, temperature=0.6, top_p=0.9, seed=1)
    with progress_bar("generating") as progress:
        outputs = llm.generate(DEMO_PROMPTS, params, progress)
    for prompt, output in zip(DEMO_PROMPTS, outputs, strict=True):
        out.print(f"[bold]{escape(prompt)}[/bold]{escape(output.text)}\n")
    out.rule("one more, as it comes", style="dim")
    prompt = "class Queue:\n    def put(self, item):"
    stream(llm, prompt, SamplingParams(max_tokens=96, temperature=0.6, top_p=0.9, seed=2), echo=prompt)
    out.rule("measured, beside the bound of this machine's measured roofs", style="dim")
    rows, why = run_bench(llm, lengths=[256], sequences=[1, 8], runs=3)
    out.print(bench_table(rows))
    say(why or BOUNDS)
    out.rule("modelled: the same model on a chip that does not exist", style="dim")
    say(modelled(llm.model.program))
    out.rule("modelled: Llama-3-70B, FP8, on eight of them, 2,048 tokens in and 128 out", style="dim")
    seventy_b()
    say(CLAIM)
    say("Next: intaglio generate --prompt 'class ', intaglio disasm, intaglio simulate llama-3-8b, intaglio --help")
