"""Rebuilds the tokenizer in a GGUF file's metadata with the `tokenizers` library.

Byte-level BPE, SentencePiece's BPE and Unigram, and WordPiece. Defaults for missing metadata are those of llama.cpp
(src/llama-vocab.cpp).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from intaglio.models.config import CheckpointError
from intaglio.models.files.gguf import GgufFile
from intaglio.models.text.embedded.splits import SPLITS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "▁"
IDS = {  # tokenizer_config.json's names, and llama.cpp's
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding",
    "cls_token": "cls", "mask_token": "mask",
}  # fmt: skip
ENDS = (  # tokens that end a turn or a text, whatever the file says of them
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<turn|>", "<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
HARMONY = ("<|return|>", "<|call|>", "<|end|>")  # where all are, the last ends a message only


@dataclass(frozen=True)
class Embedded:
    """A tokenizer that was rebuilt from the metadata of a GGUF file.

    Attributes:
        inner: the tokenizer of the `tokenizers` library.
        special: {name of a special token, such as bos_token: its text}.
        templates: {name: chat template}; the template without a name in the file is named "default".
        bos_id: id of the beginning-of-sequence token, or None.
        eos_ids: ids of the tokens that end a sequence.
    """

    inner: Tokenizer
    special: Mapping[str, str]
    templates: Mapping[str, str]
    bos_id: int | None
    eos_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Vocabulary:
    """The vocabulary of a GGUF file.

    Attributes:
        path: the file.
        tokens: text of each token, by id.
        kinds: type of each token, by id, such as CONTROL.
        scores: score of each token, by id.
        get: function get(key, default) that returns a tokenizer's metadata value. The key is llama.cpp's without
            "tokenizer.ggml.".
    """

    path: Path
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    get: Callable[..., Any]

    def of_kind(self, *kinds: int) -> dict[str, int]:
        return {t: i for i, (t, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)) if kind in kinds}

    @property
    def known(self) -> dict[str, int]:
        """The vocabulary as {token: id}, without the unused tokens that only pad the embedding matrix."""
        return {t: i for i, (t, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)) if kind != UNUSED}

    def id(self, name: str, default: int | None = None) -> int | None:
        value = self.get(f"{name}_token_id", default)
        return None if value is None or not 0 <= int(value) < len(self.tokens) else int(value)


@lru_cache(maxsize=2)
def read_tokenizer(file: GgufFile) -> Embedded | None:
    """Rebuild the tokenizer of a GGUF file.

    Returns an Embedded (tokenizer with special tokens); None if the file has none. Raises CheckpointError if this kind
    of tokenizer is not supported, or if its metadata are damaged.
    """

    def get(key: str, default: Any = None) -> Any:
        return file.get(f"tokenizer.ggml.{key}", default)

    tokens, model = get("tokens"), str(get("model", "none"))
    if not tokens or model in ("none", "no_vocab"):
        return None
    build = _BUILD.get(model)
    if build is None:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model {model!r} is not read; known are {', '.join(_BUILD)}; put the model's "
            "tokenizer.json into the file's folder and give the folder"
        )
    tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(tokens)]
    kinds, scores = get("token_type", [NORMAL] * len(tokens)), get("scores", [0.0] * len(tokens))
    if len(set(tokens)) < len(tokens) or not len(tokens) == len(kinds) == len(scores):
        raise CheckpointError(
            f"{file.path}: {len(tokens)} tokens, of which {len(set(tokens))} differ, with {len(kinds)} types and "
            f"{len(scores)} scores; the file is damaged, download it again"
        )
    v = _Vocabulary(file.path, tokens, kinds, scores, get)
    inner = build(v)
    _add_tokens(inner, v, file.architecture)
    special = {name: tokens[i] for name, key in IDS.items() if (i := v.id(key)) is not None}
    return Embedded(inner, special, _templates(file), v.id("bos"), _ends(v))


def _add_tokens(inner: Tokenizer, v: _Vocabulary, architecture: str) -> None:
    """Add the file's control tokens and user-defined tokens to `inner`. They are found in a text before it is split.

    Returns nothing.

    Args:
        inner: the tokenizer.
        v: the file's vocabulary.
        architecture: llama.cpp's name of the model architecture. In phi2 and phi3, a control token also takes the white
            space after it.
    """
    strips = architecture in ("phi3", "phi2")  # their tokens swallow the white space after them; the flag is not kept
    kept = ("<unk>", "<s>", "<|endoftext|>")
    control = v.of_kind(CONTROL)
    inner.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=strips and t not in kept) for t in control]
    )
    inner.add_tokens([AddedToken(t, normalized=False) for t in v.of_kind(USER_DEFINED)])


def _templates(file: GgufFile) -> dict[str, str]:
    named = {"default": file.get("tokenizer.chat_template")}
    named |= {n: file.get(f"tokenizer.chat_template.{n}") for n in file.get("tokenizer.chat_templates") or []}
    return {name: template for name, template in named.items() if template}


def _ends(v: _Vocabulary) -> tuple[int, ...]:
    """Returns a tuple of the ids of the tokens that end a sequence; () if there are none.

    They are the tokens that the file names as eos, eot and eom, and its control tokens in the table ENDS, such as
    <|im_end|>. If the file has <|end|>, <|return|> and <|call|> (gpt-oss), <|end|> is not taken from ENDS, since there
    it only ends a message.
    """
    named = [i for name in ("eos", "eot", "eom") if (i := v.id(name)) is not None]
    control = v.of_kind(CONTROL)
    found = [control[t] for t in ENDS if t in control]
    if all(t in control for t in HARMONY):
        found.remove(control[HARMONY[-1]])
    return tuple(dict.fromkeys([*named, *found]))


def _bpe(v: _Vocabulary) -> Tokenizer:
    """Returns a byte-level BPE tokenizer (the kind of GPT-2) made from the file's tokens and merges.

    The key tokenizer.ggml.pre says how text is split before merging. If the file lacks it, the default split is used
    and a warning is issued. Raises CheckpointError if the key has an unknown value, or if the file has no merges.
    """
    name = v.get("pre")
    if name is None:
        warnings.warn(
            f"{v.path} does not say how text is split (tokenizer.ggml.pre); tokens may differ from the model's own. "
            "Use a file of 2024 or later",
            stacklevel=6,
        )
    own = SPLITS.get(str(name or "default"))
    if own is None:
        raise CheckpointError(
            f"{v.path}: tokenizer.ggml.pre {name!r} is not read; known are {', '.join(sorted(SPLITS))}; put the "
            "model's tokenizer.json into the file's folder and give the folder"
        )
    model = models.BPE(vocab=v.known, merges=_merges(v), ignore_merges=own.whole)
    inner = Tokenizer(model)
    if normalizer := own.normalizer():
        inner.normalizer = normalizer
    inner.pre_tokenizer, inner.decoder = own.pre_tokenizer(), decoders.ByteLevel()
    return _with_ends(inner, v, bos=own.whole and not str(name).startswith("glm"))


def _merges(v: _Vocabulary) -> list[tuple[str, str]]:
    """Returns a list of the file's BPE merges, pairs (left text, right text), best first.

    Raises CheckpointError if the file has none.
    """
    merges = v.get("merges")
    if merges is None:
        raise CheckpointError(f"{v.path} holds a vocabulary without tokenizer.ggml.merges; use another conversion")
    return [(m[: (at := m.index(" ", 1))], m[at + 1 :]) for m in merges]


def _gemma4(v: _Vocabulary) -> Tokenizer:
    """Returns the BPE tokenizer of Gemma 4, which splits text into characters and joins them by the file's own merges.

    Raises CheckpointError if the file has no merges.
    """
    return _sentencepiece(v, _merges(v))


def _sentencepiece(v: _Vocabulary, merges: list[tuple[str, str]] | None = None) -> Tokenizer:
    """Returns a SentencePiece BPE tokenizer made from the file's tokens.

    If the vocabulary has byte tokens, a character without a token becomes the tokens of its bytes.

    v: the file's vocabulary. merges: BPE merges, best first; None: they are computed from the tokens' scores.
    """
    known = v.known
    unknown = v.id("unknown", 0)
    merges = merges_of(known, v.scores) if merges is None else merges
    model = models.BPE(
        vocab=known, merges=merges, unk_token=None if unknown is None else v.tokens[unknown], fuse_unk=True,
        byte_fallback=bool(v.of_kind(BYTE)),
    )  # fmt: skip
    prefix = bool(v.get("add_space_prefix", True))
    inner = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return _with_ends(inner, v, bos=True, default_bos=1)


def merges_of(known: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Returns the BPE merges of a SentencePiece vocabulary: a list of pairs (left text, right text), best first.

    There is a merge for every split of a token into two tokens. Merges are ordered by the score of the whole token.
    With equal scores, the merge with the longest left part comes first, then the merge with the longest right part.

    known: {token: id}. scores: score of each token, by id.
    """
    found = []
    for token, i in known.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in known and right in known:
                found.append((-scores[i], -len(left), -len(right), i, known[left], known[right], left, right))
    return [(m[-2], m[-1]) for m in sorted(found)]


