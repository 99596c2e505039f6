"""`intaglio replay`: a recorded journal run again, step by step, to see whether the same comes out, and where not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from intaglio.llm import LLM
    from intaglio.runtime import Replayed, Request


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Its entries. A last line cut short, as a killed process leaves it, is left out; any other raises ValueError."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as e:
                if not line.endswith("\n"):
                    return
                raise ValueError(f"{path}:{number} is not JSON: {e}; is it a journal?") from None
            if not isinstance(entry, dict) or "do" not in entry:
                raise ValueError(f"{path}:{number} is no entry of a journal: it has no 'do'")
            yield entry


def replay_journal(path: Path, model: Path | None = None, device: str | None = None) -> Replayed:
    """Run a journal again, on the model and device that it names unless told otherwise. Raises ValueError if it is no
    journal or the model is another."""
    from intaglio.llm import LLM
    from intaglio.runtime import replay as run_again

    entries = read_journal(path)
    first: dict[str, Any] = next(entries, {"do": "nothing"})
    if first["do"] != "model":
        raise ValueError(f"{path} begins with {first['do']!r}; a journal begins with the model")
    other = {"device": device, "chip": None, "chips": None} if device else {}
    options = {**first["options"], **other}
    llm = LLM(model or first["path"], **options)
    return run_again(entries, llm.load, lambda request: _revived(llm, request))


def _revived(llm: LLM, r: Request) -> Request:
    """A request with its stop strings and grammar in place again."""
    if not (r.params.stop or r.params.grammar):
        return r
    whole, _ = llm.prepare(r.prompt, r.params)
    return replace(r, stopped=whole.stopped, matcher=whole.matcher)


def replay(
    journal: Annotated[Path, typer.Argument(help="The file that LLM(journal=...) or the server wrote.")],
    model: Annotated[Path | None, typer.Option(help="The checkpoint folder, if it has moved.")] = None,
    device: Annotated[str | None, typer.Option(help="Run on another device than the recorded one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
) -> None:
    """Run a recorded journal again and say whether every event came out the same; exit code 1 if not."""
    done = replay_journal(journal, model, device)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
    else:
        typer.echo(f"{done.steps} steps, {done.requests} requests, {done.tokens} tokens, {done.faults} failed launches")
        typer.echo(f"not the same: {done.divergence}" if done.divergence else "every event came out the same")
    if done.divergence:
        raise typer.Exit(1)
