"""Sampling defaults of a checkpoint's generation_config.json: what is read, what requests override, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.served import served

from intaglio import SamplingParams
from intaglio.server.defaults import sampling_defaults

GIVEN = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1, "min_p": None}
WANTED = {name: value for name, value in GIVEN.items() if value is not None}


def write(folder: Path, table: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(table))
    return folder


def test_what_is_read(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}
    a = write(tmp_path / "a", {**GIVEN, "do_sample": True, "eos_token_id": [1, 2], "max_new_tokens": 5})
    b = write(tmp_path / "b", {"temperature": 0.0, "top_k": -1})
    assert sampling_defaults(a) == WANTED and sampling_defaults(a, "none") == {}
    assert sampling_defaults(a, str(b)) == {"temperature": 0.0, "top_k": 0}
    assert sampling_defaults(a, str(b / "generation_config.json")) == {"temperature": 0.0, "top_k": 0}


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing; allowed: auto, none"):
        sampling_defaults(tmp_path, str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"generation_config.json: temperature is -1; .*--generation-config none"):
        sampling_defaults(write(tmp_path / "bad", {"temperature": -1}))


def test_requests_override_them(folder: Path) -> None:
    with served(folder, defaults={"tiny": {"temperature": 0.0, "repetition_penalty": 1.5}}) as s:
        made = s.llm.generate("abc", SamplingParams(12, repetition_penalty=1.5))[0].text
        plain = s.llm.generate("abc", SamplingParams(12))[0].text
        for fields, wanted in (({}, made), ({"repetition_penalty": 1.0}, plain)):
            got = s.post("/v1/completions", {"prompt": "abc", "max_tokens": 12, **fields}).json()
            assert got["choices"][0]["text"] == wanted
        assert s.service.models["tiny"].defaults["temperature"] == 0.0
