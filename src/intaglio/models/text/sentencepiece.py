"""Reads a SentencePiece model (tokenizer.model) and rebuilds its tokenizer with the `tokenizers` library.

BPE and Unigram models. The file is a protobuf; its fields are those of sentencepiece_model.proto. Encoding follows the
model's own settings (normalisation, white space, user-defined pieces), as SentencePiece's own encoder does.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

NAME = "tokenizer.model"
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5  # protobuf's wire types
LLAMA = (  # classes of transformers in which text after an added token has no prefix
    "LlamaTokenizer",
    "CodeLlamaTokenizer",
    "GemmaTokenizer",
    "Phi3Tokenizer",
)
RENUMBERED = {  # classes of transformers whose ids are not the pieces' own, or that change the text
    "Albert", "Barthez", "BertGeneration", "BigBird", "Camembert", "Cpm", "DebertaV2", "ErnieM", "FNet", "GPTSw3",
    "LayoutXLM", "M2M100", "MBart", "MBart50", "MLuke", "Marian", "Nllb", "Pegasus", "Plbart", "Reformer", "RemBert",
    "SeamlessM4T", "Speech2Text", "T5", "Udop", "XGLM", "XLMProphetNet", "XLMRoberta", "XLNet",
}  # fmt: skip


class SentencePieceError(ValueError):
    """Raised for a file that is not a SentencePiece model, and for a model or tokenizer class that is not supported."""


@dataclass(frozen=True)
class SentencePiece:
    """Contents of a SentencePiece model file.

    Attributes:
        pieces: text of each piece, by id.
        scores: score of each piece, by id.
        kinds: type of each piece, by id, such as CONTROL.
        trainer: {field number: value} of the file's TrainerSpec.
        normalizer: {field number: value} of the file's NormalizerSpec.
    """

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    trainer: Mapping[int, Any]
    normalizer: Mapping[int, Any]

    @property
    def kind(self) -> int:
        return int(self.trainer.get(3, UNIGRAM))

    @property
    def byte_fallback(self) -> bool:
        return bool(self.trainer.get(35, 0))

    @property
    def dummy_prefix(self) -> bool:
        """True if the model puts a space in front of a text."""
        return bool(self.normalizer.get(3, 1))

    @property
    def special(self) -> dict[str, str]:
        """A dict with the texts of unk_token, bos_token and eos_token.

        A key is missing if the model has no such piece.
        """
        out = {}
        for name, number, usual in (("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2)):
            id = _signed(self.trainer.get(number, usual))
            if 0 <= id < len(self.pieces):
                out[name] = self.pieces[id]
        return out

    def of_kind(self, kind: int) -> list[str]:
        return [p for p, k in zip(self.pieces, self.kinds, strict=True) if k == kind]


def read_model(path: Path) -> SentencePiece:
    """Read a SentencePiece model file. Returns a SentencePiece.

    Raises SentencePieceError if the file is not a SentencePiece model, or if its kind is neither BPE nor Unigram.
    """
    data = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", data[:400]):
        raise SentencePieceError(f"{path} is a tiktoken file, not a SentencePiece model: download tokenizer.json")
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                own = dict(_fields(value))
                pieces.append(own.get(1, b"").decode())
                scores.append(float(own.get(2, 0.0)))
                kinds.append(int(own.get(3, NORMAL)))
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(_fields(value))
    except (IndexError, ValueError, TypeError, AttributeError, struct.error):
        pieces = []
    if not pieces or len(set(pieces)) < len(pieces):
        raise SentencePieceError(f"{path} is no SentencePiece model, or a damaged one; download it again")
    model = SentencePiece(pieces, scores, kinds, trainer, normalizer)
    if model.kind not in (UNIGRAM, BPE):
        raise SentencePieceError(
            f"{path} is a SentencePiece model of words or characters (model_type {model.kind}); BPE and Unigram are "
            "read"
        )
    return model


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) for each field of a protobuf message. A value is an int, a float or bytes.

    Raises ValueError, IndexError or struct.error if `data` is not a message.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif wire == FLOAT:
            yield number, struct.unpack_from("<f", data, at)[0]
            at += 4
        elif wire == DOUBLE:
            yield number, struct.unpack_from("<d", data, at)[0]
            at += 8
        elif wire == BYTES:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field reaches beyond the end")
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns (the protobuf varint that begins at data[at], the position after it), two ints.

    A varint is an integer of variable length: each byte has seven bits of it, the lowest bits first.
    """
    value, shift = 0, 0
    while True:
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
        shift += 7


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def build_tokenizer(model: SentencePiece, config: Mapping[str, Any]) -> Tokenizer:
    """Returns a tokenizer of the `tokenizers` library that splits text as a SentencePiece model does.

    Args:
        model: the SentencePiece model.
        config: tokenizer_config.json. Two keys are read besides the class. `added_tokens_decoder` gives other texts to
            some pieces, such as unused ones. `legacy` says where a space is put: if true, in front of each run of text
            between added tokens; if false, only in front of the first run, unless the run begins with a space. Without
            `legacy`, it is false for the tokenizer classes in LLAMA and true for others, as in transformers 5.

    Raises SentencePieceError for a tokenizer class whose token ids are not the numbers of the pieces.
    """
    named = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if named.removesuffix("Tokenizer") in RENUMBERED:
        raise SentencePieceError(
            f"{NAME} alone does not say the ids of a {named}; convert it with transformers' AutoTokenizer and "
            "save_pretrained()"
        )
    llama = named in LLAMA
    legacy = bool(config.get("legacy", not llama))
    pieces = _renamed(model, config)
    user = [pieces[i] for i, kind in enumerate(model.kinds) if kind == USER_DEFINED]
    split = [] if llama else user
    inner = Tokenizer(_model(model, pieces, bool(split)))
    inner.normalizer = _normalizer(model, prepend=legacy and not llama)
    steps: list[pre_tokenizers.PreTokenizer] = []
    if model.dummy_prefix and (llama or not legacy):
        steps.append(pre_tokenizers.Metaspace(SPACE, "always" if legacy else "first", split=False))
    if split:  # SentencePiece never merges them with others
        longest = sorted(split, key=len, reverse=True)
        steps.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, longest))), "isolated"))
    if steps:
        inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    control = [pieces[i] for i, kind in enumerate(model.kinds) if kind == CONTROL]
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    if llama:
        inner.add_tokens([AddedToken(t, normalized=False) for t in user])
    return inner


