"""Cache-aware routing against round robin, over replicas of this package, under the same conversations.

Users go on with conversations of their own after one of a few long system prompts, in a closed loop: a user's next turn
is sent when the reply to the last one has come, and the user has thought. Two clusters run at the same time, one for
each policy; in each round both get the same conversations, one after the other, and those of no other round. Printed
for each round and policy: mean time to first token, output tokens a second, prompt tokens found cached. Then the
medians of the rounds' ratios, and a bound of what any placement could reach. Then the router's overhead at concurrency
1: the median time of a one-token request through the router with one replica, less that of one sent to the same replica
directly, in turns.

    python bench/router.py --shape 135m --systems 8
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import aiohttp
from checkpoints import SHAPES, write_random, write_tokenizer

from intaglio.devices.processes import child_environment

WORDS = [
    "def", "class", "return", "import", "self", "name", "value", "list", "dict", "for", "in", "while", "try", "with",
]  # fmt: skip
POLICIES = ("round-robin", "cache-aware")
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


@dataclass(frozen=True)
class Turn:
    """One request of a user, and what came of it.

    at: when it was sent, seconds after the first. ttft: seconds to its first token. tokens, cached: of its prompt.
    new: those that are in no earlier prompt or reply of the user, nor in the system prompt. system: number of that.
    number: of the turn, from 0.
    """

    at: float
    ttft: float
    tokens: int
    cached: int
    new: int
    system: int
    number: int


async def ask(session: aiohttp.ClientSession, url: str, prompt: str, tokens: int) -> tuple[float, dict[str, Any], str]:
    """(seconds to the first token, usage, reply) of a streamed completion."""
    body: dict[str, Any] = {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, reply, usage = time.perf_counter(), 0.0, "", {}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                chunk = json.loads(line[6:])
                reply += "".join(choice["text"] for choice in chunk["choices"])
                usage = chunk["usage"] or usage
    return first, usage, reply


async def pace(session: aiohttp.ClientSession, url: str, words: int) -> tuple[float, float]:
    """Seconds (of a step, of a prompt token) of an idle replica, from new prompts of few words and of `words`."""
    rng, times = random.Random(time.time_ns()), dict[int, tuple[float, int]]()
    for _ in range(3):
        for n in (4, words):
            first, usage, _ = await ask(session, url, f"{rng.random()} {text(rng, n)}", 1)
            times[n] = min(times.get(n, (math.inf, 0)), (first, usage["prompt_tokens"]))
    (short, few), (long, many) = times[4], times[words]
    per_token = max(0.0, long - short) / (many - few)
    return max(0.0, short - few * per_token), per_token


async def converse(url: str, a: argparse.Namespace) -> tuple[list[Turn], float, float]:
    """(all turns of all conversations, output tokens a second, lower bound of the mean TTFT of these turns)."""
    rng = random.Random(a.seed)
    systems = [text(rng, a.system_words) for _ in range(a.systems)]
    system_of = [n % max(1, a.systems) for n in range(a.users)]
    rng.shuffle(system_of)  # else users in turn would give replicas in turn one system prompt each
    turns: list[Turn] = []

    async def user(n: int, session: aiohttp.ClientSession, shared: list[int], began: float) -> None:
        own, known = random.Random(f"{a.seed} {n}"), shared[system_of[n]] if shared else 0
        prompt = systems[system_of[n]] if a.systems else ""
        prompt += f"\nuser {n}: {text(own, a.own_words)}"
        await asyncio.sleep(own.random() * a.stagger)
        for number in range(a.turns):
            at = time.perf_counter() - began
            first, usage, reply = await ask(session, url, prompt, a.output)
            tokens, cached = usage["prompt_tokens"], usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
            turns.append(Turn(at, first, tokens, cached, max(1, tokens - known), system_of[n], number))
            known = tokens + a.output
            prompt += f"{reply}\n{text(own, a.turn_words)}\n"
            await asyncio.sleep(own.expovariate(1 / a.think) if a.think else 0)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:
        per_step, per_token = await pace(session, url, a.system_words)
        shared = [await tokens_of(session, url, system) for system in systems]
        began = time.perf_counter()
        await asyncio.gather(*(user(n, session, shared, began) for n in range(a.users)))
        seconds = time.perf_counter() - began
    cores = os.cpu_count() or 1
    at_once = min(a.replicas, cores // max(1, cores // a.replicas))
    return turns, len(turns) * a.output / seconds, least_ttft(turns, shared, per_step, per_token, at_once)


async def tokens_of(session: aiohttp.ClientSession, url: str, prompt: str) -> int:
    """Number of tokens of a text."""
    async with session.post(f"{url}/tokenize", json={"prompt": prompt}) as response:
        response.raise_for_status()
        return int((await response.json())["count"])


def least_ttft(turns: list[Turn], shared: list[int], per_step: float, per_token: float, at_once: int) -> float:
    """Lower bound of the mean TTFT of these turns over all placements, in seconds.

    The larger of two bounds. Without queues: each turn takes a step and the time of its new tokens, after its system
    prompt has been computed once. Without latencies: each token is computed once, and all replicas that can compute at
    the same time (`at_once`) work as one, on the turn that has the least left (SRPT, which minimises the mean).

    shared: tokens of the system prompts. per_step, per_token: seconds of an idle replica.
    """
    ready: dict[int, float] = {}
    work: list[tuple[float, float]] = []  # (when it was sent, seconds of one replica)
    alone = 0.0
    for turn in sorted(turns, key=lambda turn: turn.at):
        mine = turn.new * per_token
        if shared and turn.system not in ready:
            ready[turn.system] = turn.at + shared[turn.system] * per_token
            work.append((turn.at, mine + shared[turn.system] * per_token))
        else:
            work.append((turn.at, mine))
        alone += per_step + mine + max(0.0, ready.get(turn.system, 0.0) - turn.at)
    return max(alone, srpt(work, at_once)) / len(turns)


def srpt(work: list[tuple[float, float]], speed: float) -> float:
    """Total seconds from arrival to end of jobs on one machine that always runs the one with the least work left.

    work: (second of arrival, work) of each job. speed: work done a second.
    """
    waiting: list[tuple[float, float]] = []  # (work left, arrival)
    now = total = 0.0
    arrivals = sorted(work)
    for i, (arrival, seconds) in enumerate(arrivals):
        now = max(now, arrival)
        heapq.heappush(waiting, (seconds, arrival))
        until = arrivals[i + 1][0] if i + 1 < len(arrivals) else math.inf
        while waiting and now < until:
            left, since = heapq.heappop(waiting)
            done = min(left, (until - now) * speed)
            now += done / speed
            if done < left:
                heapq.heappush(waiting, (left - done, since))
            else:
                total += now - since
    return total


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


def compare(a: argparse.Namespace) -> None:
    """Run the rounds with both policies, and print each and the medians."""
    seen: dict[str, list[tuple[float, float, float]]] = {policy: [] for policy in POLICIES}  # TTFT, rate, least TTFT
    with ExitStack() as stack:
        words = ("--", "--kv-tokens", str(a.kv_tokens))
        urls = {
            policy: stack.enter_context(cluster(a.model, "--replicas", str(a.replicas), "--policy", policy, *words))
            for policy in POLICIES
        }
        for number in range(a.rounds):
            own = argparse.Namespace(**{**vars(a), "seed": f"{a.seed} {number}"})
            for policy in POLICIES if number % 2 else POLICIES[::-1]:
                turns, rate, least = asyncio.run(converse(urls[policy], own))
                first, later = ([t.ttft for t in turns if (t.number == 0) is begins] for begins in (True, False))
                seen[policy].append((mean(t.ttft for t in turns), rate, least))
                cached, tokens = mean(t.cached for t in turns), mean(t.tokens for t in turns)
                print(f"{policy:12} mean TTFT {seen[policy][-1][0] * 1e3:8.1f} ms (first turns {mean(first) * 1e3:.1f},"
                      f" later {mean(later or [0.0]) * 1e3:.1f})   {rate:8.1f} output tokens/s   "
                      f"{cached:6.0f} of {tokens:.0f} prompt tokens cached", flush=True)  # fmt: skip
    pairs = list(zip(*seen.values(), strict=True))
    lower = [old[0] / new[0] for old, new in pairs]
    more = [new[1] / old[1] for old, new in pairs]
    print(f"cache-aware, median of {len(pairs)} rounds (lowest to highest): TTFT {spread(lower)} lower, "
          f"throughput {spread(more)}")  # fmt: skip
    bound = median(old[0] / new[2] for old, new in pairs)
    print(f"no placement has a mean TTFT more than {bound:.2f}x lower than round robin's here")


def spread(ratios: list[float]) -> str:
    """The median of ratios, with the lowest and the highest."""
    return f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model", nargs="?", help="Default: the bundled model.")
    p.add_argument("--shape", choices=SHAPES, help="A random checkpoint of this shape in place of a model.")
    p.add_argument("--dir", help="Keep the checkpoint of --shape there.")
    p.add_argument("--rounds", type=int, default=5, help="0: measure only the router's overhead.")
    p.add_argument("--replicas", type=int, default=2)
    p.add_argument("--users", type=int, default=12)
    p.add_argument("--turns", type=int, default=4)
    p.add_argument("--systems", type=int, default=2, help="Different system prompts; 0: none is shared.")
    p.add_argument("--system-words", type=int, default=300)
    p.add_argument("--own-words", type=int, default=60)
    p.add_argument("--turn-words", type=int, default=20)
    p.add_argument("--output", type=int, default=16, help="Tokens of a reply.")
    p.add_argument("--stagger", type=float, default=0.0, help="Seconds over which the users begin.")
    p.add_argument("--think", type=float, default=0.0, help="Mean seconds from a reply to the next turn.")
    p.add_argument("--kv-tokens", type=int, default=16384, help="Of each replica.")
    p.add_argument("--overhead", type=int, default=300, help="Requests of the overhead's measurement; 0: leave it out.")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    print(f"{os.cpu_count()} cores, {a.replicas} replicas, {a.users} users with {a.turns} turns", flush=True)
    with ExitStack() as stack:
        if a.shape:
            scratch = Path(a.dir or stack.enter_context(tempfile.TemporaryDirectory()))
            a.model = str(write_tokenizer(write_random(scratch / a.shape, SHAPES[a.shape])))
        if a.rounds:
            compare(a)
        if not a.overhead:
            return
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with cluster(a.model, "--replicas", "1", "--", "--api-key", KEY, folder=folder) as url:
            [log] = Path(folder).rglob("r0.log")
            own = re.findall(r" at (http://[^\s;]+)", log.read_text())[-1]
            routed, direct = asyncio.run(overhead(url, own, a.overhead))
        print(f"one request at a time: {routed * 1e3:.2f} ms through the router, {direct * 1e3:.2f} ms directly, "
              f"{(routed - direct) * 1e3:.2f} ms more")  # fmt: skip


if __name__ == "__main__":
    main()
