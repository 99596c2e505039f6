"""Two models in one server: requests reach the model that they name, and limits and metrics are separate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from support.served import Served, Slow, serving, wait_for
from support.tiny import tiny, tokenizer

from intaglio import LLM, SamplingParams
from intaglio.cli.serve import named_folders
from intaglio.machine import Machine
from intaglio.model import BUNDLED

NAMES = ("small", "large")
LAYERS = {"small": 1, "large": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {n: tokenizer(tiny("llama", root / n, num_hidden_layers=LAYERS[n])) for n in NAMES}


def loaded(folders: dict[str, Path], **options: Any) -> dict[str, LLM]:
    machine = Machine(models=2)
    return {name: LLM(folder, device="reference", machine=machine, **options) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[Served]:
    with serving(loaded(folders)) as s:
        yield s


def labelled(server: Served, name: str) -> dict[str, float]:
    """A metric by model_name."""
    found = re.findall(rf'^{name}{{engine="0",model_name="(\w+)"}} (\S+)$', server.get("/metrics").text, re.MULTILINE)
    return {model: float(value) for model, value in found}


def test_each_answers_for_itself(folders: dict[str, Path], server: Served) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    wanted = {name: LLM(folders[name], device="reference").generate("abc", params)[0].text for name in NAMES}
    assert wanted["small"] != wanted["large"]
    before = labelled(server, "vllm:generation_tokens_total")
    assert set(before) == set(NAMES)
    ask = {"prompt": "abc", "max_tokens": 20, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(8) as pool:
        given = [NAMES[i % 2] for i in range(8)]
        got = list(pool.map(lambda name: server.client().completions.create(model=name, **ask), given))
    assert [(c.model, c.choices[0].text) for c in got] == [(name, wanted[name]) for name in given]
    stream = server.client().completions.create(model="large", stream=True, **ask)
    assert "".join(c.choices[0].text for c in stream) == wanted["large"]
    after = labelled(server, "vllm:generation_tokens_total")
    assert {n: after[n] - before[n] for n in NAMES} == {"small": 80, "large": 100}
    assert labelled(server, "vllm:request_generation_tokens_count")["large"] >= 5
    server.quiet()


def test_all_are_listed_and_others_refused_by_name(folders: dict[str, Path], server: Served) -> None:
    client = server.client()
    assert [m.id for m in client.models.list()] == list(NAMES)
    assert client.models.retrieve("large").id == "large"
    for ask in (
        lambda: client.models.retrieve("tiny"),
        lambda: client.completions.create(model="tiny", prompt="a"),
        lambda: client.embeddings.create(model="tiny", input="a"),
    ):
        with pytest.raises(openai.NotFoundError, match="there is no model 'tiny'; there are 'small', 'large'") as e:
            ask()
        assert e.value.code == "model_not_found" and e.value.param == "model"
    missing = server.post("/v1/completions", {"prompt": "a"})
    assert missing.status_code == 400 and "model is missing; there are 'small'" in missing.json()["error"]["message"]
    for path, body in (("tokenize", {"prompt": "abc"}), ("detokenize", {"tokens": [5, 6]})):
        assert server.post(f"/{path}", {**body, "model": "large"}).status_code == 200
        assert server.post(f"/{path}", {**body, "model": "tiny"}).status_code == 404
    described = server.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
    assert described["properties"]["model"] == {"enum": list(NAMES)} and "model" in described["required"]


def test_the_state_of_each_is_shown(server: Served) -> None:
    first, large = server.get("/state").json(), server.get("/state?model=large").json()
    assert (first["model"], large["model"]) == NAMES and first["models"] == large["models"] == list(NAMES)
    assert server.get("/state?model=tiny").status_code == 404
    assert [server.get(path).status_code for path in ("/health", "/ready")] == [200, 200]


def test_a_full_queue_is_that_of_one_model(folders: dict[str, Path]) -> None:
    with serving(loaded(folders, max_sequences=1, max_waiting=1)) as s:
        large = s.llms["large"].engine
        large.executable = Slow(large.executable, 0.02)
        long = {"model": "large", "prompt": "a", "max_tokens": 60, "ignore_eos": True}
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(s.post, "/v1/completions", long)
            wait_for(lambda: len(large.scheduler.running) == 1)
            second = pool.submit(s.post, "/v1/completions", long)
            wait_for(lambda: len(large.scheduler.waiting) == 1)
            refused = s.post("/v1/completions", long)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert s.get("/ready").status_code == 200
            assert s.post("/v1/completions", {**long, "model": "small", "max_tokens": 3}).status_code == 200
            assert first.result().status_code == second.result().status_code == 200


def test_a_model_that_breaks_leaves_the_others(folders: dict[str, Path]) -> None:
    s_llms = loaded(folders)
    with serving(s_llms) as s:

        def crash(*_: object) -> None:
            raise SystemError("a bug")

        s_llms["large"].engine.step = crash  # type: ignore[method-assign, assignment]
        ask = {"prompt": "a", "max_tokens": 3}
        assert s.post("/v1/completions", {**ask, "model": "large"}).status_code == 500
        later = s.post("/v1/completions", {**ask, "model": "large"})
        assert later.status_code == 503 and "a bug" in later.json()["error"]["message"]
        assert s.post("/v1/completions", {**ask, "model": "small"}).status_code == 200
        health = s.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "large: the engine crashed: a bug"
        assert s.get("/ready").status_code == 200 and s.thread.is_alive()
        engine = s_llms["large"].engine
        for id in list(engine.requests):  # what the crash left in the engine
            engine.abort(id)


def test_names_on_the_command_line(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert named_folders([], None) == {BUNDLED.name: None} and named_folders([], "x") == {"x": None}
    assert named_folders(["x=/m/one", "/m/two"], None) == {"x": Path("/m/one"), "two": Path("/m/two")}
    assert named_folders([str(odd)], None) == {"a=b": odd} and named_folders([f"x={odd}"], None) == {"x": odd}
    assert named_folders(["/m/two"], "x") == {"x": Path("/m/two")}
    with pytest.raises(ValueError, match="--name x is for one model, here are 2; write NAME=MODEL for each"):
        named_folders(["/m/one", "/m/two"], "x")
    for wrong in (["/m/one", "/n/one"], ["=/m/one"]):
        with pytest.raises(ValueError, match="is empty or used twice; write NAME=MODEL"):
            named_folders(wrong, None)
