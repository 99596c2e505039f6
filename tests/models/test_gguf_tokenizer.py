"""Tokenizers rebuilt from GGUF files give the tokens of transformers' own, on random strings in ten scripts.

Also special tokens, chat templates, vocabularies that are refused, and generation from the file alone.
"""

from __future__ import annotations

import json
import os
import secrets

import pytest
from support.gguf_files import write
from support.gguf_vocab import (
    BYTE_LEVEL,
    CONTROL,
    add_vocabulary,
    byte_level,
    gemma4,
    sentencepiece,
    texts,
    unigram,
    wordpiece,
    write_vocabulary,
)
from support.tiny import CHAT, SPECIALS, tiny, truth
from typer.testing import CliRunner

from intaglio import LLM, SamplingParams
from intaglio.cli import app
from intaglio.models import Grammars, Tokenizer, TokenizerError
from intaglio.models.text.embedded.splits import SPLITS

pytest.importorskip("gguf")
STRINGS = int(os.environ.get("INTAGLIO_TOKENIZER_STRINGS", "200"))  # a sort of tokenizer
SORTS = {
    **{pre: lambda seed, pre=pre: byte_level(pre, seed) for pre in BYTE_LEVEL},
    "sentencepiece": lambda seed: sentencepiece(True, seed),
    "sentencepiece without a space": lambda seed: sentencepiece(False, seed),
    "gemma4": gemma4,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


@pytest.mark.parametrize("sort", SORTS)
def test_tokens_are_those_of_transformers(tmp_path, sort):
    seed = secrets.randbelow(2**31)
    judge, held = SORTS[sort](seed)
    ours = Tokenizer.open(write_vocabulary(tmp_path / "model.gguf", held))
    for text in ["", " ", "\n", "a", *texts(STRINGS, seed + 1)]:
        wanted = judge.encode(text, add_special_tokens=False)
        if sort == "unigram":
            wanted = [i for i in judge(text).input_ids if i != 1]
        got = ours.encode(text, special=False)
        assert got == wanted, (seed, text)
        if sort not in ("unigram", "wordpiece"):  # which lose white space
            back = judge.decode(wanted, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert ours.decode(got) == back, (seed, text)
    if sort in BYTE_LEVEL:
        mixed = "a<tool>b".join(CONTROL) + " <|im_end|>"
        assert ours.encode(mixed, special=False) == judge.encode(mixed, add_special_tokens=False)
        assert "<tool>" in ours.decode(ours.encode(mixed)) and CONTROL[2] not in ours.decode(ours.encode(mixed))
        assert set(ours.eos_ids) == {judge.convert_tokens_to_ids(t) for t in CONTROL[1:3]}
        assert ours.special == {"bos_token": CONTROL[0], "eos_token": CONTROL[1]}


def test_what_is_added_in_front_and_behind(tmp_path):
    """add_bos_token and add_eos_token; without them, Llama's sort begins with bos and BERT's is between two tokens."""
    _, held = sentencepiece(True, 1)
    del held["add_bos_token"]
    for more, wanted in (({}, ([1], [])), ({"add_bos_token": False, "add_eos_token": True}, ([], [2]))):
        ours = Tokenizer.open(write_vocabulary(tmp_path / f"{len(more)}.gguf", held | more))
        plain = ours.encode("ab", special=False)
        assert ours.encode("ab") == [*wanted[0], *plain, *wanted[1]]
    judge, held = wordpiece(1)
    ours = Tokenizer.open(write_vocabulary(tmp_path / "bert.gguf", held))
    assert ours.encode("ab cd") == judge.encode("ab cd")
    _, held = byte_level("llama-bpe", 1)
    del held["add_bos_token"]
    assert Tokenizer.open(write_vocabulary(tmp_path / "bpe.gguf", held)).encode("a")[0] == held["bos_token_id"]


def test_phi_3_swallows_white_space(tmp_path):
    _, held = sentencepiece(True, 2)
    held = {k: v for k, v in held.items()}
    held["tokens"], held["token_type"] = [*held["tokens"], "<|user|>"], [*held["token_type"], 3]
    held["scores"] = [*held["scores"], -1000.0]
    for arch, lost in (("phi3", True), ("llama", False)):
        ours = Tokenizer.open(write_vocabulary(tmp_path / f"{arch}.gguf", held, arch))
        assert (ours.encode("<|user|>\n\na") == ours.encode("<|user|>a")) == lost


def test_several_ends(tmp_path):
    """The file's end of text, turn and message, and tokens called so; <|end|> of gpt-oss ends a message only."""
    _, held = byte_level("gpt-4o", 3)
    more = ["<|eot_id|>", "<|return|>", "<|call|>", "<|end|>", "<|other|>"]
    at = len(held["tokens"])
    held["tokens"], held["token_type"] = held["tokens"] + more, held["token_type"] + [3] * 5
    held["eot_token_id"] = at + 4
    ours = Tokenizer.open(write_vocabulary(tmp_path / "model.gguf", held))
    named = {held["eos_token_id"], held["tokens"].index("<|im_end|>"), at, at + 1, at + 2, at + 4}
    assert set(ours.eos_ids) == named


def test_templates(tmp_path):
    _, held = byte_level("gpt-2", 4)
    ours = Tokenizer.open(write_vocabulary(tmp_path / "a.gguf", held, template=CHAT, tool_use="{{ tools }}!"))
    assert ours.chat([{"role": "user", "content": "hi"}]).startswith("<|begin|><user>hi<|end_of_text|>")
    assert ours.chat([{"role": "user", "content": "hi"}], tools=[1]) == "[1]!"
    bare = Tokenizer.open(write_vocabulary(tmp_path / "b.gguf", held))
    with pytest.raises(TokenizerError, match="b.gguf has no chat_template"):
        bare.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "klingon"}, r"tokenizer.ggml.pre 'klingon' is not read; known are .*llama-bpe"),
        (
            {"model": "rwkv"},
            r"tokenizer.ggml.model 'rwkv' is not read; known are gpt2, llama, gemma4, t5, bert; put the model's",
        ),
        ({"token_type": [1]}, r"\d+ tokens, of which \d+ differ, with 1 types .*damaged"),
        ({"merges": None}, r"a vocabulary without tokenizer.ggml.merges"),
    ],
)
def test_what_cannot_be_rebuilt(tmp_path, change, message):
    _, held = byte_level("gpt-2", 5)
    held = {k: v for k, v in (held | change).items() if v is not None}
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.open(write_vocabulary(tmp_path / "model.gguf", held))


