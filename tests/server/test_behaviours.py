"""Behaviours of vLLM's server that its own tests require, checked on this server: bounds, refusals, counts, streams."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from support.scripted import scripted
from support.served import Served

USER = [{"role": "user", "content": "what is 1+1?"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BAD_PROPERTY = {"type": "object", "properties": {"foo": "bar"}, "required": ["foo"]}
BAD_GRAMMAR = 'root ::= selectinvalidsyntax\n\nselect ::= "SELECT " column'


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("completions", {"logprobs": 21}), ("completions", {"logprobs": 30, "stream": True}),
        ("completions", {"prompt": None}), ("completions", {"prompt": []}), ("completions", {"prompt": [[]]}),
        ("completions", {"stream_options": {"include_usage": None}}),
        ("completions", {"stream_options": {"continuous_usage_stats": True}}),
        ("completions", {"structured_outputs": {"json": BAD_PROPERTY}}),
        ("completions", {"structured_outputs": {"json": {"$ref": "#"}}}),
        ("completions", {"structured_outputs": {"regex": "[.*"}, "stop": ["\n"]}),
        ("completions", {"structured_outputs": {"grammar": BAD_GRAMMAR}}),
        ("completions", {"seed": 2**63}), ("completions", {"seed": -(2**63) - 1}),
        ("completions", {"logit_bias": {"9999": 1.0}}), ("completions", {"stop_token_ids": [9999]}),
        ("completions", {"prompt_logprobs": -1}), ("completions", {"best_of": 0}),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21, "stream": True}),
        ("chat/completions", {"structured_outputs": {"regex": {"1": "Python"}}}),
        ("chat/completions", {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        ("chat/completions", {"tools": [TOOL], "tool_choice": {}}),
        ("chat/completions", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
    ],
)  # fmt: skip
def test_what_is_refused(server: Served, path: str, fields: dict[str, Any]) -> None:
    body = {"messages": USER} if path.startswith("chat") else {"prompt": "a"}
    refused = server.post(f"/v1/{path}", {**body, "max_tokens": 3, **fields})
    assert refused.status_code == 400 and refused.json()["error"]["message"], refused.text
    if "structured_outputs" in fields:
        message = refused.json()["error"]["message"]
        assert "\n" not in message and len(message) < 300, message
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("asked", [0, 1, 5])
def test_how_many_likeliest_tokens_come(server: Served, asked: int) -> None:
    for prompt in ("Hello, my name is", [1, 2, 3, 4, 5]):
        body = {"prompt": prompt, "max_tokens": 5, "echo": True, "logprobs": asked}
        scores = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        assert all(max(asked, 1) <= len(top) <= asked + 1 for top in scores["top_logprobs"][1:])
        assert len({len(values) for values in scores.values()}) == 1
    for more in ({"logprobs": False}, {}):
        said = server.post("/v1/chat/completions", {"messages": USER, "max_tokens": 2, **more}).json()
        assert said["choices"][0]["logprobs"] is None


def test_usage_of_a_stream(server: Served) -> None:
    """Each chunk's usage counts the tokens up to that chunk, also where several tokens are sent at once."""

    def stream(tokens: int, **options: Any) -> list[Any]:
        asked: Any = {"model": "tiny", "messages": USER, "max_tokens": tokens, "stream": True}
        more = {"min_tokens": tokens}
        return list(server.client().chat.completions.create(**asked, extra_body=more, stream_options=options))

    for options in ({"include_usage": False}, {"continuous_usage_stats": True}, {}):
        assert all(chunk.usage is None for chunk in stream(10, **options))
    with scripted(server.llm, lambda _: "and so on " * 40):
        *chunks, last = stream(60, include_usage=True, continuous_usage_stats=True)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(set(counts)) and last.choices == [] and counts[-1] == last.usage.completion_tokens == 60
    assert all(u.total_tokens == u.prompt_tokens + u.completion_tokens for u in (c.usage for c in [*chunks, last]))


def test_roles_and_parts(server: Served) -> None:
    """A role of the client's own is rendered, and content in parts as the same text."""
    said = []
    for content in ("what is 1+1?", [{"type": "text", "text": "what is 1+1?"}]):
        messages = [{"role": "my-custom-role", "content": content, "extra_field": "0"}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 8}
        said.append(server.post("/v1/chat/completions", body).json()["choices"][0]["message"])
    assert said[0] == said[1]


def test_equal_prompts_have_equal_answers(server: Served) -> None:
    for prompts in (["Hello, my name is"] * 2, [[7, 8, 9]] * 2):
        body: Any = {"model": "tiny", "prompt": prompts, "max_tokens": 5, "temperature": 0}
        first, second = server.client().completions.create(**body).choices
        assert first.text == second.text
        texts = ["", ""]
        for chunk in server.client().completions.create(**body, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [first.text, second.text]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [True, False, None])
def test_reasoning_may_be_left_out(server: Served, stream: bool, include: bool | None) -> None:
    body: Any = {"messages": USER, "max_tokens": 90, "stream": stream, "include_reasoning": include}
    with scripted(server.llm, lambda _: "<think>\nhm</think>\n\ntwo"):
        answer = server.post("/v1/chat/completions", body)
    if stream:
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in answer.text.split("\n\n")[:-2]]
        names = ("content", "reasoning", "reasoning_content")
        said = {name: "".join(d.get(name) or "" for d in deltas) for name in names}
    else:
        said = answer.json()["choices"][0]["message"]
        assert answer.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] >= 2
    why = "" if include is False else "\nhm"
    assert said["content"] == "two" and (said.get("reasoning") or "") == (said.get("reasoning_content") or "") == why


def test_other_requests_go_on_after_bad_ones(server: Served) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a", extra_body={"structured_outputs": {"regex": "[.*"}})
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens <= 2
