"""Throughput and latency of this server and of llama.cpp's llama-server, under the same requests.

Both serve the same random checkpoint with formats of equal bits and the same number of threads. Requests are a closed
loop with lengths as in a public trace, timed by one client. Each server runs alone, in turn; medians are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
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

from checkpoints import OURS, PEER_FORMATS, SHAPES, write_gguf, write_random, write_tokenizer

from intaglio.measure.load import Server, Summary, load, probe, summarise
from intaglio.measure.server import serve_words, started
from intaglio.measure.workload import draw, fitting, trace

TIMEOUT = 600.0


@contextmanager
def llama(command: list[str]) -> Iterator[str]:
    """A server by this command, with {port} in it, until the block ends: its address up to and with /v1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.format(port=port) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, until = f"http://127.0.0.1:{port}/v1", time.monotonic() + TIMEOUT
    try:
        while time.monotonic() < until and process.poll() is None:
            try:
                with urllib.request.urlopen(f"{url}/models", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def commands(a: argparse.Namespace, folder: Path, kind: str) -> dict[str, list[str]]:
    """How llama.cpp's servers start: its own, if it is named, and the one of its Python package."""
    gguf = str(write_gguf(folder, PEER_FORMATS[kind], a.threads))
    n, threads = str(a.concurrency), str(a.threads)
    found = {}
    if a.llama_server:
        found["llama-server"] = [
            str(a.llama_server), "-m", gguf, "--port", "{port}", "-t", threads, "-tb", threads, "-np", n,
            "-c", str(a.context * a.concurrency),
        ]  # fmt: skip
    if a.llama_python:
        found["llama_cpp.server"] = [
            a.llama_python, "-m", "llama_cpp.server", "--model", gguf, "--port", "{port}", "--n_threads", threads,
            "--n_threads_batch", threads, "--n_ctx", str(a.context), "--interrupt_requests", "false",
        ]  # fmt: skip
    return found


def measured(url: str, a: argparse.Namespace) -> Summary:
    async def run() -> Summary:
        server, t = Server(url), trace(a.workload)
        await probe(server)
        asks = draw(t, a.requests, float("inf"), scale=fitting(t, a.context), context=a.context - 64, seed=a.seed)
        return summarise(await load(server, asks, a.concurrency), TIMEOUT)

    return asyncio.run(run())


def compare(a: argparse.Namespace, folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """A row a server."""
    words = serve_words(folder, weights=kind, threads=a.threads, context=a.context, kv_tokens=a.context * a.concurrency)
    servers: dict[str, Any] = {"intaglio": lambda: started(words)}
    servers |= {name: lambda command=c: llama(command) for name, c in commands(a, folder, kind).items()}
    samples: dict[str, list[Summary]] = {name: [] for name in servers}
    for _ in range(a.runs):
        for name, start in servers.items():
            with start() as url:
                samples[name].append(measured(url, a))
            print(kind, name, samples[name][-1], file=sys.stderr)
    for name, of in samples.items():
        yield {
            "format": kind if name == "intaglio" else PEER_FORMATS[kind], "server": name,
            "answered": min(s.answered for s in of),
            "output_tokens_per_s": median(s.output_tokens_per_s for s in of),
            "prompt_tokens_per_s": median(s.prompt_tokens_per_s for s in of),
            "ttft_p50_ms": median(s.times["ttft"]["p50"] for s in of) * 1e3,
            "tpot_p50_ms": median(s.times["tpot"]["p50"] for s in of) * 1e3,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--format", nargs="*", choices=OURS, default=["int8", "bf16"])
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's llama-server")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python[server]")
    parser.add_argument("--workload", default="conversation")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="keep the checkpoint and GGUF files there")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tokenizer(write_random((a.dir or Path(scratch)) / a.shape, SHAPES[a.shape]))
        rows = [row for kind in a.format for row in compare(a, folder, kind)]
    if a.json:
        print(json.dumps(rows))
        return
    print(f"{'format':6} {'server':18} {'output/s':>9} {'prompt/s':>9} {'ttft ms':>9} {'tpot ms':>9} {'ratio':>6}")
    mine = {r["format"]: r["output_tokens_per_s"] for r in rows if r["server"] == "intaglio"}
    mine |= {PEER_FORMATS[kind]: mine[kind] for kind in a.format}
    for r in rows:
        print(
            f"{r['format']:6} {r['server']:18} {r['output_tokens_per_s']:>9,.1f} {r['prompt_tokens_per_s']:>9,.0f} "
            f"{r['ttft_p50_ms']:>9,.0f} {r['tpot_p50_ms']:>9,.1f} {mine[r['format']] / r['output_tokens_per_s']:>6.2f}"
        )


if __name__ == "__main__":
    main()
