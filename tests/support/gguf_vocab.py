"""Tokenizers of every kind that GGUF files hold: trained on random text, written as llama.cpp's converters do.

Each comes with the tokenizer that it must equal: transformers' own class, or the pre-tokenizer that the model's
tokenizer.json has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

RANGES = (  # ten scripts
    (0x41, 0x5A), (0x61, 0x17E), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x621, 0x64A), (0x905, 0x94D),
    (0xE01, 0xE39), (0x3041, 0x30FE), (0x4E00, 0x4F00), (0xAC00, 0xADFF),
)  # fmt: skip
OTHERS = " \n\t.,!?'\"()-_/\\<>|{}0123456789١२٣✓€😀🏽\u0301\u200d\u00a0\u3000\r"
WORDS = ("it's", "WE'LL", "don't", "1234567", "  ", "   \n\n", " a", "www.", "€100", "\r\n", "HelloWorld", "x² ")
CONTROL = ("<|begin|>", "<|end_of_text|>", "<|im_end|>", "<|start|>")
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
)
CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
QWEN2 = CL100K.replace("{1,3}", "")


def texts(count: int, seed: int) -> list[str]:
    """Random strings of all scripts, with what tokenizers trip over between."""
    draw, out = random.Random(seed), []
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 12)):
            kind = draw.random()
            low, high = draw.choice(RANGES)
            if kind < 0.6:
                parts.append("".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 7))))
            elif kind < 0.8:
                parts.append("".join(draw.choice(OTHERS) for _ in range(draw.randint(1, 3))))
            else:
                parts.append(draw.choice(WORDS))
            parts.append(" " * (draw.random() < 0.6))
        out.append("".join(parts))
    return out


AFMOE = (  # digits in threes from the end, Asian scripts, and the last of DeepSeek's patterns
    r"\p{N}{1,3}(?=(?:\p{N}{3})*$)|\p{N}{1,3}(?=(?:\p{N}{3})*\P{N})",
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
    DEEPSEEK[-1],
)


def _split(*patterns: str, digits: str = "") -> Any:
    own: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    if digits:
        own.append(pre_tokenizers.Digits(individual_digits=True))
    return pre_tokenizers.Sequence([*own, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2(*before: Any) -> Any:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


def _falcon() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )  # fmt: skip


BYTE_LEVEL: dict[str, tuple[Callable[[], Any], bool, bool]] = {  # pre-tokenizer, NFC, pieces that are tokens stay whole
    "llama-bpe": (lambda: _split(CL100K), False, True),
    "glm4": (lambda: _split(CL100K), False, True),
    "smaug-bpe": (lambda: _split(CL100K), False, False),
    "qwen2": (lambda: _split(QWEN2), True, False),
    "gpt-2": (_gpt2, False, False),
    "olmo": (_gpt2, True, False),
    "starcoder": (lambda: _gpt2(pre_tokenizers.Digits(individual_digits=True)), False, False),
    "refact": (lambda: _gpt2(pre_tokenizers.Digits(individual_digits=True)), False, False),
    "smollm": (lambda: _gpt2(pre_tokenizers.Digits(individual_digits=True)), False, False),
    "command-r": (lambda: _gpt2(pre_tokenizers.Digits(individual_digits=True)), True, False),
    "gpt-4o": (lambda: _split(O200K), False, False),
    "llama4": (lambda: _split(O200K), False, False),
    "minimax-m2": (lambda: _split(O200K), False, False),
    "tekken": (lambda: _split(TEKKEN), False, True),
    "deepseek-v3": (lambda: _split(*DEEPSEEK), False, False),
    "deepseek-coder": (lambda: _split(*CODER, digits="last"), False, False),
    "falcon": (_falcon, False, False),
    "afmoe": (lambda: _split(*AFMOE), False, False),
}
OWN_CLASSES = {"qwen2": "Qwen2Tokenizer", "gpt-2": "GPT2Tokenizer", "command-r": "CohereTokenizer"}


def byte_level(pre: str, seed: int, size: int = 900) -> tuple[Any, dict[str, Any]]:
    """(transformers' tokenizer, the metadata of one trained on random text)."""
    make, nfc, whole = BYTE_LEVEL[pre]
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = make()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts(1500, seed) * 2, trainer)
    held = json.loads(inner.to_str())["model"]
    vocabulary, merges = held["vocab"], [tuple(m) for m in held["merges"]]
    if pre in OWN_CLASSES:
        first = {"unk_token": CONTROL[0], "bos_token": CONTROL[0], "eos_token": CONTROL[1], "pad_token": CONTROL[0]}
        judge = getattr(transformers, OWN_CLASSES[pre])(vocab=vocabulary, merges=merges, **first)
        judge.add_special_tokens({"additional_special_tokens": list(CONTROL[2:])})
    else:
        whole_model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole)
        inner = tokenizers.Tokenizer(whole_model)
        inner.pre_tokenizer, inner.decoder = make(), decoders.ByteLevel()
        if nfc:
            inner.normalizer = normalizers.NFC()
        judge = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
        judge.add_special_tokens({"additional_special_tokens": list(CONTROL)})
    judge.add_tokens(["<tool>"])
    ids = judge.get_vocab()
    tokens = [t for t, _ in sorted(ids.items(), key=lambda item: item[1])]
    kinds = [3 if t in CONTROL else 4 if t == "<tool>" else 1 for t in tokens]
    return judge, {
        "model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": [" ".join(m) for m in merges],
        "bos_token_id": ids[CONTROL[0]], "eos_token_id": ids[CONTROL[1]], "add_bos_token": False,
    }  # fmt: skip


