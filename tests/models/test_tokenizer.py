"""The tokenizer: round trips, streaming, the chat template against transformers, and its errors."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny, tokenizer

from intaglio.model import Model
from intaglio.models import CheckpointError, Tokenizer, TokenizerError, account

TEMPLATES = {
    "plain": None,
    "llama": """{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    "alternating": """{{ bos_token }}{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('roles must alternate user/assistant') }}
{% endif %}
    {% if m['role'] == 'user' %}{{ '[' + m['content'] + ']' }}{% else %}{{ m['content'] + eos_token }}{% endif %}
{% endfor %}""",
    "json": """{% set ns = namespace(n=0) %}
{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m | tojson }}
{% if ns.n > 3 %}{% break %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}
{{ tools is none }}""",
}
CHAT = [
    {"role": "user", "content": 'Grüße <b>&amp;</b> "quoted"', "name": None},
    {"role": "assistant", "content": "  yes \n"},
    {"role": "user", "content": "日本語"},
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Tokenizer.open(tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_ids_of_special_tokens(plain):
    assert (plain.bos_id, plain.eos_ids) == (257, (258,))
    assert plain.encode("<bos>é<eos>") == [257, *plain.encode("é"), 258]
    assert plain.decode([257, *plain.encode("é"), 258]) == "é"
    assert plain.decode([257], skip_special=False) == "<bos>"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_text_comes_back(plain, text):
    if "<" not in text:
        assert plain.decode(plain.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20), cut=st.integers(0, 40))
def test_a_stream_says_the_same_and_breaks_no_character(plain, text, cut):
    if "<" in text or "\ufffd" in text:
        return
    ids = plain.encode(text)
    stream = plain.stream()
    parts = [stream.push(i) for i in ids[:cut]]
    assert not any("\ufffd" in p for p in parts)
    parts += [stream.push(i) for i in ids[cut:]]
    assert "".join(parts) + stream.end() == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30))
def test_a_stream_of_any_bytes_ends_as_decode_does(plain, ids):
    stream = plain.stream()
    assert "".join(stream.push(i) for i in ids) + stream.end() == plain.decode(ids)


def test_a_stream_after_a_prompt_returns_only_what_is_new(plain):
    ids = plain.encode("naïve café")
    stream = plain.stream(ids[:7])
    assert plain.decode(ids[:7]) + "".join(stream.push(i) for i in ids[7:]) == "naïve café"


def test_bytes_that_are_no_text_are_let_go_in_the_end(plain):
    stream = plain.stream()
    lone = plain.encode("é")[1]
    assert "".join(stream.push(lone) for _ in range(40)).count("\ufffd") >= 16


def test_a_stream_with_spaces_that_belong_to_the_next_word(tmp_path):
    """A sentencepiece-like tokenizer: a word carries its space, the first one loses it, bytes stand alone."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models

    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁Hello", "▁wide", "▁world", "!"]
    inner = Inner(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.save(str(tmp_path / "tokenizer.json"))
    t = Tokenizer.open(tmp_path)
    ids = [257, 258, *(1 + b for b in "é😀".encode()), 259, 260]
    stream = t.stream()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) == t.decode(ids) == "Hello wideé😀 world!"
    assert parts[:4] == ["Hello", " wide", "", "é"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_is_what_transformers_writes(tmp_path, name, prompt):
    transformers = pytest.importorskip("transformers")
    tokenizer(tmp_path)
    if TEMPLATES[name]:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    wanted = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
    assert Tokenizer.open(tmp_path).chat(CHAT, prompt) == wanted


def test_encoding_is_what_transformers_gives(plain):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(plain.path)
    text = "Hello <user> wörld\n"
    assert plain.encode(text) == theirs(text).input_ids


def test_eos_may_be_many(tmp_path):
    tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [259, 260]}))
    assert Tokenizer.open(tmp_path).eos_ids == (259, 260, 258)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 260}))
    assert Tokenizer.open(tmp_path).eos_ids == (260, 258)
    for named, ids in ((None, (258,)), ([], (258,)), (0, (0, 258)), ([10**6, 258], (10**6, 258))):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": named}))
        assert Tokenizer.open(tmp_path).eos_ids == ids


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("named", [{"a": 1}, [[1]], [None], "x", "5", -7, [3, -7], 5.5, [1.5], True, [False]])
def test_ends_that_are_no_ids_are_refused(tmp_path, file, named):
    path = tiny("llama", tmp_path)
    if file == "config.json":
        (path / "generation_config.json").unlink()
    table = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps({**table, "eos_token_id": named}))
    said = f"{path / file}: eos_token_id is {named!r}; wanted an integer of 0 or more, or a list of them "
    with pytest.raises(TokenizerError, match=re.escape(said)):
        Tokenizer.open(path)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        account(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink(missing_ok=True)
    if file == "config.json":  # a model without a tokenizer
        with pytest.raises(CheckpointError, match=re.escape(said)):
            Model.open(path)


def test_a_template_may_stand_in_a_list(tmp_path):
    tokenizer(tmp_path)
    table = json.loads((tmp_path / "tokenizer_config.json").read_text())
    table["chat_template"] = [
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": "{{ messages|length }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    assert Tokenizer.open(tmp_path).chat(CHAT) == "3"


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        ("{{ raise_exception('no system role') }}", CHAT, "no system role"),
        ("{{ messages[0].content.__class__.__mro__ }}", CHAT, "refuses"),
        ("{{ messages[9].content.text }}", CHAT, "refuses"),
        ("{{ messages[0].content + 1 }}", CHAT, "TypeError"),
        ("{% for %}", CHAT, "refuses"),
        ("x", [], "at least one message"),
        ("", CHAT, "no chat_template"),
    ],
)
def test_chats_refused(tmp_path, template, messages, says):
    tokenizer(tmp_path)
    table = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**table, "chat_template": template}))
    with pytest.raises(TokenizerError, match=says):
        Tokenizer.open(tmp_path).chat(messages)


def test_a_tokenizer_of_another_model(plain):
    plain.fits(256)  # added tokens may lie beyond the model's vocabulary
    with pytest.raises(TokenizerError, match=r"has id 255.*0\.\.254.*another model"):
        plain.fits(255)
    plain.check_ids(plain.encode("abc"), 258)
    with pytest.raises(TokenizerError, match=r"the prompt has the token '<eos>' \(id 258\), which.*0\.\.257"):
        plain.check_ids(plain.encode("ab<eos>c"), 258)


@pytest.mark.parametrize("held", [5, True, [5], ["text"], 1.5, [{"name": "a", "template": "b"}, None]])
def test_chat_templates_that_are_no_text_are_refused(tmp_path, held):
    tokenizer(tmp_path)
    table = json.loads((tmp_path / "tokenizer_config.json").read_text())
    table.pop("chat_template", None)
    for file, more in (("tokenizer_config.json", table), ("chat_template.json", {})):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
        (tmp_path / file).write_text(json.dumps({**more, "chat_template": held}))
        said = f"{tmp_path / file}: chat_template is {held!r}; wanted a text, "
        with pytest.raises(TokenizerError, match=re.escape(said)):
            Tokenizer.open(tmp_path)


def test_files_missing_or_damaged(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer.json is missing"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.model").write_text("")
    with pytest.raises(TokenizerError, match=r"tokenizer.model is no SentencePiece model, or a damaged one"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.open(tmp_path)
    tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"generation_config.json is not JSON"):
        Tokenizer.open(tmp_path)
