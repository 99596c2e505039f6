"""Fuzz test of the server: requests generated from its OpenAPI description, valid and not: `make fuzz CASES=10000`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from support.served import TEST_TIMEOUT_S, served
from support.tiny import tiny

from intaglio.server.openapi import POSTS
from intaglio.server.prepare import Limits

CONFIG = Path(__file__).parent / "schemathesis.toml"
MEMORY = 1.05  # of what the process held after the first half
CACHES = 64 << 20  # bytes: a field drawn first in the second half may still fill a bounded cache
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection,unsupported_method"
)


def fuzz(folder: Path, cases: int, seed: int | None = None) -> subprocess.CompletedProcess[str]:
    """About `cases` requests, most of them to the operations that take a body, in two halves, of which the second may
    leave nothing behind: no block, no task, no file, no memory."""
    each = -(-cases // (2 * len(POSTS)))
    with served(folder, llm={"device": "oracle", "context": 48, "max_waiting": 64}, limits=Limits(timeout=1)) as s:
        words = [
            sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", f"{s.url}/openapi.json",
            "--max-examples", str(each), "--phases", "fuzzing", "--checks", CHECKS, "--mode", "all",
            "--request-timeout", "60", "--max-failures", "3", "--no-color",
        ]  # fmt: skip
        words += [] if seed is None else ["--seed", str(seed)]
        process, held = psutil.Process(), list[tuple[int, int]]()
        for _ in range(2):
            done = subprocess.run(words, capture_output=True, text=True, timeout=100 * TEST_TIMEOUT_S)
            if done.returncode:
                return done
            s.quiet()
            held.append((process.num_fds(), process.memory_info().rss))
        assert held[1][0] <= held[0][0], f"files before and after: {held}"
        assert held[1][1] <= MEMORY * held[0][1] + CACHES, f"memory before and after: {held}"
        return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = fuzz(tiny("llama", Path(folder) / "tiny", num_hidden_layers=2), given.cases, given.seed)
    print(done.stdout, done.stderr, sep="\n")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
