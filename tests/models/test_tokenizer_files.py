"""Quirks of published tokenizer files: tokens added beside tokenizer.json, truncation, several chat templates.

Ids, text and prompts are those of transformers on the same files, or the tokenizer is refused."""

from __future__ import annotations

import json

import pytest
from support.tiny import tokenizer

from intaglio.models import Grammars, Tokenizer, TokenizerError

transformers = pytest.importorskip("transformers")
TEXTS = ["<bos>Hi <|im_end|> there<|x|>  é <eos>", "plain", "[PAD]<user>a<tool> b", " <|im_end|>  <|im_end|>a"]
IM_END = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def table(path, file="tokenizer_config.json", drop=(), **change):
    at = path / file
    held = json.loads(at.read_text()) if at.exists() else {}
    at.write_text(json.dumps({k: v for k, v in {**held, **change}.items() if k not in drop}))


def same(path):
    """The tokenizer, after comparing it with transformers'."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), Tokenizer.open(path)
    for text in TEXTS:
        for special in (True, False):
            assert ours.encode(text, special) == theirs(text, add_special_tokens=special).input_ids
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    assert ours.special.items() <= theirs.special_tokens_map.items()
    return ours


def baked(path, **change):
    """tokenizer.json with some of its parts changed."""
    table(path, "tokenizer.json", **change)


def test_truncation_and_padding_are_off(tmp_path):
    tokenizer(tmp_path)
    baked(
        tmp_path,
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 256,
            "pad_type_id": 0, "pad_token": "<pad>",
        },
    )  # fmt: skip
    t = same(tmp_path)
    assert len(t.encode("a" * 40)) == 40 and t.encode("a") == [ord("a") - 33]


def test_tokens_of_added_tokens_decoder(tmp_path):
    tokenizer(tmp_path)
    table(tmp_path, added_tokens_decoder={"261": {**IM_END, "special": True}}, eos_token="<|im_end|>")
    t = same(tmp_path)
    assert t.encode("a<|im_end|>")[-1] == 261 and t.eos_ids == (258, 261)
    assert Grammars(t, 263).matcher("regex", "a+").mask()[8] >> 5 & 1 == 0  # known to grammars too: no text yet


@pytest.mark.parametrize("special", [True, False])
def test_tokens_of_added_tokens_json(tmp_path, special):
    tokenizer(tmp_path)
    table(tmp_path, "added_tokens.json", **{"<|im_end|>": 261, "<tool>": 262})
    if special:
        table(tmp_path, "special_tokens_map.json", eos_token=IM_END, additional_special_tokens=["<tool>"])
    t = same(tmp_path)
    assert t.encode("<|im_end|><tool>") == [261, 262]
    assert t.decode([261, 262]) == ("<tool>" if special else "<|im_end|><tool>")


def test_special_tokens_that_only_the_config_names(tmp_path):
    tokenizer(tmp_path)
    table(tmp_path, pad_token="[PAD]", extra_special_tokens=["<|x|>"], image_token="<tool>")
    t = same(tmp_path)
    assert t.encode("[PAD]")[0] > 260
    t.fits(261)


def test_an_ordinary_token_becomes_special(tmp_path):
    tokenizer(tmp_path)
    table(tmp_path, sep_token="a", added_tokens_decoder={"260": {"content": "<assistant>", "special": False}})
    same(tmp_path)


def test_old_maps_do_not_count_beside_added_tokens_decoder(tmp_path):
    tokenizer(tmp_path)
    table(tmp_path, added_tokens_decoder={"261": {**IM_END, "special": True}})
    table(tmp_path, "special_tokens_map.json", eos_token="<user>")
    table(tmp_path, "added_tokens.json", **{"<tool>": 262})
    assert same(tmp_path).special["eos_token"] == "<eos>"


def test_special_tokens_are_split_if_asked(tmp_path):
    tokenizer(tmp_path)
    table(tmp_path, split_special_tokens=True)
    assert len(same(tmp_path).encode("<eos>")) == 5


def test_an_id_that_does_not_come_out(tmp_path):
    tokenizer(tmp_path)
    table(tmp_path, "added_tokens.json", **{"<|im_end|>": 300})
    with pytest.raises(TokenizerError, match=r"'<\|im_end\|>' has id 300, but comes to 261"):
        Tokenizer.open(tmp_path)
    table(tmp_path, added_tokens_decoder={"261": "<|im_end|>"})
    with pytest.raises(TokenizerError, match=r"added_tokens_decoder has '261': '<\|im_end\|>'; wanted"):
        Tokenizer.open(tmp_path)


NAMED = [
    {"name": n, "template": f"{n}: {{{{ messages|length }}}}{{{{ eos_token }}}}"}
    for n in ("default", "tool_use", "rag")
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("where", ["list", "files", "files without a default", "a file beside a list"])
@pytest.mark.parametrize("tools", [None, TOOLS, []])
def test_several_templates(tmp_path, where, tools):
    tokenizer(tmp_path)
    if "list" in where:
        table(tmp_path, chat_template=NAMED)
    if "file" in where:
        (tmp_path / "additional_chat_templates").mkdir()
        for t in NAMED[1:]:
            at = tmp_path / "additional_chat_templates" / f"{t['name']}.jinja"
            at.write_text("file " + t["template"])
        if "without" not in where:
            (tmp_path / "chat_template.jinja").write_text("the file {{ messages|length }}")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.open(tmp_path)
    try:
        wanted = theirs.apply_chat_template(CHAT, tools=tools, tokenize=False)
    except ValueError:
        with pytest.raises(TokenizerError, match="none named default"):
            ours.chat(CHAT, False, tools=tools)
        return
    assert ours.chat(CHAT, False, tools=tools) == wanted


def test_a_template_of_an_old_processor(tmp_path):
    tokenizer(tmp_path)
    table(tmp_path, drop=["chat_template"])
    table(tmp_path, "chat_template.json", chat_template="old {{ messages|length }}")
    assert Tokenizer.open(tmp_path).chat(CHAT) == "old 1"


def test_tokens_beyond_the_models_vocabulary(tmp_path):
    """Only a prompt that uses one is refused."""
    from support.tiny import tiny

    from intaglio.model import Model

    path = tiny("llama", tmp_path / "m", num_hidden_layers=1)
    table(path, "added_tokens.json", **{f"<image_{i}>": 261 + i for i in range(4)})
    model = Model.open(path)
    assert model.encode("a<image_1>") == [64, 262]
    with pytest.raises(TokenizerError, match=r"the prompt has the token '<image_3>' \(id 264\).*0\.\.262"):
        model.encode("a<image_3>")
    with pytest.raises(TokenizerError, match=r"the conversation has the token '<image_2>'"):
        model.chat_prompt([{"role": "user", "content": "<image_2>"}])
