"""Folders whose tokenizer is a SentencePiece model (tokenizer.model) without tokenizer.json.

Judges: SentencePiece itself and transformers' conversion, on random strings in ten scripts. Where neither is installed,
models written here, field by field.
"""

from __future__ import annotations

import io
import json
import os
import random
import secrets
import struct
import warnings

import pytest
from support.gguf_vocab import texts
from support.tiny import CHAT, tiny
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.models import Tokenizer, TokenizerError, account, has_tokenizer

STRINGS = int(os.environ.get("INTAGLIO_TOKENIZER_STRINGS", "200"))
SAME = {"character_coverage": 0.98, "vocab_size": 3000, "minloglevel": 2}
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SORTS = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "split_digits": True, **PLAIN},
    "with symbols": {
        "model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<tool>", "  ", "\t"],
        "control_symbols": ["<|im_end|>"], **PLAIN,
    },
    "without a prefix": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, **PLAIN},
    "bpe, nfkc": {"model_type": "bpe", "normalization_rule_name": "nfkc"},
    "unigram, nfkc": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
    "unigram, bytes": {"model_type": "unigram", "byte_fallback": True, **PLAIN},
}  # fmt: skip
INSERTED = ["<tool>", "<|im_end|>", "<s>", "</s>", "▁", "  ", "\t", " <tool> ", "▁▁"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Function from the name of a sort to a folder with its trained model."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("trained")
    corpus = [t.replace("\n", " ") for t in texts(3000, 7)]

    def of(sort):
        path = folder / sort.replace(" ", "_")
        if not path.exists():
            path.mkdir()
            out = io.BytesIO()
            spm.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_writer=out, **SAME, **SORTS[sort])
            (path / "tokenizer.model").write_bytes(out.getvalue())
        return path

    return of


def configured(source, path, **config):
    path.mkdir()
    (path / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    (path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, **config}))
    return path


@pytest.mark.parametrize("sort", SORTS)
def test_tokens_are_those_of_sentencepiece(tmp_path, trained, sort):
    """Except where NFKC meets combining marks: the library's character map works on whole graphemes."""
    spm = pytest.importorskip("sentencepiece")
    path = configured(trained(sort), tmp_path / "m")
    judge, ours, seed = spm.SentencePieceProcessor(model_file=str(path / "tokenizer.model")), Tokenizer.open(path), 0
    seed = secrets.randbelow(2**31)
    apart = 0
    for text in ["", " ", "  ", "a", " a", "▁a", *texts(STRINGS, seed)]:
        wanted = judge.encode(text)
        if "nfkc" in sort or "unigram" in sort:  # or two segmentations are equally likely
            apart += wanted != ours.encode(text)
            continue
        assert ours.encode(text) == wanted, (seed, text)
        assert ours.decode(wanted) == judge.decode(wanted), (seed, text)
    assert apart <= STRINGS // 25


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "TokenizersBackend"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "legacy": False, "add_bos_token": True, "add_eos_token": True},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        {"added_tokens_decoder": {
            "2999": {"content": "<|turn|>", "special": False}, "3000": {"content": "<|more|>", "special": True},
        }, "add_bos_token": True},
    ],
)  # fmt: skip
def test_tokens_are_those_of_transformers(tmp_path, trained, sort, config):
    """With added tokens in the text. LlamaTokenizer ignores the normalisation of models unlike Llama's own."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    if config.get("tokenizer_class") == "LlamaTokenizer" and sort not in ("llama", "with symbols"):
        pytest.skip("transformers' class has Llama's settings, whatever the model's")
    if "added_tokens_decoder" in config and "unigram" in sort:
        pytest.skip("transformers gives such tokens other ids than the file does")
    path = configured(trained(sort), tmp_path / "m", **config)
    if "tokenizer_class" not in config:
        (path / "config.json").write_text(json.dumps({"model_type": "olmo2"}))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), Tokenizer.open(path)
    seed = secrets.randbelow(2**31)
    draw = random.Random(seed)
    for text in ["", " ", "a", " a", *texts(STRINGS, seed)]:
        if draw.random() < 0.4:
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice([*INSERTED, "<|turn|>", "<|more|>"]) + text[at:]
        for special in (False, True):
            ids = theirs(text, add_special_tokens=special).input_ids
            assert ours.encode(text, special) == ids, (seed, text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), (seed, text)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), (seed, text)
    assert ours.special["bos_token"] == theirs.bos_token and ours.special["eos_token"] == theirs.eos_token
    assert ours.bos_id == theirs.bos_token_id and theirs.eos_token_id in ours.eos_ids


def field(number, value):
    """One field of a protobuf message."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value % (1 << 64))


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def message(**fields):
    return b"".join(field(int(n[1:]), x) for n, x in fields.items())


