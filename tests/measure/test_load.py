"""Workloads as in public traces, the load generator on a server, and the same load in a chip's modelled time."""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path

import numpy as np
import pytest
from support.served import Served, served
from support.tiny import tiny
from typer.testing import CliRunner

import intaglio.cli
from intaglio.llm import LLM
from intaglio.measure.load import Outcome, Server, load, probe, summarise
from intaglio.measure.modelled import load_modelled
from intaglio.measure.workload import SHARES, TRACES, LoadRequest, arrivals, draw, fitting, trace

N = 20_000
SIGMAS = 6.0  # of a binomial share or a mean: one draw in 10^9 is further off


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("load") / "tiny", num_hidden_layers=2)


def sent(s: Served, requests: list[LoadRequest], **options: int) -> list[Outcome]:
    async def both() -> list[Outcome]:
        server = Server(f"{s.url}/v1")
        await probe(server)
        return await load(server, requests, **options)

    return asyncio.run(both())


@pytest.mark.parametrize("name", TRACES)
def test_lengths_follow_the_trace(name: str) -> None:
    t, requests = trace(name), draw(trace(name), N, 1.0, seed=secrets.randbits(32))
    for knots, lengths in ((t.prompt, [a.prompt for a in requests]), (t.output, [a.output for a in requests])):
        for share, knot in zip(SHARES, knots, strict=True):
            off = SIGMAS * np.sqrt(share * (1 - share) / N)
            assert np.mean(np.array(lengths) <= knot) >= share - off
            assert np.mean(np.array(lengths) < knot) <= share + off


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_arrivals_have_the_requested_rate_and_cv(cv: float) -> None:
    rng = np.random.default_rng()
    gaps = np.diff(arrivals(N, 4.0, cv, rng), prepend=0.0)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25, abs=SIGMAS * 0.25 * cv / np.sqrt(N))
    # the variance of a gamma variable's square about its mean: (2 + 6 cv^2) sigma^4
    spread = np.sqrt((2 + 6 * cv**2) / N)
    assert gaps.var() == pytest.approx((0.25 * cv) ** 2, rel=SIGMAS * spread)
    assert arrivals(5, float("inf"), cv, rng).tolist() == [0.0] * 5