def _unigram(v: _Vocabulary) -> Tokenizer:
    """Returns a SentencePiece Unigram tokenizer made from the file's tokens, scores and normalisation rules."""
    unknown = v.id("unknown", 2)
    inner = Tokenizer(
        models.Unigram([*zip(v.tokens, map(float, v.scores), strict=True)], unknown, bool(v.of_kind(BYTE)))
    )
    steps: list[normalizers.Normalizer] = []
    words: list[pre_tokenizers.PreTokenizer] = []
    if charsmap := v.get("precompiled_charsmap"):
        steps.append(normalizers.Precompiled(bytes(c & 255 for c in charsmap)))
    if v.get("remove_extra_whitespaces", False):
        words.append(pre_tokenizers.WhitespaceSplit())
    inner.normalizer = normalizers.Sequence(steps)
    scheme = "always" if v.get("add_space_prefix", True) else "never"
    inner.pre_tokenizer = pre_tokenizers.Sequence([*words, pre_tokenizers.Metaspace(SPACE, scheme)])
    inner.decoder = decoders.Metaspace(SPACE, scheme)
    return _with_ends(inner, v, bos=False, eos=True, default_eos=1)


def _wordpiece(v: _Vocabulary) -> Tokenizer:
    """Returns a WordPiece tokenizer (the kind of BERT) made from the file's tokens.

    GGUF marks the first piece of a word with U+2581. In the result, as in BERT, all other pieces begin with "##".
    """

    def piece(token: str, kind: int) -> str:
        if kind in (CONTROL, UNKNOWN, UNUSED) or (token.startswith("[") and token.endswith("]")):
            return token
        return token.removeprefix(SPACE) if token.startswith(SPACE) else f"##{token}"

    known = {piece(t, kind): i for i, (t, kind) in enumerate(zip(v.tokens, v.kinds, strict=True))}
    unknown = v.id("unknown", 100)
    inner = Tokenizer(models.WordPiece(known, unk_token=v.tokens[unknown if unknown is not None else 100]))
    lower = bool(v.get("normalizer.lowercase", True))
    inner.normalizer = normalizers.BertNormalizer(
        lowercase=lower, strip_accents=bool(v.get("normalizer.strip_accents", lower))
    )
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    first, last = v.id("cls", v.get("bos_token_id", 101)), v.id("seperator", 102)
    if first is not None and last is not None:
        _surround(inner, v, first, last)
    return inner


