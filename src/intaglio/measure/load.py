"""Load generator: sends requests to a server with the OpenAI API, times them, and summarises what came back.

Times are seconds from a request's scheduled arrival, so a client that is late does not make the server look faster.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from intaglio.measure.workload import LoadRequest
from intaglio.progress import Progress, silent

REQUEST_TIMEOUT = 3600.0  # seconds; a server that never answers must not block the client for ever
WORDS = ("the", "of", "and", "to", "in", "is", "was", "for", "that", "with", "as", "by", "at", "from", "his", "it")
PROBE = 256  # words of the prompt that measures the number of tokens per word


@dataclass(frozen=True)
class Outcome:
    """Times and result of one request of a load test. Times are in seconds.

    Attributes:
        request: the request as planned.
        start: the moment from which `end` and `first` are counted, as time since the beginning of the load. It is the
            planned arrival or, if concurrency was limited, the moment when the request was sent.
        end: time from `start` to the end of the response.
        first: time from `start` to the first text of the response (TTFT); None if no text came.
        gaps: times between each text of the stream and the next.
        prompt: number of prompt tokens.
        output: number of output tokens.
        error: what failed; None if the response is complete.
    """

    request: LoadRequest
    start: float
    end: float
    first: float | None = None
    gaps: tuple[float, ...] = ()
    prompt: int = 0
    output: int = 0
    error: str | None = None

    @property
    def each(self) -> float | None:
        """The mean seconds per output token after the first (TPOT).

        None if the response has fewer than two tokens or no text.
        """
        return (self.end - self.first) / (self.output - 1) if self.first is not None and self.output > 1 else None


@dataclass
class Server:
    """A server that a load test measures, with what is needed to send requests to it.

    Attributes:
        url: address up to and with /v1.
        key: API key; None if the server needs none.
        ignore_eos: True to ask the server for outputs of exactly the planned length.
        model: name of the model; set by probe().
        context: the model's context length in tokens; None if the server does not report it. Set by probe().
        tokens_per_word: tokens per word of generated prompts; measured by probe().
        extra: more fields for the JSON body of each request.
    """

    url: str
    key: str | None = None
    ignore_eos: bool = True
    model: str = ""
    context: int | None = None
    tokens_per_word: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers of each request, as a dict; {} if there is no API key."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def body(self, request: LoadRequest, rng: random.Random) -> dict[str, Any]:
        """The JSON body of a request, as a dict. It asks for a greedy, streamed completion of a random prompt.

        The prompt has about as many tokens as `request` plans. Prompts differ from their first word on, so that the
        server's prefix cache does not shorten the work.
        """
        words = rng.choices(WORDS, k=max(1, round(request.prompt / self.tokens_per_word) - 1))
        body = {
            "model": self.model, "prompt": f"{rng.getrandbits(16)} {' '.join(words)}", "max_tokens": request.output,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return {**body, **({"ignore_eos": True} if self.ignore_eos else {}), **self.extra}


async def probe(server: Server) -> None:
    """Find out the attributes of `server` that a load test needs, and set them.

    Asks the server for its model and completes one short prompt. Sets `model`, `context` (None if the server does not
    report it) and `tokens_per_word`. Raises ValueError if the server does not answer like OpenAI's API, OSError if it
    cannot be reached or drops the connection.
    """
    from aiohttp import ClientError

    async with _session() as session:
        try:
            await _probe(session, server)
        except ClientError as e:  # some of these are no OSError
            raise OSError(str(e) or type(e).__name__) from None


async def _probe(session: Any, server: Server) -> None:
    async with session.get(f"{server.url}/models", headers=server.headers) as response:
        answer = await response.json(content_type=None)
        models = answer.get("data") if isinstance(answer, dict) and response.status == 200 else None
        if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "id" not in models[0]:
            raise ValueError(
                f"{server.url}/models answers {response.status} {str(answer)[:200]}; is the address right?"
            )
    server.model, server.context = models[0]["id"], models[0].get("max_model_len")
    words = min(PROBE, (server.context or PROBE) // 8)
    body = server.body(LoadRequest(0.0, words, 1), random.Random(0))
    plain = {k: v for k, v in body.items() if not k.startswith("stream")}
    async with session.post(f"{server.url}/completions", json=plain, headers=server.headers) as response:
        answer = await response.json(content_type=None)
        usage = answer.get("usage") if isinstance(answer, dict) and response.status == 200 else None
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if not isinstance(tokens, int):
            raise ValueError(
                f"{server.url}/completions answers {response.status} {str(answer)[:200]}; wanted a completion with "
                "usage.prompt_tokens"
            )
    server.tokens_per_word = max(0.1, tokens / words)


def _session() -> Any:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # each request opens its own connection
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT), connector=connector)


async def load(
    server: Server,
    requests: Sequence[LoadRequest],
    concurrency: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Outcome]:
    """Send each request at its planned arrival and wait until all have ended. Returns their Outcomes in the same order.

    If a request fails, Outcome.error has the reason. Call probe(server) first. It finds out the model's name,
    which each request needs, and the tokens per word, which are needed to make prompts of the planned lengths.

    Args:
        server: the server to measure.
        requests: arrival time, prompt length and output length of each request.
        concurrency: largest number of open requests. Further requests wait until others have ended. With a limit, the
            times of all requests are counted from the moment of sending. None: no limit.
        seed: random seed of the prompts.
        progress: called with (requests ended, requests in all, text) at the start and after each request.
    """
    rng = random.Random(seed)
    gate = asyncio.Semaphore(concurrency or max(1, len(requests)))
    bodies = [json.dumps(server.body(request, rng)).encode() for request in requests]
    ended: list[Outcome] = []

    def report(done: int) -> None:
        progress(done, len(requests), f"{done} of {len(requests)} requests ended")

    async with _session() as session:
        began = time.perf_counter()

        async def one(request: LoadRequest, body: bytes) -> Outcome:
            await asyncio.sleep(max(0.0, began + request.at - time.perf_counter()))
            async with gate:
                # time in this queue is not time of the server
                start = request.at if concurrency is None else time.perf_counter() - began
                answered = await _send(session, server, request, body, began, start)
            ended.append(answered)
            report(len(ended))
            return answered

        report(0)
        return list(await asyncio.gather(*map(one, requests, bodies)))


async def _send(session: Any, server: Server, request: LoadRequest, body: bytes, began: float, start: float) -> Outcome:
    """Send one request, read its response to the end, and return its Outcome.

    If the request fails, Outcome.error has the reason.

    Args:
        session: an aiohttp.ClientSession.
        server: the server that is measured.
        request: the request as planned.
        body: its JSON body.
        began: value of time.perf_counter() at the beginning of the load.
        start: becomes Outcome.start: the moment from which the request's times are counted, in seconds after `began`.
    """
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
                            if choice.get("finish_reason") == "deadline":  # the answer is not complete
                                error = "deadline"
    except (aiohttp.ClientError, TimeoutError, ValueError) as e:
        error = type(e).__name__
    end = time.perf_counter() - began - start
    if error is None and not stamps:
        error = "no end"
    gaps = tuple(b - a for a, b in itertools.pairwise(stamps))
    output = usage.get("completion_tokens", len(stamps))  # without usage: one token per text
    prompt = usage.get("prompt_tokens", request.prompt)
    return Outcome(request, start, end, stamps[0] if stamps else None, gaps, prompt, output, error)


@dataclass(frozen=True)
class Summary:
    """Statistics of a load test.

    Attributes:
        requests: number of requests sent.
        answered: number of complete responses.
        errors: {text of an error: number of requests that failed with it}.
        seconds: time from the start of the first request to the end of the last response.
        requests_per_s: complete responses per second.
        prompt_tokens_per_s: prompt tokens of complete responses per second.
        output_tokens_per_s: output tokens of complete responses per second.
        deadline: limit in seconds for the time of a response; a slower response does not count for goodput.
        goodput: responses per second that were complete within `deadline`.
        times: statistics of latencies over complete responses, {name: {"mean", "p50", "p90", "p99": seconds}}. The
            names are "ttft" (time to the first text), "tpot" (a request's mean time per output token after the first),
            "gap" (time between two texts of a stream) and "whole" (time to the end of the response). A name without
            values is left out.
    """

    requests: int
    answered: int
    errors: dict[str, int]
    seconds: float
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    deadline: float
    goodput: float
    times: dict[str, dict[str, float]]


def summarise(answers: Sequence[Outcome], deadline: float) -> Summary:
    """The Summary of a load test, computed from the Outcomes of its requests. There must be at least one.

    Failed requests count only for the duration of the load, not for latencies, rates or goodput. deadline: seconds
    within which a response must be complete to count for goodput.
    """
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
    """The mean and percentiles of one or more values, as a dict {"mean", "p50", "p90", "p99": value}."""
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {"mean": float(np.mean(values)), "p50": float(p50), "p90": float(p90), "p99": float(p99)}
