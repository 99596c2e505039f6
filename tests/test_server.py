"""The HTTP server by way of the official client: every endpoint, every option, every refusal; against LLM as truth."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import TOOLS, Served, Slow, served, wait_for
from tiny import tiny

from intaglio import LLM, SamplingParams
from intaglio.batch import Batch
from intaglio.server.prepare import Limits
from intaglio.server.vocabulary import BYTES, Vocabulary

USER = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose chat template takes tools and may reason."""
    path = tiny("llama", tmp_path_factory.mktemp("server") / "tiny", num_hidden_layers=2, max_position_embeddings=512)
    (path / "chat_template.jinja").write_text(TOOLS)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with served(folder) as s:
        yield s


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").quiet()


@pytest.fixture(scope="module")
def truth(folder: Path) -> LLM:
    return LLM(folder, device="reference")


def prompt(rng: random.Random, n: int) -> str:
    return "".join(rng.choice("abcdefgh ,.:\n") for _ in range(n))


def streaming(s: Served, tokens: int = 200) -> Any:
    """A stream of so many tokens: none that the model draws ends it."""
    asked: Any = {"max_tokens": tokens, "extra_body": {"ignore_eos": True}}
    return s.client().completions.create(model="tiny", prompt="a", stream=True, **asked)


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
    assert got.usage.prompt_tokens == sum(len(truth.tokenizer.encode(p)) for p in prompts)
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
    ids = truth.tokenizer.encode(text)
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
    letter = Vocabulary(server.llm.tokenizer).piece(token)[0]
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
        told = client.completions.create(model="tiny", prompt="x", max_tokens=30, extra_body=body).choices[0].text
        assert told in allowed
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
        calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
        reason = chunks[-1].choices[0].finish_reason
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
    else:
        calls, reason = got.choices[0].message.tool_calls, got.choices[0].finish_reason
        assert got.choices[0].message.content is None
    [call] = calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["day"] in (1, 2)
    assert call.id.startswith("call_") and reason == "tool_calls"
    asked["tool_choice"] = "required"
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
    ids = {c: i for i in range(256) if len(c := Vocabulary(server.llm.tokenizer).piece(i)[0]) == 1}
    client = server.client()
    got: Any = client.chat.completions.create(model="tiny", messages=USER, max_tokens=8, extra_body=body)
    assert got.choices[0].message.content == "" and got.choices[0].message.reasoning_content
    assert ids["<"] < 256
    grammar = {"response_format": {"type": "json_object"}}
    with pytest.raises(openai.BadRequestError, match="enable_thinking=false"):
        client.chat.completions.create(model="tiny", messages=USER, extra_body={**body, **grammar})
    with pytest.raises(openai.BadRequestError, match="does not read it"):
        client.chat.completions.create(model="tiny", messages=USER, reasoning_effort="low")


