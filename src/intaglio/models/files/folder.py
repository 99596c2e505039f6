"""Chooses the weight files of a checkpoint folder as transformers does, and notes which others are ignored.

`model.safetensors`, else the shards that `model.safetensors.index.json` names, else the only safetensors file. It knows
file names and headers, not the meaning of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.models.config import CheckpointError
from intaglio.models.files.header import Entry, read_header, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".npz", ".onnx")
OTHER_LAYOUTS = {  # a file in place of config.json, and what the folder is then
    "params.json": "a model in Meta's or Mistral's own layout", "model_index.json": "a diffusers pipeline",
    "modules.json": "a sentence-transformers model", "open_clip_config.json": "an OpenCLIP model",
}  # fmt: skip
CHUNK = 1 << 24  # bytes compared at a time


@dataclass
class Found:
    """The tensors in a checkpoint folder's files, and which of the files are read.

    Attributes:
        entries: {name of a tensor: its place in the files}.
        said_by: name of the file that decides which files are read: an index, or the only file.
        unlisted: names of *.safetensors files that are not read.
        absent: {name of a tensor that the index lists but no file holds: the file that the index names for it}.
        copies: a list of pairs (name of a tensor, its second place). The tensor is stored in both places with equal
            values; its first place is in `entries`.
        notes: notes for the user about ignored or unusual files.
    """

    entries: dict[str, Entry]
    said_by: str
    unlisted: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    copies: list[tuple[str, Entry]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_files(path: Path, config: Mapping[str, Any]) -> Found:
    """Find the tensors of the folder `path`. Returns a Found with their places and the files that are read.

    config: the contents of the folder's config.json. Raises CheckpointError if there is no file to read, or if a file
    that config.json or the index names is missing or damaged.
    """
    decides = deciding_file(config, lambda name: (path / name).exists(), lambda name: read_json(path / name))
    if decides is None:
        found = _only_file(path)
    elif decides.endswith(".index.json"):
        found = _shards(path, decides)
    else:
        found = Found(_file(path, decides, "config.json"), decides)
    read = {e.file.name for e in [*found.entries.values(), *(e for _, e in found.copies)]} | {found.said_by}
    found.unlisted = sorted(f.name for f in path.glob("*.safetensors") if f.name not in read)
    if (path / ADAPTER).exists():
        found.notes.append(
            f"{ADAPTER} beside the model: the LoRA of {_adapter_file(path)} is not applied; to apply it, merge it with "
            "peft (merge_and_unload) and save the result"
        )
    return found


def deciding_file(
    config: Mapping[str, Any], has: Callable[[str], bool], read: Callable[[str], Mapping[str, Any]]
) -> str | None:
    """The name of the file that is read first to find a checkpoint's tensors; None if no name fits.

    It is the file with all tensors, or an index (*.index.json), which says which file has each tensor. The result is
    the first of these names; transformers chooses in the same way:

    1. The name that the config has under `transformers_weights`, even if the checkpoint has no such file.
    2. model.safetensors, if the checkpoint has it, unless the index lists it as one of several shards.
    3. model.safetensors.index.json, if the checkpoint has it.

    The result is None if none of the three applies. find_files() then takes the only safetensors file.

    Args:
        config: the contents of the checkpoint's config.json.
        has: function that says whether the checkpoint has a file of a given name.
        read: function that returns the object in a JSON file of the checkpoint, by name.
    """
    named = config.get("transformers_weights")
    if isinstance(named, str) and named:
        return named
    if has(SINGLE) and not (has(INDEX) and len(shards := listed_shards(read(INDEX))) > 1 and SINGLE in shards):
        return SINGLE
    return INDEX if has(INDEX) else None


def listed_shards(index: Mapping[str, Any]) -> list[str]:
    """The names of the files that an index lists, as a sorted list; [] if the index has no weight_map."""
    listed = index.get("weight_map")
    return sorted({str(f) for f in listed.values()}) if isinstance(listed, dict) else []


def refuse_folder(path: Path) -> CheckpointError:
    """A CheckpointError for a folder without config.json, to be raised by the caller.

    Its message says what the folder seems to be and what to do.
    """
    if (path / ADAPTER).exists():
        base = read_json(path / ADAPTER).get("base_model_name_or_path") or "its base model"
        return CheckpointError(
            f"{path} is a LoRA adapter (peft's {ADAPTER}), not a model: merge it into {base}: "
            "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(new_folder), and give "
            "that folder"
        )
    for name, what in OTHER_LAYOUTS.items():
        if (path / name).exists():
            return CheckpointError(
                f"{path} has no config.json but {name}: it is {what}; download the files of its transformers version, "
                "or convert it"
            )
    inside = sorted(p.parent.name for p in path.glob("*/config.json"))
    hint = f"; its folder {inside[0]} has one: give {path / inside[0]}" if inside else ""
    return CheckpointError(f"{path} has no config.json; download it, it says which model this is{hint}")


def _file(path: Path, name: str, said_by: str) -> dict[str, Entry]:
    if not (path / name).exists():
        raise CheckpointError(f"{path / said_by} names the shard {name}, which is missing; download it")
    return read_header(path / name)


def _shards(path: Path, index: str) -> Found:
    """A Found with all tensors of the files that an index names.

    It also has the tensors of these files that the index does not list. index: name of the index file. Raises
    CheckpointError if a file is missing, or if two files have different tensors of the same name.
    """
    if not (path / index).exists():
        raise CheckpointError(f"{path / 'config.json'} names the index {index}, which is missing; download it")
    table = read_json(path / index)
    listed = table.get("weight_map")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path / index} has no weight_map from tensor to file; download it again")
    entries: dict[str, Entry] = {}
    copies: list[tuple[str, Entry]] = []
    for file in listed_shards(table):
        for name, entry in _file(path, file, index).items():
            if name in entries and not _same(entries[name], entry):
                raise CheckpointError(
                    f"{path}: tensor {name} is in {entries[name].file.name} and, with other values, in {file}; one of "
                    "the files belongs to another model: download both again"
                )
            if entries.setdefault(name, entry) is not entry:
                copies.append((name, entry))
    absent = {name: str(file) for name, file in listed.items() if name not in entries}
    return Found(entries, index, absent=absent, copies=copies)


def _same(a: Entry, b: Entry) -> bool:
    """True if the two stored tensors `a` and `b` have the same type, shape and bytes."""
    if (a.dtype, a.shape, a.stop - a.start) != (b.dtype, b.shape, b.stop - b.start):
        return False
    one, other = (
        np.memmap(e.file, np.uint8, "r", e.start, (e.stop - e.start,)) if e.stop > e.start else b"" for e in (a, b)
    )
    return all(np.array_equal(one[i : i + CHUNK], other[i : i + CHUNK]) for i in range(0, len(one), CHUNK))


def _only_file(path: Path) -> Found:
    """A Found with the tensors of the only safetensors file in a folder.

    Files that are known not to hold a model, such as adapters, do not count. Raises CheckpointError if there is no
    file, or more than one.
    """
    found = sorted(path.glob("*.safetensors"))
    others = [f for f in found if not_a_model(f.name)]
    mine = [f for f in found if f not in others]
    if len(mine) == 1:
        return Found(read_header(mine[0]), mine[0].name)
    if mine:
        names = ", ".join(f.name for f in mine[:4])
        raise CheckpointError(
            f"{path} has {len(mine)} safetensors files ({names}{', ...' if len(mine) > 4 else ''}) but no {SINGLE} and "
            f"no {INDEX}; download the index too"
        )
    if others:
        what = {f.name: not_a_model(f.name) for f in others}
        said = "; ".join(f"{name} is {is_}" for name, is_ in what.items())
        raise CheckpointError(f"{path} has no {SINGLE}: {said}; download {SINGLE}, or its shards with {INDEX}")
    other = sorted(f.name for f in path.iterdir() if f.suffix in OTHER_WEIGHTS)
    hint = (
        f"it has {', '.join(other[:4])}; convert with transformers: AutoModelForCausalLM.from_pretrained(folder)"
        ".save_pretrained(new_folder)"
        if other
        else f"download {SINGLE}, or its shards with {INDEX}"
    )
    raise CheckpointError(f"{path} has no *.safetensors file; {hint}")


def not_a_model(name: str) -> str:
    """Returns what a safetensors file called `name` seems to hold, such as "a LoRA adapter".

    "" for a usual model file. The file is judged only by its name.
    """
    for start, what in (
        ("consolidated", "the model in Mistral's own layout"), ("adapter_", "a LoRA adapter"),
        ("optimizer", "an optimizer's state"), ("mtp", "layers that predict tokens further ahead"),
        ("scheduler", "a training state"), ("training", "a training state"), ("random_states", "a training state"),
        ("vision_tower", "a vision tower"), ("mm_projector", "a projector of images"), ("lora", "a LoRA adapter"),
        ("embeddings", "embeddings apart"), ("value_head", "a value head"), ("medusa", "heads of speculative decoding"),
        ("eagle", "a draft model"), ("sparse_autoencoder", "a sparse autoencoder"),
    ):  # fmt: skip
        if name.startswith(start):
            return what
    return ""


def _adapter_file(path: Path) -> str:
    held = sorted(f.name for f in path.glob("adapter_model.*"))
    return held[0] if held else ADAPTER
