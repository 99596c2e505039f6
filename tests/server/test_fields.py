"""Request fields beyond OpenAI's basic ones: the effect of each, compared with the class LLM or its definition."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from support.scripted import scripted
from support.served import Served, prompt, served

from intaglio import LLM, SamplingParams
from intaglio.runtime import Grammar
from intaglio.server.vocabulary import Vocabulary

USER = [{"role": "user", "content": "hello there"}]
HINTS: dict[str, Any] = {
    "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x",
    "prompt_cache_key": "y", "prompt_cache_retention": "24h", "length_penalty": 1.0, "use_beam_search": False,
    "spaces_between_special_tokens": True,
}  # fmt: skip


def complete(server: Served, **fields: Any) -> Any:
    """The body of a completion."""
    answer = server.post("/v1/completions", {"prompt": "abc", "max_tokens": 6, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(server: Served, **fields: Any) -> Any:
    answer = server.post("/v1/chat/completions", {"messages": USER, "max_tokens": 6, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_hints_are_taken_and_named(server: Served) -> None:
    plain = complete(server)["choices"]
    for stream in (False, True):
        body = {"prompt": "abc", "max_tokens": 6, "temperature": 0, "stream": stream}
        given = server.post("/v1/completions", {**body, **HINTS})
        assert given.headers["x-ignored-fields"] == ", ".join(HINTS), given.text
        assert "x-ignored-fields" not in server.post("/v1/completions", body).headers
        if not stream:
            assert given.json()["choices"] == plain
    asked = {"messages": [{**USER[0], "extra": 1}], "max_tokens": 3, "verbosity": "low"}
    response = server.post("/v1/chat/completions", asked)
    assert response.status_code == 200 and response.headers["x-ignored-fields"] == "verbosity, messages.0.extra"
    asked = {"messages": [{**USER[0], "\u6c34\r\nx": 1}], "max_tokens": 3}  # a name that a header cannot hold as it is
    response = server.post("/v1/chat/completions", asked)
    assert response.status_code == 200 and response.headers["x-ignored-fields"] == "messages.0.%E6%B0%B4%0D%0Ax"


def test_null_is_the_same_as_nothing(server: Served) -> None:
    names = ("functions", "function_call", "audio", "modalities", "prediction", "best_of", "top_logprobs", "metadata")
    nothing = {"logprobs": False, "top_logprobs": 0}
    assert chat(server, **dict.fromkeys(names))["choices"] == chat(server, **nothing)["choices"]
    history = [
        *USER,
        {"role": "assistant", "content": "hi", "refusal": None, "audio": None, "function_call": None,
         "annotations": [], "tool_calls": None},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": None, "refusal": "no"},
        *USER,
    ]  # fmt: skip
    ids = server.post("/tokenize", {"messages": history}).json()["tokens"]
    text = server.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert "<assistant>hi<eos><assistant><eos><assistant>no<eos><user>" in text
    refused = server.post("/v1/chat/completions", {"messages": [{"role": "assistant", "audio": {"id": "x"}}]})
    assert refused.status_code == 400 and "audio" in refused.json()["error"]["message"]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1]}, "strict": False}}
    assert chat(server, response_format=form)["choices"][0]["message"]["content"] == "1"


def test_min_tokens_and_the_stop_string(server: Served, truth: LLM) -> None:
    [free] = truth.generate("abc", SamplingParams(40, ignore_eos=True))
    stop = free.text[3:5]
    fields = {"max_tokens": 40, "ignore_eos": True, "stop": [stop]}
    cut = complete(server, **fields)["choices"][0]
    assert cut["text"] == free.text[: free.text.index(stop)] and cut["stop_reason"] == stop
    kept = complete(server, **fields, include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == cut["text"] + stop
    more = complete(server, **fields, min_tokens=20)["choices"][0]
    assert free.text.startswith(more["text"]) and len(more["text"]) > len(cut["text"])
    id = free.token_ids[4]
    assert complete(server, max_tokens=40, ignore_eos=True, stop_token_ids=[id])["choices"][0]["stop_reason"] == id
    ended = complete(server, max_tokens=9, logit_bias={"258": 100})
    assert ended["usage"]["completion_tokens"] == 1 and ended["choices"][0]["stop_reason"] is None
    assert complete(server, max_tokens=9, min_tokens=5, logit_bias={"258": 100})["usage"]["completion_tokens"] == 6


def test_which_tokens_may_come(server: Served) -> None:
    letters = server.llm.model.tokenizer.encode("abc", special=False)
    only = complete(server, allowed_token_ids=letters, max_tokens=20, return_token_ids=True)["choices"][0]
    assert set(only["token_ids"]) <= set(letters) and len(only["token_ids"]) == 20
    bias = {str(id): 100 for id in letters}
    word = only["text"][:2]
    without = complete(server, logit_bias=bias, max_tokens=30, bad_words=[word], temperature=1)["choices"][0]["text"]
    assert word not in without and len(without) == 30


def test_token_ids_come_with_the_text(server: Served, truth: LLM) -> None:
    [wanted] = truth.generate("abc", SamplingParams(6))
    got = complete(server, return_token_ids=True)["choices"][0]
    assert got["token_ids"] == wanted.token_ids and got["prompt_token_ids"] == wanted.prompt_token_ids
    assert complete(server)["choices"][0]["token_ids"] is None
    body: Any = {"model": "tiny", "prompt": "abc", "max_tokens": 6, "temperature": 0, "logprobs": 0, "stream": True}
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    chunks = [c.choices[0] for c in server.client().completions.create(**body, extra_body=extra)]
    assert [id for c in chunks for id in c.token_ids] == wanted.token_ids
    assert [t for c in chunks for t in c.logprobs.tokens] == [f"token_id:{id}" for id in wanted.token_ids]
    assert [c.model_extra.get("prompt_token_ids") for c in chunks] == [
        wanted.prompt_token_ids, *[None] * (len(chunks) - 1)
    ]  # fmt: skip
    answer = chat(server, return_token_ids=True)
    [said] = truth.generate([truth.chat_prompt(USER)], SamplingParams(6))
    assert answer["prompt_token_ids"] == said.prompt_token_ids and answer["choices"][0]["token_ids"] == said.token_ids
    lines = server.post("/v1/chat/completions", {"messages": USER, "max_tokens": 3, "stream": True, **extra}).text
    parts = [json.loads(line[6:]) for line in lines.split("\n\n")[:-2]]
    assert ["prompt_token_ids" in p for p in parts] == [True] + [False] * (len(parts) - 1)


def test_a_prompt_may_be_cut(server: Served) -> None:
    ids = list(range(97, 105))
    for side, wanted in (("left", ids[-4:]), ("right", ids[:4]), (None, ids[-4:])):
        got = complete(server, prompt=ids, truncate_prompt_tokens=4, truncation_side=side, return_token_ids=True)
        assert got["choices"][0]["prompt_token_ids"] == wanted
    long = complete(server, prompt=[97] * 600, truncate_prompt_tokens=-1, max_tokens=9)
    assert long["usage"]["prompt_tokens"] + 9 == 512 + 1
    assert chat(server, truncate_prompt_tokens=3)["usage"]["prompt_tokens"] == 3


def test_special_tokens_in_the_text(server: Served) -> None:
    bias = {"260": 100}
    assert complete(server, logit_bias=bias, max_tokens=2)["choices"][0]["text"] == ""
    shown = complete(server, logit_bias=bias, max_tokens=2, skip_special_tokens=False)["choices"][0]["text"]
    assert shown == "<assistant>" * 2
    stopped = complete(server, logit_bias=bias, stop=["<assistant>"])
    assert stopped["choices"][0]["finish_reason"] == "stop" and stopped["usage"]["completion_tokens"] == 1
    bos = complete(server, add_special_tokens=True)["usage"]["prompt_tokens"]
    assert bos >= complete(server, add_special_tokens=False)["usage"]["prompt_tokens"]


def test_the_best_of_several(server: Served, truth: LLM) -> None:
    seed = random.randrange(2**40)
    made = truth.generate("abc", SamplingParams(6, temperature=1.0, seed=seed, n=5))
    ranked = sorted(made, key=lambda o: -float(np.mean(o.logprobs)))
    got = complete(server, best_of=5, n=2, temperature=1, seed=seed)
    assert [c["text"] for c in got["choices"]] == [o.text for o in ranked[:2]]
    assert [c["index"] for c in got["choices"]] == [0, 1]
    assert got["usage"]["completion_tokens"] == sum(len(o.token_ids) for o in made)


def test_seeds_may_be_negative(server: Served) -> None:
    once, again = (complete(server, seed=-5, temperature=1)["choices"][0]["text"] for _ in range(2))
    assert once == again


def test_scores_of_a_prompt(server: Served, truth: LLM) -> None:
    text = prompt(random.Random(), 9)
    ids = truth.model.tokenizer.encode(text)
    rows = truth.logits([ids])[0].astype("float64")
    rows -= np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) + rows.max(1, keepdims=True)
    got = complete(server, prompt=text, prompt_logprobs=2)["choices"][0]
    assert got["logprobs"] is None and len(got["prompt_logprobs"]) == len(ids) and got["prompt_logprobs"][0] is None
    for row, id, scores in zip(rows, ids[1:], got["prompt_logprobs"][1:], strict=False):
        assert scores[str(id)]["logprob"] == pytest.approx(row[id], abs=1e-4)
        assert scores[str(id)]["rank"] == 1 + int((row > row[id]).sum()) and 2 <= len(scores) <= 3
        assert {e["rank"] for e in scores.values()} >= {1, 2}
    said = chat(server, prompt_logprobs=0)
    assert len(said["prompt_logprobs"]) == said["usage"]["prompt_tokens"] and chat(server)["prompt_logprobs"] is None
    assert all(len(entry) == 1 for entry in said["prompt_logprobs"][1:])


def test_scores_of_chosen_ids(server: Served) -> None:
    [a] = server.llm.model.tokenizer.encode("a", special=False)
    got = complete(server, logprobs=1, logprob_token_ids=[a, 5])["choices"][0]["logprobs"]
    for token, top in zip(got["tokens"], got["top_logprobs"], strict=True):
        assert set(top) == {"a", Vocabulary(server.llm.model.tokenizer).name(5), token}
    content = chat(server, logprobs=True, logprob_token_ids=[a])["choices"][0]["logprobs"]["content"]
    assert all([t["bytes"] for t in entry["top_logprobs"]] == [[97]] for entry in content)


def test_no_likeliest_tokens_are_the_token_itself(server: Served) -> None:
    scores = complete(server, logprobs=0)["choices"][0]["logprobs"]
    for token, logprob, top in zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True):
        assert top == {token: logprob}


def test_every_likeliest_token_has_a_key_of_its_own(server: Served) -> None:
    """Tokens that are part of a character have the same text."""
    name = Vocabulary(server.llm.model.tokenizer).name
    ids = [id for id in range(256) if name(id).startswith("bytes:")][:20]
    got = complete(server, logprobs=20, allowed_token_ids=ids, logprob_token_ids=ids)["choices"][0]["logprobs"]
    assert all(len(top) == 20 and all(key.startswith("bytes:\\x") for key in top) for top in got["top_logprobs"])
    assert all(len(top) >= 20 for top in complete(server, logprobs=20)["choices"][0]["logprobs"]["top_logprobs"])


@pytest.mark.parametrize("text", ["abc", "a😀é", "<eos>b"])
def test_offsets_are_places_in_the_text(server: Served, text: str) -> None:
    with scripted(server.llm, lambda _: "é😀x"):
        got = complete(server, prompt=text, echo=True, logprobs=0, max_tokens=20)["choices"][0]
    pieces = [(at, got["logprobs"]["tokens"][i]) for i, at in enumerate(got["logprobs"]["text_offset"])]
    assert got["text"].startswith(text) and pieces[0][0] == 0
    assert [at for at, _ in pieces] == sorted(at for at, _ in pieces)
    for at, token in pieces:
        assert token.startswith("bytes:") or token == "<eos>" or got["text"][at:].startswith(token), (at, token)
    whole = bytes(text + "é😀x", "utf-8")
    places = [at for c, at in zip(text + "é😀x", range(99), strict=False) for _ in c.encode()]
    if "<" not in text:
        assert len(whole) == len(places) and [at for at, _ in pieces][: len(places)] == places


def test_echo_leaves_out_what_the_tokenizer_adds(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A beginning and an end of sequence have no text in the response; special tokens that the prompt spells have."""
    tokenizer = server.llm.model.tokenizer
    plain = tokenizer.encode
    [eos] = plain("<eos>", False)

    def encode(self: object, text: str, special: bool = True) -> list[int]:
        return [*[eos] * special, *plain(text, False), *[eos] * special]

    monkeypatch.setattr(type(tokenizer), "encode", encode)
    for text, at in (("abc", [0, 0, 1, 2, 3]), ("a<eos>", [0, 0, 1, 6])):
        with scripted(server.llm, lambda _: "xy"):
            got = complete(server, prompt=text, echo=True, logprobs=0, max_tokens=20)["choices"][0]
        assert got["text"] == text + "xy", text
        assert got["logprobs"]["text_offset"][: len(at) + 2] == [*at, len(text), len(text) + 1]


