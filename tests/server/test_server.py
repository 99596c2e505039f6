"""The HTTP server through the official openai client: endpoints, options and refusals, compared with LLM in-process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.served import Served, prompt, served

from intaglio import LLM, SamplingParams
from intaglio.server.vocabulary import BYTES, Vocabulary

USER = [{"role": "user", "content": "hello there"}]


def test_models_are_listed(server: Served) -> None:
    [model] = server.client().models.list().data
    assert model.id == "tiny" and model.owned_by == "intaglio"
    assert server.client().models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="there is 'tiny'"):
        server.client().models.retrieve("gpt/4")
    with pytest.raises(openai.NotFoundError) as e:
        server.client().completions.create(model="other", prompt="a")
    assert e.value.code == "model_not_found"


def test_a_chat_is_what_the_model_says(server: Served, truth: LLM) -> None:
    said = server.client().chat.completions.create(model="tiny", messages=USER, max_tokens=17, temperature=0)
    [wanted] = truth.generate([truth.chat_prompt(USER)], SamplingParams(17))
    assert said.choices[0].message.content == wanted.text
    assert said.choices[0].message.role == "assistant" and said.choices[0].finish_reason == wanted.finish_reason
    assert said.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert said.usage.completion_tokens == len(wanted.token_ids)
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_the_same(server: Served, n: int) -> None:
    asked: Any = {
        "model": "tiny", "messages": USER, "n": n, "seed": random.randrange(2**40), "max_completion_tokens": 20,
        "temperature": 0.8, "stop": ["e", "qq"], "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    client = server.client()
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({c.id for c in chunks}) == 1 and chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    for choice in whole.choices:
        mine = [d for c in chunks for d in c.choices if d.index == choice.index]
        assert "".join(d.delta.content or "" for d in mine) == choice.message.content
        assert [d.finish_reason for d in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert [d.delta.role for d in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [t for d in mine if d.logprobs for t in d.logprobs.content] == choice.logprobs.content


def test_choices_and_seeds(server: Served, truth: LLM) -> None:
    rng = random.Random()
    prompts, seed = [prompt(rng, rng.randrange(1, 60)) for _ in range(3)], rng.randrange(2**60)
    asked: Any = {
        "temperature": 1.1, "top_p": 0.9, "seed": seed, "n": 2, "max_tokens": 9, "presence_penalty": 0.5,
        "frequency_penalty": -0.4,
    }  # fmt: skip
    beyond = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "ignore_eos": True, "stop_token_ids": [3, 5]}
    got = server.client().completions.create(model="tiny", prompt=prompts, extra_body=beyond, **asked)
    wanted = truth.generate(prompts, SamplingParams(**asked, **beyond))
    assert [c.index for c in got.choices] == list(range(6))
    assert [c.text for c in got.choices] == [w.text for w in wanted]
    assert [c.finish_reason for c in got.choices] == [w.finish_reason for w in wanted]
    assert got.usage.prompt_tokens == sum(len(truth.model.tokenizer.encode(p)) for p in prompts)
    unseeded = server.client().completions.create(model="tiny", prompt="a", n=8, max_tokens=8)
    assert len({c.text for c in unseeded.choices}) > 1  # temperature is 1 unless told otherwise


def test_a_stop_string_ends_before_itself(server: Served, truth: LLM) -> None:
    [free] = truth.generate("abc", SamplingParams(40))
    stop = free.text[5:8]
    got = server.client().completions.create(model="tiny", prompt="abc", max_tokens=40, temperature=0, stop=stop)
    assert got.choices[0].text == free.text[: free.text.index(stop)] and got.choices[0].finish_reason == "stop"


def test_prompts_may_be_ids(server: Served, truth: LLM) -> None:
    rows = [[random.randrange(256) for _ in range(random.randrange(1, 20))] for _ in range(3)]
    wanted = [o.text for o in truth.generate(rows, SamplingParams(6))]
    got = server.client().completions.create(model="tiny", prompt=rows, max_tokens=6, temperature=0)
    assert [c.text for c in got.choices] == wanted
    one = server.client().completions.create(model="tiny", prompt=rows[0], max_tokens=6, temperature=0)
    assert one.choices[0].text == wanted[0]


def test_logprobs_of_a_chat(server: Served, truth: LLM) -> None:
    asked: Any = {"model": "tiny", "messages": USER, "max_tokens": 12, "temperature": 0, "logprobs": True}
    got = server.client().chat.completions.create(**asked, top_logprobs=3)
    [wanted] = truth.generate([truth.chat_prompt(USER)], SamplingParams(12, logprobs=3))
    tokens = got.choices[0].logprobs.content
    assert [t.logprob for t in tokens] == pytest.approx(wanted.logprobs, rel=1e-4, abs=1e-5)
    assert bytes(b for t in tokens for b in t.bytes).decode(errors="replace") == got.choices[0].message.content
    for t in tokens:
        assert len(t.top_logprobs) == 3 and t.top_logprobs[0].bytes == t.bytes  # greedy: the likeliest was drawn
        assert [o.logprob for o in t.top_logprobs] == sorted((o.logprob for o in t.top_logprobs), reverse=True)
    assert all(
        t.top_logprobs == [] for t in server.client().chat.completions.create(**asked).choices[0].logprobs.content
    )


def test_echo_and_logprobs_of_a_prompt(server: Served, truth: LLM) -> None:
    text = prompt(random.Random(), 14)
    asked: Any = {"model": "tiny", "prompt": text, "echo": True, "logprobs": 2, "temperature": 0}
    got = server.client().completions.create(**asked, max_tokens=5).choices[0]
    ids = truth.model.tokenizer.encode(text)
    rows = truth.logits([ids])[0].astype("float64")
    [new] = truth.generate(text, SamplingParams(5))
    assert got.text == text + new.text
    chances = [float(r[t] - r.max()) for r, t in zip(rows, ids[1:], strict=False)]
    sums = [float(__import__("numpy").log(__import__("numpy").exp(r - r.max()).sum())) for r in rows[:-1]]
    wanted = [c - s for c, s in zip(chances, sums, strict=True)]
    assert got.logprobs.token_logprobs[0] is None and got.logprobs.top_logprobs[0] is None
    assert got.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert len(got.logprobs.tokens) == len(ids) + len(new.token_ids)  # the end of the sequence may come first
    assert got.logprobs.text_offset[: len(ids)] == list(range(len(ids)))
    scored = server.client().completions.create(**asked, max_tokens=0)
    assert scored.choices[0].text == text and scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs == got.logprobs.token_logprobs[: len(ids)]
    [*parts] = server.client().completions.create(**asked, max_tokens=5, stream=True)
    assert "".join(p.choices[0].text for p in parts) == got.text
    assert [t for p in parts for t in p.choices[0].logprobs.token_logprobs] == got.logprobs.token_logprobs


def test_a_bias_decides(server: Served) -> None:
    token = random.randrange(97, 123)
    letter = Vocabulary(server.llm.model.tokenizer).piece(token)[0]
    got = server.client().completions.create(model="tiny", prompt="a", max_tokens=4, logit_bias={str(token): 100})
    assert got.choices[0].text == letter * 4


def test_a_schema_is_kept(server: Served) -> None:
    low = random.randrange(10, 50)
    properties = {"kind": {"enum": ["a", "b"]}, "n": {"type": "integer", "minimum": low, "maximum": low + 9}}
    schema = {"type": "object", "properties": properties, "required": ["kind", "n"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    client = server.client()
    got = client.chat.completions.create(model="tiny", messages=USER, response_format=form, max_tokens=60)
    value = json.loads(got.choices[0].message.content)
    assert value["kind"] in "ab" and low <= value["n"] <= low + 9 and got.choices[0].finish_reason == "stop"
    for given, allowed in (({"choice": ["yes", "n.o"]}, {"yes", "n.o"}), ({"regex": "(ab){2}"}, {"abab"})):
        body = {"structured_outputs": given}
        text = client.completions.create(model="tiny", prompt="x", max_tokens=30, extra_body=body).choices[0].text
        assert text in allowed
    with pytest.raises(openai.BadRequestError, match="one of json, regex"):
        client.completions.create(
            model="tiny", prompt="x", extra_body={"structured_outputs": {"choice": ["a"], "regex": "b"}}
        )
    with pytest.raises(openai.BadRequestError, match="unclosed group"):
        client.completions.create(model="tiny", prompt="x", extra_body={"structured_outputs": {"regex": "(("}})


def weather(**more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"day": {"enum": [1, 2]}}, "required": ["day"]}
    parameters["additionalProperties"] = False
    return {"type": "function", "function": {"name": "weather", "parameters": parameters, **more}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_is_made(server: Served, stream: bool) -> None:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    other = {"type": "function", "function": {"name": "other", "parameters": nothing}}
    asked: Any = {"model": "tiny", "messages": USER, "tools": [weather(), other], "max_tokens": 120}
    asked["tool_choice"] = {"type": "function", "function": {"name": "weather"}}
    got: Any = server.client().chat.completions.create(**asked, stream=stream)
    if stream:
        chunks = list(got)
        deltas = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
        calls = [deltas[0]]
        assert {d.index for d in deltas} == {0} and [d.id for d in deltas[1:]] == [None] * (len(deltas) - 1)
        deltas[0].function.arguments = "".join(d.function.arguments for d in deltas)
        reason = chunks[-1].choices[0].finish_reason
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
    else:
        calls, reason = got.choices[0].message.tool_calls, got.choices[0].finish_reason
        assert got.choices[0].message.content is None
    [call] = calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["day"] in (1, 2)
    assert call.id.startswith("call_") and reason == "tool_calls"
    asked["tool_choice"] = "required"
    asked["parallel_tool_calls"] = False
    [free] = server.client().chat.completions.create(**asked).choices[0].message.tool_calls
    assert free.function.name in ("weather", "other")


def test_a_conversation_with_calls_is_rendered(server: Served) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"day": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    body = {"messages": messages, "tools": [weather()], "return_token_strs": True}
    ids = server.post("/tokenize", body).json()["tokens"]
    text = server.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert "<system>be\nbrief<eos><user>hello there<eos><assistant><eos><tool>sunny<eos><assistant>" in text
    assert '"name": "weather"' in text
    call["function"] = {"name": "weather", "arguments": "{"}
    refused = server.post("/v1/chat/completions", {"messages": messages})
    assert refused.status_code == 400 and "arguments of c1 are not JSON" in refused.json()["error"]["message"]


def test_reasoning_is_told_apart(server: Served) -> None:
    body: Any = {"chat_template_kwargs": {"enable_thinking": True}}
    ids = {c: i for i in range(256) if len(c := Vocabulary(server.llm.model.tokenizer).piece(i)[0]) == 1}
    client = server.client()
    got: Any = client.chat.completions.create(model="tiny", messages=USER, max_tokens=8, extra_body=body)
    assert got.choices[0].message.content == "" and got.choices[0].message.reasoning_content
    assert ids["<"] < 256
    grammar: Any = {"extra_body": {**body, "structured_outputs": {"regex": "[0-9]{3}"}}}
    got = client.chat.completions.create(model="tiny", messages=USER, max_tokens=8, **grammar)
    assert got.choices[0].finish_reason == "length"  # a grammar begins after the reasoning
    assert got.choices[0].message.content == "" and got.choices[0].message.reasoning_content
    effort: Any = client.chat.completions.create(model="tiny", messages=USER, max_tokens=8, reasoning_effort="low")
    used = effort.usage
    assert used.completion_tokens_details.reasoning_tokens == used.completion_tokens > 0
    assert effort.choices[0].message.reasoning
    hidden: Any = {**body, "include_reasoning": False}
    got = client.chat.completions.create(model="tiny", messages=USER, max_tokens=8, extra_body=hidden)
    assert got.choices[0].message.content == "" and "reasoning" not in got.choices[0].message.model_dump()
    with pytest.raises(openai.BadRequestError, match="does not read it"):
        client.chat.completions.create(model="tiny", messages=USER, extra_body={"chat_template_kwargs": {"nothing": 1}})


CHAT, TEXT = {"messages": USER}, {"prompt": "abc"}
UNSUPPORTED = (
    "audio",
    "functions",
    "modalities",
    "prediction",
    "web_search_options",
)


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        *(("chat/completions", {**CHAT, name: 1}, name, f"{name} is not supported here") for name in UNSUPPORTED),
        *(("completions", {**TEXT, n: 1}, n, f"{n} is not supported") for n in ("suffix", "x")),
        ("chat/completions", {}, "messages", "messages is missing"),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "the boss", "content": "x"}]}, "messages.0.role", "pattern"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        ("chat/completions", {**CHAT, "store": True}, "store", "False"),
        ("chat/completions", {**CHAT, "service_tier": "flex"}, "service_tier", "'auto'"),
        ("completions", {**TEXT, "length_penalty": 1.2}, "length_penalty", "less than or equal to 1"),
        ("completions", {**TEXT, "use_beam_search": True}, "use_beam_search", "False"),
        ("completions", {**TEXT, "n": 3, "best_of": 2}, "best_of", "n or more"),
        ("completions", {**TEXT, "best_of": 2, "stream": True}, "best_of", "stream"),
        ("completions", {**TEXT, "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        ("completions", {**TEXT, "prompt_logprobs": -1}, "prompt_logprobs", "greater than or equal to 0"),
        ("completions", {**TEXT, "logprob_token_ids": [1]}, "logprob_token_ids", "needs logprobs"),
        ("completions", {**TEXT, "allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
        ("completions", {**TEXT, "allowed_token_ids": [263]}, None, "allowed token id 263"),
        ("completions", {**TEXT, "min_tokens": 9, "max_tokens": 8}, "min_tokens", "0 to 8"),
        ("completions", {**TEXT, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "1 or more"),
        ("completions", {**TEXT, "stop": "a<eos>"}, None, "special token '<eos>'"),
        ("chat/completions", {**CHAT, "continue_final_message": True, "add_generation_prompt": True}, None, "exclude"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice", "needs tools"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, None, "needs logprobs=true"),
        ("chat/completions", {**CHAT, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_schema"}}, None, "is missing"),
        ("chat/completions", {**CHAT, "response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ("completions", {"prompt": ""}, "prompt", "at least 1"),
        ("completions", {"prompt": []}, "prompt", "at least 1"),
        ("completions", {"prompt": 5}, "prompt", "valid string"),
        ("completions", {"prompt": [[1, 2], [999]]}, None, "token id 999 is outside 0..262"),
        ("completions", {**TEXT, "temperature": 2.5}, "temperature", "less than or equal to 2"),
        ("completions", {**TEXT, "temperature": "hot"}, "temperature", "valid number"),
        ("completions", {**TEXT, "n": 0}, "n", "greater than or equal to 1"),
        ("completions", {**TEXT, "n": True}, "n", "valid integer"),
        ("completions", {**TEXT, "max_tokens": 0}, "max_tokens", "1 or more"),
        ("completions", {**TEXT, "max_tokens": 511}, "max_tokens", "up to 510"),
        ("completions", {"prompt": "a" * 513}, "prompt", "the context holds 512"),
        ("completions", {**TEXT, "logit_bias": {"x": 1}}, None, "pattern"),
        ("completions", {**TEXT, "logit_bias": {"500": 1}}, None, "500 is outside"),
        ("completions", {**TEXT, "stream_options": {}}, "stream_options", "stream=true"),
        ("completions", {"prompt": ["a"] * 128, "n": 100}, None, "12800 choices"),
        ("completions", {"prompt": ["a"] * 129}, "prompt", "up to 128"),
        ("embeddings", {"input": "x"}, "model", "gives no embeddings"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(server: Served, path: str, body: Any, param: Any, message: str) -> None:
    response = server.post(f"/v1/{path}", body)
    error = response.json()["error"]
    assert response.status_code == 400 and message in error["message"], error
    assert error["type"] == "invalid_request_error"
    if param:
        assert error["param"] == param or error["param"].startswith(f"{param}."), error


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'{"prompt": "\xff"}', "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b'{"prompt": ' + b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "a"}', "", 415),
    ],
)
def test_bodies_that_are_none(server: Served, content: bytes, kind: str, status: int) -> None:
    headers = {"content-type": kind} if kind else {}
    response = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert response.status_code == status and response.json()["error"]["message"]


def test_text_and_ids(server: Served) -> None:
    text = prompt(random.Random(), 30) + "é€😀"
    got = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert got["count"] == len(got["tokens"]) == len(text.encode()[:-9]) + 9 and got["max_model_len"] == 512
    assert server.post("/detokenize", {"tokens": got["tokens"]}).json() == {"prompt": text}
    raw = [Vocabulary(server.llm.model.tokenizer).piece(id) for id in got["tokens"]]
    assert b"".join(bytes for _, bytes in raw).decode() == text and got["token_strs"] == [t for t, _ in raw]
    assert len(BYTES) == 256 and sorted(BYTES.values()) == list(range(256))
    refused = server.post("/detokenize", {"tokens": [263]})
    assert refused.status_code == 400 and "0..262" in refused.text


def test_paths_and_methods(server: Served) -> None:
    assert server.get("/v1/nothing").status_code == 404
    refused = server.get("/v1/completions")
    assert (
        refused.status_code == 405
        and refused.headers["allow"] == "POST"
        and "method" in refused.json()["error"]["message"]
    )
    named = httpx.get(f"{server.url}/health", headers={"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1" and named.json() == {"status": "ok"}
    assert "access-control-allow-origin" not in httpx.get(server.url, headers={"origin": "http://else.where"}).headers


def test_keys_are_asked_for(folder: Path) -> None:
    with served(folder, keys=("k1", "k2"), origins=("http://a.test",)) as s:
        for key in ("k1", "k2"):
            assert s.client(api_key=key).models.list().data
        for key in ("k3", "k", "k11"):
            with pytest.raises(openai.AuthenticationError):
                s.client(api_key=key).models.list()
        assert s.get("/state").status_code == 401 and s.post("/tokenize", {"prompt": "a"}).status_code == 401
        assert [s.get(path).status_code for path in ("/health", "/ready", "/metrics", "/")] == [200] * 4
        asked = {"origin": "http://a.test", "access-control-request-method": "POST"}
        assert httpx.options(f"{s.url}/v1/completions", headers=asked).headers["access-control-allow-origin"]
