"""What engine and server add to the device's own step: decode steps of the same batch on the device alone, in an
engine, and in a server whose clients, in a process of their own, stream. All times are measured here.

The three take turns, for the machine is not the same from minute to minute; what is printed are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Collection
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from checkpoints import SHAPES, write_random, write_tokenizer

from intaglio.batch import Batch, Chunk, bind
from intaglio.devices import Executable, StepResult
from intaglio.llm import LLM
from intaglio.runtime import SamplingParams
from intaglio.server.serve import listen, serve
from intaglio.server.service import Options, Service
from intaglio.tools.load import Server, load, meet
from intaglio.tools.workload import Ask

PROMPT = 64
PATIENCE = 600.0


class Timed:
    """An executable that notes when each step of so many sequences, one token each, began and ended."""

    def __init__(self, inner: Executable, sequences: int) -> None:
        self.inner, self.sequences = inner, sequences
        self.program, self.state = inner.program, inner.state
        self.spans: list[tuple[float, float]] = []

    def step(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> StepResult:
        began = time.perf_counter()
        result = self.inner.step(batch, logits=logits, taps=taps, timed=timed)
        if len(batch.tokens) == len(batch.first_row) == self.sequences:
            self.spans.append((began, time.perf_counter()))
        return result

    def take(self) -> tuple[float, float]:
        """(milliseconds in a step, milliseconds from one to the next) of the steps so far, medians; forget them."""
        spans, self.spans = self.spans[2:], []
        inside = median(end - began for began, end in spans)
        return inside * 1e3, median(b[0] - a[0] for a, b in itertools.pairwise(spans)) * 1e3


def alone(llm: LLM, timed: Timed, steps: int) -> tuple[float, float]:
    """On the device alone, contexts as long as in the engine."""
    n, size = timed.sequences, llm.state.page_tokens
    pages = -(-(PROMPT + steps) // size)
    for i in range(steps):
        chunks = [Chunk([7], PROMPT + i, range(s * pages, (s + 1) * pages), (0,)) for s in range(n)]
        timed.step(bind(chunks, size))
    return timed.take()


def in_engine(llm: LLM, timed: Timed, steps: int) -> tuple[float, float]:
    """Through the engine, in one thread."""
    prompts = [[(7 * i + k) % 4096 for k in range(PROMPT)] for i in range(timed.sequences)]
    llm.generate(prompts, SamplingParams(max_tokens=steps, ignore_eos=True))
    return timed.take()


def clients(url: str, sequences: int, steps: int) -> None:
    """As many streams as sequences."""

    async def run() -> None:
        server = Server(url)
        await meet(server)
        answers = await load(server, [Ask(0.0, PROMPT, steps)] * sequences)
        assert all(a.error is None for a in answers), answers[0].error

    asyncio.run(run())


def in_server(port: int, timed: Timed, steps: int) -> tuple[float, float]:
    """Through the server, which runs in this process as it does by itself: loop and engine in a thread each."""
    process = multiprocessing.get_context("spawn").Process(
        target=clients, args=(f"http://127.0.0.1:{port}/v1", timed.sequences, steps)
    )
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0, "the clients failed"
    return timed.take()


def started(llm: LLM) -> int:
    """A server of this LLM in a thread; its port."""
    listener = listen("127.0.0.1", 0)
    ready = threading.Event()

    def announce(service: Service) -> None:
        ready.set()

    def run() -> None:
        uvloop.run(serve(llm, Options(), listener, announce, signals=False))

    threading.Thread(target=run, daemon=True).start()
    assert ready.wait(PATIENCE)
    return int(listener.getsockname()[1])


def measure(folder: Path, weights: str, sequences: int, steps: int, rounds: int) -> dict[str, Any]:
    """Milliseconds, medians over the rounds: `device` a step on the device alone; `engine`, `server` from step to step
    there; `busy` inside the device while the server runs."""
    llm = LLM(folder, weights=weights, context=1024, kv_tokens=sequences * 1024)
    timed = llm.engine.executable = Timed(llm.engine.executable, sequences)
    port = started(llm)
    rows = []
    for i in range(rounds + 1):
        device, _ = alone(llm, timed, steps)
        llm.engine.pool.forget()  # what its blocks held was written over
        _, engine = in_engine(llm, timed, steps)  # the server's thread waits meanwhile
        busy, server = in_server(port, timed, steps)
        if i:  # the first round warms up
            rows.append((device, engine, server, busy))
    names = ("device", "engine", "server", "busy")
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
    print(f"{'shape':>6} {'batch':>5} {'device ms':>10} {'engine adds':>12} {'server adds':>12} {'of a step':>10}")
    for r in rows:
        engine, server = r["engine"] - r["device"], r["server"] - r["device"]
        share = server / r["device"]
        print(
            f"{r['shape']:>6} {r['sequences']:>5} {r['device']:>10.3f} {engine:>12.3f} {server:>12.3f} {share:>10.1%}"
        )


if __name__ == "__main__":
    main()
