"""Threads of a server: only the driver's thread calls the engine of a served model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.guard import Guard
from support.served import Served
from support.tiny import tiny, tokenizer

from intaglio.llm import LLM
from intaglio.server.served_model import ServedModel
from intaglio.server.service import Options, Service


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny("llama", tmp_path_factory.mktemp("threads") / "tiny", num_hidden_layers=1, max_position_embeddings=512)
    return tokenizer(path)


def accesses_of_a_session(folder: Path) -> list[tuple[str, str]]:
    """Every (thread, attribute) by which the engine was used while a server answered requests of all kinds."""
    llm = LLM(folder, device="reference")
    engine, accesses = llm.engine, list[tuple[str, str]]()
    llm.engine = Guard(engine, accesses)  # type: ignore[assignment]
    server = Served({"tiny": llm}, Options())
    try:
        accesses.clear()  # until the server is ready, the engine belongs to the thread that makes it
        use(server)
        seen = list(accesses)
        llm.engine = engine
        server.quiet()
    finally:
        server.stop()
    return seen


def use(server: Served) -> None:
    """Requests that are answered, streamed, refused and given up, and all the pages that show the engine's state."""
    prompt: dict[str, Any] = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4}
    assert server.post("/v1/completions", prompt).status_code == 200
    assert server.post("/v1/completions", {**prompt, "n": 2, "stream": True, "logprobs": 1}).status_code == 200
    assert server.post("/v1/completions", {**prompt, "prompt": "text", "echo": True}).status_code == 200
    assert server.post("/v1/completions", {**prompt, "max_tokens": 10**6}).status_code == 400
    assert server.post("/v1/completions", {**prompt, "prompt": [10**6]}).status_code == 400
    with server.client().completions.create(**{**prompt, "max_tokens": 40, "stream": True}) as stream:
        next(iter(stream))
    for path in ("/health", "/metrics", "/state", "/v1/models", "/"):
        server.get(path)


def foreign(accesses: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted({(thread, what) for thread, what in accesses if thread != "engine"})


def test_only_its_thread_touches_the_engine(folder: Path) -> None:
    accesses = accesses_of_a_session(folder)
    assert foreign(accesses) == []
    assert {"engine.add", "engine.step", "engine.abort", "engine.gauges"} <= {what for _, what in accesses}


def in_the_preparing_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = LLM.prepare

    def broken(self: LLM, *arguments: Any, **options: Any) -> Any:
        assert not self.engine.draining
        return prepare(self, *arguments, **options)

    monkeypatch.setattr(LLM, "prepare", broken)


def on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    admitting = Service.admitting

    def broken(self: Service, model: ServedModel) -> Any:
        assert len(model.llm.engine.scheduler.waiting) < 10**6
        return admitting(self, model)

    monkeypatch.setattr(Service, "admitting", broken)


@pytest.mark.parametrize(
    ("plant", "thread", "what"),
    [
        (in_the_preparing_thread, "prepare_0", "engine.draining"),
        (on_the_event_loop, "Thread-", "engine.scheduler.waiting"),
    ],
)
def test_a_planted_breach_is_caught(
    monkeypatch: pytest.MonkeyPatch, folder: Path,
    plant: Callable[[pytest.MonkeyPatch], None], thread: str, what: str,
) -> None:  # fmt: skip
    plant(monkeypatch)
    breaches = foreign(accesses_of_a_session(folder))
    assert any(name.startswith(thread) and used == what for name, used in breaches)
