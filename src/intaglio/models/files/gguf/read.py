"""Reads a GGUF file as a checkpoint: its config, and its tensors by transformers' names."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.models.config import CheckpointError, PortError
from intaglio.models.files.gguf.architectures import ARCHITECTURES, PROJECTIONS, REFUSED, Architecture
from intaglio.models.files.gguf.file import GgufFile, open_gguf
from intaglio.models.files.gguf.header import Tensor
from intaglio.models.files.gguf.keys import KeyFate, judge_keys
from intaglio.models.files.gguf.metadata import Metadata
from intaglio.models.files.gguf.tensors import Place, Tables, place_of, summed

FACTORS = {"rope_freqs": "freqs", "rope_factors_long": "long", "rope_factors_short": "short"}
SUFFIXES = ("weight", "bias", "scale")
UNNAMED = (  # whose names have no `.weight` or `.bias` after them
    "e_score_correction_bias", "expert_bias", "sinks", "sink_bias", "layer_scalar", "A_log", ".D", "dt_bias",
    "correct_output_scale",
)  # fmt: skip
EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d+)")  # old files keep a mixture's matrices one by one
DERIVED = ("attn_rot_embd",)  # frequencies that follow from the metadata
WORTH = 1 << 30  # bytes: a file that takes so much more in memory is worth a warning


@dataclass(frozen=True)
class GgufModel:
    """A model that was read from a GGUF file, which may be split into several files.

    Attributes:
        file: the open file.
        config: the model's settings in the form of config.json.
        tables: the model's tensors, under the names that they have in transformers.
        keys: for each metadata key, whether it was used or ignored, and why.
    """

    file: GgufFile
    config: dict[str, Any]
    tables: Tables
    keys: tuple[KeyFate, ...]


def read_gguf(path: Path) -> GgufModel:
    """Reads a GGUF file, and the other files of a split model. Returns a GgufModel: config, tensors and report of keys.

    Raises CheckpointError for a damaged or incomplete file. Raises PortError for an architecture or a tensor that is
    not supported.

    path: the file, or the first file of a split model.
    """
    file = open_gguf(path)
    own = ARCHITECTURES.get(file.architecture)
    if why := REFUSED.get(file.architecture):
        raise PortError(f"{path}: architecture {file.architecture!r} is not read: {why}")
    if own is None:
        known = ", ".join(ARCHITECTURES)
        raise PortError(f"{path}: architecture {file.architecture!r} is not read; known are {known}")
    reader = _Reader(file, own.variant({part_of(t.name) for _, t in file.tensors}))
    for part, t in file.tensors:
        reader.add(part, t)
    if "model.embed_tokens.weight" not in reader.tables.names:
        raise CheckpointError(f"{path} has no token_embd.weight; it holds no whole model")
    reader.join_latent()
    if reader.meta.get("attention.causal") is False:
        raise PortError(f"{path}: {file.architecture}.attention.causal=False is not ported: attention is causal here")
    config = own.describe(reader.meta)
    if reader.meta.factors and "longrope" not in str((config.get("rope_scaling"), config.get("rope_parameters"))):
        raise PortError(
            f"{path}: the port of {file.architecture!r} has no rope with frequency factors; the file has them in "
            "rope_freqs or rope_factors_long, and they would be left unused"
        )
    config |= _special(file)
    _note_cost(file)
    return GgufModel(file, config, reader.tables, tuple(judge_keys(file, reader.meta.seen)))


def use_of(file: GgufFile, name: str) -> str:
    """Returns one of three words that says what a tensor is for. Call it only for a tensor that is not a weight.

    - "factors": the tensor holds frequency factors of rope.
    - "derived": its values follow from the metadata.
    - "ahead": it belongs to a multi-token-prediction layer. Any other name gives this word, too.

    name: the tensor's name in the file.
    """
    if part_of(name) in FACTORS:
        return "factors"
    return "derived" if part_of(name) in DERIVED else "ahead"


def part_of(name: str) -> str:
    """Returns a tensor's name in llama.cpp without the prefix blk.N and without the suffix .weight, .bias or .scale.

    name: the name in the file. blk.3.attn_q.weight gives attn_q.
    """
    words = name.split(".")
    return ".".join(words[2 if words[0] == "blk" else 0 : -1 if words[-1] in SUFFIXES else None])


class _Reader:
    """Adds the tensors of a GGUF file one by one to `tables`, under transformers' names.

    For the tensor kv_b_proj of latent attention, a GGUF file has two tensors, one for keys and one for values. Their
    places are kept in `halves` until join_latent() adds kv_b_proj.
    """

    def __init__(self, file: GgufFile, own: Architecture) -> None:
        self.file, self.own, self.tables = file, own, Tables()
        self.meta = Metadata(file, self.tables, {})
        self.halves: dict[str, Place] = {}  # of kv_b_proj, by layer and k or v

    def add(self, part: Path, t: Tensor) -> None:
        words = t.name.split(".")
        in_layer = words[0] == "blk"
        if in_layer and not (len(words) > 2 and words[1].isascii() and words[1].isdecimal()):
            raise CheckpointError(
                f"{part}: tensor {t.name!r} has no layer number; wanted a name such as blk.0.attn_q.weight: the file "
                "is damaged, download it again"
            )
        if in_layer and int(words[1]) >= self.meta.layers:
            return  # predictors of tokens further ahead
        at = f"model.layers.{words[1]}." if in_layer else ""
        own, suffix = part_of(t.name), words[-1] if words[-1] in SUFFIXES else "weight"
        if own in FACTORS:
            self.meta.factors[FACTORS[own]] = np.fromfile(part, "<f4", t.shape[0], offset=t.start).tolist()
        elif own in ("attn_k_b", "attn_v_b"):
            self.halves[f"{at}{own[5]}"] = place_of(self.file.path, part, t)
        elif own not in DERIVED:
            self._add(at, own, suffix, place_of(self.file.path, part, t), t.name)

    def _add(self, at: str, own: str, suffix: str, p: Place, full: str) -> None:
        match = EXPERT.fullmatch(own)
        name = self.own.name(f"ffn_{match[1]}_exps" if match else own)
        if suffix == "scale" and (whole := self.own.scales.get(own)):
            self.tables.add(at + whole, p)
            return
        if name is None and own == "attn_qkv":
            self._add_rows(at, ("attn_q", "attn_k", "attn_v"), suffix, p, self._widths(at), full)
        elif name is None and own == "ffn_gate_up_exps":
            self._add_gate_up(at, suffix, p, full)
        elif name is None:
            raise PortError(
                f"{self.file.path}: tensor {full} belongs to nothing that the port of "
                f"{self.file.architecture!r} has; it would be left unused"
            )
        elif match:
            self.tables.add(f"{at}{name.format(e=match[2])}.{suffix}", p)
        elif "{e}" in name:
            self._add_experts(f"{at}{name}", suffix, p, full)
        else:
            self._add_one(at + name, own, suffix, p)

    def _add_one(self, name: str, own: str, suffix: str, p: Place) -> None:
        meta, heads = self.meta, 0
        if self.own.permuted and own in ("attn_q", "attn_k"):
            heads = meta.heads if own == "attn_q" else meta.kv_heads
        if name.endswith("shared_expert_gate"):
            p = p.cut(0, (1, p.shape[-1]))
        elif own == "shortconv.conv" and suffix == "weight":  # a channel's taps, as PyTorch keeps them
            p = p.cut(0, (p.shape[0], 1, p.shape[-1]))
        norm = own.endswith("norm") and own != "ssm_norm" and suffix == "weight"
        full = name if name.endswith(UNNAMED) else f"{name}.{suffix}"
        if change := self.own.changes.get(own):
            change(self.tables, meta, full, p)
            return
        self.tables.add(full, p, heads, self.own.shift if norm else 0.0)

    def _add_experts(self, name: str, suffix: str, p: Place, full: str) -> None:
        """Add one weight tensor per expert to `tables`. The file stores the weights of all experts as one tensor.

        The biases of all experts stay one tensor, whose name ends with _bias. Returns nothing.

        Args:
            name: name in transformers, with {e} for the expert's number and without suffix.
            suffix: weight or bias.
            p: where the file has the weights [experts, rows, columns], or the biases.
            full: name of the stored tensor, for errors.

        Raises PortError for another suffix, and for weights that do not have 3 dimensions.
        """
        if suffix == "bias":
            head, _, own = name.partition("{e}.")
            self.tables.add(f"{head}{own}_bias", p)
            return
        if suffix != "weight" or len(p.shape) != 3:
            raise PortError(
                f"{self.file.path}: tensor {full} is {list(p.shape)}; of experts in one tensor, weights with 3 "
                "dimensions and biases are read"
            )
        each = p.shape[1:]
        for e in range(p.shape[0]):
            self.tables.add(f"{name.format(e=e)}.{suffix}", p.cut(e * each[0], each))

    def _add_gate_up(self, at: str, suffix: str, p: Place, full: str) -> None:
        """Add two tensors per expert, gate and up, to `tables`. The file stores those of all experts as one tensor.

        In the stored tensor, each expert has its rows of gate, then its rows of up. Returns nothing.

        Args:
            at: prefix of the new tensors' names.
            suffix: last part of the new tensors' names, such as weight.
            p: where the file has the stored tensor.
            full: name of the stored tensor, for errors.

        Raises PortError if the architecture has no experts, or if the stored tensor does not have 3 dimensions (biases
        have 2).
        """
        if len(p.shape) != 3:
            raise PortError(
                f"{self.file.path}: tensor {full} is {list(p.shape)}; gate and up of experts in one tensor are read as "
                "matrices only, with 3 dimensions"
            )
        count, rows, columns = p.shape
        for i, n in enumerate(PROJECTIONS[:2]):
            name = self.own.name(f"ffn_{n}_exps")
            if name is None:
                raise PortError(f"{self.file.path}: {self.file.architecture!r} has no experts")
            for e in range(count):
                own = p.cut(e * rows + i * (rows // 2), (rows // 2, columns))
                self.tables.add(f"{at}{name.format(e=e)}.{suffix}", own)

    def _widths(self, at: str) -> tuple[int, int, int]:
        """Returns three ints: the numbers of rows of the matrices q, k and v of a layer.

        The first is 0 if the metadata do not state the width of a head.

        at: prefix of the layer's names, such as model.layers.3.
        """
        meta, layer = self.meta, int(at.split(".")[2])
        key, kv = meta.whole("attention.key_length", 0), meta.kv_heads_by_layer[layer]
        return (meta.heads * key, kv * key, kv * (meta.whole("attention.value_length", 0) or key))

    def _add_rows(
        self, at: str, parts: tuple[str, ...], suffix: str, p: Place, widths: tuple[int, ...], full: str
    ) -> None:
        """Add several matrices that the file stores as one tensor, such as q, k and v.

        The tensor has the rows of the first matrix, then the rows of the second, and so on. Returns nothing.

        Args:
            at: prefix of the matrices' names in transformers.
            parts: llama.cpp's names of the matrices, in their order in the stored tensor.
            suffix: weight or bias.
            p: where the file has the stored tensor.
            widths: number of rows of each matrix. If the first is 0, all numbers are computed from the numbers of
                heads.
            full: name of the stored tensor, for the error.

        Raises CheckpointError if the sum of `widths` is not the number of rows of the stored tensor.
        """
        if not widths[0]:  # no key_length: heads share the embedding's width
            head = p.shape[0] // (self.meta.heads + 2 * self.meta.kv_heads)
            widths = (self.meta.heads * head, *(self.meta.kv_heads * head,) * 2)
        if sum(widths) != p.shape[0]:
            raise CheckpointError(f"{self.file.path}: {full} has {p.shape[0]} rows; heads make it {sum(widths)}")
        first = 0
        for part, width in zip(parts, widths, strict=True):
            name = self.own.name(part)
            assert name
            own = p.cut(first, (width, *p.shape[1:])) if len(p.shape) > 1 else _run(p, first, width)
            self._add_one(at + name, part, suffix, own)
            first += width

    def join_latent(self) -> None:
        """Add the tensor kv_b_proj of each layer with latent attention to `tables`. Does nothing for other models.

        The tensor is [heads * (nope + v), rank]: for each head, `nope` rows of keys, then `v` rows of values. The file
        stores the keys as [heads, rank, nope] and the values as [heads, v, rank], so the keys are transposed. Call it
        once, after all tensors have been added. Raises CheckpointError if the keys or the values of a layer are
        missing.
        """
        for at in dict.fromkeys(key[:-1] for key in self.halves):
            keys, values = self.halves.get(f"{at}k"), self.halves.get(f"{at}v")
            if keys is None or values is None:
                raise CheckpointError(
                    f"{self.file.path}: {at}self_attn has only one of attn_k_b and attn_v_b; the file is not complete, "
                    "download it again"
                )
            heads, rank, nope = keys.shape
            rows = nope + values.shape[1]

            def join(parts: list[np.ndarray], shape: tuple[int, ...] = (heads * rows, rank)) -> np.ndarray:
                return np.concatenate([parts[0].swapaxes(1, 2), parts[1]], axis=1).reshape(shape)

            self.tables.add_joined(f"{at}self_attn.kv_b_proj.weight", (keys, values), (heads * rows, rank), join)


def _run(p: Place, first: int, count: int) -> Place:
    """Returns the Place of a part of a vector: `count` consecutive values.

    A Place says where a file has a tensor: file, offset, type and shape. p: the Place of the whole vector. first: index
    in the vector of the part's first value.
    """
    each = p.row_bytes // prod(p.shape)
    return Place(p.file, p.kind, (count,), p.start + first * each)


def _special(file: GgufFile) -> dict[str, Any]:
    """Returns a dict of special token ids, with the keys bos_token_id, pad_token_id and eos_token_id of config.json.

    The first two are ints; the last is a list of the ids that end a sequence, a turn or a message. A key is missing if
    the file has no such token.
    """
    ends = (file.get(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot", "eom"))
    eos = list(dict.fromkeys(int(i) for i in ends if i is not None))
    bos, pad = (file.get(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "padding"))
    known = {"bos_token_id": bos, "pad_token_id": pad, "eos_token_id": eos or None}
    return {key: value for key, value in known.items() if value is not None}


def _note_cost(file: GgufFile) -> None:
    """Issue a warning if the model takes over 1 GiB more in memory than in its file, because tensors become bf16.

    Tensors of some quantised types are converted to bf16 when they are read. Returns nothing.
    """
    stored, held = summed(file.types)
    if held - stored > WORTH:
        kinds = ", ".join(sorted(kind for kind in file.types if summed({kind: 1})[1]))
        warnings.warn(
            f"{file.path}: matrices of type {kinds} become bf16, {held / 1e9:.1f} GB in memory instead of "
            f"{stored / 1e9:.1f} in the file; with weights int8 or int4 they are quantised anew",
            stacklevel=4,
        )
