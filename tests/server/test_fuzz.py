"""A few hundred generated requests find no fault in the server; `make fuzz` sends 10,000."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from support.fuzz import fuzz
from support.served import served
from support.tiny import tiny


def test_generated_requests_find_no_fault(tmp_path: Path) -> None:
    done = fuzz(tiny("llama", tmp_path / "tiny", num_hidden_layers=2), 200)
    output = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, output
    found = re.search(r"(\d+) generated", output)
    assert found and int(found[1]) > 75, output  # of the second half


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "!", "n": 3}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
def test_a_stream_is_as_described(tmp_path: Path, path: str, asked: dict[str, Any]) -> None:
    """Generated requests that are valid and streamed are few."""
    folder = tiny("llama", tmp_path / "tiny", num_hidden_layers=2)
    with served(folder, llm={"device": "oracle", "context": 48}) as s:
        schema = schemathesis.openapi.from_url(f"{s.url}/openapi.json")
        case = schema[path]["POST"].Case(body={**asked, "stream": True}, media_type="application/json")
        answer = case.call()
        assert answer.status_code == 200 and answer.headers["content-type"][0].startswith("text/event-stream")
        case.validate_response(answer)
