"""The server under requests generated from its own OpenAPI description, valid and not. `make fuzz` sends 10,000."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from served import PATIENCE, served
from tiny import tiny

from intaglio.server.prepare import Limits

HERE = Path(__file__).parent
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection,unsupported_method"
)


def fuzz(url: str, cases: int, seed: int | None = None) -> subprocess.CompletedProcess[str]:
    """`cases` requests an operation at most."""
    words = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml"), "run",
        f"{url}/openapi.json", "--max-examples", str(cases), "--phases", "fuzzing", "--checks", CHECKS,
        "--mode", "all", "--request-timeout", "60", "--max-failures", "3", "--no-color",
    ]  # fmt: skip
    words += [] if seed is None else ["--seed", str(seed)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60 * PATIENCE)


def test_generated_requests_find_no_fault(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path / "tiny", num_hidden_layers=2)
    with served(folder, llm={"device": "oracle", "context": 48, "max_waiting": 64}, limits=Limits(timeout=1)) as s:
        done = fuzz(s.url, 25)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


if __name__ == "__main__":
    pytest.importorskip("schemathesis")
