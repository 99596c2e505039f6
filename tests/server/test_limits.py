"""The server under load, with faults and at its end: limits, deadlines, metrics, draining."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.served import Served, Slow, prompt, served, streaming, wait_for
from support.serving import add, oracle_engine, request

from intaglio import LLM, SamplingParams
from intaglio.batch import Batch
from intaglio.server.driver import Snapshot
from intaglio.server.metrics import Metrics
from intaglio.server.prepare import Limits


def metrics(s: Served) -> dict[str, float]:
    """Every sample without its model: {name or name{label}: value}."""
    out = {}
    for family in text_string_to_metric_families(s.get("/metrics").text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "tiny" and sample.labels.pop("engine") == "0"
            out[sample.name + "".join(f"/{v}" for v in sample.labels.values())] = sample.value
    return out


def test_metrics_say_what_happened(folder: Path) -> None:
    rng = random.Random()
    with served(folder) as s:
        lengths = [rng.randrange(1, 20) for _ in range(4)]
        for n in lengths:
            s.client().completions.create(
                model="tiny", prompt=prompt(rng, 40), max_tokens=n, n=2, extra_body={"ignore_eos": True}
            )
        with pytest.raises(openai.BadRequestError):
            s.client().completions.create(model="tiny", prompt=[999])
        s.quiet()
        m = metrics(s)
        assert m["vllm:generation_tokens_total"] == 2 * sum(lengths) == m["vllm:request_generation_tokens_sum"]
        assert m["vllm:prompt_tokens_total"] == 8 * 40 == m["vllm:request_prompt_tokens_sum"]
        assert m["vllm:request_success_total/length"] == 8 == m["vllm:e2e_request_latency_seconds_count"]
        assert m["vllm:time_to_first_token_seconds_count"] == 8 == m["intaglio:requests_admitted_total"]
        assert m["vllm:inter_token_latency_seconds_count"] == 2 * sum(lengths) - 8
        assert m["vllm:num_requests_running"] == m["vllm:num_requests_waiting"] == m["vllm:kv_cache_usage_perc"] == 0
        assert m["vllm:iteration_tokens_total_count"] == m["intaglio:steps_total"]
        assert m["vllm:prefix_cache_hits_total"] == s.llm.engine.counts.cached_tokens
        state = s.get("/state").json()
        assert state["output_tokens"] == 2 * sum(lengths) and len(state["steps"]) == m["intaglio:steps_total"]
        last = state["steps"][-3][0]
        assert s.get(f"/state?since={last}").json()["steps"] == state["steps"][-2:]
        assert s.get("/state?since=x").status_code == 400


def test_metrics_show_window_blocks() -> None:
    """Requests that wait for window blocks while most K/V blocks are free: the usage of both is told apart."""
    engine = oracle_engine(pages=300, windows=(9, 6), max_batch_tokens=16)
    add(engine, *(request(f"r{i}", range(16), max_tokens=9) for i in range(3)))
    engine.step()
    registry = Metrics()
    registry.add_model("m", lambda: Snapshot(engine.gauges(), engine.counts, 0.0, engine.idle, 3), {})
    lines = [line for line in registry.render().decode().splitlines() if not line.startswith("#")]
    m = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    assert m["vllm:num_requests_waiting"] == 2 and engine.pool.held == 4
    assert m["intaglio:window_blocks"] == m["intaglio:window_blocks_reserved"] == 4
    assert m["intaglio:window_blocks_held"] == engine.windows.pool.held == 2 and m["vllm:kv_cache_usage_perc"] == 1


def test_full_queue_returns_retry_after(folder: Path) -> None:
    with served(folder, llm={"max_sequences": 1, "max_waiting": 1}) as s:
        gate = threading.Event()
        s.llm.engine.executable = Slow(s.llm.engine.executable, before=lambda _: gate.wait(60) and None)
        running = streaming(s, 16)
        wait_for(lambda: s.llm.engine.gauges().running == 1)
        rest = [threading.Thread(target=s.post, args=("/v1/completions", {"prompt": "b"})) for _ in range(2)]
        for t in rest:
            t.start()
        gate.set()
        for t in rest:
            t.join()
        assert len(list(running)) > 1
        gate.clear()
        s.quiet()
        with s.client() as client:
            first = client.completions.create(model="tiny", prompt="a", stream=True, max_tokens=200)
            wait_for(lambda: s.llm.engine.gauges().running == 1)
            pending = [threading.Thread(target=s.post, args=("/v1/completions", {"prompt": "b"}))]
            pending[0].start()
            wait_for(lambda: s.service.open == 2)
            statuses: list[httpx.Response] = []
            late = threading.Thread(target=lambda: statuses.append(s.post("/v1/completions", {"prompt": "c"})))
            late.start()
            wait_for(lambda: s.service.open == 3)
            gate.set()
            late.join()
            first.close()
            pending[0].join()
        assert statuses[0].status_code == 429 and int(statuses[0].headers["retry-after"]) >= 1
        assert statuses[0].json()["error"]["code"] == "queue_full"


def test_too_many_open_requests(folder: Path) -> None:
    with served(folder, max_open=2) as s:
        gate = threading.Event()
        s.llm.engine.executable = Slow(s.llm.engine.executable, before=lambda _: gate.wait(60) and None)
        streams = [s.client().completions.create(model="tiny", prompt="a", stream=True) for _ in range(1)]
        t = threading.Thread(target=s.post, args=("/v1/completions", {"prompt": "b"}))
        t.start()
        wait_for(lambda: s.service.open == 2)
        refused = s.post("/v1/completions", {"prompt": "b"})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert s.get("/health").status_code == 200 and s.get("/metrics").status_code == 200
        gate.set()
        t.join()
        assert [c.choices[0].finish_reason for c in streams[0]][-1] in ("length", "stop")


def test_what_would_be_late_is_refused_at_once(folder: Path) -> None:
    with served(folder) as s:
        inner = s.llm.engine.executable
        s.llm.engine.executable = Slow(inner, before=lambda batch: time.sleep(0.01 * len(batch.tokens)))
        ask: Any = {"prompt": "abc", "max_tokens": 10, "ignore_eos": True, "timeout": 0.8}
        assert s.post("/v1/completions", ask).status_code == 200  # alone: 13 rows, 0.13 s and what the machine adds
        many: Any = {"ignore_eos": True}
        crowd = s.client().completions.create(
            model="tiny", prompt="a", n=16, max_tokens=30, temperature=1, stream=True, extra_body=many
        )
        wait_for(lambda: s.llm.engine.gauges().running == 16)
        late = s.post("/v1/completions", ask)  # ten steps of 17 rows: 1.7 s
        assert late.status_code == 429 and int(late.headers["retry-after"]) >= 1
        assert late.json()["error"]["code"] == "late" and "its timeout is 0.8 s" in late.json()["error"]["message"]
        series = 'intaglio:requests_refused_total{engine="0",model_name="tiny",reason="late"} 1.0'
        wait_for(lambda: series in s.get("/metrics").text)
        crowd.close()


def test_deadlines_end_with_a_reason(folder: Path) -> None:
    with served(folder, llm={"max_sequences": 1}, limits=Limits(timeout=500)) as s:
        s.llm.engine.executable = Slow(s.llm.engine.executable, 0.05)
        body: Any = {"ignore_eos": True, "timeout": 0.4}
        got = s.client().completions.create(model="tiny", prompt="a", max_tokens=200, extra_body=body)
        assert got.choices[0].finish_reason == "deadline" and 0 < got.usage.completion_tokens < 20
        running = streaming(s)
        next(iter(running))
        with pytest.raises(openai.InternalServerError) as late:
            s.client().completions.create(model="tiny", prompt="b", extra_body={"queue_timeout": 0.01})
        assert late.value.status_code == 503 and late.value.code == "deadline"
        assert late.value.response.headers["retry-after"] == "1"
        running.close()


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_worked_for(folder: Path, stream: bool) -> None:
    with served(folder) as s:
        slow = Slow(s.llm.engine.executable, 0.02)
        s.llm.engine.executable = slow
        body = {"prompt": "abc", "max_tokens": 200, "ignore_eos": True, "stream": stream}
        with httpx.Client() as client:
            if stream:
                with client.stream("POST", f"{s.url}/v1/completions", json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{s.url}/v1/completions", json=body, timeout=0.5)
        wait_for(lambda: s.llm.engine.counts.finished["abort"] == 1)
        assert s.llm.engine.counts.output_tokens < 150


def test_a_failing_step_ends_only_its_cause(folder: Path) -> None:
    with served(folder) as s:

        def fail(batch: Batch) -> None:
            if 7 in batch.tokens.tolist():
                raise RuntimeError("seven")

        s.llm.engine.executable = Slow(s.llm.engine.executable, 0.01, fail)
        good = s.client().completions.create(
            model="tiny", prompt="abc", stream=True, max_tokens=30, logit_bias={"7": -100}, temperature=0
        )
        first = next(iter(good))
        with pytest.raises(openai.InternalServerError, match="seven") as bad:
            s.client().completions.create(model="tiny", prompt=[7, 8])
        assert bad.value.status_code == 500 and bad.value.code == "step_fault"
        with pytest.raises(openai.APIError, match="seven"):
            list(s.client().completions.create(model="tiny", prompt=[7, 8], stream=True))
        rest = list(good)
        alone = LLM(folder, device="reference").generate("abc", SamplingParams(30, logit_bias={7: -100}))[0]
        assert first.choices[0].text + "".join(c.choices[0].text for c in rest) == alone.text


def test_draining_finishes_and_admits_nothing(folder: Path) -> None:
    with served(folder) as s:
        s.llm.engine.executable = Slow(s.llm.engine.executable, 0.02)
        running = streaming(s, 60)
        chunks = [next(iter(running))]
        s.service.drain()
        assert s.get("/health").status_code == 200
        ready = s.get("/ready")
        assert ready.status_code == 503 and ready.json()["error"]["code"] == "draining"
        with pytest.raises(openai.InternalServerError) as refused:
            s.client().completions.create(model="tiny", prompt="b")
        assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"] == "1"
        chunks += list(running)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert s.stop() == 0


def test_told_twice_everything_ends(folder: Path) -> None:
    with served(folder) as s:
        s.llm.engine.executable = Slow(s.llm.engine.executable, 0.05)
        running = streaming(s)
        next(iter(running))
        s.service.drain()
        s.service.halt()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(running)
        s.thread.join(60)
        assert s.llm.engine.idle and s.llm.engine.pool.held == 0


def test_a_crash_ends_streams_and_the_process(folder: Path) -> None:
    with served(folder) as s:
        slow = Slow(s.llm.engine.executable, 0.02)
        s.llm.engine.executable = slow
        running = streaming(s)
        next(iter(running))

        def crash(batch: Batch) -> None:
            raise SystemExit("a bug in the engine's thread")

        slow.before = crash
        with pytest.raises(openai.APIError, match="the engine crashed"):
            list(running)
        s.thread.join(60)
        assert s.code == 1


def test_every_chunk_tells_the_tokens_so_far_if_asked(server: Served) -> None:
    asked: Any = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 9, "n": 2, "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *parts, last = server.client().completions.create(**asked, stream_options=options, extra_body={"ignore_eos": True})
    counts = [p.usage.completion_tokens for p in parts]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == last.usage.completion_tokens == 18
    assert {p.usage.prompt_tokens for p in [*parts, last]} == {3}
    assert all(p.usage.total_tokens == 3 + p.usage.completion_tokens for p in [*parts, last])
