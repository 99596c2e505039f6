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
    """Returns a dict of SamplingParams fields, such as temperature, that a checkpoint recommends.

    The values come from the file generation_config.json. The dict is empty if the checkpoint has no such file.

    folder: the checkpoint's folder. source: "auto" reads the file in this folder; "none" reads no file and gives an
    empty dict; any other text is the path of another file, or of a folder with the file.

    Raises ParamsError if a value is out of range, and CheckpointError if the file that `source` names is missing or is
    not JSON. Both messages name the file.
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
