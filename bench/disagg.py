"""Benchmark of disaggregated prefill and decode against one mixed engine, in real processes on the same cores.

Users stream answers to short prompts in a closed loop, while long prompts, each of other tokens, are sent one after the
other. Printed for both: time per output token (TPOT) of the users' requests, (last - first token) / (tokens - 1); the
longest pauses in their streams; and the time to the first token of the long prompts. The mixed engine is a cluster of
one replica, so that both stand behind the same router.

    python bench/disagg.py --shape 135m
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from checkpoints import SHAPES, write_random, write_tokenizer
from router import cluster


async def stream(session: aiohttp.ClientSession, url: str, prompt: list[int], tokens: int) -> list[float]:
    """Send a prompt. Returns the seconds from the request to each of its output tokens."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    began, times = time.perf_counter(), list[float]()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                if "error" in json.loads(line[6:]):
                    raise SystemExit(f"a stream ended with {line.decode()}")
                times.append(time.perf_counter() - began)
    return times


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def measure(url: str, a: argparse.Namespace, vocabulary: int) -> dict[str, float]:
    """Seconds: TPOT and pauses of the users' streams, time to the first token of the long prompts."""
    rng, streams, firsts = random.Random(a.seed), list[list[float]](), list[float]()
    ended = asyncio.Event()

    def prompt(n: int) -> list[int]:
        return [rng.randrange(100, vocabulary) for _ in range(n)]

    async def user(session: aiohttp.ClientSession) -> None:
        while not ended.is_set():
            streams.append(await stream(session, url, prompt(16), a.output))

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(3600)) as session:
        await stream(session, url, prompt(16), 4)  # the first step ever is slower
        users = [asyncio.ensure_future(user(session)) for _ in range(a.users)]
        await asyncio.sleep(a.lead)
        for _ in range(a.prompts):
            firsts.append((await stream(session, url, prompt(a.prompt_tokens), 1))[0])
        ended.set()
        await asyncio.gather(*users)
    tpot = [(s[-1] - s[0]) / (len(s) - 1) for s in streams]
    pauses = [later - sooner for s in streams for sooner, later in pairwise(s)]
    return {
        "tpot_p50": median(tpot), "tpot_p99": percentile(tpot, 0.99), "pause_p99": percentile(pauses, 0.99),
        "pause_max": max(pauses), "long_ttft": median(firsts), "requests": len(streams),
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--shape", choices=SHAPES, default="135m")
    p.add_argument("--format", default="int8")
    p.add_argument("--prefill", type=int, default=1)
    p.add_argument("--decode", type=int, default=1)
    p.add_argument("--users", type=int, default=2, help="Streams that run all the time.")
    p.add_argument("--output", type=int, default=24, help="Tokens of an answer.")
    p.add_argument("--prompts", type=int, default=4, help="Long prompts.")
    p.add_argument("--prompt-tokens", type=int, default=1000)
    p.add_argument("--lead", type=float, default=1.0, help="Seconds before the first long prompt.")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dir", type=Path, help="Keep the checkpoint there.")
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    apart = ["--prefill", str(a.prefill), "--decode", str(a.decode)]
    more = ["--", "--context", str(max(512, a.prompt_tokens + 64))]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(write_tokenizer(write_random((a.dir or Path(scratch)) / a.shape, SHAPES[a.shape])))
        for name, words in (("mixed", ["--replicas", "1"]), ("apart", apart)):
            with cluster(folder, "--weights", a.format, *words, *more) as url:
                results[name] = asyncio.run(measure(url, a, SHAPES[a.shape].vocabulary))
    mixed, ours = results["mixed"], results["apart"]
    if a.json:
        print(json.dumps(results))
        return
    print(f"{a.shape} {a.format} on {os.cpu_count()} cores: {a.users} users, {a.prompts} prompts of {a.prompt_tokens}")
    print(f"{'':6} {'TPOT p50':>9} {'TPOT p99':>9} {'pause p99':>9} {'pause max':>9} {'TTFT of long':>12}   ms")
    for name, r in results.items():
        print(f"{name:6} {r['tpot_p50'] * 1e3:9.1f} {r['tpot_p99'] * 1e3:9.1f} {r['pause_p99'] * 1e3:9.1f} "
              f"{r['pause_max'] * 1e3:9.1f} {r['long_ttft'] * 1e3:12.0f}")  # fmt: skip
    print(f"apart: TPOT p99 {mixed['tpot_p99'] / ours['tpot_p99']:.1f}x lower")


if __name__ == "__main__":
    main()
