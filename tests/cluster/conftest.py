"""Fixtures of the tests with real replicas: the model, and a single server whose answers theirs must equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.served import TOOLS, Served, served

from intaglio.model import BUNDLED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, called tiny, with a chat template that takes tools."""
    path = tmp_path_factory.mktemp("cluster") / "tiny"
    path.mkdir()
    for file in BUNDLED.iterdir():
        (path / file.name).symlink_to(file)
    (path / "chat_template.jinja").write_text(TOOLS)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Served]:
    with served(folder, {"device": "host"}) as s:
        yield s
