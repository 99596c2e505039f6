"""Account of a checkpoint: which Program weights each tensor becomes, which keys are read, and why others are ignored.

It also says which model the checkpoint is and which file says so. It is made without reading weights. A checkpoint that
cannot be ported has no account, only an error.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.models.files.checkpoint import Checkpoint
from intaglio.models.files.folder import INDEX, SINGLE
from intaglio.models.files.gguf import use_of
from intaglio.models.files.quantisation import BESIDE
from intaglio.models.keys import Fate
from intaglio.models.leftovers import judge_tensor
from intaglio.models.port import Ported, port_checkpoint
from intaglio.models.text.account import FILES, judge_tokenizer
from intaglio.models.text.files import TEMPLATES
from intaglio.program.source import names

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
OTHER_FILES = (  # patterns of names, and why a file is not read
    (r"\.(md|txt|pdf|png|jpg|jpeg|gif|svg|html)$|^LICENSE|^NOTICE|^USE_POLICY|^\.git", "documentation"),
    (r"\.py$", "code of the model's own; none is ever run here"),
    (r"\.(bin|pt|pth|h5|msgpack|ckpt|npz|onnx)(\.index\.json)?$|^flax_|^tf_|^rust_model", "weights in another format"),
    (r"\.gguf$", "a GGUF file; give it by its own path to read it"),
    (r"\.safetensors$", "safetensors that hold something else than the model"),
    (r"\.index\.json$", "an index of files that are not read"),
    (r"preprocessor|processor|image|video|audio|feature", "for images, video or sound, which are not ported"),
    (r"^(tokenizer\.model|spiece\.model|vocab\.(json|txt)|merges\.txt|tekken\.json|.*\.tiktoken|.*sentencepiece.*)$",
     "the tokenizer in another form; tokenizer.json is read"),
    (r"^adapter_", "a LoRA adapter, which is not applied"),
    (r"trainer_state|training_args|optimizer|scheduler|rng_state|zero_to_fp32|latest|all_results|eval_results|"
     r"train_results", "the state of a training run"),
    (r"config.*\.json$|\.ya?ml$|\.toml$", "settings of other programs"),
)  # fmt: skip
UNUSED = {  # tensors of GGUF files, by use_of()
    "derived": "frequencies of rope, which follow from the metadata",
    "ahead": "a layer that only predicts tokens further ahead",
}


@dataclass(frozen=True)
class TensorFate:
    """Report on one tensor in a checkpoint's files: the weights that are made from it, or why it is ignored.

    Attributes:
        name: name of the tensor.
        file: name of the file that has the tensor.
        dtype: stored type, such as BF16.
        shape: stored shape.
        bytes: bytes of the tensor in the file.
        fate: "used" or "ignored".
        becomes: names of the Program's weights that are made from the tensor; () if it is ignored.
        format: number format of the first of these weights; "" if the tensor is ignored.
        why: why the tensor is ignored; "" if it is used.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    fate: str
    becomes: tuple[str, ...] = ()
    format: str = ""
    why: str = ""


@dataclass(frozen=True)
class Group:
    """Report on a group of used tensors whose names differ only in the numbers of layers and experts.

    Attributes:
        tensors: the name that the tensors share, with * in place of each number.
        count: number of tensors in the group.
        dtype: stored type of the tensors.
        becomes: names of the Program's weights made from the tensors, with * in place of each number.
        format: number format of these weights.
        bytes: bytes of these weights in memory.
    """

    tensors: str
    count: int
    dtype: str
    becomes: str
    format: str
    bytes: int


@dataclass(frozen=True)
class Account:
    """Report on how a checkpoint is read: which model it is, and which of its tensors, keys and files are used.

    Attributes:
        path: path of the checkpoint.
        architecture: name of the architecture in config.json.
        models: names of released models of this architecture.
        said_by: the file and key in which the checkpoint names its architecture.
        quantised_by: the file and key in which the checkpoint says how its matrices are quantised; "" if they are not.
        context: maximum tokens of a sequence.
        vocabulary: number of token ids.
        bytes: bytes of the weights in memory.
        tensors: one entry per tensor in the files, with the reason if it is ignored.
        groups: the used tensors, one entry for all layers and experts together.
        keys: one entry per key of config.json and of the tokenizer's files (for a GGUF file, of its metadata).
        files: one entry per file of the checkpoint.
        notes: texts of warnings about the model and the tokenizer's files.
    """

    path: str
    architecture: str
    models: str
    said_by: str
    quantised_by: str
    context: int
    vocabulary: int
    bytes: int
    tensors: tuple[TensorFate, ...]
    groups: tuple[Group, ...]
    keys: tuple[Fate, ...]
    files: tuple[Fate, ...]
    notes: tuple[str, ...]

    def table(self) -> dict[str, Any]:
        """This report as a dict that can be written as JSON.

        The keys are the names of the attributes. `groups`, `tensors`, `keys` and `files` are lists with one dict per
        entry. `quantised_by` is None instead of "".
        """
        return {
            "path": self.path, "architecture": self.architecture, "models": self.models, "said_by": self.said_by,
            "quantised_by": self.quantised_by or None, "context": self.context, "vocabulary": self.vocabulary,
            "bytes": self.bytes, "groups": [vars(g) for g in self.groups],
            "tensors": [{**vars(t), "shape": list(t.shape), "becomes": list(t.becomes)} for t in self.tensors],
            "keys": [{k: v for k, v in vars(f).items() if k != "note"} for f in self.keys],
            "files": [{"file": f.file, "fate": f.fate, "why": f.why} for f in self.files], "notes": list(self.notes),
        }  # fmt: skip


