"""Overload test of a server: keeps it for minutes at more requests than it can answer. Exit code 1 if a check fails.

Checks that nothing grows without bound, that each admitted request ends in time or with a reason, and that the server
stays reachable. First measures how many requests per second the server answers; then sends a multiple of that rate,
with arrivals by a Poisson process.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import sys
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from intaglio.measure.load import Server, load, probe, summarise
from intaglio.measure.server import serve_words, started
from intaglio.measure.workload import LoadRequest, draw, fitting, trace

EVERY = 0.1  # seconds between looks
HEALTH = 0.1  # seconds that 99 of 100 answers of /health may take at most
GROWTH = 1.05  # memory of the last quarter over that of the second: more is growth
SLACK = 1.0  # seconds beyond its deadline in which a request's end must reach the client
REASONS = {"status 429", "status 503", "deadline"}  # ends that a client is told


def watch(host: str, pid: int, going: Synchronized[int], queue: Any) -> None:
    """In a process of its own: ask for /health all the while, look at the server's memory, files and threads."""
    connection, process = http.client.HTTPConnection(host, timeout=60), psutil.Process(pid)
    seen = []
    while going.value:
        began = time.perf_counter()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        seconds = time.perf_counter() - began
        memory = process.memory_info().rss
        seen.append((seconds, answer.status, memory, process.num_fds(), process.num_threads()))
        time.sleep(max(0.0, EVERY - seconds))
    queue.put(seen)


def state(host: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", "/state")
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return found


def soak(url: str, pid: int, a: argparse.Namespace) -> dict[str, Any]:
    """What was seen, as a dict of figures."""
    host = url.removeprefix("http://").removesuffix("/v1")
    server, t = Server(url, extra={"timeout": a.deadline}), trace(a.workload)
    asyncio.run(probe(server))
    by = fitting(t, server.context)

    def drawn(n: int, rate: float) -> list[LoadRequest]:
        return draw(t, n, rate, scale=by, context=server.context, seed=a.seed)

    calm = Server(url, model=server.model, tokens_per_word=server.tokens_per_word)
    found = asyncio.run(load(calm, drawn(a.requests, float("inf")), concurrency=32))
    capacity = summarise(found, a.deadline).requests_per_s
    before = psutil.Process(pid).num_fds()
    context = multiprocessing.get_context("spawn")
    going, queue = context.Value("i", 1), context.Queue()
    watcher = context.Process(target=watch, args=(host, pid, going, queue))
    watcher.start()
    rate = a.times * capacity
    answers = asyncio.run(load(server, drawn(int(rate * a.seconds), rate)))
    going.value = 0
    seen = queue.get()
    watcher.join()
    time.sleep(1.0)
    health, statuses, memory, files, threads = (np.array(column) for column in zip(*seen, strict=True))
    quarters = [float(np.median(part)) for part in np.array_split(memory, 4)]
    ended, summary = state(host), summarise(answers, a.deadline)
    late = [x.end for x in answers if x.end > a.deadline + SLACK]
    checks = {
        "health": float(np.quantile(health, 0.99)) < HEALTH and set(statuses.tolist()) == {200},
        "memory": quarters[3] <= GROWTH * quarters[1],
        "files": int(files.max()) <= before + 2048 and psutil.Process(pid).num_fds() <= before,
        "threads": len(set(threads[len(threads) // 4 :].tolist())) <= 2,
        "blocks": ended["blocks_held"] == ended["running"] == ended["waiting"] == 0,
        "in time": not late,
        "a reason": set(summary.errors) <= REASONS,
    }
    return {
        "capacity_per_s": capacity, "rate": rate, "seconds": summary.seconds, "requests": summary.requests,
        "answered": summary.answered, "errors": summary.errors, "goodput": summary.goodput, "late": len(late),
        "latest": max(x.end for x in answers), "health_ms": {
            f"p{q}": float(np.percentile(health, q)) * 1e3 for q in (50, 90, 99, 100)
        },
        "memory_mb": [q / 1e6 for q in quarters], "files": [before, int(files.max()), psutil.Process(pid).num_fds()],
        "threads": [int(threads.min()), int(threads.max())], "checks": checks,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint folder; default: the bundled model")
    parser.add_argument("--workload", default="conversation")
    parser.add_argument("--times", type=float, default=2.0, help="the capacity")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--deadline", type=float, default=10.0)
    parser.add_argument("--requests", type=int, default=200, help="to see the capacity by")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    with started(serve_words(a.model, max_waiting=128)) as url:
        pid = next(p.pid for p in psutil.Process().children() if "serve" in p.cmdline())
        found = soak(url, pid, a)
    print(json.dumps(found, indent=2))
    sys.exit(not all(found["checks"].values()))


if __name__ == "__main__":
    main()
