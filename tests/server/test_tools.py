"""Tool calls and reasoning end to end: special tokens as delimiters, templates without tools, forced calls, history."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.scripted import scripted
from support.served import TOOLS, Served, served
from support.tiny import tiny
from tokenizers import AddedToken
from tokenizers import Tokenizer as Inner

from intaglio.server.markup import FORMS

USER = [{"role": "user", "content": "hello there"}]
WEATHER = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
FUNCTION = {"name": "weather", "parameters": {**WEATHER, "additionalProperties": False}}
ASK: dict[str, Any] = {"messages": USER, "tools": [{"type": "function", "function": FUNCTION}]}
MARKS = ("<|channel|>", "<|message|>")  # the tiny model's vocabulary has room for two more tokens
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'system' and refuse is defined %}{{ raise_exception('no system') }}"
    "{% endif %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}<assistant>"
)
ARGUMENTS = '{"city": "Paris"}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model whose tokenizer has two of harmony's marks as special tokens."""
    folder = tiny("llama", tmp_path_factory.mktemp("tools") / "tiny", num_hidden_layers=1, max_position_embeddings=4096)
    inner = Inner.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TOOLS)
    with served(folder, llm={"device": "host"}) as s:
        yield s


def chat(server: Served, **fields: Any) -> Any:
    answer = server.post("/v1/chat/completions", {"max_tokens": 400, **ASK, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def prompt_of(server: Served, messages: list[Any], tools: bool = True) -> str:
    """The prompt that a conversation becomes."""
    body = {"messages": messages, **({"tools": ASK["tools"]} if tools else {})}
    ids = server.post("/tokenize", body).json()["tokens"]
    return str(server.post("/detokenize", {"tokens": ids}).json()["prompt"])


def test_marks_may_be_special_tokens(server: Served) -> None:
    server.llm.use_chat_template(PLAIN + "{# tools <|channel|> #}")
    special = server.llm.model.needed_tokenizer().special_ids
    assert {"<|channel|>", "<|message|>"} <= special.keys()
    final = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hello!"
    call = f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}"
    for tools in ({}, {"tools": None}):
        with scripted(server.llm, lambda _: final):
            message = chat(server, **tools)["message"]
        assert (message["content"], message["reasoning_content"]) == ("Hello!", "hm")
    with scripted(server.llm, lambda _: call):
        made = chat(server)
    assert made["finish_reason"] == "tool_calls" and made["message"]["content"] is None
    assert made["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": ARGUMENTS}
    with scripted(server.llm, lambda _: final):
        shown = server.post("/v1/completions", {"prompt": "a", "max_tokens": 99}).json()["choices"][0]["text"]
    assert "<|channel|>" not in shown and "Hello!" in shown


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_every_format_can_be_forced(server: Served, form: str, choice: Any) -> None:
    signs = {
        "harmony": "<|channel|>", "deepseek": "<｜tool▁calls▁begin｜>", "dsml": "｜DSML｜", "glm": "<arg_key>",
        "kimi": "<|tool_call_begin|>", "minimax": "<minimax:tool_call>", "minimax-m1": "<tool_calls>",
        "qwen-coder": "<function=", "cohere": "<|START_ACTION|>", "granite": "<|tool_call|>", "hermes": "<tool_call>",
        "mistral-args": "[ARGS]", "mistral": "[TOOL_CALLS]", "olmo": "<function_calls>", "plain": "",
        "llama4": "<|python_start|>", "pythonic": "[func_name1(", "llama": '"parameters"',
    }  # fmt: skip
    server.llm.use_chat_template(PLAIN + "{# tools #}{# " + signs[form] + " #}")
    made = chat(server, tool_choice=choice, parallel_tool_calls=False)
    [call] = made["message"]["tool_calls"]
    assert call["function"]["name"] == "weather" and made["message"]["content"] is None
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    assert made["finish_reason"] == "tool_calls"


def test_tools_for_a_template_that_takes_none(server: Served) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "function": {"name": "weather", "arguments": ARGUMENTS}},
            {"id": "b", "function": {"name": "weather", "arguments": ""}},
        ]},
        {"role": "tool", "tool_call_id": "a", "content": "22 degrees"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "unknown"}]},
    ]  # fmt: skip
    server.llm.use_chat_template(PLAIN)
    text = prompt_of(server, history)
    assert text.startswith("<system>Be brief.\n\nYou may call these functions:\n") and json.dumps(FUNCTION) in text
    assert '<assistant><tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>\n<tool_call>' in text
    results = "<tool_response>\n22 degrees\n</tool_response>\n<tool_response>\nunknown\n</tool_response>"
    assert f"<user>{results}<eos>" in text and '"arguments": {}}' in text
    assert "functions" not in prompt_of(server, USER, tools=False)
    with scripted(server.llm, lambda _: f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}</tool_call>'):
        assert chat(server)["message"]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
    server.llm.use_chat_template(PLAIN.replace("refuse is defined", "true"))
    assert prompt_of(server, USER).startswith("<user>You may call these functions:")