def model(pieces, trainer=b"", normalizer=b""):
    """A model of (text, score, kind) pieces; by default BPE without normalisation."""
    listed = b"".join(field(1, message(_1=t.encode(), _2=float(s), _3=k)) for t, s, k in pieces)
    trainer = trainer or message(_3=2, _35=1)
    return listed + field(2, trainer) + field(3, normalizer or message(_3=1, _4=0))


BYTES = [(f"<0x{i:02X}>", 0.0, 6) for i in range(128, 256)]
PIECES = [
    ("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *BYTES, ("ab", -1.0, 1), ("▁ab", -2.0, 1), ("bc", -0.5, 1),
    *((c, -9.0 - i, 1) for i, c in enumerate("▁abcd")),
]  # fmt: skip


def written(path, data, **config):
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(data)
    (path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, **config}))
    return path


def test_a_model_written_by_hand(tmp_path):
    """Merges go by score, characters without a piece become bytes, and the special tokens are the model's."""
    tokens = Tokenizer.open(written(tmp_path / "m", model(PIECES)))
    at = {t: i for i, (t, _, _) in enumerate(PIECES)}
    assert tokens.encode("ab") == [1, at["▁ab"]]
    assert tokens.encode("abc", special=False) == [at["▁"], at["a"], at["bc"]]  # the better score comes first
    assert tokens.encode("é", special=False) == [at["▁"], at["<0xC3>"], at["<0xA9>"]]
    assert tokens.decode([1, at["▁ab"], at["<0xC3>"], at["<0xA9>"], 2]) == "abé"
    assert (tokens.bos_id, tokens.eos_ids) == (1, (2,)) and tokens.special["unk_token"] == "<unk>"
    ends = message(_3=2, _35=1, _41=-1, _42=1)
    other = Tokenizer.open(written(tmp_path / "n", model(PIECES, ends), add_eos_token=True))
    assert other.encode("ab") == [at["▁ab"], 1] and other.bos_id is None


def test_without_add_bos_token_a_warning_says_so(tmp_path):
    path = written(tmp_path / "m", model(PIECES))
    (path / "tokenizer_config.json").unlink()
    with pytest.warns(UserWarning, match="add_bos_token"):
        assert Tokenizer.open(path).encode("ab")[0] != 1


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        (b"IQ== 0\nIg== 1\n", {}, "is a tiktoken file, not a SentencePiece model: download tokenizer.json"),
        (model(PIECES)[:-40], {}, "is no SentencePiece model, or a damaged one"),
        (b"", {}, "is no SentencePiece model, or a damaged one"),
        (b"version https://git-lfs.github.com/spec/v1\n", {}, "is no SentencePiece model, or a damaged one"),
        (model(PIECES + PIECES[:1]), {}, "is no SentencePiece model, or a damaged one"),
        (model(PIECES, message(_3=3)), {}, r"words or characters \(model_type 3\)"),
        (model(PIECES), {"tokenizer_class": "XGLMTokenizer"}, "does not say the ids of a XGLMTokenizer"),
        (model(PIECES), {"tokenizer_class": "T5TokenizerFast"}, "does not say the ids of a T5Tokenizer"),
    ],
)
def test_what_is_refused(tmp_path, data, config, message):
    path = written(tmp_path / "m", data, **config)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.open(path)


def test_a_folder_generates_and_has_an_account(tmp_path):
    """tokenizer.model is read if tokenizer.json is missing, and listed as ignored beside one."""
    path = tiny("llama", tmp_path / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = {f.file: f.fate for f in account(path).files}
    assert both["tokenizer.json"] == "used"
    for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
        (path / name).unlink(missing_ok=True)
    assert not has_tokenizer(path)
    written(path, model(PIECES), chat_template=CHAT)
    assert has_tokenizer(path)
    a = account(path)
    assert {f.file: f.fate for f in a.files}["tokenizer.model"] == "used"
    assert [k.fate for k in a.keys if k.key == "add_bos_token"] == ["used"]
    (path / "tokenizer.json").write_text(Tokenizer.open(path).inner.to_str())
    assert {f.file: f.fate for f in account(path).files}["tokenizer.model"] == "ignored"
    (path / "tokenizer.json").unlink()
    done = CliRunner().invoke(app, ["generate", str(path), "--prompt", "ab", "--max-tokens", "3"])
    assert done.exit_code == 0, done.output
