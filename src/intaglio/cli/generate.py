"""`intaglio generate` and `intaglio chat`: text from a model, printed as it is generated."""

from __future__ import annotations

import itertools
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from intaglio.cli import options as o
from intaglio.cli.load import open_llm
from intaglio.cli.progress import progress_bar
from intaglio.cli.show import err, out, print_json
from intaglio.devices import DeviceError

if TYPE_CHECKING:
    from intaglio.llm import LLM
    from intaglio.runtime import SamplingParams


def generate(
    model: o.Model = None,
    revision: o.Revision = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; several make one batch. Default: stdin.")
    ] = None,
    max_tokens: o.MaxTokens = 64,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = 0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    seed: o.Seed = None,
    stop: o.Stop = None,
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
    """Continue text. The bundled model continues Python code: intaglio generate --prompt "def "."""
    from intaglio.runtime import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, seed, stop or ())
    piped = "" if prompt or sys.stdin.isatty() else sys.stdin.read()
    prompts = prompt or [piped or ("def " if model is None else "")]
    if not prompts[0]:
        raise ValueError("there is nothing to continue: give --prompt TEXT, or pipe text in")
    llm = open_llm(model, device, weights, kv_format, threads, context, no_cache, layout, in_process, revision)
    if len(prompts) == 1 and not as_json:
        stream(llm, prompts[0], params, echo=prompts[0])
        return
    with progress_bar("generating") as progress:
        outputs = llm.generate(prompts, params, progress)
    if as_json:
        print_json([{"prompt": p, **asdict(output)} for p, output in zip(prompts, outputs, strict=True)])
        return
    for text, output in zip(prompts, outputs, strict=True):
        out.rule(style="dim")
        print(text + output.text + (f"\nerror: {output.error}" if output.error else ""))


def chat(
    model: o.Model = None,
    revision: o.Revision = None,
    max_tokens: o.MaxTokens = 512,
    temperature: o.Temperature = 0.7,
    top_k: o.TopK = 0,
    top_p: o.TopP = 0.95,
    min_p: o.MinP = 0.0,
    seed: o.Seed = None,
    stop: o.Stop = None,
    weights: o.Weights = "auto",
    kv_format: o.KvFormat = "auto",
    device: o.Device = "host",
    threads: o.Threads = None,
    context: o.Context = None,
    layout: o.Layout = None,
    in_process: o.InProcess = False,
    no_cache: o.NoCache = False,
) -> None:
    """Talk with a model that has a chat template. Each line of input is one turn; Ctrl-D ends."""
    from intaglio.runtime import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, seed, stop or ())
    llm = open_llm(model, device, weights, kv_format, threads, context, no_cache, layout, in_process, revision)
    llm.chat_prompt([{"role": "user", "content": "?"}])  # says at once if the model has no template
    history: list[dict[str, str]] = []
    while (line := read_turn()) is not None:
        if line.strip():
            turn = [*history, {"role": "user", "content": line}]
            answer, _ = stream(llm, llm.chat_prompt(turn), params)
            history = [*turn, {"role": "assistant", "content": answer}]


def read_turn() -> str | None:
    """Returns the user's next line of a chat; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def stream(llm: LLM, prompt: str | list[int], params: SamplingParams, echo: str = "") -> tuple[str, str]:
    """Print `echo` and the continuation of the prompt as it is generated, then its speed on stderr.

    Returns (text of the continuation, finish reason). Raises the errors of LLM.stream(), and DeviceError if the output
    ends in an error.
    """
    clock = llm.clock
    text, tokens, reason, start = "", 0, "", clock()
    deltas = llm.stream(prompt, params)
    with progress_bar("reading the prompt"):
        opening = next(deltas)
    first = clock() - start
    print(echo, end="")
    try:
        for delta in itertools.chain([opening], deltas):
            text += delta.text
            tokens += len(delta.token_ids)
            reason = delta.finish_reason or reason
            print(delta.text, end="", flush=True)
            if delta.error:
                raise DeviceError(delta.error)
    finally:
        print()  # also after an error or Ctrl-C: what follows begins a line
    rest = clock() - start - first
    speed = f", then {(tokens - 1) / rest:,.0f} tokens/s" if tokens > 1 else ""
    speed += f", modelled: {llm.modelled}" if llm.modelled else ""
    err.print(f"[dim]{tokens} tokens, first after {first * 1e3:,.2f} ms{speed}; finish reason: {reason}[/dim]")
    return text, reason
