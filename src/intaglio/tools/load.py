"""A client that puts a load on a server with OpenAI's API and takes the time, and the same load in a chip's time.

Times are seconds from the moment at which a request was to be sent, so a client that is late makes nothing look better.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.runtime import Refused, SamplingParams
from intaglio.tools.workload import Ask

if TYPE_CHECKING:
    from intaglio.llm import LLM

PATIENCE = 3600.0  # seconds for one request: a server that never answers must not keep the client for ever
WORDS = ("the", "of", "and", "to", "in", "is", "was", "for", "that", "with", "as", "by", "at", "from", "his", "it")
PROBE = 256  # words, to see how many tokens one is


@dataclass(frozen=True)
class Answered:
    """What became of a request. first, gaps, end: seconds to the first text, between texts, and to the end, from
    `start`, which counts from the beginning of the load."""

    ask: Ask
    start: float
    end: float
    first: float | None = None
    gaps: tuple[float, ...] = ()
    prompt: int = 0
    output: int = 0
    error: str | None = None

    @property
    def each(self) -> float | None:
        """Seconds a token after the first."""
        return (self.end - self.first) / (self.output - 1) if self.first is not None and self.output > 1 else None


@dataclass
class Server:
    """A server as a client sees it: its address up to and with /v1, its model, and how many tokens a word makes."""

    url: str
    key: str | None = None
    ignore_eos: bool = True
    model: str = ""
    context: int | None = None
    tokens_a_word: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def body(self, ask: Ask, rng: random.Random) -> dict[str, Any]:
        """Greedy, streamed, of as many words as make the tokens asked for; no two prompts begin alike."""
        words = rng.choices(WORDS, k=max(1, round(ask.prompt / self.tokens_a_word) - 1))
        body = {
            "model": self.model, "prompt": f"{rng.getrandbits(16)} {' '.join(words)}", "max_tokens": ask.output,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return {**body, **({"ignore_eos": True} if self.ignore_eos else {}), **self.extra}


async def meet(server: Server) -> None:
    """Ask which model there is, and how many tokens a word is. Raises ValueError if that is no such server, OSError if
    there is none."""
    async with _session() as session:
        await _meet(session, server)


async def _meet(session: Any, server: Server) -> None:
    async with session.get(f"{server.url}/models", headers=server.headers) as response:
        told = await response.json(content_type=None)
        if response.status != 200 or not told.get("data"):
            raise ValueError(f"{server.url}/models answers {response.status} {str(told)[:200]}; is the address right?")
    server.model, server.context = told["data"][0]["id"], told["data"][0].get("max_model_len")
    words = min(PROBE, (server.context or PROBE) // 8)
    body = server.body(Ask(0.0, words, 1), random.Random(0))
    plain = {k: v for k, v in body.items() if not k.startswith("stream")}
    async with session.post(f"{server.url}/completions", json=plain, headers=server.headers) as response:
        told = await response.json(content_type=None)
        if response.status != 200:
            raise ValueError(f"{server.url}/completions answers {response.status} {str(told)[:200]}")
    server.tokens_a_word = max(0.1, told["usage"]["prompt_tokens"] / words)


def _session() -> Any:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # each request is a client of its own
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE), connector=connector)


async def load(server: Server, asks: Sequence[Ask], concurrency: int | None = None, seed: int = 0) -> list[Answered]:
    """Send every request at its time, at most `concurrency` of them open at once; what became of each, in order. The
    server has been met."""
    rng = random.Random(seed)
    gate = asyncio.Semaphore(concurrency or max(1, len(asks)))
    bodies = [json.dumps(server.body(ask, rng)).encode() for ask in asks]
    async with _session() as session:
        began = time.perf_counter()

        async def one(ask: Ask, body: bytes) -> Answered:
            await asyncio.sleep(max(0.0, began + ask.at - time.perf_counter()))
            async with gate:
                # what waits for its turn here is not waiting for the server
                start = ask.at if concurrency is None else time.perf_counter() - began
                return await _ask(session, server, ask, body, began, start)

        return list(await asyncio.gather(*map(one, asks, bodies)))


async def _ask(session: Any, server: Server, ask: Ask, body: bytes, began: float, start: float) -> Answered:
    """One request, from its sending to its end."""
    import aiohttp

    stamps: list[float] = []
    usage: dict[str, Any] = {}
    error: str | None = None
    headers = {**server.headers, "content-type": "application/json"}
    try:
        async with session.post(f"{server.url}/completions", data=body, headers=headers) as response:
            if response.status != 200:
                error = f"status {response.status}"
                await response.read()
            else:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        usage = event.get("usage") or usage
                        if "error" in event:
                            error = str(event["error"].get("code") or event["error"].get("type") or "error")
                        for choice in event.get("choices", ()):
                            if choice.get("text") or (choice.get("finish_reason") and not stamps):
                                stamps.append(time.perf_counter() - began - start)
                            if choice.get("finish_reason") == "deadline":  # what there is of the answer is not all
                                error = "deadline"
    except (aiohttp.ClientError, TimeoutError, ValueError) as e:
        error = type(e).__name__
    end = time.perf_counter() - began - start
    if error is None and not stamps:
        error = "no end"
    gaps = tuple(b - a for a, b in itertools.pairwise(stamps))
    output = usage.get("completion_tokens", len(stamps))  # of a server that tells none: a text a token
    prompt = usage.get("prompt_tokens", ask.prompt)
    return Answered(ask, start, end, stamps[0] if stamps else None, gaps, prompt, output, error)


def load_modelled(llm: LLM, asks: Sequence[Ask], seed: int = 0) -> list[Answered]:
    """The same in the time of the chips that a silicon LLM models: a request comes when their clock says so, and where
    nothing is to be done until then, that time just passes."""
    engine, clock, rng = llm.engine, llm.device.clock, random.Random(seed)  # type: ignore[attr-defined]
    began, pending = clock(), deque(asks)
    running: dict[str, tuple[Ask, list[float]]] = {}
    done: list[Answered] = []
    while pending or running:
        if not running and pending:
            clock.wait_until(began + pending[0].at)
        while pending and began + pending[0].at <= clock():
            ask = pending.popleft()
            ids = [rng.randrange(llm.program.vocabulary) for _ in range(ask.prompt)]
            request, _ = llm.prepare(ids, SamplingParams(max_tokens=ask.output, ignore_eos=True))
            try:
                engine.add(request)
                running[request.id] = ask, []
            except Refused as e:
                done.append(Answered(ask, ask.at, 0.0, error=e.reason))
        for event in engine.step():
            ask, stamps = running[event.request]
            if event.scored:
                stamps.append(clock() - began - ask.at)
            if event.usage:
                del running[event.request]
                error = event.finish_reason if event.finish_reason in ("error", "abort", "deadline") else None
                gaps = tuple(b - a for a, b in itertools.pairwise(stamps))
                end, used = clock() - began - ask.at, event.usage
                first = stamps[0] if stamps else None
                done.append(Answered(ask, ask.at, end, first, gaps, used.prompt_tokens, used.output_tokens, error))
    return done


@dataclass(frozen=True)
class Summary:
    """What a load came to. `goodput`: requests a second answered whole within `deadline` seconds of their time."""

    requests: int
    answered: int
    errors: dict[str, int]
    seconds: float  # from the first request's time to the last one's end
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    deadline: float
    goodput: float
    times: dict[str, dict[str, float]]  # ttft, tpot, gap, whole: mean, p50, p90, p99 in seconds


def summarise(answers: Sequence[Answered], deadline: float) -> Summary:
    """Of one answer or more; of requests that failed only the number counts."""
    good = [a for a in answers if a.error is None]
    seconds = max(1e-9, max(a.start + a.end for a in answers) - min(a.start for a in answers))
    columns = {
        "ttft": [a.first for a in good if a.first is not None],
        "tpot": [a.each for a in good if a.each is not None],
        "gap": [gap for a in good for gap in a.gaps],
        "whole": [a.end for a in good],
    }
    return Summary(
        len(answers), len(good), dict(Counter(a.error for a in answers if a.error is not None)), seconds,
        len(good) / seconds, sum(a.prompt for a in good) / seconds, sum(a.output for a in good) / seconds,
        deadline, sum(a.end <= deadline for a in good) / seconds,
        {name: _spread(values) for name, values in columns.items() if values},
    )  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {"mean": float(np.mean(values)), "p50": float(p50), "p90": float(p90), "p99": float(p99)}
