"""Time to the first token of a server that was killed and started again, with its K/V blocks on disk and without.

Each round starts a server on an empty directory, sends one long prompt, kills the server with SIGKILL once its blocks
are written, starts it again, and sends the same prompt and one that shares all but its last tokens. The tokens must be
the same; times are measured here, from the request to the first token at the client.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from checkpoints import SHAPES, write_random, write_tokenizer

from intaglio.devices.processes import child_environment

OUTPUT_TOKENS = 16
WRITTEN_TIMEOUT = 120.0  # seconds


@contextmanager
def server(words: list[str]) -> Iterator[tuple[str, int]]:
    """Run `intaglio serve` with these arguments. Yields its host:port, and kills it with SIGKILL at the end."""
    command = [sys.executable, "-m", "intaglio", "serve", *words, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment())
    try:
        assert process.stdout
        found = re.search(r" at http://([^\s;]+)", process.stdout.readline())
        if not found:
            raise SystemExit("the server did not start")
        yield found[1], process.pid
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def ask(address: str, prompt: list[int]) -> tuple[float, list[str]]:
    """Send a prompt. Returns the seconds to the first token, and the pieces of text that were streamed."""
    body = {
        "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "stream": True, "ignore_eos": True,
        "logprobs": 0,
    }  # fmt: skip
    connection = http.client.HTTPConnection(address, timeout=600)
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response, first, pieces = connection.getresponse(), 0.0, list[str]()
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {response.read().decode()}")
    for line in response:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - began
            [choice] = json.loads(line[6:])["choices"] or [{"text": "", "logprobs": None}]
            pieces.append(json.dumps([choice["text"], choice.get("logprobs")]))
    connection.close()
    return first, pieces


def metric(address: str, name: str) -> float:
    """The sum of a metric's values over all its labels, as the server's /metrics shows them now."""
    with urllib.request.urlopen(f"http://{address}/metrics") as r:
        lines = r.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def wait_written(address: str, blocks: int) -> None:
    """Wait until the server has written so many blocks."""
    until = time.monotonic() + WRITTEN_TIMEOUT
    while metric(address, 'intaglio:kv_tier_blocks_total{engine="0",event="saved"') < blocks:
        if time.monotonic() > until:
            raise SystemExit(f"{blocks} blocks were not written in {WRITTEN_TIMEOUT:g} s")
        time.sleep(0.1)


def play(words: list[str], prompt: list[int], other: list[int]) -> dict[str, Any]:
    """One round: seconds to the first token cold, warm, and warm for the other prompt."""
    with server(words) as (address, _):
        ask(address, [1, 2, 3])  # the first step ever is slower
        cold, said = ask(address, prompt)
        wait_written(address, len(prompt) // 32)
    with server(words) as (address, _):
        ask(address, [1, 2, 3])
        warm, again = ask(address, prompt)
        shared, _ = ask(address, other)
        loaded = metric(address, "vllm:external_prefix_cache_hits_total")
    if said != again:
        raise SystemExit(f"the answers differ: {said} and {again}")
    return {"cold_s": cold, "warm_s": warm, "shared_s": shared, "loaded_tokens": loaded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--format", default="int8")
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="keep the checkpoint there")
    parser.add_argument("--kv-dir", type=Path, help="put the K/V blocks below this folder, such as /dev/shm")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    rng, rounds = random.Random(a.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tokenizer(write_random((a.dir or Path(scratch)) / a.shape, SHAPES[a.shape]))
        for _ in range(a.runs):
            blocks = Path(tempfile.mkdtemp(dir=a.kv_dir or scratch))
            words = [str(folder), "--weights", a.format, "--threads", str(a.threads), "--kv-cache-dir", str(blocks)]
            prompt = [rng.randrange(100, SHAPES[a.shape].vocabulary) for _ in range(a.prompt_tokens)]
            other = [*prompt[:-20], *(rng.randrange(100, 4000) for _ in range(20))]
            try:
                rounds.append(play([*words, "--context", str(a.prompt_tokens + 64)], prompt, other))
            finally:
                shutil.rmtree(blocks)
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    names = ("cold_s", "warm_s", "shared_s", "loaded_tokens")
    result = {name: median(r[name] for r in rounds) for name in names}
    result["ratio"] = median(r["cold_s"] / r["warm_s"] for r in rounds)
    if a.json:
        print(json.dumps(result))
        return
    print(f"{'cold s':>8} {'warm s':>8} {'ratio':>7}   prompt of {a.prompt_tokens} tokens, {a.shape} {a.format}")
    print(f"{result['cold_s']:>8.2f} {result['warm_s']:>8.2f} {result['ratio']:>7.1f}")


if __name__ == "__main__":
    main()
