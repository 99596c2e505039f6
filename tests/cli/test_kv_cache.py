"""`intaglio serve` with K/V blocks on disk: after a kill and a restart it answers alike; options that are sizes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.cli.options import parse_size
from intaglio.cli.serve import state_cache_bytes

TIMEOUT_S = 120.0


@contextmanager
def killed_server(*words: str) -> Iterator[str]:
    """Run `intaglio serve` of the bundled model with these arguments; killed with SIGKILL at the end."""
    command = [sys.executable, "-m", "intaglio", "serve", "--port", "0", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout
        found = re.search(r" at (http://\S+)", process.stdout.readline())
        assert found, "the server did not start"
        yield found[1]
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def ask(url: str) -> dict[str, object]:
    """The answer to a prompt of 300 token ids, and its usage."""
    body = {"prompt": [5, 6, 7] * 100, "max_tokens": 8, "temperature": 0.7, "seed": 3, "logprobs": 2}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as r:
        answer = json.load(r)
    return {"choices": answer["choices"], "cached": answer["usage"]["prompt_tokens_details"]["cached_tokens"]}


def metrics(url: str) -> dict[str, float]:
    """Values of the tier's metrics by name and last label."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as r:
        lines = r.read().decode().splitlines()
    found = {}
    for line in lines:
        if match := re.match(r"((?:intaglio:kv_tier|vllm:external)\w+)\{(.*)\} (\S+)$", line):
            label = re.search(r'(?:event|direction)="(\w+)"', match[2])
            found[f"{match[1]} {label[1]}" if label else match[1]] = float(match[3])
    return found


def test_killed_server_answers_warm_with_the_same_tokens(tmp_path: Path) -> None:
    words = ("--kv-cache-dir", str(tmp_path), "--kv-cache-size", "1GiB", "--worker")
    with killed_server(*words) as url:
        cold, until = ask(url), time.monotonic() + TIMEOUT_S
        while metrics(url)["intaglio:kv_tier_blocks_total saved"] < 9 and time.monotonic() < until:
            time.sleep(0.05)
    for _ in range(5):
        with killed_server(*words) as url:
            warm, seen = ask(url), metrics(url)
        if not seen["intaglio:kv_tier_blocks_total late"]:  # on a busy machine a load may take too long, and is left
            break
    assert warm["choices"] == cold["choices"] and (cold["cached"], warm["cached"]) == (0, 288)
    assert seen["vllm:external_prefix_cache_hits_total"] == seen["vllm:external_prefix_cache_queries_total"] == 288
    assert seen["intaglio:kv_tier_blocks_total hits"] == 9 and seen["intaglio:kv_tier_blocks_total corrupt"] == 0
    files = sum(f.stat().st_size for f in tmp_path.rglob("*.kv"))
    assert 0 < seen["intaglio:kv_tier_bytes_total load"] < files


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("500MB", 500_000_000),
        ("1048576", 1 << 20),
        ("1.5 KiB", 1536),
        ("7b", 7),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8 apples", "-1", "0", "GiB", "8Gi", "0.5"])
def test_what_is_no_size_is_refused_before_anything_is_loaded(text: str) -> None:
    result = CliRunner().invoke(app, ["serve", "/no/such/model", "--kv-cache-dir", "d", f"--kv-cache-size={text}"])
    assert result.exit_code != 0
    assert "is not a size in bytes" in str(result.exception) + result.output


def test_state_cache_size() -> None:
    assert [state_cache_bytes(text) for text in ("auto", "0", "2KiB")] == [None, 0, 2048]
    result = CliRunner().invoke(app, ["serve", "/no/such/model", "--state-cache-size", "some"])
    assert result.exit_code != 0
    assert "is not a size in bytes" in str(result.exception) + result.output