def _with_ends(
    inner: Tokenizer, v: _Vocabulary, bos: bool, eos: bool = False, default_bos: int | None = None,
    default_eos: int | None = None,
) -> Tokenizer:  # fmt: skip
    """Make the tokenizer `inner` put bos before each text and eos after it, if the file wants that. Returns `inner`.

    Args:
        inner: the tokenizer; changed in place.
        v: the file's vocabulary. Its keys add_bos_token and add_eos_token say what is added.
        bos: True to add bos if the file has no add_bos_token.
        eos: True to add eos if the file has no add_eos_token.
        default_bos: id of bos if the file names no bos. None: without a bos in the file, no bos is added.
        default_eos: id of eos if the file names no eos. None: without an eos in the file, no eos is added.
    """
    first = v.id("bos", default_bos) if v.get("add_bos_token", bos) else None
    last = v.id("eos", default_eos) if v.get("add_eos_token", eos) else None
    _surround(inner, v, first, last)
    return inner


def _surround(inner: Tokenizer, v: _Vocabulary, first: int | None, last: int | None) -> None:
    ends = [("$A" if i is None else v.tokens[i], i) for i in (first, last)]
    if first is None and last is None:
        return
    used = [(t, i) for t, i in dict.fromkeys(ends) if i is not None]
    single = [*([ends[0][0]] if first is not None else []), "$A", *([ends[1][0]] if last is not None else [])]
    double = [*single[: -1 if last is not None else None], "$B:1", *([f"{ends[1][0]}:1"] if last is not None else [])]
    inner.post_processor = processors.TemplateProcessing(single=single, pair=double, special_tokens=used)


_BUILD = {"gpt2": _bpe, "llama": _sentencepiece, "gemma4": _gemma4, "t5": _unigram, "bert": _wordpiece}