CHAT, TEXT = {"messages": USER}, {"prompt": "abc"}
UNSUPPORTED = (
    "audio",
    "functions",
    "modalities",
    "prediction",
    "service_tier",
    "store",
    "web_search_options",
    "best_of",
)


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        *(("chat/completions", {**CHAT, name: 1}, name, f"{name} is not supported here") for name in UNSUPPORTED),
        *(("completions", {**TEXT, n: 1}, n, f"{n} is not supported") for n in ("suffix", "best_of", "x")),
        ("chat/completions", {}, "messages", "messages is missing"),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role", "'user'"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        ("chat/completions", {**CHAT, "parallel_tool_calls": False}, "parallel_tool_calls", "True"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice", "needs tools"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, None, "needs logprobs=true"),
        ("chat/completions", {**CHAT, "max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "give one"),
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
    raw = [Vocabulary(server.llm.tokenizer).piece(id) for id in got["tokens"]]
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


def metrics(s: Served) -> dict[str, float]:
    """Every sample without its model: {name or name{label}: value}."""
    out = {}
    for family in text_string_to_metric_families(s.get("/metrics").text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "tiny" and sample.labels.pop("engine") == "0"
            out[sample.name + "".join(f"/{v}" for v in sample.labels.values())] = sample.value
    return out


def test_metrics_say_what_happened(folder: Path) -> None:
    rng = random.Random()
    with served(folder) as s:
        lengths = [rng.randrange(1, 20) for _ in range(4)]
        for n in lengths:
            s.client().completions.create(
                model="tiny", prompt=prompt(rng, 40), max_tokens=n, n=2, extra_body={"ignore_eos": True}
            )
        with pytest.raises(openai.BadRequestError):
            s.client().completions.create(model="tiny", prompt=[999])
        s.quiet()
        m = metrics(s)
        assert m["vllm:generation_tokens_total"] == 2 * sum(lengths) == m["vllm:request_generation_tokens_sum"]
        assert m["vllm:prompt_tokens_total"] == 8 * 40 == m["vllm:request_prompt_tokens_sum"]
        assert m["vllm:request_success_total/length"] == 8 == m["vllm:e2e_request_latency_seconds_count"]
        assert m["vllm:time_to_first_token_seconds_count"] == 8 == m["intaglio:requests_admitted_total"]
        assert m["vllm:inter_token_latency_seconds_count"] == 2 * sum(lengths) - 8
        assert m["vllm:num_requests_running"] == m["vllm:num_requests_waiting"] == m["vllm:kv_cache_usage_perc"] == 0
        assert m["vllm:iteration_tokens_total_count"] == m["intaglio:steps_total"]
        assert m["vllm:prefix_cache_hits_total"] == s.llm.engine.counts.cached_tokens
        state = s.get("/state").json()
        assert state["output_tokens"] == 2 * sum(lengths) and len(state["steps"]) == m["intaglio:steps_total"]
        last = state["steps"][-3][0]
        assert s.get(f"/state?since={last}").json()["steps"] == state["steps"][-2:]
        assert s.get("/state?since=x").status_code == 400


def test_a_full_queue_says_when_to_come_back(folder: Path) -> None:
    with served(folder, llm={"max_sequences": 1, "max_waiting": 1}) as s:
        gate = threading.Event()
        s.llm.engine.executable = Slow(s.llm.engine.executable, before=lambda _: gate.wait(60) and None)
        running = streaming(s, 16)
        wait_for(lambda: s.llm.engine.gauges().running == 1)
        rest = [threading.Thread(target=s.post, args=("/v1/completions", {"prompt": "b"})) for _ in range(2)]
        for t in rest:
            t.start()
        gate.set()
        for t in rest:
            t.join()
        assert len(list(running)) > 1
        gate.clear()
        s.quiet()
        with s.client() as client:
            first = client.completions.create(model="tiny", prompt="a", stream=True, max_tokens=200)
            wait_for(lambda: s.llm.engine.gauges().running == 1)
            pending = [threading.Thread(target=s.post, args=("/v1/completions", {"prompt": "b"}))]
            pending[0].start()
            wait_for(lambda: s.service.open == 2)
            statuses: list[httpx.Response] = []
            late = threading.Thread(target=lambda: statuses.append(s.post("/v1/completions", {"prompt": "c"})))
            late.start()
            wait_for(lambda: s.service.open == 3)
            gate.set()
            late.join()
            first.close()
            pending[0].join()
        assert statuses[0].status_code == 429 and int(statuses[0].headers["retry-after"]) >= 1
        assert statuses[0].json()["error"]["code"] == "queue_full"


def test_too_many_open_requests(folder: Path) -> None:
    with served(folder, max_open=2) as s:
        gate = threading.Event()
        s.llm.engine.executable = Slow(s.llm.engine.executable, before=lambda _: gate.wait(60) and None)
        streams = [s.client().completions.create(model="tiny", prompt="a", stream=True) for _ in range(1)]
        t = threading.Thread(target=s.post, args=("/v1/completions", {"prompt": "b"}))
        t.start()
        wait_for(lambda: s.service.open == 2)
        refused = s.post("/v1/completions", {"prompt": "b"})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert s.get("/health").status_code == 200 and s.get("/metrics").status_code == 200
        gate.set()
        t.join()
        assert [c.choices[0].finish_reason for c in streams[0]][-1] in ("length", "stop")


def test_what_would_be_late_is_refused_at_once(folder: Path) -> None:
    with served(folder) as s:
        inner = s.llm.engine.executable
        s.llm.engine.executable = Slow(inner, before=lambda batch: time.sleep(0.01 * len(batch.tokens)))
        ask: Any = {"prompt": "abc", "max_tokens": 10, "ignore_eos": True, "timeout": 0.8}
        assert s.post("/v1/completions", ask).status_code == 200  # alone: 13 rows, 0.13 s and what the machine adds
        many: Any = {"ignore_eos": True}
        crowd = s.client().completions.create(
            model="tiny", prompt="a", n=16, max_tokens=30, temperature=1, stream=True, extra_body=many
        )
        wait_for(lambda: s.llm.engine.gauges().running == 16)
        late = s.post("/v1/completions", ask)  # ten steps of 17 rows: 1.7 s
        assert late.status_code == 429 and int(late.headers["retry-after"]) >= 1
        assert late.json()["error"]["code"] == "late" and "its timeout is 0.8 s" in late.json()["error"]["message"]
        told = 'intaglio:requests_refused_total{engine="0",model_name="tiny",reason="late"} 1.0'
        wait_for(lambda: told in s.get("/metrics").text)
        crowd.close()


def test_deadlines_end_with_a_reason(folder: Path) -> None:
    with served(folder, llm={"max_sequences": 1}, limits=Limits(timeout=500)) as s:
        s.llm.engine.executable = Slow(s.llm.engine.executable, 0.05)
        body: Any = {"ignore_eos": True, "timeout": 0.4}
        got = s.client().completions.create(model="tiny", prompt="a", max_tokens=200, extra_body=body)
        assert got.choices[0].finish_reason == "deadline" and 0 < got.usage.completion_tokens < 20
        running = streaming(s)
        next(iter(running))
        with pytest.raises(openai.InternalServerError) as late:
            s.client().completions.create(model="tiny", prompt="b", extra_body={"queue_timeout": 0.01})
        assert late.value.status_code == 503 and late.value.code == "deadline"
        assert late.value.response.headers["retry-after"] == "1"
        running.close()


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_worked_for(folder: Path, stream: bool) -> None:
    with served(folder) as s:
        slow = Slow(s.llm.engine.executable, 0.02)
        s.llm.engine.executable = slow
        body = {"prompt": "abc", "max_tokens": 200, "ignore_eos": True, "stream": stream}
        with httpx.Client() as client:
            if stream:
                with client.stream("POST", f"{s.url}/v1/completions", json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{s.url}/v1/completions", json=body, timeout=0.5)
        wait_for(lambda: s.llm.engine.counts.finished["abort"] == 1)
        assert s.llm.engine.counts.output_tokens < 150


def test_a_failing_step_ends_only_its_cause(folder: Path) -> None:
    with served(folder) as s:

        def fail(batch: Batch) -> None:
            if 7 in batch.tokens.tolist():
                raise RuntimeError("seven")

        s.llm.engine.executable = Slow(s.llm.engine.executable, 0.01, fail)
        good = s.client().completions.create(
            model="tiny", prompt="abc", stream=True, max_tokens=30, logit_bias={"7": -100}, temperature=0
        )
        first = next(iter(good))
        with pytest.raises(openai.InternalServerError, match="seven") as bad:
            s.client().completions.create(model="tiny", prompt=[7, 8])
        assert bad.value.status_code == 500 and bad.value.code == "step_fault"
        with pytest.raises(openai.APIError, match="seven"):
            list(s.client().completions.create(model="tiny", prompt=[7, 8], stream=True))
        rest = list(good)
        alone = LLM(folder, device="reference").generate("abc", SamplingParams(30, logit_bias={7: -100}))[0]
        assert first.choices[0].text + "".join(c.choices[0].text for c in rest) == alone.text


def test_draining_finishes_and_admits_nothing(folder: Path) -> None:
    with served(folder) as s:
        s.llm.engine.executable = Slow(s.llm.engine.executable, 0.02)
        running = streaming(s, 60)
        chunks = [next(iter(running))]
        s.service.drain()
        assert s.get("/health").status_code == 200
        ready = s.get("/ready")
        assert ready.status_code == 503 and ready.json()["error"]["code"] == "draining"
        with pytest.raises(openai.InternalServerError) as refused:
            s.client().completions.create(model="tiny", prompt="b")
        assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"] == "1"
        chunks += list(running)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert s.stop() == 0


def test_told_twice_everything_ends(folder: Path) -> None:
    with served(folder) as s:
        s.llm.engine.executable = Slow(s.llm.engine.executable, 0.05)
        running = streaming(s)
        next(iter(running))
        s.service.drain()
        s.service.halt()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(running)
        s.thread.join(60)
        assert s.llm.engine.idle and s.llm.engine.pool.held == 0


def test_a_crash_ends_streams_and_the_process(folder: Path) -> None:
    with served(folder) as s:
        slow = Slow(s.llm.engine.executable, 0.02)
        s.llm.engine.executable = slow
        running = streaming(s)
        next(iter(running))

        def crash(batch: Batch) -> None:
            raise SystemExit("a bug in the engine's thread")

        slow.before = crash
        with pytest.raises(openai.APIError, match="the engine crashed"):
            list(running)
        s.thread.join(60)
        assert s.code == 1


def test_every_chunk_tells_the_tokens_so_far_if_asked(server: Served) -> None:
    asked: Any = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 9, "n": 2, "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *parts, last = server.client().completions.create(**asked, stream_options=options, extra_body={"ignore_eos": True})
    told = [p.usage.completion_tokens for p in parts]
    assert told == sorted(told) and told[0] >= 1 and told[-1] == last.usage.completion_tokens == 18
    assert {p.usage.prompt_tokens for p in [*parts, last]} == {3}
    assert all(p.usage.total_tokens == 3 + p.usage.completion_tokens for p in [*parts, last])