def test_a_template_with_unknown_calls_is_refused_unless_they_are_forced(server: Served) -> None:
    server.llm.use_chat_template(PLAIN + "{{ tools | length if tools else '' }}")
    refused = server.post("/v1/chat/completions", ASK)
    assert refused.status_code == 400 and "no known tool-call format" in refused.json()["error"]["message"]
    assert chat(server, tool_choice="required", parallel_tool_calls=False)["message"]["tool_calls"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_that_is_cut_off_leaves_no_content(server: Served, stream: bool) -> None:
    server.llm.use_chat_template(TOOLS)
    body = {**ASK, "tool_choice": "required", "max_tokens": 1, "stream": stream}
    answer = server.post("/v1/chat/completions", body)
    if stream:
        parts = [json.loads(line[6:])["choices"][0] for line in answer.text.split("\n\n")[:-2]]
        assert not any(p["delta"].get("content") or p["delta"].get("tool_calls") for p in parts)
        assert parts[-1]["finish_reason"] == "length"
    else:
        [choice] = answer.json()["choices"]
        assert choice["finish_reason"] == "length" and choice["message"]["content"] == ""
        assert "tool_calls" not in choice["message"]


def test_ids_of_calls_are_what_templates_take(server: Served) -> None:
    server.llm.use_chat_template(PLAIN + "{# tools [TOOL_CALLS] #}")
    with scripted(server.llm, lambda _: f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}}}]'):
        [call] = chat(server)["message"]["tool_calls"]
    assert len(call["id"]) == 9 and call["id"].isalnum()
    server.llm.use_chat_template(
        "{% for m in messages %}{{ m.tool_call_id }};{{ m.content }}{% endfor %}{# tools [TOOL_CALLS] #}"
    )
    result = {"role": "tool", "tool_call_id": "call_0123456789abc", "content": "x"}
    assert prompt_of(server, [*USER, result]).endswith("456789abc;x")
    server.llm.use_chat_template(PLAIN + "{# tools <|tool_calls_section_begin|> #}")
    kimi = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        f"{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>"
    )
    with scripted(server.llm, lambda _: kimi):
        assert chat(server)["message"]["tool_calls"][0]["id"] == "functions.weather:0"


def test_reasoning_of_the_history_goes_where_the_template_reads_it(server: Served) -> None:
    said = {"role": "assistant", "content": "so", "reasoning": "why"}
    loop = "{% for m in messages %}{{ m.content }}%s;{% endfor %}"
    for name in ("reasoning_content", "reasoning", "thinking"):
        server.llm.use_chat_template(loop.replace("%s", "{{ m." + name + " }}"))
        assert "sowhy;" in prompt_of(server, [*USER, said], tools=False)


def test_the_template_for_tools_is_taken(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path / "named", num_hidden_layers=1)
    table = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].function.name }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**table, "chat_template": named}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with served(folder) as s:
        refused = s.post("/tokenize", {"messages": USER, "tools": ASK["tools"]})
        assert refused.status_code == 400 and "no known tool-call format" in refused.text