def test_a_file_that_does_not_say_how_text_is_split(tmp_path):
    _, held = byte_level("gpt-2", 6)
    del held["pre"]
    with pytest.warns(UserWarning, match=r"does not say how text is split .*tokens may differ"):
        assert Tokenizer.open(write_vocabulary(tmp_path / "model.gguf", held)).encode("abc")


def test_every_split_makes_a_tokenizer():
    for name, own in SPLITS.items():
        pieces = own.pre_tokenizer().pre_tokenize_str("It's 12345 Wörter，你好 ἐν สวัสดี\n\n")
        assert len(pieces) > 3, name


@pytest.fixture
def model(tmp_path):
    """A whole model in one file: 256 bytes, and the special tokens of a chat."""
    path = tiny("llama", tmp_path / "source", vocab_size=262)
    alphabet = sorted(tokens_of_bytes())
    tokens = [*alphabet, *SPECIALS, "he"]
    held = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [1] * 256 + [3] * 5 + [1], "merges": ["h e"],
        "bos_token_id": 257, "eos_token_id": 258, "padding_token_id": 256,
    }  # fmt: skip
    file, _, _ = write(path, tmp_path / "out", "Q8_0", extra=lambda w: add_vocabulary(w, held, CHAT))
    alone = tmp_path / "alone"
    alone.mkdir()
    return file.rename(alone / "model.gguf"), path


def tokens_of_bytes():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def test_generate_from_a_file_alone(model):
    """`intaglio generate model.gguf`, a chat and a grammar, with nothing beside the file."""
    file, source = model
    llm = LLM(file)
    assert llm.model.tokenizer.encode("hello") == [261, *Tokenizer.open(source).encode("llo")]
    assert llm.model.eos_ids == {258}
    out = llm.generate("hello", SamplingParams(max_tokens=4, temperature=0))[0]
    row = truth(source, llm.model.tokenizer.encode("hello"))[-1]
    assert row[out.token_ids[0]] > sorted(row)[-5]  # weights of 8 bits beside those of 32
    assert llm.model.chat_prompt([{"role": "user", "content": "hi"}])[0] == 257
    assert Grammars(llm.model.tokenizer, 262).matcher("regex", "[0-9]+").mask().any()
    run = CliRunner().invoke(app, ["generate", str(file), "--prompt", "hello", "--max-tokens", "4", "--json"])
    assert run.exit_code == 0 and json.loads(run.stdout)[0]["token_ids"] == out.token_ids
