"""Fixtures of the server tests: a tiny model, a server of it for each module, and an LLM that gives its answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.served import TOOLS, Served, served
from support.tiny import tiny

from intaglio import LLM


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
