"""Random combinations of quirks in tiny checkpoints: ids, prompts and logits are those of transformers.

INTAGLIO_LOADER_CASES sets how many combinations are tried (40), INTAGLIO_LOADER_SEED the first seed (0).
"""

from __future__ import annotations

import os
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import transformers
from support.published import logits
from support.quirks import Draw, quirky
from support.tiny import BASE, error, truth

from intaglio.models import Checkpoint, Tokenizer, TokenizerError, account, port

safetensors = pytest.importorskip("safetensors.torch")
CASES, SEED = int(os.environ.get("INTAGLIO_LOADER_CASES", "40")), int(os.environ.get("INTAGLIO_LOADER_SEED", "0"))
LIMIT = 5e-5  # of float32 sums in other orders
WORDS = [
    "<bos>",
    "<eos>",
    "<user>",
    "<|im_end|>",
    "<tool>",
    "[PAD]",
    "<|x|>",
    "é",
    " hello",
    "a",
    "  ",
    "日本",
    "!",
    "\n",
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]


def compare_tokenizers(path: Path, draw: Draw) -> None:
    alone = path.parent / "tokenizer"  # without config.json, whose model_type may choose a class that builds its own
    shutil.copytree(path, alone, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    theirs = transformers.AutoTokenizer.from_pretrained(alone)
    ours = Tokenizer.open(alone)
    for _ in range(6):
        text = "".join(draw.choices(WORDS, k=draw.randint(1, 9)))
        special = draw.random() < 0.5
        ids = ours.encode(text, special)
        assert ids == theirs(text, add_special_tokens=special).input_ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), text
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "é"}]
    for tools in (None, TOOLS):
        extra = {} if tools is None else {"tools": tools}
        try:
            wanted = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **extra)
        except ValueError:
            with pytest.raises(TokenizerError):
                ours.chat(chat, True, **extra)
            continue
        assert ours.chat(chat, True, **extra) == wanted


def compare_models(path: Path, draw: Draw) -> None:
    tokens = [draw.randrange(BASE["vocab_size"]) for _ in range(24)]
    wanted = truth(path, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = port(Checkpoint.open(path))
        got = logits(path, "reference", program, tokens=tokens)
        a = account(path)
    assert error(got, wanted) < LIMIT
    listed = [(t.file, t.name) for t in a.tensors]
    found = [
        (f.name, n) for f in {e.file for e in Checkpoint.open(path).entries.values()} for n in safetensors.load_file(f)
    ]
    assert len(set(listed)) == len(listed) and {n for _, n in listed} == {n for _, n in found}
    assert np.isfinite(got).all()


@pytest.mark.parametrize("case", range(SEED, SEED + CASES))
def test_as_transformers(tmp_path, case):
    path = quirky(tmp_path / "m", tmp_path / "source", case)
    draw = random.Random(case + 1)
    compare_tokenizers(path, draw)
    compare_models(path, draw)
