"""Runs a recorded journal again, step by step, and finds the first difference: `intaglio replay`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.progress import Progress, silent

if TYPE_CHECKING:
    from intaglio.llm import LLM
    from intaglio.runtime import Replayed, Request


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a journal file in order. Each entry is a dict with the key "do".

    An incomplete last line, which a killed process leaves, is skipped. Raises ValueError for any other line that is not
    the JSON text of a dict with the key "do".
    """
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


def replay_journal(
    path: Path, model: Path | None = None, device: str | None = None, progress: Progress = silent
) -> Replayed:
    """Run a journal's steps again, up to the first difference. Returns a Replayed, which names a difference if any.

    Args:
        path: the journal file.
        model: checkpoint to use; None: the checkpoint that the journal names.
        device: device to use; None: the device that the journal names.
        progress: called before each entry.

    Raises ValueError if the file is not a journal, or was recorded with another Program or K/V pool, and the errors of
    LLM if the model cannot be loaded.
    """
    from intaglio.llm import LLM
    from intaglio.runtime import replay as run_again

    entries = read_journal(path)
    first: dict[str, Any] = next(entries, {"do": "nothing"})
    if first["do"] != "model":
        raise ValueError(f"{path} begins with {first['do']!r}; a journal begins with the model")
    other = {"device": device, "chip": None, "chips": None} if device else {}
    options = {"window_tokens": 0, **first["options"], **other}  # older journals: the K/V of all tokens was kept
    llm = LLM(model or first["path"], **options, progress=progress)
    with path.open("rb") as file:
        total = sum(1 for _ in file) - 1
    return run_again(_reported(entries, total, progress), llm.load, lambda request: _revived(llm, request))


def _reported(entries: Iterator[dict[str, Any]], total: int, progress: Progress) -> Iterator[dict[str, Any]]:
    """Yield the journal's entries unchanged, and report progress before each one.

    Calls progress(number of entries already yielded, total, text). `total` is the number of all entries.
    """
    for done, entry in enumerate(entries):
        progress(done, total, f"replaying entry {done + 1:,} of {total:,}")
        yield entry


def _revived(llm: LLM, r: Request) -> Request:
    """Return a copy of the request `r` from a journal, with its stop checker and grammar matcher made again.

    A journal cannot hold these two objects. A request without stop strings and grammar is returned unchanged.
    """
    if not (r.params.stop or r.params.grammar):
        return r
    whole, _ = llm.prepare(r.prompt, r.params)
    return replace(r, stop_checker=whole.stop_checker, matcher=whole.matcher)
