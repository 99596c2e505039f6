"""Options that several commands share, as Annotated types, and the callbacks that parse and check their values."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer

from intaglio.cli.progress import quiet_with_json


def in_existing_folder(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Callback of an option for an output file: returns the path unchanged; None if the option is not given.

    Raises ValueError, before any work is done, if the file's folder does not exist.
    """
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"{param.opts[0]} {path}: there is no folder {path.parent}; create it, or give another path")
    return path


def parse_size(text: str) -> int:
    """Returns the number of bytes that a text such as 8GiB, 500MB or 1048576 stands for.

    Raises ValueError for other texts, and for 0.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt]?)(i?)b)?\s*", text, re.IGNORECASE)
    size = 0
    if match:
        number, prefix, binary = match[1], (match[2] or "").lower(), match[3]
        size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))
    if size < 1:
        raise ValueError(f"{text!r} is not a size in bytes; write such as 8GiB, 500MB or 1048576")
    return size


def checked_by(read: Callable[[str], object], others: str = "") -> Callable[[typer.CallbackParam, Any], Any]:
    """Returns a callback that checks the text of a command-line option by calling `read` with the text.

    The callback returns the text unchanged; None if the option is not given. If `read` raises ValueError, the callback
    raises ValueError with a message that names the option.

    others: text put at the end of that message, such as ", or auto", for values that `read` accepts but does not
    mention.
    """

    def callback(param: typer.CallbackParam, text: str | None) -> str | None:
        try:
            if text is not None:
                read(text)
        except ValueError as e:
            raise ValueError(f"{param.opts[0]}: {e}{others}") from None
        return text

    return callback


checked_size = checked_by(parse_size)


def positive(param: typer.CallbackParam, value: float | None) -> float | None:
    """Callback of an option for a number: returns the number unchanged; None if the option is not given.

    Raises ValueError, naming the option, unless the number is finite and above 0.
    """
    if value is not None and not 0 < value < inf:
        raise ValueError(f"{param.opts[0]} is {value:g}; give a finite number above 0, or leave the option out")
    return value


def not_negative(param: typer.CallbackParam, value: float) -> float:
    """Callback of an option for a number: returns the number unchanged.

    Raises ValueError unless the number is finite and at least 0.
    """
    if not 0 <= value < inf:
        raise ValueError(f"{param.opts[0]} is {value:g}; give a finite number of at least 0")
    return value


def checked_keys(param: typer.CallbackParam, keys: list[str] | None) -> list[str] | None:
    """Callback of an option for API keys: returns the keys unchanged; None if the option is not given.

    Raises ValueError for an empty key, because a request without a key would match it.
    """
    if keys and not all(key.strip() for key in keys):
        raise ValueError(f"{param.opts[0]} is empty; give a key, or leave the option out to ask for none")
    return keys


Model = Annotated[
    Path | None,
    typer.Argument(help="Checkpoint folder, GGUF file or hub id (owner/name). Default: the bundled model."),
]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option(
        envvar="INTAGLIO_API_KEY", callback=checked_keys, help="Ask for this key; may be given several times."
    ),
]
TracesEndpoint = Annotated[
    str | None, typer.Option(help="URL of a collector for OpenTelemetry traces (OTLP over HTTP).")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id. Default: main.")]
Device = Annotated[
    str, typer.Option(help="host (C++, fast), reference (NumPy, the definition), oracle, silicon (modelled).")
]
Weights = Annotated[
    str, typer.Option(help="Format of the weights: auto (as stored), f32, bf16, fp8, int8, int4, q4_k, mxfp4.")
]
KvFormat = Annotated[
    str, typer.Option("--kv", help="Format of the KV cache: auto (as the weights ask), f32, bf16, int8, fp8.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the host device. Default: all cores.")]
Context = Annotated[int | None, typer.Option(min=1, help="Positions to compile for. Default: the model's own.")]
Layout = Annotated[
    str | None,
    typer.Option(help="How ranks share the model: tp2, pp2, tp4pp2, tp2ep4, tp4sp, tp1sums2, ... All run here."),
]
InProcess = Annotated[
    bool, typer.Option("--in-process", help="With --layout: all ranks in this process instead of one each.")
]
Chip = Annotated[
    str | None, typer.Option(help="With silicon: the chip that is modelled. Default: sohu. See intaglio chips.")
]
Chips = Annotated[int | None, typer.Option(min=1, help="With silicon: how many chips share the model.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither use nor keep packed weights on disk.")]
TtftLimit = Annotated[
    float | None, typer.Option("--ttft", callback=positive, help="Limit of the time to the first token, in ms.")
]
TpotLimit = Annotated[
    float | None, typer.Option("--tpot", callback=positive, help="Limit of the time per token after it, in ms.")
]
Json = Annotated[bool, typer.Option("--json", callback=quiet_with_json, help="Print JSON for a script.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")]
TopK = Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same tokens. Default: a fresh one.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