def surround(inner: Tokenizer, special: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Make the tokenizer `inner` put bos before each text, eos after it, or both, as the config asks.

    Returns nothing.

    Args:
        inner: the tokenizer; changed in place.
        special: the texts of the special tokens; the keys bos_token and eos_token are read.
        config: tokenizer_config.json. bos is added if add_bos_token is true, eos if add_eos_token is true.
    """
    ends = [special.get(name) if config.get(f"add_{name}") else None for name in ("bos_token", "eos_token")]
    used = [(t, i) for t in dict.fromkeys(ends) if t is not None and (i := inner.token_to_id(t)) is not None]
    if not used:
        return
    known = dict(used)
    first, last = (t if t in known else None for t in ends)
    single = [*([first] if first else []), "$A", *([last] if last else [])]
    double = [*single, *([f"{first}:1"] if first else []), "$B:1", *([f"{last}:1"] if last else [])]
    inner.post_processor = processors.TemplateProcessing(single=single, pair=double, special_tokens=used)


def _renamed(model: SentencePiece, config: Mapping[str, Any]) -> list[str]:
    """Returns a list of the texts of the model's pieces, by id, after the changes in added_tokens_decoder.

    The config may give other texts to some pieces, such as unused ones.

    model: the SentencePiece model. config: contents of tokenizer_config.json.
    """
    pieces = list(model.pieces)
    for id, token in (config.get("added_tokens_decoder") or {}).items():
        text = token.get("content") if isinstance(token, Mapping) else None
        if isinstance(text, str) and str(id).isdigit() and int(id) < len(pieces) and text not in pieces:
            pieces[int(id)] = text
    return pieces


def _model(model: SentencePiece, pieces: list[str], whole: bool) -> models.Model:
    """Returns the BPE or Unigram model of the `tokenizers` library for a SentencePiece model.

    Args:
        model: the SentencePiece model.
        pieces: text of each piece, by id.
        whole: BPE only: True if a pre-token that is itself a piece becomes that piece without merging (ignore_merges).
    """
    if model.kind == UNIGRAM:
        unknown = int(model.trainer.get(40, 0))
        return models.Unigram([*zip(pieces, model.scores, strict=True)], unknown, model.byte_fallback)
    normal = {pieces[i]: i for i, kind in enumerate(model.kinds) if kind == NORMAL}
    merges = []
    for token, i in normal.items():
        for at in range(1, len(token)):
            if token[:at] in normal and token[at:] in normal:
                merges.append((-model.scores[i], i, token[:at], token[at:]))
    return models.BPE(
        vocab={t: i for i, t in enumerate(pieces)}, merges=[(m[2], m[3]) for m in sorted(merges)],
        unk_token=model.special.get("unk_token"), fuse_unk=True, byte_fallback=model.byte_fallback, ignore_merges=whole,
    )  # fmt: skip


def _normalizer(model: SentencePiece, prepend: bool) -> normalizers.Normalizer:
    """Returns a Normalizer of the `tokenizers` library with the steps of SentencePiece.

    The steps are the character map, the treatment of spaces, and a space before the text.

    model: the SentencePiece model. prepend: False to put no space before the text even if the model asks for one.
    """
    steps: list[normalizers.Normalizer] = []
    if charsmap := model.normalizer.get(2):
        steps.append(normalizers.Precompiled(charsmap))
    if model.normalizer.get(4, 1):  # remove_extra_whitespaces: of spaces alone
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.normalizer.get(5, 1):  # escape_whitespaces
        steps.append(normalizers.Replace(" ", SPACE))
    if model.dummy_prefix and prepend:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence(steps)