def test_a_message_may_be_continued(server: Served, truth: LLM) -> None:
    messages = [*USER, {"role": "assistant", "content": " An apple a day"}]
    fields = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    got = chat(server, **fields)["choices"][0]["message"]["content"]
    start = "<user>hello there<eos><assistant> An apple a day"
    [wanted] = truth.generate([truth.model.tokenizer.encode(start, special=False)], SamplingParams(6))
    assert got == wanted.text
    assert chat(server, **fields, echo=True)["choices"][0]["message"]["content"] == " An apple a day" + got
    ids = server.post("/tokenize", fields).json()["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json()["prompt"] == start
    bare = server.post("/tokenize", {"messages": USER, "add_generation_prompt": False}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": bare}).json()["prompt"] == "<user>hello there<eos>"
    empty = server.post("/tokenize", {**fields, "messages": [{"role": "assistant", "content": " "}]})
    assert empty.status_code == 400


def test_other_fields_of_vllm(server: Served) -> None:
    assert complete(server, request_id="mine")["id"] == "cmpl-mine"
    assert chat(server, request_id="mine", max_completion_tokens=6)["id"] == "chatcmpl-mine"
    assert server.get("/version").json()["version"] and server.get("/ping").json() == {"status": "ok"}
    role = chat(server, messages=[{"role": "critic", "content": "so"}])
    assert role["choices"][0]["message"]["role"] == "assistant"
    assert not {"reasoning_tokens"} & set(complete(server)["usage"])


@pytest.mark.parametrize("parallel", [None, False])
@pytest.mark.parametrize("stream", [False, True])
def test_at_most_one_call(server: Served, parallel: bool | None, stream: bool) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in "fg"]
    calls = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>'
    with scripted(server.llm, lambda _: calls):
        asked: Any = {"model": "tiny", "messages": USER, "tools": tools, "parallel_tool_calls": parallel}
        got: Any = server.client().chat.completions.create(**asked, stream=stream)
        if stream:
            made: dict[int, list[str]] = {}
            for chunk in got:
                for c in chunk.choices[0].delta.tool_calls or ():
                    entry = made.setdefault(c.index, ["", ""])
                    entry[0] += c.function.name or ""
                    entry[1] += c.function.arguments or ""
            said = list(made.values())
        else:
            said = [[c.function.name, c.function.arguments] for c in got.choices[0].message.tool_calls]
    assert said == [["f", '{"a": 1}'], ["g", "{}"]][: 1 if parallel is False else 2]


def test_keys_of_a_schema_keep_their_order(server: Served) -> None:
    names = random.sample(["reasoning", "answer", "zebra", "alpha"], 4)
    schema = {
        "type": "object", "properties": {n: {"enum": [1]} for n in names}, "required": names,
        "additionalProperties": False,
    }  # fmt: skip
    wanted = "{" + ", ".join(f'"{n}": 1' for n in names) + "}"
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert chat(server, max_tokens=90, response_format=form)["choices"][0]["message"]["content"] == wanted
    assert json.loads(Grammar("json_schema", schema).text) == schema


def test_a_template_may_read_parts(folder: Path, tmp_path: Path) -> None:
    templates = {
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}": True,
        "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}": True,
        "{% for m in messages %}{{ m['content'] }}{% endfor %}": True,
        "{% for m in messages %}{{ m['role'] }}{% endfor %}": False,
    }
    with served(folder) as s:
        for template, good in templates.items():
            s.llm.use_chat_template(template)
            answer = s.post("/tokenize", {"messages": USER})
            assert answer.status_code == (200 if good else 400), template
            if good:
                text = s.post("/detokenize", {"tokens": answer.json()["tokens"]}).json()["prompt"]
                assert text == "hello there"
        with pytest.raises(ValueError, match="does not parse"):
            s.llm.use_chat_template("{% for %}")


def test_a_chat_without_a_template_says_what_helps(tmp_path: Path) -> None:
    from support.tiny import tiny, tokenizer

    bare = tokenizer(tiny("llama", tmp_path / "bare", num_hidden_layers=1))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    with served(bare) as s, pytest.raises(openai.BadRequestError, match="--chat-template FILE"):
        s.client().chat.completions.create(model="tiny", messages=USER)