def account(path: str | Path, context: int | None = None) -> Account:
    """Read a checkpoint and report what each of its tensors, keys and files is used for. Returns the Account.

    context: maximum tokens of a sequence; None: the model's own limit. Raises CheckpointError if the checkpoint cannot
    be read, PortError if the model is not supported.
    """
    checkpoint = Checkpoint.open(path)
    ported = port_checkpoint(checkpoint, context)
    program = ported.program
    tensors = tuple((_gguf_tensors if checkpoint.gguf else _tensors)(checkpoint, ported))
    keys = [*ported.keys]
    if checkpoint.gguf:
        name = checkpoint.gguf.file.path.name
        keys = [Fate(name, k.key, "used" if k.used else "ignored", k.why, k.note) for k in checkpoint.gguf.keys]
    notes = list(ported.notes)
    if checkpoint.path.is_dir() and (checkpoint.path / "config.json").exists():
        read = judge_tokenizer(checkpoint.path)
        keys += read
        notes += [fate.note for fate in read if fate.note]
    return Account(
        str(path), ported.family.architecture, ported.family.models, ported.architecture_from, checkpoint.quantised_by,
        program.context, program.vocabulary, sum(t.nbytes({}) for t in program.of_role("weight")), tensors,
        tuple(_groups(ported, checkpoint, tensors)), tuple(keys), tuple(_files(checkpoint)), tuple(notes),
    )  # fmt: skip