def gemma4(seed: int) -> tuple[Any, dict[str, Any]]:
    """Gemma 4's: SentencePiece's BPE without a space in front, with merges in the file and scores that say nothing."""
    judge, held = sentencepiece(False, seed)
    merges = [" ".join(m) for m in json.loads(judge.backend_tokenizer.to_str())["model"]["merges"]]
    return judge, held | {"model": "gemma4", "merges": merges, "scores": [-1000.0] * len(held["scores"])}


def sentencepiece(prefix: bool, seed: int, size: int = 700) -> tuple[Any, dict[str, Any]]:
    """SentencePiece's BPE: Llama's with a space in front of the text, whatever it begins with, or Gemma's without. The
    judge is Llama 2's tokenizer.json, which does as SentencePiece; LlamaTokenizer adds no space in front of one."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=300, show_progress=False)
    inner.train_from_iterator(texts(1500, seed), trainer)
    own = sorted(inner.get_vocab(), key=inner.token_to_id)
    special = ["<unk>", "<s>", "</s>"] if prefix else ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *own]
    known = {t: i for i, t in enumerate(tokens)}
    scores = [0.0] * (len(tokens) - len(own)) + [-float(i) for i in range(len(own))]
    from transformers.convert_slow_tokenizer import generate_merges

    merges = generate_merges(known, {t: scores[i] for t, i in known.items() if t in own})
    make = transformers.LlamaTokenizer if prefix else transformers.GemmaTokenizer
    judge = make(vocab=known, merges=merges)
    if prefix:
        legacy = tokenizers.Tokenizer.from_str(judge.backend_tokenizer.to_str())
        legacy.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        legacy.pre_tokenizer = pre_tokenizers.Split("\n\n\n\n\n", "isolated")  # which splits nothing: None is refused
        llama, judge = judge, transformers.PreTrainedTokenizerFast(tokenizer_object=legacy)
        for text in texts(100, seed + 2):
            same = [t.encode(text, add_special_tokens=False) for t in (llama, judge)]
            assert text.startswith(" ") or same[0] == same[1]
    kinds = [2 if t == "<unk>" else 3 for t in special] + [6] * 256 + [1] * (len(tokens) - 256 - len(special))
    return judge, {
        "model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": kinds,
        "bos_token_id": known["<s>" if prefix else "<bos>"], "eos_token_id": known["</s>" if prefix else "<eos>"],
        "unknown_token_id": known["<unk>"], "add_space_prefix": prefix, "add_bos_token": False,
    }  # fmt: skip


def unigram(seed: int, size: int = 2000) -> tuple[Any, dict[str, Any]]:
    """SentencePiece's Unigram, as T5 has it."""
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(texts(1500, seed), trainer)
    pieces = [(t, s) for t, s in json.loads(inner.to_str())["model"]["vocab"]]
    judge = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    return judge, {
        "model": "t5", "tokens": [t for t, _ in pieces], "scores": [float(s) for _, s in pieces],
        "token_type": [3, 3, 2] + [1] * (len(pieces) - 3), "eos_token_id": 1, "unknown_token_id": 2,
        "add_eos_token": True, "remove_extra_whitespaces": True, "add_space_prefix": True,
    }  # fmt: skip


def wordpiece(seed: int, size: int = 700) -> tuple[Any, dict[str, Any]]:
    """BERT's WordPiece; converters write "▁" before a word's first piece, and leave "##" out."""
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    inner.train_from_iterator(texts(1500, seed), trainer)
    known = inner.get_vocab()
    judge = transformers.BertTokenizer(vocab=known)
    tokens = sorted(known, key=known.__getitem__)
    written = [t if t in special else t[2:] if t.startswith("##") else "▁" + t for t in tokens]
    return judge, {
        "model": "bert", "tokens": written, "token_type": [3] * 5 + [1] * (len(tokens) - 5), "padding_token_id": 0,
        "unknown_token_id": 1, "cls_token_id": 2, "bos_token_id": 2, "seperator_token_id": 3, "mask_token_id": 4,
    }  # fmt: skip


def add_vocabulary(w: Any, held: dict[str, Any], template: str | None = None, **named: str) -> None:
    """The metadata of a vocabulary, into a GGUFWriter."""
    for key, value in held.items():
        full = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            w.add_bool(full, value)
        elif isinstance(value, list):
            w.add_array(full, value)
        else:
            (w.add_string if isinstance(value, str) else w.add_uint32)(full, value)
    if template:
        w.add_string("tokenizer.chat_template", template)
    if named:
        w.add_array("tokenizer.chat_templates", list(named))
    for name, text in named.items():
        w.add_string(f"tokenizer.chat_template.{name}", text)


def write_vocabulary(path: Path, held: dict[str, Any], arch: str = "llama", **templates: Any) -> Path:
    """A GGUF file of nothing but a vocabulary."""
    import gguf
    import numpy as np

    w = gguf.GGUFWriter(path, arch)
    add_vocabulary(w, held, **templates)
    w.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
