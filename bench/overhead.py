"""Time that engine and server add to the device's own step, measured for decode steps of the same batch.

The batch runs on the device alone, in an engine, and in a server whose clients stream in a process of their own. The
three take turns, because the machine's speed changes from minute to minute; medians over the rounds are printed.
"waits": time between two steps in the server. "slower": how much longer the device's step takes there.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from checkpoints import SHAPES, write_random, write_tokenizer

from intaglio.batch import Chunk, bind
from intaglio.devices import BlockingExecutable, Executable, StepRequest, StepResult
from intaglio.llm import LLM
from intaglio.measure.load import Server, probe
from intaglio.measure.workload import LoadRequest
from intaglio.runtime import SamplingParams
from intaglio.server.serve import listen, serve
from intaglio.server.service import Options, Service

PROMPT = 64
TIMEOUT = 600.0
LOOK = 0.2  # seconds between a client's looks


class Timed(BlockingExecutable):
    """An executable that notes when each step of so many sequences, one token each, began and ended."""

    def __init__(self, inner: Executable, sequences: int) -> None:
        self.inner, self.sequences = inner, sequences
        self.program, self.state = inner.program, inner.state
        self.spans: list[tuple[float, float]] = []

    def run(self, request: StepRequest) -> StepResult:
        began = time.perf_counter()
        result = self.inner.step(request)
        if len(request.batch.tokens) == len(request.batch.first_row) == self.sequences:
            self.spans.append((began, time.perf_counter()))
        return result

    def take(self) -> tuple[float, float]:
        """(milliseconds in a step, milliseconds from one to the next) of the steps so far, medians; forget them."""
        spans, self.spans = self.spans[2:], []
        inside = median(end - began for began, end in spans)
        return inside * 1e3, median(b[0] - a[0] for a, b in itertools.pairwise(spans)) * 1e3


def run_single(llm: LLM, timed: Timed, steps: int) -> tuple[float, float]:
    """On the device alone, contexts as long as in the engine."""
    n, size = timed.sequences, llm.state.page_tokens
    pages = -(-(PROMPT + steps) // size)
    for i in range(steps):
        chunks = [Chunk([7], PROMPT + i, range(s * pages, (s + 1) * pages), (0,)) for s in range(n)]
        timed.step(StepRequest(bind(chunks, size)))
    return timed.take()


def in_engine(llm: LLM, timed: Timed, steps: int) -> tuple[float, float]:
    """Through the engine, in one thread."""
    prompts = [[(7 * i + k) % 4096 for k in range(PROMPT)] for i in range(timed.sequences)]
    llm.generate(prompts, SamplingParams(max_tokens=steps, ignore_eos=True))
    return timed.take()


def clients(url: str, sequences: int, steps: int) -> None:
    """As many streams as sequences. They look only now and then at what came, for a client's time is not the server's
    and here they share their cores."""
    server, rng = Server(url), random.Random(0)
    asyncio.run(probe(server))
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    streams = []
    for _ in range(sequences):
        body = json.dumps(server.body(LoadRequest(0.0, PROMPT, steps), rng))
        stream = socket.create_connection((host, int(port)), TIMEOUT)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        stream.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        streams.append(stream)
    for stream in streams:
        came = b""
        while b"[DONE]" not in came:
            time.sleep(LOOK)
            more = stream.recv(1 << 20)
            assert more, f"a stream ended with {came[-300:]!r}"
            came += more
        assert came.startswith(b"HTTP/1.1 200") and b'"error"' not in came, came[-300:]


def in_server(port: int, timed: Timed, steps: int) -> tuple[float, float]:
    """Through the server, which runs in this process as it does by itself: loop and engine in a thread each."""
    process = multiprocessing.get_context("spawn").Process(
        target=clients, args=(f"http://127.0.0.1:{port}/v1", timed.sequences, steps)
    )
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == 0, "the clients failed"
    return timed.take()


def started(llm: LLM) -> int:
    """A server of this LLM in a thread; its port."""
    listener = listen("127.0.0.1", 0)
    ready = threading.Event()

    def announce(service: Service) -> None:
        ready.set()

    def run() -> None:
        uvloop.run(serve({"model": llm}, Options(), listener, announce, signals=False))

    threading.Thread(target=run, daemon=True).start()
    assert ready.wait(TIMEOUT)
    return int(listener.getsockname()[1])


def measure(folder: Path, weights: str, sequences: int, steps: int, rounds: int) -> dict[str, Any]:
    """Milliseconds, medians over the rounds: `device` a step on the device alone; what `engine` and `server` add to it,
    of which `waits` passes between steps of the server and `slower` inside of them."""
    llm = LLM(folder, weights=weights, context=1024, kv_tokens=sequences * 1024)
    timed = llm.engine.executable = Timed(llm.engine.executable, sequences)
    port = started(llm)
    rows = []
    for i in range(rounds + 1):
        device, _ = run_single(llm, timed, steps)
        llm.engine.pool.reset_prefix_cache()  # what its blocks held was written over
        _, engine = in_engine(llm, timed, steps)  # the server's thread waits meanwhile
        busy, server = in_server(port, timed, steps)
        if i:  # the first round warms up
            rows.append((device, engine - device, server - device, server - busy, busy - device))
    names = ("device", "engine", "server", "waits", "slower")
    return {name: median(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=["135m", "1b"])
    parser.add_argument("--format", default="int8")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="keep the checkpoints there")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    sys.setswitchinterval(0.0005)  # as `intaglio serve` does
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in a.shape:
            folder = write_tokenizer(write_random((a.dir or Path(scratch)) / shape, SHAPES[shape]))
            for n in a.sequences:
                found = measure(folder, a.format, n, a.steps, a.rounds)
                rows.append({"shape": shape, "format": a.format, "sequences": n, **found})
                print(rows[-1], file=sys.stderr)
    if a.json:
        print(json.dumps(rows))
        return
    columns = ("device ms", "engine adds", "server adds", "of a step")
    print(f"{'shape':>6} {'batch':>5} " + " ".join(f"{c:>11}" for c in columns) + "  waits slower")
    for r in rows:
        print(
            f"{r['shape']:>6} {r['sequences']:>5} {r['device']:>11.3f} {r['engine']:>11.3f} {r['server']:>11.3f} "
            f"{r['server'] / r['device']:>11.1%} {r['waits']:>6.2f} {r['slower']:>6.2f}"
        )


if __name__ == "__main__":
    main()