def _uses(checkpoint: Checkpoint, ported: Ported) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Find the weights of the Program that are made from each tensor of a checkpoint. Returns two dicts.

    The first dict is {name of a stored tensor: list of the names of the weights made from it}. The second is {name of a
    stored tensor: number format of the first weight in that list}. A tensor that no weight is made from is in neither
    dict.
    """
    used: dict[str, list[str]] = {}
    formats: dict[str, str] = {}
    for t in ported.program.of_role("weight"):
        for name in (name for source in t.source for name in names(source)):
            parts = checkpoint.coded[name].parts if name in checkpoint.coded else (name,)
            for part in parts:
                used.setdefault(part, []).append(t.name)
                formats.setdefault(part, t.format)
    return used, formats


def _gguf_tensors(checkpoint: Checkpoint, ported: Ported) -> Iterator[TensorFate]:
    """Yield a TensorFate for each tensor of a GGUF checkpoint.

    It says which weights the tensor becomes, or why it is ignored. The tensor is named as in the GGUF file. If the
    checkpoint is divided into several files, the tensors of all files are yielded. ported: the Program that was made
    from the checkpoint.
    """
    assert checkpoint.gguf
    used, formats = _uses(checkpoint, ported)
    starts: dict[Path, list[tuple[int, str]]] = {}
    for name, e in checkpoint.entries.items():
        starts.setdefault(e.file, []).append((e.start, name))
    for places in starts.values():
        places.sort()
    for file, t in checkpoint.gguf.file.tensors:
        how = (t.name, file.name, t.kind, t.shape, t.stop - t.start)
        places = starts.get(file, [])
        first, last = (bisect_left(places, (at, "")) for at in (t.start, t.stop))
        own = [name for _, name in places[first:last] if name in used]
        if own:
            becomes = dict.fromkeys(weight for name in own for weight in used[name])
            yield TensorFate(*how, "used", tuple(becomes), formats[own[0]])
        elif (use := use_of(checkpoint.gguf.file, t.name)) == "factors":
            tables = (n for n, x in ported.program.tensors.items() if x.role == "const" and "frequencies" in n)
            yield TensorFate(*how, "used", tuple(tables), "f32")
        else:
            held = (name.removeprefix("blocks of ") for _, name in places[first:last])
            why = next((ported.unused[name] for name in held if name in ported.unused), UNUSED[use])
            yield TensorFate(*how, "ignored", why=why)


def _tensors(checkpoint: Checkpoint, ported: Ported) -> Iterator[TensorFate]:
    """Yield a TensorFate for each tensor in the checkpoint's files.

    It says which weights the tensor becomes, or why it is ignored. ported: the Program that was made from the
    checkpoint.
    """
    used, formats = _uses(checkpoint, ported)
    whole = {part: name for name, coded in checkpoint.coded.items() for part in coded.parts}
    for name, e in sorted(checkpoint.entries.items()):
        how = (name, e.file.name, e.dtype, e.shape, e.stop - e.start)
        if name in used:
            yield TensorFate(*how, "used", tuple(dict.fromkeys(used[name])), formats[name])
            continue
        if ported.scales.get(name) and name not in ported.unused:
            yield TensorFate(*how, "used", ported.scales[name], "f32")
            continue
        why = ported.unused.get(name) or ported.unused.get(whole.get(name, ""))
        if not why and name.endswith("weight_shape"):
            why = "the shape of a packed matrix, which its codes and scales have too"
        if not why and whole.get(name, "").endswith(".order"):
            why = "the columns stand in the order of what they multiply"
        yield TensorFate(*how, "ignored", why=why or judge_tensor(checkpoint, name) or "part of a matrix not used")
    for name, e in checkpoint.found.copies:
        why = f"the same values stand in {checkpoint.entries[name].file.name}, which is read"
        yield TensorFate(name, e.file.name, e.dtype, e.shape, e.stop - e.start, "ignored", why=why)


def _groups(ported: Ported, checkpoint: Checkpoint, tensors: tuple[TensorFate, ...]) -> Iterator[Group]:
    """Yield a Group for each set of used tensors whose names differ only in numbers, such as layer numbers.

    The tensors of a Group have the same type and number format. The names of the weights made from them also differ
    only in numbers. If a weight is made of tensors in several groups, its bytes count in the first of these groups.
    tensors: reports on all tensors of the checkpoint.
    """
    sizes = {t.name: t.nbytes({}) for t in ported.program.of_role("weight")}
    count, size = Counter[tuple[str, str, str, str]](), Counter[tuple[str, str, str, str]]()
    for t in tensors:
        if t.fate != "used":
            continue
        key = (
            NUMBER.sub("*", t.name),
            t.dtype,
            ", ".join(dict.fromkeys(NUMBER.sub("*", b) for b in t.becomes)),
            t.format,
        )
        count[key] += 1
        size[key] += sum(sizes.pop(name, 0) for name in t.becomes)
    for (pattern, dtype, becomes, format), n in count.items():
        yield Group(pattern, n, dtype, becomes, format, size[pattern, dtype, becomes, format])


def _files(checkpoint: Checkpoint) -> Iterator[Fate]:
    """Yield a Fate for each file of the checkpoint: whether the file is used or ignored, and why."""
    path = checkpoint.path
    if not path.is_dir():
        for part in checkpoint.gguf.file.parts if checkpoint.gguf else (path,):
            yield Fate(part.name, "", "used", "holds the model")
        return
    read = {e.file.name for e in [*checkpoint.entries.values(), *(e for _, e in checkpoint.found.copies)]}
    for folder in sorted(f for f in path.iterdir() if f.is_dir() and f.name != TEMPLATES):
        yield Fate(f"{folder.name}/", "", "ignored", "a folder; nothing in it is read")
    for file in sorted(f for f in (path / TEMPLATES).glob("*") if f.is_file()):
        own = f"{TEMPLATES}/{file.name}"
        if file.suffix == ".jinja":
            yield Fate(own, "", "used", f"the chat template named {file.stem}")
        else:
            yield Fate(own, "", "ignored", "not a template: its name does not end in .jinja")
    for file in sorted(f for f in path.iterdir() if f.is_file()):
        name = file.name
        if name in read:
            yield Fate(name, "", "used", "holds tensors of the model")
        elif name == checkpoint.found.said_by:
            yield Fate(name, "", "used", "says which files hold the model")
        elif name in ("config.json", checkpoint.quantised_by.split(":")[0]):
            yield Fate(name, "", "used", "describes the model")
        elif name in FILES and not (name == "tokenizer.model" and (path / "tokenizer.json").exists()):
            yield Fate(name, "", "used", FILES[name])
        elif name in BESIDE:
            yield Fate(
                name, "", "ignored", f"{checkpoint.quantised_by or 'nothing here'} says how weights are quantised"
            )
        elif name == INDEX:
            yield Fate(name, "", "ignored", f"{SINGLE} holds the whole model, and is read first, as in transformers")
        else:
            why = next((why for pattern, why in OTHER_FILES if re.search(pattern, name)), "not a file of the model's")
            yield Fate(name, "", "ignored", why)