def test_lengths_are_cut_to_the_context() -> None:
    t = trace("document")
    context = int(np.random.default_rng().integers(16, 3000))
    requests = draw(t, 500, 1.0, scale=fitting(t, context), context=context, seed=secrets.randbits(32))
    assert all(1 <= a.output <= context // 2 and 1 <= a.prompt <= context - a.output for a in requests)
    assert fitting(t, None) == fitting(t, 10**6) == 1.0
    with pytest.raises(ValueError, match="no workload called 'poems'; there are code, conversation, document"):
        trace("poems")
    with pytest.raises(ValueError, match="rate is 0.0 and cv is 1.0; allowed: above 0"):
        draw(t, 1, 0.0)


@pytest.mark.parametrize("concurrency", [None, 2])
def test_load_gets_all_tokens(checkpoint: Path, concurrency: int | None) -> None:
    rng = np.random.default_rng()
    requests = [LoadRequest(0.01 * i, int(rng.integers(20, 60)), int(rng.integers(1, 20))) for i in range(12)]
    options = {"concurrency": concurrency} if concurrency else {}
    with served(checkpoint) as s:
        answers = sent(s, requests, **options)
    assert [(a.request, a.error) for a in answers] == [(request, None) for request in requests]
    for a in answers:
        assert a.output == a.request.output and abs(a.prompt - a.request.prompt) <= 8 + a.request.prompt // 4
        assert a.first is not None and 0 < a.first <= a.end
        assert sum(a.gaps) <= a.end - a.first + 1e-9
        assert (a.each is None) == (a.output == 1)
    whole = summarise(answers, deadline=1e9)
    assert whole.requests == whole.answered == 12 and whole.errors == {}
    assert whole.goodput == whole.requests_per_s == pytest.approx(12 / whole.seconds)
    assert whole.output_tokens_per_s * whole.seconds == pytest.approx(sum(a.output for a in requests))
    assert summarise(answers, deadline=0.0).goodput == 0
    assert whole.times["whole"]["p50"] == pytest.approx(np.median([a.end for a in answers]))


def test_refusals_are_counted_by_reason(checkpoint: Path) -> None:
    with served(checkpoint, llm={"max_waiting": 2, "max_sequences": 1}) as s:
        found = summarise(sent(s, [LoadRequest(0.0, 30, 100)] * 12), deadline=60.0)
    assert found.answered >= 2 and set(found.errors) == {"status 429"}
    assert found.answered + found.errors["status 429"] == 12


def test_modelled_clock_jumps_while_idle(checkpoint: Path) -> None:
    requests = [LoadRequest(100.0 * i, 40, 6) for i in range(4)]  # arrivals span 300 s of modelled time

    def run(rate: float) -> list[Outcome]:
        llm = LLM(checkpoint, device="silicon", chips=2)
        return load_modelled(llm, [LoadRequest(a.at if rate else 0.0, a.prompt, a.output) for a in requests])

    apart, together = run(1.0), run(0.0)
    assert apart == run(1.0)
    assert [a.output for a in apart] == [6] * 4 and all(len(a.gaps) == 5 for a in apart)
    assert {round(a.end, 9) for a in apart} == {round(apart[0].end, 9)}  # requests never overlap
    assert 300 < summarise(apart, 1.0).seconds < 300.01
    assert summarise(together, 1.0).seconds < 0.01
    assert max(a.first or 0 for a in together) > max(a.first or 0 for a in apart)  # a step of four prompts is longer


def test_the_command(checkpoint: Path) -> None:
    words = ["bench", "serve", str(checkpoint), "--requests", "4", "--json"]
    done = CliRunner().invoke(intaglio.cli.app, [*words, "--rate", "inf", "--device", "reference"])
    assert done.exit_code == 0, done.output
    output = json.loads(done.stdout)
    assert (output["requests"], output["answered"], output["clock"]) == (4, 4, "measured")
    assert {"mean", "p50", "p90", "p99"} == set(output["times"]["ttft"])
    done = CliRunner().invoke(intaglio.cli.app, [*words, "--rate", "10", "--device", "silicon", "--chips", "2"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["clock"] == "modelled" and "2 x sohu, tp2" in done.stdout
    done = CliRunner().invoke(intaglio.cli.app, ["bench", "serve", "--base-url", "http://127.0.0.1:9/v1"])
    assert done.exit_code == 2 and done.stderr.startswith("error: http://127.0.0.1:9/v1: ")
    done = CliRunner().invoke(intaglio.cli.app, [*words, "--base-url", "http://127.0.0.1:9/v1"])
    assert done.exit_code == 2 and "leave out options for a new one" in done.stderr


@pytest.mark.parametrize(
    ("models", "completion", "error", "words"),
    [
        ("", "{}", ValueError, "models answers 200"),
        ("[1]", "{}", ValueError, "models answers 200"),
        ('{"data": [{}]}', "{}", ValueError, "models answers 200"),
        ('{"data": [{"id": "m"}]}', "{}", ValueError, "wanted a completion with usage.prompt_tokens"),
        ('{"data": [{"id": "m"}]}', '{"usage": {"prompt_tokens": null}}', ValueError, "usage.prompt_tokens"),
        (None, "{}", OSError, "disconnected"),
    ],
)
def test_a_server_that_is_not_openai_like_is_named(
    models: str | None, completion: str, error: type[Exception], words: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        text = models if head.startswith(b"GET") else completion
        if text is not None:
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n{text}".encode())
            await writer.drain()
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
            await probe(Server(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"))

    with pytest.raises(error, match=words):
        asyncio.run(ask())
