"""Cache-aware routing against round robin, over replicas of this package, under the same conversations.

Users go on with conversations of their own after one of a few long system prompts, in a closed loop: a user's next turn
is sent when the reply to the last one has come. Printed for each policy: mean time to first token, output tokens a
second, share of prompt tokens found cached. Then the router's overhead at concurrency 1: the median time of a one-token
request through the router with one replica, less that of one sent to the same replica directly, in turns.

    python bench/router.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import aiohttp

from intaglio.devices.processes import child_environment

WORDS = [
    "def", "class", "return", "import", "self", "name", "value", "list", "dict", "for", "in", "while", "try", "with",
]  # fmt: skip
KEY = "bench"  # of the replica that is also asked directly


@contextmanager
def cluster(model: str | None, *words: str, folder: str | None = None) -> Iterator[str]:
    """The address of a running cluster, which is stopped at the end of the block.

    folder: for its sockets and logs; None: one that is removed at the end.
    """
    with tempfile.TemporaryDirectory() as own:
        command = [
            sys.executable,
            "-m",
            "intaglio",
            "cluster",
            "up",
            *([model] if model else []),
            "--port",
            "0",
            *words,
        ]
        environment = {**child_environment(), "XDG_RUNTIME_DIR": folder or own}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        try:
            assert process.stdout
            said = ""
            while not (found := re.search(r"replicas at (http://\S+)", said)):
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"the cluster did not start: {said}")
                said += line
            yield found[1]
        finally:
            process.terminate()
            process.communicate()


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


async def ask(session: aiohttp.ClientSession, url: str, prompt: str, tokens: int) -> tuple[float, int, str]:
    """(seconds to the first token, prompt tokens found cached, reply) of a streamed completion."""
    body: dict[str, Any] = {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, reply, cached = time.perf_counter(), 0.0, "", 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                chunk = json.loads(line[6:])
                reply += "".join(choice["text"] for choice in chunk["choices"])
                cached = (chunk["usage"] or {}).get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return first, cached, reply


async def converse(url: str, a: argparse.Namespace) -> dict[str, float]:
    """Mean seconds to the first token, output tokens a second and cached tokens a request of all conversations."""
    rng = random.Random(a.seed)
    systems = [text(rng, a.system_words) for _ in range(a.systems)]
    firsts: list[float] = []
    cached: list[int] = []

    async def user(n: int, session: aiohttp.ClientSession) -> None:
        own = random.Random(f"{a.seed} {n}")
        prompt = systems[n % len(systems)] if a.systems else ""
        prompt += f"\nuser {n}: {text(own, a.own_words)}"
        for _ in range(a.turns):
            first, found, reply = await ask(session, url, prompt, a.output)
            firsts.append(first)
            cached.append(found)
            prompt += f"{reply}\n{text(own, a.turn_words)}\n"

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(user(n, session) for n in range(a.users)))
        seconds = time.perf_counter() - began
    return {"ttft": mean(firsts), "rate": len(firsts) * a.output / seconds, "cached": mean(cached)}


async def overhead(routed: str, direct: str, n: int) -> tuple[float, float]:
    """Median seconds of `n` one-token requests through the router, and of `n` sent directly to its only replica.

    They are sent one after the other, in turns, so that both meet the same machine.
    """
    body = {"prompt": "def f(", "max_tokens": 1, "temperature": 0}
    times: dict[str, list[float]] = {routed: [], direct: []}
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}) as session:
        for _ in range(n):
            for url, seen in times.items():
                began = time.perf_counter()
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    await response.read()
                    response.raise_for_status()
                seen.append(time.perf_counter() - began)
    return median(times[routed][n // 10 :]), median(times[direct][n // 10 :])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model", nargs="?", help="Default: the bundled model.")
    p.add_argument("--replicas", type=int, default=2)
    p.add_argument("--users", type=int, default=12)
    p.add_argument("--turns", type=int, default=4)
    p.add_argument("--systems", type=int, default=2, help="Different system prompts; 0: none is shared.")
    p.add_argument("--system-words", type=int, default=300)
    p.add_argument("--own-words", type=int, default=60)
    p.add_argument("--turn-words", type=int, default=20)
    p.add_argument("--output", type=int, default=16, help="Tokens of a reply.")
    p.add_argument("--kv-tokens", type=int, default=16384, help="Of each replica.")
    p.add_argument("--overhead", type=int, default=300, help="Requests of the overhead's measurement; 0: leave it out.")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    print(f"{os.cpu_count()} cores, {a.replicas} replicas, {a.users} users with {a.turns} turns")
    seen: dict[str, dict[str, float]] = {}
    for policy in ("round-robin", "cache-aware"):
        with cluster(a.model, "--replicas", str(a.replicas), "--policy", policy, "--", "--kv-tokens",
                     str(a.kv_tokens)) as url:  # fmt: skip
            seen[policy] = s = asyncio.run(converse(url, a))
        print(f"{policy:12} mean TTFT {s['ttft'] * 1e3:8.1f} ms   {s['rate']:8.1f} output tokens/s   "
              f"{s['cached']:6.0f} prompt tokens cached a request")  # fmt: skip
    turns, ours = seen["round-robin"], seen["cache-aware"]
    print(
        f"cache-aware: TTFT {turns['ttft'] / ours['ttft']:.2f}x lower, throughput {ours['rate'] / turns['rate']:.2f}x"
    )
    if a.overhead:
        with (
            tempfile.TemporaryDirectory() as folder,
            cluster(a.model, "--replicas", "1", "--", "--api-key", KEY, folder=folder) as url,
        ):
            [log] = Path(folder).rglob("r0.log")
            own = re.findall(r" at (http://[^\s;]+)", log.read_text())[-1]
            routed, direct = asyncio.run(overhead(url, own, a.overhead))
        print(f"one request at a time: {routed * 1e3:.2f} ms through the router, {direct * 1e3:.2f} ms directly, "
              f"{(routed - direct) * 1e3:.2f} ms more")  # fmt: skip


if __name__ == "__main__":
    main()
