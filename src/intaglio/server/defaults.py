"""Sampling defaults for fields that a request leaves out, from a checkpoint's generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from intaglio.models import CheckpointError
from intaglio.models.files.checkpoint import read_json
from intaglio.runtime import ParamsError, SamplingParams

NAME = "generation_config.json"
FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # those that vLLM and SGLang take


def sampling_defaults(folder: Path, source: str = "auto") -> dict[str, Any]:
    """A dict of SamplingParams fields from a checkpoint's generation_config.json; {} if it has none.

    source: auto (in the checkpoint's folder), none (no defaults), or another folder or file. Raises ParamsError for a
    value out of range, and CheckpointError for a file that is missing or not JSON; both name the file.
    """
    if source == "none":
        return {}
    path = folder / NAME if source == "auto" else Path(source)
    path = path / NAME if path.is_dir() else path
    if not path.exists():
        if source == "auto":
            return {}
        raise CheckpointError(f"--generation-config {source}: {path} is missing; allowed: auto, none, a folder or file")
    table = read_json(path)
    found = {name: table[name] for name in FIELDS if table.get(name) is not None}
    if found.get("top_k") == -1:  # another way to write 0, all tokens
        found["top_k"] = 0
    try:
        SamplingParams(**found)
    except ParamsError as e:
        raise ParamsError(f"{path}: {e}; correct it, or serve with --generation-config none") from None
    return found
